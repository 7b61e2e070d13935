"""Does the switch hear only who may speak, send frames only where they belong, and answer what it can?"""

from __future__ import annotations

import struct
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.lan import packets as p
from p2pgrid.hole_punch.lan.segment import (
    FRAME_MAX,
    SERVER_IP,
    SERVER_MAC,
    Segment,
    ip_of,
    mac_of,
    place_of_ip,
    place_of_mac,
)
from p2pgrid.hole_punch.lan.switch import FLOOD_BURST, FLOOD_RATE, Bucket, Delivery, Switch, Way
from p2pgrid.ids import PeerId

ANN, BOB, EVE = PeerId("ann"), PeerId("bob"), PeerId("eve")
SEGMENT = Segment("job1", tuple(range(0, 60, 10)))
PLACES = range(len(SEGMENT.indices))


def whole(*frames: bytes) -> bytes:
    return b"".join(struct.pack("!I", len(frame)) + frame for frame in frames)


def frame(to: int | bytes, source: int, payload: bytes = b"hello", kind: int = p.IPV4) -> bytes:
    return p.ethernet(to if isinstance(to, bytes) else mac_of(to), mac_of(source), kind, payload)


def cut(frames: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(frames):
        length = int.from_bytes(frames[at : at + 4], "big")
        found.append(frames[at + 4 : at + 4 + length])
        at += 4 + length
    assert at == len(frames)
    return found


def sent(switch: Switch, source: Way, *frames: bytes, now: float = 0.0) -> dict[Way, list[bytes]]:
    data = whole(*frames)
    taken, deliveries = switch.forward(source, data, now)
    assert taken == len(data)
    return by_way(deliveries)


def by_way(deliveries: list[Delivery]) -> dict[Way, list[bytes]]:
    ways: dict[Way, list[bytes]] = defaultdict(list)
    for way, frames in deliveries:
        ways[way] += cut(frames)
    return dict(ways)


@pytest.fixture
def switch() -> Switch:
    """Guests 0 and 1 are here, 2 and 3 at Ann's, 4 at Bob's; 5 runs nowhere."""
    switch = Switch(SEGMENT)
    switch.attach(0)
    switch.attach(1)
    switch.set_members({ANN: [2, 3], BOB: [4]})
    return switch


@given(st.integers(0, 254 * 254 - 1))
def test_addresses_tell_the_place_and_no_two_are_the_same(place: int):
    assert place_of_mac(mac_of(place)) == place
    assert place_of_ip(ip_of(place)) == place
    assert ip_of(place)[3] not in (0, 255)
    assert ip_of(place) != SERVER_IP
    assert mac_of(place) != SERVER_MAC
    assert mac_of(place)[0] & 3 == 2, "one machine's, and locally administered"


def test_frames_go_to_the_guest_or_to_its_node(switch: Switch):
    assert sent(switch, 0, frame(1, 0)) == {1: [frame(1, 0)]}
    assert sent(switch, 0, frame(3, 0)) == {ANN: [frame(3, 0)]}
    assert sent(switch, 0, frame(5, 0)) == {}
    assert switch.counts["to nobody"] == 1
    assert sent(switch, BOB, frame(1, 4)) == {1: [frame(1, 4)]}


def test_those_in_a_row_for_one_place_stay_one_piece(switch: Switch):
    frames = [frame(2, 0, bytes([n])) for n in range(20)]
    sent(switch, 0, frames[0], frame(4, 0))
    data = whole(*frames[:15], frame(4, 0), *frames[15:]) + b"\0\0"
    taken, deliveries = switch.forward(0, data, 0.0)
    assert taken == len(data) - 2
    assert deliveries == [(ANN, whole(*frames[:15])), (BOB, whole(frame(4, 0))), (ANN, whole(*frames[15:]))]


def test_what_came_over_a_link_never_goes_over_a_link(switch: Switch):
    assert sent(switch, ANN, frame(4, 2)) == {}
    everybody = frame(p.BROADCAST, 2)
    assert sent(switch, ANN, everybody) == {0: [everybody], 1: [everybody]}


def test_a_broadcast_goes_to_all_others_once(switch: Switch):
    everybody = frame(p.BROADCAST, 0)
    assert sent(switch, 0, everybody) == {1: [everybody], ANN: [everybody], BOB: [everybody]}


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        (0, frame(1, 2)),  # a guest with another's address
        (ANN, frame(1, 4)),  # a node for a guest that runs elsewhere
        (ANN, frame(1, 0)),  # ... or here
        (BOB, p.ethernet(mac_of(0), SERVER_MAC, p.IPV4, b"")),
        (0, p.ethernet(mac_of(1), b"\x02\x00\x00\x00\x00\x01", p.IPV4, b"")),
    ],
)
def test_who_speaks_for_others_is_not_heard(switch: Switch, source: Way, bad: bytes):
    assert sent(switch, source, bad) == {}
    assert switch.counts["spoofed"] == 1


def test_a_node_that_is_no_member_is_not_heard(switch: Switch):
    assert sent(switch, EVE, frame(0, 2), frame(p.BROADCAST, 5)) == {}
    assert switch.counts["from a stranger"] == 1
    switch.set_members({EVE: [5]})
    assert sent(switch, EVE, frame(0, 5)) == {0: [frame(0, 5)]}
    assert sent(switch, ANN, frame(0, 2)) == {}


def test_a_task_that_moves_is_found_where_it_runs_now(switch: Switch):
    sent(switch, 0, frame(4, 0))
    switch.set_members({ANN: [2, 3, 4]})
    assert sent(switch, 0, frame(4, 0)) == {ANN: [frame(4, 0)]}
    switch.attach(4)
    assert sent(switch, 0, frame(4, 0)) == {4: [frame(4, 0)]}
    assert sent(switch, ANN, frame(0, 4)) == {}, "who ran it before still speaks"
    switch.detach(4)
    assert sent(switch, 0, frame(4, 0)) == {ANN: [frame(4, 0)]}


def test_frames_that_are_none_are_dropped(switch: Switch):
    long = frame(1, 0, bytes(FRAME_MAX - 13))
    assert sent(switch, 0, b"", b"short", long, frame(1, 0)) == {1: [frame(1, 0)]}
    assert switch.counts["malformed"] == 3
    with pytest.raises(BadFrame):
        switch.forward(0, struct.pack("!I", 1 << 20) + b"what is this", 0.0)


def arp(operation: int, source: int, ip: bytes, wanted: bytes, to: bytes = p.BROADCAST) -> bytes:
    return p.ethernet(
        to, mac_of(source), p.ARP, p.Arp(operation, mac_of(source), ip, bytes(6), wanted).encode()
    )


@pytest.mark.parametrize(
    ("wanted", "mac"), [(ip_of(1), mac_of(1)), (ip_of(3), mac_of(3)), (SERVER_IP, SERVER_MAC)]
)
def test_who_has_an_address_is_answered_on_the_spot(switch: Switch, wanted: bytes, mac: bytes):
    answers = sent(switch, 0, arp(p.REQUEST, 0, ip_of(0), wanted))
    (reply,) = answers.pop(0)
    assert not answers, "it crossed no link"
    assert reply[:12] == mac_of(0) + SERVER_MAC
    assert p.read_arp(reply[14:]) == p.Arp(p.REPLY, mac, wanted, mac_of(0), ip_of(0))


def test_nobody_has_the_address_of_a_task_that_does_not_run(switch: Switch):
    assert sent(switch, 0, arp(p.REQUEST, 0, ip_of(0), ip_of(5))) == {}
    assert sent(switch, 0, arp(p.REQUEST, 0, bytes(4), ip_of(0))) == {}, "nor its own, which it probes"


def test_an_address_that_guests_took_themselves_is_asked_of_all(switch: Switch):
    other = bytes((192, 168, 7, 7))
    question = arp(p.REQUEST, 0, ip_of(0), other)
    assert sent(switch, 0, question) == {1: [question], ANN: [question], BOB: [question]}
    assert sent(switch, BOB, arp(p.REQUEST, 4, ip_of(4), other)).keys() == {0, 1}
    reply = arp(p.REPLY, 4, other, ip_of(0), to=mac_of(0))
    assert sent(switch, BOB, reply) == {0: [reply]}


@pytest.mark.parametrize("to", [p.BROADCAST, mac_of(0)])
@pytest.mark.parametrize("ip", [ip_of(3), SERVER_IP])
def test_nobody_takes_the_address_of_another(switch: Switch, to: bytes, ip: bytes):
    sent(switch, BOB, frame(0, 4))  # that pair is known
    assert sent(switch, BOB, arp(p.REPLY, 4, ip, ip_of(0), to=to)) == {}
    assert switch.counts["spoofed"] == 1


def test_a_storm_is_stopped_where_it_begins(switch: Switch):
    storm = [frame(p.BROADCAST, 0, bytes([n & 255, n >> 8])) for n in range(5000)]
    first = sent(switch, 0, *storm)
    assert len(first[ANN]) == FLOOD_BURST // 3  # copies count, and there are three
    later = sent(switch, 0, *storm, now=2.0)
    assert len(first[ANN]) + len(later[ANN]) == (FLOOD_BURST + 2 * FLOOD_RATE) // 3
    assert sent(switch, 1, frame(p.BROADCAST, 1), now=2.0).keys() == {0, ANN, BOB}, "others are not to blame"
    received = sent(switch, BOB, *(f[:6] + mac_of(4) + f[12:] for f in storm))
    assert len(received[0]) == FLOOD_BURST // 2, "a node that lets its guest storm is not believed"


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 30)), max_size=60))
def test_a_bucket_gives_no_more_than_its_burst_and_its_rate(steps: list[tuple[float, int]]):
    bucket, now, taken = Bucket(10.0, 40.0), 0.0, 0
    for wait, count in steps:
        now += wait
        taken += count * bucket.take(count, now)
        assert taken <= 40.0 + 10.0 * now + 1e-6


noise = st.one_of(
    st.binary(max_size=80),
    st.builds(
        lambda to, source, kind, body: p.ethernet(to, source, kind, body),
        st.sampled_from([p.BROADCAST, SERVER_MAC, *map(mac_of, PLACES)]),
        st.sampled_from([SERVER_MAC, *map(mac_of, PLACES)]),
        st.sampled_from([p.ARP, p.IPV4, p.IPV6, 0x8100]),
        st.binary(max_size=400),
    ),
)


class AnyHistory(RuleBasedStateMachine):
    """Guests come and go, tasks move, everybody sends anything."""

    @initialize()
    def begin(self) -> None:
        self.switch = Switch(SEGMENT)
        self.now = 0.0
        self.nodes: dict[PeerId, set[int]] = {}

    @rule(place=st.sampled_from(PLACES))
    def attach(self, place: int) -> None:
        self.switch.attach(place)

    @rule(place=st.sampled_from(PLACES))
    def detach(self, place: int) -> None:
        self.switch.detach(place)

    @rule(nodes=st.dictionaries(st.sampled_from([ANN, BOB]), st.sets(st.integers(0, 9))))
    def told(self, nodes: dict[PeerId, set[int]]) -> None:
        self.nodes = nodes
        self.switch.set_members(nodes)

    @rule(
        source=st.sampled_from([*PLACES, ANN, BOB, EVE]),
        frames=st.lists(noise, max_size=8),
        tail=st.binary(max_size=3),
        wait=st.floats(0, 2),
    )
    def sends(self, source: Way, frames: list[bytes], tail: bytes, wait: float) -> None:
        self.now += wait
        data = whole(*frames)
        taken, deliveries = self.switch.forward(source, data + tail, self.now)
        if isinstance(source, int) and source not in self.switch.guests:
            assert not deliveries
        if isinstance(source, str) and source not in self.nodes:
            assert not deliveries
            return
        assert taken == len(data) or not deliveries
        for way, passed in by_way(deliveries).items():
            assert way in self.switch.guests or way in self.nodes
            for one in passed:
                self.rightly(source, way, one, frames)

    def rightly(self, source: Way, way: Way, one: bytes, frames: list[bytes]) -> None:
        to, place = one[:6], place_of_mac(one[6:12])
        if one[6:12] == SERVER_MAC:
            assert way == source
            assert to == mac_of(source)  # type: ignore[arg-type]  # an answer, to who asked
            return
        assert one in frames
        assert way != source
        assert isinstance(way, int) or isinstance(source, int)
        if isinstance(source, int):
            assert place == source
        else:
            assert place in self.nodes[source]
            assert place not in self.switch.guests
        if not to[0] & 1:
            assert place_of_mac(to) in ({way} if isinstance(way, int) else self.nodes[way])

    @rule(source=st.sampled_from([*PLACES, ANN, EVE]), data=st.binary(max_size=200))
    def noise(self, source: Way, data: bytes) -> None:
        try:
            taken, _ = self.switch.forward(source, data, self.now)
        except BadFrame:
            return
        assert taken <= len(data)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "switch"):
            self.switch.check()


AnyHistory.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestAnyHistory = AnyHistory.TestCase
