"""Does every guest get its own address, and every name the right one, whatever noise there is?"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.hole_punch.lan import dhcp, names
from p2pgrid.hole_punch.lan import packets as p
from p2pgrid.hole_punch.lan.packets import Datagram
from p2pgrid.hole_punch.lan.segment import MASK, MTU, SERVER_IP, SERVER_MAC, Segment, ip_of, mac_of
from p2pgrid.hole_punch.lan.switch import Switch

SEGMENT = Segment("Job1", (0, 10, 20, 7))
ZERO = bytes(4)


def asked(
    place: int, *options: tuple[int, bytes], own: bytes = ZERO, flags: int = 0, xid: int = 7
) -> Datagram:
    header = dhcp.HEADER.pack(1, 1, 6, 0, xid, 0, flags, own, ZERO, ZERO, ZERO, mac_of(place), dhcp.COOKIE)
    return Datagram(own, 68, dhcp.EVERYBODY, 67, header + dhcp.write_options(list(options)))


def told(reply: Datagram | None) -> tuple[int, bytes, dict[int, bytes]]:
    """The kind, the address given, and all options of an answer."""
    assert reply is not None
    fields = dhcp.HEADER.unpack_from(reply.data)
    assert fields[:3] == (2, 1, 6)
    options = dhcp.read_options(reply.data[dhcp.HEADER.size :])
    assert options[54] == SERVER_IP
    return options[53][0], fields[8], options


@pytest.mark.parametrize("place", range(4))
def test_discover_and_request_end_with_the_guests_own_address(place: int):
    kind, given, _ = told(dhcp.answer(SEGMENT, place, asked(place, (53, b"\x01"))))
    assert (kind, given) == (dhcp.OFFER, ip_of(place))
    request = asked(place, (53, b"\x03"), (50, given), (54, SERVER_IP))
    kind, given, options = told(dhcp.answer(SEGMENT, place, request))
    assert (kind, given) == (dhcp.ACK, ip_of(place))
    assert options[1] == MASK
    assert options[26] == struct.pack("!H", MTU)
    assert options[6] == SERVER_IP
    assert options[12] == f"task{SEGMENT.indices[place]}".encode()
    assert options[15] == b"job1.grid"
    assert 3 not in options, "it leads nowhere"


def test_a_renewal_is_answered_where_the_guest_is():
    reply = dhcp.answer(SEGMENT, 1, asked(1, (53, b"\x03"), own=ip_of(1)))
    assert told(reply)[:2] == (dhcp.ACK, ip_of(1))
    assert reply is not None
    assert (reply.to, reply.port) == (ip_of(1), 68)


def test_another_address_is_refused():
    reply = dhcp.answer(SEGMENT, 1, asked(1, (53, b"\x03"), (50, ip_of(2))))
    assert told(reply)[:2] == (dhcp.NAK, ZERO)
    assert reply is not None
    assert reply.to == dhcp.EVERYBODY


def test_who_has_an_address_already_is_told_the_rest():
    kind, given, options = told(dhcp.answer(SEGMENT, 1, asked(1, (53, b"\x08"), own=ip_of(1))))
    assert (kind, given) == (dhcp.ACK, ZERO)
    assert 51 not in options
    assert options[6] == SERVER_IP


@pytest.mark.parametrize(
    "silly",
    [
        asked(2, (53, b"\x01")),  # in another's name
        asked(1, (53, b"\x07")),  # a release
        asked(1),
        asked(1, (53, b"\x03"), (50, ip_of(1)), (54, bytes((10, 0, 0, 1)))),  # meant for another server
        Datagram(ZERO, 68, dhcp.EVERYBODY, 67, b"\x01\x01\x06"),
    ],
)
def test_what_is_not_for_us_has_no_answer(silly: Datagram):
    assert dhcp.answer(SEGMENT, 1, silly) is None


@given(st.dictionaries(st.integers(1, 254), st.binary(max_size=255), max_size=8), st.binary(max_size=9))
def test_options_are_read_as_they_were_written(options: dict[int, bytes], after: bytes):
    assert dhcp.read_options(dhcp.write_options(list(options.items())) + after) == options


@given(st.binary(max_size=400), st.integers(0, 3), st.booleans())
def test_noise_in_a_dhcp_message_is_harmless(noise: bytes, place: int, is_shaped: bool):
    start = asked(place).data[: dhcp.HEADER.size] if is_shaped else b""
    reply = dhcp.answer(SEGMENT, place, Datagram(ZERO, 68, dhcp.EVERYBODY, 67, start + noise))
    assert reply is None or told(reply)[1] in (ip_of(place), ZERO)


def query(name: str, kind: int = 1, class_: int = 1, flags: int = 0x0100) -> Datagram:
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split(".") if part) + b"\0"
    data = struct.pack("!HHHHHH", 77, flags, 1, 0, 0, 0) + labels + struct.pack("!HH", kind, class_)
    return Datagram(ip_of(0), 5353, SERVER_IP, 53, data)


def answered(asked: Datagram) -> tuple[int, bytes | None]:
    """The response code and the record's value."""
    reply = names.answer(SEGMENT, asked)
    assert reply is not None
    assert (reply.to, reply.port) == (asked.source, asked.source_port)
    number, flags, questions, answers, *_ = struct.unpack_from("!HHHHHH", reply.data)
    assert (number, questions, flags & 0x8500) == (77, 1, 0x8500)
    assert reply.data[12 : len(asked.data)] == asked.data[12:], "the question comes back as it was"
    if not answers:
        assert len(reply.data) == len(asked.data)
        return flags & 15, None
    pointer, _, _, ttl, length = struct.unpack_from("!HHHIH", reply.data, len(asked.data))
    value = reply.data[len(asked.data) + 12 :]
    assert (pointer, ttl, len(value)) == (0xC00C, names.TTL, length)
    return flags & 15, value


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("task0.job1.grid", ip_of(0)),
        ("TASK10.Job1.GRID", ip_of(1)),
        ("task7.job1.grid", ip_of(3)),
        ("lan.job1.grid", SERVER_IP),
    ],
)
def test_the_others_are_found_by_name(name: str, found: bytes):
    assert answered(query(name)) == (0, found)
    assert answered(query(name, kind=28)) == (0, None), "no IPv6 address, and that is no error"


@pytest.mark.parametrize(
    "name",
    ["task1.job1.grid", "task07.job1.grid", "task.job1.grid", "task0.job2.grid", "example.org", "", "x"],
)
def test_of_other_names_it_is_said_at_once_that_there_are_none(name: str):
    assert answered(query(name)) == (3, None)


def test_an_address_is_found_as_a_name():
    code, value = answered(query("2.1.77.10.in-addr.arpa", kind=12))
    assert (code, value) == (0, b"\x06task10\x04job1\x04grid\x00")
    assert answered(query("9.1.77.10.in-addr.arpa", kind=12)) == (3, None)
    assert answered(query("999.x.77.10.in-addr.arpa", kind=12)) == (3, None)


def test_only_questions_are_answered():
    assert names.answer(SEGMENT, query("task0.job1.grid", flags=0x8000)) is None
    assert answered(query("task0.job1.grid", flags=0x2900)) == (4, None), "an update"


@given(st.binary(max_size=120), st.booleans())
def test_noise_in_a_query_is_harmless(noise: bytes, is_shaped: bool):
    start = query("").data[:12] if is_shaped else b""
    names.answer(SEGMENT, Datagram(ip_of(0), 5353, SERVER_IP, 53, start + noise))


@given(st.binary(max_size=300), st.integers(0, 65535), st.integers(0, 65535))
def test_a_datagram_is_read_as_it_was_written(data: bytes, source: int, port: int):
    sent = Datagram(ip_of(1), source, ip_of(2), port, data)
    packet = sent.encode()
    assert p.read_datagram(packet + b"padding") == sent
    assert p.checksum(packet[:20]) == 0
    pseudo = struct.pack("!4s4sBBH", ip_of(1), ip_of(2), 0, 17, 8 + len(data))
    assert p.checksum(pseudo + packet[20:]) == 0


@given(st.binary(max_size=80))
def test_noise_is_no_packet_that_hurts(noise: bytes):
    for shaped in (noise, b"\x45" + noise):
        read = p.read_datagram(shaped)
        assert read is None or len(read.data) <= len(shaped) - 28
        p.read_arp(shaped)


def test_a_guest_is_served_through_the_switch_and_nobody_else_hears():
    switch = Switch(SEGMENT)
    switch.attach(1)
    switch.attach(2)
    discover = p.ethernet(p.BROADCAST, mac_of(1), p.IPV4, asked(1, (53, b"\x01")).encode())
    ask = p.ethernet(SERVER_MAC, mac_of(1), p.IPV4, query("task0.job1.grid").encode())
    vain = p.ethernet(SERVER_MAC, mac_of(1), p.IPV4, Datagram(ip_of(1), 9, SERVER_IP, 9, b"?").encode())
    frames = b"".join(struct.pack("!I", len(f)) + f for f in (discover, ask, vain))
    _, deliveries = switch.forward(1, frames, 0.0)
    assert [way for way, _ in deliveries] == [1, 1]
    replies = [p.read_datagram(data[18:]) for _, data in deliveries]
    assert told(replies[0])[:2] == (dhcp.OFFER, ip_of(1))
    assert replies[1] is not None
    assert replies[1].data.endswith(ip_of(0))
    assert switch.counts["asked in vain"] == 1
