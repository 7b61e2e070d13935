"""Do the bulk plane's messages survive any cut, refuse any noise, and match the page?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.dht.manifest import FRAME_MAX
from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch import link_messages as own
from p2pgrid.hole_punch.framing import HEADER, MESSAGE_MAX, START, Framing, header
from p2pgrid.hole_punch.path import candidates, own_addresses, parse_address
from p2pgrid.ids import DAG_CBOR, Cid, PeerId
from p2pgrid.transfer import messages
from p2pgrid.transfer.messages import (
    Bitfield,
    Cancel,
    Close,
    Frame,
    GetObject,
    Grown,
    Have,
    NoObject,
    Object,
    Open,
    Peers,
    Refuse,
    Request,
)

PAGE = Path(__file__).parents[2] / "docs" / "protocols" / "bulk.md"

topics = st.integers(0, 65535)
indices = st.integers(0, 2**32 - 1)
cids = st.binary(min_size=32, max_size=32).map(lambda digest: Cid(DAG_CBOR, digest))
lists = st.lists(indices, min_size=1, max_size=50).map(tuple)
addresses = st.lists(st.text(max_size=40), max_size=3).map(tuple)
peers = st.lists(st.tuples(st.text(min_size=1, max_size=60).map(PeerId), addresses), max_size=5).map(tuple)
any_message = st.one_of(
    st.builds(Open, topics, cids),
    st.builds(Bitfield, topics, st.integers(0, 2**29 - 1).map(lambda n: 8 * n), st.binary(min_size=1)),
    st.builds(Have, topics, lists),
    st.builds(Request, topics, lists, st.booleans()),
    st.builds(Frame, topics, indices, st.binary(min_size=1)),
    st.builds(Refuse, topics, indices),
    st.builds(Cancel, topics, lists),
    st.builds(GetObject, cids),
    st.builds(Object, cids, st.binary(min_size=1)),
    st.builds(NoObject, cids),
    st.builds(Peers, topics, peers),
    st.builds(Close, topics),
    st.builds(Grown, topics, cids),
)


def body(message: messages.Message) -> bytes:
    return b"".join(messages.encode(message))


@given(any_message)
def test_what_is_encoded_decodes_to_the_same(message: messages.Message) -> None:
    assert messages.decode(body(message)) == message
    assert messages.decode(memoryview(body(message))) == message


@given(st.binary(max_size=300))
def test_noise_is_only_ever_a_bad_frame(noise: bytes) -> None:
    try:
        message = messages.decode(noise)
    except BadFrame:
        return
    if not isinstance(message, Peers):  # MessagePack may spell a length in more than one way
        assert body(message) == noise


@given(any_message, st.data())
def test_a_message_cut_or_changed_is_a_bad_frame_or_another_message(
    message: messages.Message, data: st.DataObject
) -> None:
    whole = bytearray(body(message))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    for damaged in (bytes(whole), bytes(whole[:at])):
        try:
            messages.decode(damaged)
        except BadFrame:
            continue


@pytest.mark.parametrize(
    "noise",
    [
        bytes([5]) + bytes(6) + bytes(FRAME_MAX + 1),
        bytes([5]) + bytes(6),
        bytes([4]) + bytes(2),
        bytes([4]) + bytes(2 + 4 * (messages.INDICES_MAX + 1)),
        bytes([2]) + bytes(6) + bytes(messages.BITS_MAX + 1),
        bytes([2, 0, 0, 0, 0, 0, 1, 255]),
        bytes([11, 0, 0]) + b"\x91" * 5000,
        bytes([13, 0, 0]),
        bytes([0, 0, 0]),
        b"",
    ],
)
def test_beyond_the_limits_is_a_bad_frame(noise: bytes) -> None:
    with pytest.raises(BadFrame):
        messages.decode(noise)


def received(stream: bytes, cuts: list[int]) -> list[bytes]:
    """The bodies in `stream` when it comes in pieces of these sizes, the rest as room allows."""
    framing = Framing()
    bodies: list[bytes] = []
    at = 0
    cuts = list(cuts)
    while at < len(stream):
        space = framing.space()
        assert len(space) > 0
        count = min(len(space), len(stream) - at, cuts.pop() if cuts else len(stream))
        space[:count] = stream[at : at + count]
        at += count
        bodies += [bytes(b) for b in framing.filled(count)]
    return bodies


@given(
    st.lists(st.one_of(st.binary(max_size=50), st.integers(0, MESSAGE_MAX).map(bytes)), max_size=8),
    st.lists(st.one_of(st.integers(1, 20), st.integers(1, START)), max_size=20),
)
def test_any_cut_of_the_stream_gives_the_same_bodies(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(header(len(b)) + b for b in bodies)
    assert received(stream, cuts) == bodies


def test_a_length_beyond_the_limit_is_refused_before_any_memory_is_taken() -> None:
    framing = Framing()
    framing.space()[:HEADER] = (MESSAGE_MAX + 1).to_bytes(HEADER, "big")
    with pytest.raises(BadFrame):
        list(framing.filled(HEADER))


@given(st.text(max_size=60))
def test_an_address_is_parsed_or_refused(text: str) -> None:
    address = parse_address(text)
    assert address is None or 0 < address[1] < 65536


def test_where_a_peer_is_dialled() -> None:
    known = [
        "/ip4/10.0.0.9/tcp/4001/p2p/x",
        "/ip4/0.0.0.0/tcp/4001",
        "/ip4/1.1.1.1/tcp/1/p2p/r/p2p-circuit",
        "/x",
    ]
    told = ["192.168.1.2:7000", "[fe80::1]:7000", "noise", "0.0.0.0:7000", "a.example:7000", "192.168.1.2:0"]
    assert candidates(told, known) == [("192.168.1.2", 7000), ("fe80::1", 7000), ("10.0.0.9", 7000)]
    assert own_addresses([("0.0.0.0", 7000), ("::1", 7001)], known) == ["10.0.0.9:7000", "[::1]:7001"]


VECTORS = {
    "Open": Open(1, Cid(DAG_CBOR, bytes(range(32)))),
    "Bitfield": Bitfield(1, 8, b"\x05"),
    "Have": Have(1, (2, 3)),
    "Request": Request(1, (4, 258)),
    "Urgent": Request(1, (4,), urgent=True),
    "Frame": Frame(1, 4, b"frame"),
    "Refuse": Refuse(1, 258),
    "Cancel": Cancel(1, (258,)),
    "GetObject": GetObject(Cid(DAG_CBOR, bytes(range(32)))),
    "Object": Object(Cid(DAG_CBOR, bytes(range(32))), b"object"),
    "NoObject": NoObject(Cid(DAG_CBOR, bytes(range(32)))),
    "Peers": Peers(1, ((PeerId("12D3"), ("/ip4/10.0.0.9/tcp/4001",)),)),
    "Close": Close(1),
    "Grown": Grown(1, Cid(DAG_CBOR, bytes(range(32)))),
}


OWN_VECTORS = {
    "Ack": own.encode(own.ACK, 256),
    "Bye": own.bye("enough"),
    "Resume": own.encode(own.RESUME, 5),
    "Probe": own.encode(own.PROBE, 1),
    "Echo": own.encode(own.ECHO, 1),
}


def test_the_page_tells_the_very_bytes() -> None:
    told = dict(re.findall(r"^    (\w+) = ((?:[0-9a-f]{2} ?)+)$", PAGE.read_text(), re.MULTILINE))
    assert told.keys() == VECTORS.keys() | OWN_VECTORS.keys()
    bodies = OWN_VECTORS | {name: body(message) for name, message in VECTORS.items()}
    for name, said in bodies.items():
        assert header(len(said)) + said == bytes.fromhex(told[name]), name


@given(st.binary(min_size=1, max_size=300))
def test_noise_about_the_link_is_only_ever_a_bad_frame(noise: bytes) -> None:
    try:
        kind, count, why = own.decode(memoryview(noise))
    except BadFrame:
        return
    assert noise == own.encode(kind, count) or (kind == own.BYE and noise[1:].decode(errors="replace") == why)
