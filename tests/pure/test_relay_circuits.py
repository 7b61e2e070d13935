"""Does a relay keep to its limits after any history, and does everybody hear why not?"""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pgrid.hole_punch.relay.circuits import COME, LIFE, Circuits
from p2pgrid.hole_punch.relay.events import (
    Barred,
    Closed,
    Cut,
    Dialled,
    Drop,
    Effect,
    Event,
    Gone,
    Join,
    Left,
    Opened,
    Said,
    Spent,
    Tell,
    Tick,
)
from p2pgrid.hole_punch.relay.limits import Limits, spell
from p2pgrid.hole_punch.relay.messages import (
    TOKEN,
    Connect,
    Connected,
    Decline,
    Ended,
    Incoming,
    Reason,
    Refused,
    Release,
    Reserve,
    Reserved,
)
from p2pgrid.ids import PeerId

A, B, C, D = map(PeerId, "ABCD")
PEERS = st.sampled_from([A, B, C, D])


class Desk:
    """A relay and what it did; the clock is the test's."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.machine = Circuits()
        self.now = 1000.0
        self.chance = 0
        self.lines = 0
        if limits is not None:
            self.do(Opened(limits))

    def do(self, event: Event) -> list[Effect]:
        effects = self.machine.step(event, self.now)
        self.machine.check()
        return effects

    def reserve(self, peer: PeerId) -> list[Effect]:
        return self.do(Said(peer, Reserve()))

    def connect(self, peer: PeerId, other: PeerId, barred: str = "") -> list[Effect]:
        self.chance += 2
        chance = self.chance.to_bytes(TOKEN, "big") + (self.chance + 1).to_bytes(TOKEN, "big")
        return self.do(Said(peer, Connect(5, other), chance, barred))

    def dial(self, token: bytes) -> list[Effect]:
        self.lines += 1
        return self.do(Dialled(self.lines, token))

    def joined(self, peer: PeerId, other: PeerId) -> int:
        one, two = self.connect(peer, other)
        assert isinstance(one, Tell)
        assert isinstance(two, Tell)
        assert isinstance(one.message, Connected)
        assert isinstance(two.message, Incoming)
        self.dial(one.message.token)
        (join,) = self.dial(two.message.token)
        assert isinstance(join, Join)
        return join.circuit

    def carry(self, circuit: int, count: int) -> None:
        assert count <= self.machine.room(circuit, self.now)
        self.machine.moved(circuit, count, self.now)

    def why(self, peer: PeerId, other: PeerId) -> Reason:
        (said,) = self.connect(peer, other)
        assert isinstance(said, Tell)
        assert isinstance(said.message, Refused)
        assert said.message.request == 5
        assert said.message.why
        return said.message.reason


def test_a_circuit_from_beginning_to_end() -> None:
    desk = Desk(Limits())
    assert desk.reserve(B) == [Tell(B, Reserved(600, 128, 0, 86400, 0))]
    one, two = desk.connect(A, B)
    assert isinstance(one, Tell)
    assert isinstance(two, Tell)
    assert (one.peer, two.peer) == (A, B)
    assert isinstance(one.message, Connected)
    assert isinstance(two.message, Incoming)
    assert two.message.peer == A
    assert one.message.token != two.message.token
    assert desk.dial(one.message.token) == []
    assert desk.dial(one.message.token) == [Drop(2)]  # good once
    assert desk.dial(two.message.token) == [Join(1, (1, 3))]
    assert desk.machine.circuits == [(A, B)]
    desk.carry(1, 1 << 40)
    assert desk.do(Gone(1)) == []
    assert desk.machine.circuits == []


def test_who_is_not_there_and_who_is_no_member() -> None:
    desk = Desk(Limits())
    assert desk.why(A, B) is Reason.NOT_HERE
    desk.reserve(A)
    assert desk.why(A, A) is Reason.NOT_HERE
    desk.reserve(B)
    (said,) = desk.connect(A, B, barred="its ticket was revoked")
    assert said == Tell(A, Refused(5, Reason.BARRED, "its ticket was revoked"))
    (said,) = desk.do(Said(C, Reserve(), barred="no member"))
    assert said == Tell(C, Refused(0, Reason.BARRED, "no member"))
    desk.do(Said(B, Release()))
    assert desk.why(A, B) is Reason.NOT_HERE
    desk.reserve(B)
    desk.do(Left(B))
    assert desk.why(A, B) is Reason.NOT_HERE


def test_no_more_than_is_allowed_at_a_time() -> None:
    desk = Desk(Limits(circuits=3, circuits_each=2, reservations=2))
    desk.reserve(A)
    desk.reserve(B)
    (said,) = desk.reserve(C)
    assert isinstance(said, Tell)
    assert isinstance(said.message, Refused)
    assert said.message.reason is Reason.FULL
    assert isinstance(desk.reserve(A)[0], Tell)  # who has one may renew it
    desk.connect(C, A)  # pending ones count, too
    desk.joined(C, A)
    assert desk.why(C, B) is Reason.TOO_MANY  # the caller
    assert desk.why(D, A) is Reason.TOO_MANY  # who is called
    desk.joined(D, B)
    assert desk.why(D, B) is Reason.FULL


def test_a_quota_is_kept_to_the_byte_and_begins_anew() -> None:
    desk = Desk(Limits(quota=1000, quota_each=700, window=60))
    desk.reserve(B)
    desk.reserve(D)
    circuit = desk.joined(A, B)
    assert desk.machine.room(circuit, desk.now) == 700
    desk.carry(circuit, 300)
    desk.now += 30
    desk.carry(circuit, 400)
    assert desk.machine.room(circuit, desk.now) == 0
    cut, *told = desk.do(Spent(circuit))
    assert cut == Cut(circuit)
    for effect, peer in zip(told, (A, B), strict=True):
        assert isinstance(effect, Tell)
        assert effect.peer == peer
        assert isinstance(effect.message, Ended)
        assert effect.message.reason is Reason.QUOTA
        assert effect.message.why == "the 700 bytes that A may have here in 60 s are used up; again in 30 s"
    assert desk.why(A, D) is Reason.QUOTA
    assert desk.why(C, B) is Reason.QUOTA
    other = desk.joined(C, D)  # others have what is left of all
    assert desk.machine.room(other, desk.now) == 300
    desk.carry(other, 300)
    assert desk.why(C, D) is Reason.QUOTA
    desk.now += 30
    assert desk.machine.room(other, desk.now) == 400  # the relay's window is over, that of C is not
    assert desk.machine.room(desk.joined(A, B), desk.now) == 700


def test_who_does_not_come_is_named() -> None:
    desk = Desk(Limits())
    desk.reserve(B)
    one, _ = desk.connect(A, B)
    assert isinstance(one, Tell)
    assert isinstance(one.message, Connected)
    desk.dial(one.message.token)
    assert desk.machine.deadline == desk.now + COME
    desk.now += COME
    drop, *told = desk.do(Tick())
    assert drop == Drop(1)
    assert [t.message.why for t in told if isinstance(t, Tell) and isinstance(t.message, Ended)] == 2 * [
        "B did not dial in within 10 s"
    ]
    assert desk.dial(one.message.token) == [Drop(2)]


def test_a_peer_may_decline_what_was_offered_to_it_and_nothing_else() -> None:
    desk = Desk(Limits())
    desk.reserve(B)
    one, two = desk.connect(A, B)
    assert isinstance(one, Tell)
    assert isinstance(two, Tell)
    assert isinstance(one.message, Connected)
    assert isinstance(two.message, Incoming)
    assert desk.do(Said(C, Decline(two.message.token, "no"))) == []
    assert desk.do(Said(B, Decline(bytes(TOKEN), "no"))) == []
    told, _ = desk.do(Said(B, Decline(two.message.token, "paused")))
    assert told == Tell(A, Ended(one.message.token, Reason.DECLINED, "B does not want it: paused"))


def test_a_reservation_ends_unless_it_is_renewed() -> None:
    desk = Desk(Limits())
    desk.reserve(A)
    desk.now += LIFE / 2
    desk.reserve(B)
    desk.reserve(A)
    assert desk.machine.deadline == desk.now + LIFE
    desk.now += LIFE
    told = desk.do(Tick())
    assert [
        (t.peer, t.message.request) for t in told if isinstance(t, Tell) and isinstance(t.message, Refused)
    ] == [
        (B, 0),
        (A, 0),
    ]
    assert desk.machine.deadline == math.inf


def test_a_relay_that_closes_tells_everybody() -> None:
    desk = Desk(Limits())
    desk.reserve(B)
    circuit = desk.joined(A, B)
    told = desk.do(Closed("paused by its owner"))
    assert Cut(circuit) in told
    heard = Counter(t.peer for t in told if isinstance(t, Tell))
    assert heard == {A: 1, B: 2}  # the circuit, and the reservation
    assert desk.why(A, B) is Reason.NO_RELAY
    assert desk.do(Gone(circuit)) == []
    desk.do(Opened(Limits()))
    desk.reserve(B)
    desk.joined(A, B)


def test_who_is_barred_loses_what_it_has() -> None:
    desk = Desk(Limits())
    desk.reserve(B)
    desk.reserve(D)
    circuit, other = desk.joined(A, B), desk.joined(C, D)
    told = desk.do(Barred(B, "its ticket was revoked"))
    assert Cut(circuit) in told
    assert Cut(other) not in told
    assert desk.machine.reserved == [D]


def test_a_broken_connection_is_told_and_an_orderly_end_is_not() -> None:
    desk = Desk(Limits())
    desk.reserve(B)
    assert desk.do(Gone(desk.joined(A, B))) == []
    assert len(desk.do(Gone(desk.joined(A, B), "it broke"))) == 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (61, "61 s"), (120, "2 min"), (7199, "120 min"), (86400, "24 h")]
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert spell(seconds) == text


class AnyHistory(RuleBasedStateMachine):
    """Members that do what they like, and a network that does too."""

    LIMITS = Limits(circuits=4, circuits_each=3, reservations=3, quota=2500, quota_each=1000, window=100)

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(self.LIMITS)
        self.tokens: list[bytes] = []
        self.open_lines: set[int] = set()
        self.live: dict[int, tuple[PeerId, PeerId]] = {}
        self.moved: list[tuple[float, PeerId | None, int]] = []

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Tell(_, Connected(_, token)) | Tell(_, Incoming(token, _)):
                    self.tokens.append(token)
                case Join(circuit, lines):
                    self.open_lines -= set(lines)
                    self.live[circuit] = self.desk.machine.circuits[-1]
                case Drop(line):
                    self.open_lines.remove(line)
                case Cut(circuit):
                    del self.live[circuit]
                case Tell(_, Ended(_, _, why)) | Tell(_, Refused(_, _, why)):
                    assert why, "nobody is left without a reason"

    @rule(peer=PEERS)
    def reserve(self, peer: PeerId) -> None:
        self.take(self.desk.reserve(peer))

    @rule(peer=PEERS, other=PEERS, barred=st.sampled_from(["", "", "", "no member"]))
    def connect(self, peer: PeerId, other: PeerId, barred: str) -> None:
        self.take(self.desk.connect(peer, other, barred))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def dial(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(self.tokens[-6:]))
        self.open_lines.add(self.desk.lines + 1)
        self.take(self.desk.dial(token))

    @rule()
    def dial_with_a_guess(self) -> None:
        self.open_lines.add(self.desk.lines + 1)
        self.take(self.desk.dial(b"guess".ljust(TOKEN)))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), share=st.floats(0, 1))
    def carry(self, data: st.DataObject, share: float) -> None:
        circuit = data.draw(st.sampled_from(sorted(self.live)))
        room = self.desk.machine.room(circuit, self.desk.now)
        if room == 0:
            self.take(self.desk.do(Spent(circuit)))
            assert circuit not in self.live
            return
        count = max(1, int(room * share))
        for peer in (*self.live[circuit], None):
            self.moved.append((self.desk.now, peer, count))
        self.desk.carry(circuit, count)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), broken=st.sampled_from(["", "reset"]))
    def end(self, data: st.DataObject, broken: str) -> None:
        circuit = data.draw(st.sampled_from(sorted(self.live)))
        del self.live[circuit]
        self.take(self.desk.do(Gone(circuit, broken)))

    @rule(peer=PEERS)
    def leave(self, peer: PeerId) -> None:
        self.take(self.desk.do(Left(peer)))

    @rule(peer=PEERS)
    def bar(self, peer: PeerId) -> None:
        self.take(self.desk.do(Barred(peer, "its ticket was revoked")))
        assert all(peer not in peers for peers in self.live.values())

    @rule(seconds=st.floats(0.1, 120))
    def wait(self, seconds: float) -> None:
        self.desk.now += seconds
        self.take(self.desk.do(Tick()))
        assert self.desk.machine.deadline > self.desk.now

    @rule()
    def close_and_open(self) -> None:
        self.take(self.desk.do(Closed("paused")))
        assert not self.live
        assert not self.open_lines, "a connection was forgotten"
        self.take(self.desk.do(Opened(self.LIMITS)))

    @invariant()
    def limits_are_kept(self) -> None:
        assert len(self.live) <= self.LIMITS.circuits
        each = Counter(peer for peers in self.live.values() for peer in peers)
        assert all(count <= self.LIMITS.circuits_each for count in each.values())
        assert len(self.desk.machine.reserved) <= self.LIMITS.reservations
        now = self.desk.now
        for who, quota in (*((p, self.LIMITS.quota_each) for p in (A, B, C, D)), (None, self.LIMITS.quota)):
            # A window may begin at any time, so two of them meet in any span of their length.
            lately = sum(n for at, peer, n in self.moved if peer == who and at > now - self.LIMITS.window)
            assert quota is not None
            assert lately <= 2 * quota

    @invariant()
    def what_is_carried_is_known(self) -> None:
        assert sorted(self.desk.machine.circuits) == sorted(self.live.values())

    def teardown(self) -> None:
        """Whatever happened: later everybody can be reached again."""
        self.desk.now += self.LIMITS.window + LIFE
        self.take(self.desk.do(Tick()))
        for circuit in list(self.live):
            self.take(self.desk.do(Gone(circuit)))
        self.desk.reserve(B)
        circuit = self.desk.joined(A, B)
        assert self.desk.machine.room(circuit, self.desk.now) > 0


AnyHistory.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyHistory = AnyHistory.TestCase
