"""Does every byte of a guest's connection arrive once and in order, whatever the cable loses?"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pgrid.hole_punch.lan import tcp
from p2pgrid.hole_punch.lan.aliases import NAMES_MAX, Aliases, is_alias
from p2pgrid.hole_punch.lan.packets import checksum
from p2pgrid.hole_punch.lan.segment import SERVER_IP, SERVER_MAC, ip_of, mac_of, place_of_ip
from p2pgrid.hole_punch.lan.tcp import ACK, RST, SYN, Connection, Ends, Segment

ENDS = Ends(mac_of(0), SERVER_MAC, ip_of(0), 4000, SERVER_IP, 80)


def turned(ends: Ends) -> Ends:
    return Ends(ends.our_mac, ends.mac, ends.ours, ends.our_port, ends.theirs, ends.their_port)


class Cable:
    """Two ends; both are ours, since a guest's is as good as the standard says."""

    def __init__(self, seed: int, loss: float) -> None:
        self.rng = random.Random(seed)
        self.loss = loss
        self.now = 0.0
        self.node = Connection(ENDS, self.rng.getrandbits(32))
        self.guest = Connection(turned(ENDS), self.rng.getrandbits(32))
        self.got = {self.node: b"", self.guest: b""}

    def open(self) -> None:
        self.node.connect(self.now)
        while not (self.node.open and self.guest.open):
            self.step()

    def step(self) -> None:
        for source, target in ((self.node, self.guest), (self.guest, self.node)):
            frames, source.out = source.out, []
            for raw in frames:
                if self.rng.random() < self.loss:
                    continue
                found = tcp.read(raw)
                assert found is not None
                ends, segment = found
                assert ends == target.ends
                if segment.flags & SYN and not segment.flags & ACK and not target._sent and not target.open:
                    target.accept(segment, self.now)
                else:
                    target.on(segment, self.now)
        self.now += 0.3
        for end in (self.node, self.guest):
            end.tick(self.now)
            if self.rng.random() < 0.7:
                while end.came:
                    self.got[end] += end.came.popleft()
            end.take(sum(map(len, end.came)), self.now)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.02, 0.2]),
    st.integers(0, 300_000),
    st.integers(0, 300_000),
)
def test_every_byte_arrives_once_and_in_order(seed: int, loss: float, there: int, back: int) -> None:
    cable = Cable(seed, loss)
    cable.open()
    left = {cable.node: cable.rng.randbytes(there), cable.guest: cable.rng.randbytes(back)}
    wanted = {cable.guest: left[cable.node], cable.node: left[cable.guest]}
    for _ in range(5000):
        for end in left:
            if count := min(end.sendable, cable.rng.choice([1, 1000, 50_000]), len(left[end])):
                end.send(left[end][:count], cable.now)
                left[end] = left[end][count:]
            if not left[end]:
                end.finish(cable.now)
        cable.step()
        if cable.node.over and cable.guest.over and not cable.node.came and not cable.guest.came:
            break
    # of a last acknowledgement that is lost one end never hears: it gives up, with everything said
    for end, other in ((cable.node, cable.guest), (cable.guest, cable.node)):
        while end.came:
            cable.got[end] += end.came.popleft()
        if loss == 0.0:
            assert end.over == "both ends have finished"
        if "finished" in end.over or "finished" in other.over:
            assert cable.got[end] == wanted[end]


def test_who_does_not_take_is_sent_no_more() -> None:
    cable = Cable(1, 0.0)
    cable.open()
    sent = 0
    for _ in range(50):
        if count := cable.node.sendable:
            cable.node.send(bytes(count), cable.now)
            sent += count
        frames, cable.node.out = cable.node.out, []
        for raw in frames:
            found = tcp.read(raw)
            assert found is not None
            cable.guest.on(found[1], cable.now)
        cable.guest.take(sum(map(len, cable.guest.came)), cable.now)
        for raw in cable.guest.out:
            found = tcp.read(raw)
            assert found is not None
            cable.node.on(found[1], cable.now)
        cable.guest.out = []
    assert sent <= tcp.WINDOW
    cable.guest.came.clear()
    cable.guest.take(0, cable.now)
    assert cable.guest.out, "the window that is open again is told"
    found = tcp.read(cable.guest.out[0])
    assert found is not None
    cable.node.on(found[1], cable.now)
    assert cable.node.sendable > 0


def test_a_guest_that_does_not_answer_is_given_up() -> None:
    connection = Connection(ENDS, 7)
    connection.connect(0.0)
    while (due := connection.deadline) is not None:
        connection.tick(due)
    assert connection.over == "the guest does not answer"


def test_what_has_no_connection_is_refused() -> None:
    answer = tcp.refusal(ENDS, Segment(100, 0, SYN, 1000, b""))
    assert answer is not None
    found = tcp.read(answer)
    assert found is not None
    assert found[1].flags == RST | ACK
    assert found[1].ack == 101
    assert tcp.refusal(ENDS, Segment(1, 0, RST, 0, b"")) is None


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1), st.integers(0, 255))
def test_checksums_are_the_internets(data: bytes, seq: int, flags: int) -> None:
    raw = tcp.frame(ENDS, Segment(seq, 5, flags, 1000, data))
    ip = raw[14:]
    assert checksum(ip[:20]) == 0
    pseudo = ip[12:20] + bytes((0, 6)) + (len(ip) - 20).to_bytes(2, "big")
    assert checksum(pseudo + ip[20:]) == 0
    assert tcp.read(raw) == (turned(ENDS), Segment(seq, 5, flags, 1000, data))


@given(st.binary(max_size=120), st.booleans())
def test_noise_is_no_segment(noise: bytes, like: bool) -> None:
    raw = bytes(12) + b"\x08\x00\x45" + noise if like else noise
    found = tcp.read(raw)
    if found is not None:
        connection = Connection(found[0], 1)
        connection.connect(0.0)
        connection.on(found[1], 0.0)


numbers = st.integers(0, 2**32 - 1)
segments = st.builds(
    Segment,
    numbers,
    numbers,
    st.integers(0, 63),
    st.integers(0, 65535),
    st.binary(max_size=20),
    st.binary(max_size=9),
)


@given(st.lists(segments, max_size=20))
def test_a_guest_that_breaks_the_rules_harms_only_itself(segments: list[Segment]) -> None:
    connection = Connection(ENDS, 2**32 - 3)
    connection.connect(0.0)
    connection.on(Segment(5, (2**32 - 2) & 0xFFFFFFFF, SYN | ACK, 65535, b""), 0.0)
    assert connection.open
    for segment in segments:
        connection.on(segment, 1.0)
        assert sum(map(len, connection.came)) <= tcp.WINDOW
        if count := min(connection.sendable, 3000):
            connection.send(bytes(count), 1.0)


# --- names --------------------------------------------------------------------------------


def test_names_get_addresses_that_are_no_guests() -> None:
    aliases = Aliases()
    first = aliases.ip_of("8000.owner.grid")
    assert first is not None
    assert is_alias(first)
    assert place_of_ip(first) is None
    assert aliases.ip_of("8000.owner.grid") == first
    assert aliases.name_of(first) == "8000.owner.grid"
    for number in range(3 * NAMES_MAX):
        aliases.ip_of("8000.owner.grid")
        ip = aliases.ip_of(f"{number + 1}.other.grid")
        assert ip is not None
        assert aliases.name_of(ip) == f"{number + 1}.other.grid"
    assert aliases.name_of(first) == "8000.owner.grid"


@pytest.mark.parametrize(
    "name", ["", "grid", ".grid", "a.org", "a..grid", "a b.grid", "a.grid.", "x" * 300 + ".grid"]
)
def test_other_names_get_none(name: str) -> None:
    assert Aliases().ip_of(name) is None
