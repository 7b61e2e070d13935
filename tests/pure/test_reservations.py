"""Is what a circuit relay gives away bounded, after any history, and given where there is room?"""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pgrid.hole_punch.reservations import Limits, Reservations
from p2pgrid.ids import PeerId

LIMITS = Limits(reservations=4, each_address=2, circuits=3, circuits_each=2, life=10.0)
PEERS = st.sampled_from([PeerId(name) for name in "abcdef"])


class Histories(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.book = Reservations(LIMITS)
        self.now = 0.0
        self.until = {}
        self.where = {}
        self.circuits = []

    @rule(seconds=st.floats(0, 12))
    def wait(self, seconds):
        self.now += seconds

    @rule(peer=PEERS, address=st.sampled_from(["192.0.2.1", "192.0.2.2", "192.0.2.3"]))
    def reserve(self, peer, address):
        others = [other for other, until in self.until.items() if until > self.now and other != peer]
        room = len(others) < 4 and sum(self.where[other] == address for other in others) < 2
        assert self.book.reserve(peer, address, self.now) == room
        if room:
            self.until[peer] = self.now + 10
            self.where[peer] = address

    @rule(peer=PEERS)
    def leave(self, peer):
        self.book.forget(peer)
        self.until.pop(peer, None)

    @rule(source=PEERS, called=PEERS)
    def begin(self, source, called):
        each = [end for circuit in self.circuits for end in circuit]
        room = len(self.circuits) < 3 and max(each.count(source), each.count(called)) < 2
        if source != called:
            assert self.book.begin(source, called) == room
            if room:
                self.circuits.append((source, called))

    @precondition(lambda self: self.circuits)
    @rule(data=st.data())
    def end(self, data):
        circuit = data.draw(st.sampled_from(self.circuits))
        self.circuits.remove(circuit)
        self.book.end(*circuit)

    @invariant()
    def holds(self):
        self.book.check()
        for name in "abcdef":
            peer = PeerId(name)
            assert self.book.reserved(peer, self.now) == (self.until.get(peer, -1) > self.now)


TestReservations = Histories.TestCase


def test_none_is_given_where_none_is_meant_to_be():
    book = Reservations(Limits(reservations=0))
    assert not book.reserve(PeerId("a"), "192.0.2.1", 0.0)
    assert not book.reserved(PeerId("a"), 0.0)


def test_a_circuit_to_oneself_counts_twice():
    book = Reservations(Limits(circuits_each=1))
    assert book.begin(PeerId("a"), PeerId("a"))
    book.check()
    assert not book.begin(PeerId("a"), PeerId("b"))
    book.end(PeerId("a"), PeerId("a"))
    assert book.begin(PeerId("a"), PeerId("b"))
