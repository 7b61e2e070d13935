"""Do messages to and from relays mean what the page says, and is noise only ever refused?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.relay.messages import (
    TOKEN,
    WHY_MAX,
    Connect,
    Connected,
    Decline,
    Ended,
    Incoming,
    Message,
    Reason,
    Refused,
    Release,
    Reserve,
    Reserved,
    decode,
    encode,
)
from p2pgrid.ids import PeerId

PAGE = Path(__file__).parents[2] / "docs" / "protocols" / "relay.md"
SHOWN, PEER = bytes(range(16)), PeerId("12D3")
VECTORS: dict[str, Message] = {
    "Reserve": Reserve(),
    "Reserved": Reserved(600, 128, 1 << 32, 86400, 1_000_000),
    "Release": Release(),
    "Connect": Connect(7, PEER),
    "Connected": Connected(7, SHOWN),
    "Refused": Refused(7, Reason.NOT_HERE, "not here"),
    "Incoming": Incoming(SHOWN, PEER),
    "Decline": Decline(SHOWN, "paused"),
    "Ended": Ended(SHOWN, Reason.QUOTA, "used up"),
}

peers = st.from_regex(r"[!-~]{1,128}", fullmatch=True).map(PeerId)
tokens = st.binary(min_size=TOKEN, max_size=TOKEN)
requests = st.integers(1, (1 << 32) - 1)
reasons = st.sampled_from(Reason)
whys = st.text(st.characters(codec="utf-8"), max_size=50)
u64 = st.integers(0, (1 << 64) - 1)
u32 = st.integers(0, (1 << 32) - 1)
messages = st.one_of(
    st.just(Reserve()),
    st.builds(Reserved, u32, st.integers(0, (1 << 16) - 1), u64, u32, u64),
    st.just(Release()),
    st.builds(Connect, requests, peers),
    st.builds(Connected, requests, tokens),
    st.builds(Refused, u32, reasons, whys),
    st.builds(Incoming, tokens, peers),
    st.builds(Decline, tokens, whys),
    st.builds(Ended, tokens, reasons, whys),
)


def vectors() -> dict[str, bytes]:
    found = re.findall(r"^    (\w+) = ((?:[0-9a-f]{2} ?)+)$", PAGE.read_text(), re.MULTILINE)
    return {name: bytes.fromhex(digits) for name, digits in found}


def test_the_page_has_a_vector_for_each_message() -> None:
    assert vectors().keys() == VECTORS.keys()


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name: str) -> None:
    assert encode(VECTORS[name]) == vectors()[name]
    assert decode(vectors()[name]) == VECTORS[name]


@given(messages)
def test_what_is_said_is_heard(message: Message) -> None:
    assert decode(memoryview(encode(message))) == message


@given(
    st.binary(max_size=64)
    | st.builds(lambda kind, rest: bytes([kind]) + rest, st.integers(48, 63), st.binary())
)
def test_noise_is_refused_or_is_a_message(noise: bytes) -> None:
    try:
        message = decode(noise)
    except BadFrame:
        return
    if message is None:
        assert 57 <= noise[0] <= 63
    elif not isinstance(message, Refused | Ended):  # an unknown reason is another one afterwards
        assert encode(message) == noise


@given(messages, st.integers(0, 40))
def test_a_piece_is_no_message(message: Message, cut: int) -> None:
    if isinstance(message, Reserve | Release | Reserved | Connected):
        body = encode(message)
        with pytest.raises(BadFrame):
            decode(body[: cut % len(body)])


def test_a_reason_that_a_later_version_has() -> None:
    assert decode(b"\x35" + bytes(4) + b"\xc8never heard of") == Refused(0, Reason.OTHER, "never heard of")


@given(st.text(st.characters(codec="utf-8"), max_size=400))
def test_a_long_reason_is_cut_between_characters(why: str) -> None:
    heard = decode(encode(Decline(SHOWN, why)))
    assert isinstance(heard, Decline)
    assert why.startswith(heard.why)
    assert len(heard.why.encode()) > WHY_MAX - 4 or heard.why == why
    with pytest.raises(BadFrame):
        decode(b"\x37" + SHOWN + b"x" * (WHY_MAX + 1))


@pytest.mark.parametrize("bad", [b"", b" ", b"with space", b"\xff\xfe", b"x" * 129])
def test_what_is_no_peer_id(bad: bytes) -> None:
    with pytest.raises(BadFrame):
        decode(b"\x33\x00\x00\x00\x07" + bad)
