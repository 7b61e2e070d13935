"""Is the kernel's word read as it is, and is a change told only where there is one?"""

from __future__ import annotations

import contextlib
import ipaddress
import struct

from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch import netlink
from p2pgrid.hole_punch.netlink import Route
from p2pgrid.hole_punch.netwatch import SLEEP_MIN, Change, Net, Watch


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 1, 0) + body + bytes(-len(body) % 4)


def address(host: str, flags: int = 0, scope: int = 0, *more: bytes) -> bytes:
    packed = ipaddress.ip_address(host).packed
    head = struct.pack("=BBBBI", 2 if len(packed) == 4 else 10, 24, flags & 0xFF, scope, 3)
    return head + attribute(1, packed) + b"".join(more)


def test_addresses_that_others_can_use_are_read():
    assert netlink.read_address(address("10.0.0.7")) == "10.0.0.7"
    assert netlink.read_address(address("2001:db8::7")) == "2001:db8::7"
    assert netlink.read_address(address("10.0.0.1", 0, 0, attribute(2, bytes([10, 0, 0, 9])))) == "10.0.0.9"
    assert netlink.read_address(address("fe80::1", scope=253)) is None
    assert netlink.read_address(address("2001:db8::7", flags=0x40)) is None, "tentative"
    temporary = attribute(8, struct.pack("=I", 0x20))
    assert netlink.read_address(address("2001:db8::7", 0, 0, temporary)) is None, "deprecated"


def test_a_route_is_read():
    body = struct.pack("=BBBBBBBBI", 2, 32, 0, 0, 254, 0, 0, 1, 0)
    body += attribute(1, bytes(4)) + attribute(4, struct.pack("=I", 3))
    assert netlink.read_route(body) == Route("", "", 3)
    body += attribute(7, bytes([10, 0, 0, 7])) + attribute(5, bytes([10, 0, 0, 1]))
    assert netlink.read_route(body) == Route("10.0.0.1", "10.0.0.7", 3)


@given(st.lists(st.tuples(st.integers(0, 65535), st.binary(max_size=40)), max_size=5))
def test_messages_are_cut_where_they_end(parts):
    data = b"".join(message(kind, body) for kind, body in parts)
    assert list(netlink.messages(data)) == parts


@given(st.binary(max_size=200), st.binary(max_size=40))
def test_noise_is_only_ever_a_bad_frame(noise: bytes, tail: bytes):
    for read in (
        lambda: list(netlink.messages(noise)),
        lambda: netlink.read_address(noise),
        lambda: netlink.read_route(noise),
        lambda: netlink.read_address(address("10.0.0.7") + tail),
        lambda: netlink.read_route(bytes(12) + tail),
    ):
        with contextlib.suppress(BadFrame):
            read()


nets = st.builds(Net, st.frozensets(st.sampled_from(["10.0.0.1", "10.0.0.2"])))


@given(nets, st.lists(st.tuples(nets, st.floats(0, 100), st.sampled_from([0.0, 0.5, 3.0, 900.0]))))
def test_a_change_is_told_exactly_where_there_is_one(first: Net, looks):
    watch, before, clock, boot = Watch(first, (5.0, 5.0)), first, 5.0, 5.0
    for net, awake, asleep in looks:
        clock, boot = clock + awake, boot + awake + asleep
        change = watch.look(net, (clock, boot))
        slept = asleep > SLEEP_MIN
        assert (change is not None) is (slept or net != before)
        if change is not None:
            assert change == Change(before, net, change.slept)
            assert abs(change.slept - (asleep if slept else 0)) < 1e-6
        before = net
