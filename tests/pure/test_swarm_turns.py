"""Is every asked chunk sent, once for each ask, to whom it helps most, and nobody kept waiting?"""

from __future__ import annotations

import math

import hypothesis.strategies as st
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from p2pgrid.transfer.turns import FRESH_MAX, HOLD, PASSED_MAX, Turns

NAMES = ("ann", "bob", "cyd")
COUNT = 200


def sent(asks, now):
    """All that is sent at this moment."""
    indices = []
    while (index := asks.next(now)) is not None:
        indices.append(index)
    return indices


def test_a_lone_fetcher_gets_all_at_once_in_the_order_asked():
    asks = Turns(COUNT).join("ann")
    asks.ask([5, 3, 9])
    asks.ask([3, 4])
    assert sent(asks, 0.0) == [5, 3, 9, 4]
    assert asks.due == math.inf


def test_what_was_sent_to_another_waits_and_what_was_not_goes_first():
    turns = Turns(COUNT)
    ann, bob = turns.join("ann"), turns.join("bob")
    ann.ask([0, 1])
    assert sent(ann, 0.0) == [0, 1]
    bob.ask([0, 1, 2])
    assert sent(bob, 0.1) == [2]
    assert bob.due == HOLD
    assert sent(bob, HOLD - 0.01) == []
    assert sent(bob, HOLD) == [0, 1]


def test_what_was_lost_on_its_way_is_sent_again_at_once():
    turns = Turns(COUNT)
    before = turns.join("ann")
    before.ask([0])
    assert sent(before, 0.0) == [0]
    before.leave()
    again = turns.join("ann")
    again.ask([0])
    assert sent(again, 0.1) == [0]


def test_who_has_no_neighbours_waits_once():
    """Ann is sent everything; bob, who gets nothing from her, is held for `HOLD` in all."""
    turns, now = Turns(COUNT), 0.0
    ann, bob = turns.join("ann"), turns.join("bob")
    for index in range(20):
        ann.ask([index])
        assert sent(ann, now) == [index]
        bob.ask([index])
        while (got := bob.next(now)) is None:
            now = bob.due
        assert got == index
    assert now <= HOLD + 1e-9


def test_second_copies_wait_while_others_ask_for_first_ones_but_not_for_long():
    turns = Turns(COUNT)
    ann, bob = turns.join("ann"), turns.join("bob")
    ann.ask([0, 1])
    assert ann.next(0.0) == 0
    bob.ask([0, 2, 3])
    assert sent(bob, 5.0) == [2, 3], "ann was not sent 1 yet"
    now = 5.0
    while not sent(bob, now):
        now = bob.due
    assert now <= 5.0 + PASSED_MAX + HOLD + 1e-9
    bob.ask([0])
    assert sent(ann, now) == [1]
    assert sent(bob, now + HOLD) == [0]


def test_a_due_ask_is_not_passed_over_for_ever():
    turns = Turns(10_000)
    ann, bob = turns.join("ann"), turns.join("bob")
    ann.ask([0])
    assert sent(ann, 0.0) == [0]
    bob.ask(range(5000))
    first = [bob.next(1.0) for _ in range(FRESH_MAX + 1)]
    assert 0 in first


def test_what_is_remembered_is_what_may_still_matter():
    turns = Turns(COUNT)
    asks = turns.join("ann")
    asks.ask([1])
    assert asks.next(3.0) == 1
    assert not turns.quiet(3.0 + HOLD / 2)
    assert turns.quiet(3.0 + HOLD)


def test_asking_and_withdrawing_without_end_takes_no_room():
    turns = Turns(COUNT)
    ann, bob = turns.join("ann"), turns.join("bob")
    ann.ask(range(COUNT))
    sent(ann, 0.0)
    for turn in range(5000):
        bob.ask([turn % COUNT])
        assert bob.next(0.1) is None
        bob.withdraw(turn % COUNT)
    assert len(bob._held) + len(bob._due) < 100
    assert len(bob) == 0


@given(st.lists(st.tuples(st.integers(0, COUNT - 1), st.floats(0, 0.3)), min_size=1, max_size=60))
def test_one_alone_never_waits(asked):
    asks, now = Turns(COUNT).join("ann"), 0.0
    for index, pause in asked:
        now += pause
        asks.ask([index])
        assert sent(asks, now) == [index]


class History(RuleBasedStateMachine):
    """Three peers ask, withdraw, come and go, and are served whenever they may be."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.turns = Turns(COUNT)
        self.asks = {name: self.turns.join(name) for name in NAMES}
        self.asked = {name: set() for name in NAMES}
        self.ever = set()

    @rule(name=st.sampled_from(NAMES), indices=st.lists(st.integers(0, 9), max_size=6))
    def ask(self, name, indices):
        self.asks[name].ask(indices)
        self.asked[name].update(indices)

    @rule(name=st.sampled_from(NAMES), index=st.integers(0, 9))
    def withdraw(self, name, index):
        self.asks[name].withdraw(index)
        self.asked[name].discard(index)

    @rule(name=st.sampled_from(NAMES))
    def leave_and_come_back(self, name):
        self.asks[name].leave()
        self.asks[name] = self.turns.join(name)
        self.asked[name].clear()

    @rule(name=st.sampled_from(NAMES))
    def serve(self, name):
        fresh = self.asked[name] - self.ever
        index = self.asks[name].next(self.now)
        if index is None:
            assert not fresh, "what nobody was sent never waits"
            assert not self.asked[name] or self.now < self.asks[name].due < math.inf
            return
        assert index in self.asked[name], "one ask, one chunk"
        assert not fresh or index in fresh, "first copies first"
        self.asked[name].discard(index)
        self.ever.add(index)

    @rule(pause=st.floats(0, 0.7))
    def pass_time(self, pause):
        self.now += pause

    @invariant()
    def nothing_is_lost(self):
        assert {name: len(asks) for name, asks in self.asks.items()} == {
            name: len(asked) for name, asked in self.asked.items()
        }

    def teardown(self):
        """Everyone who goes on asking is served in bounded time, whatever the others do."""
        for name, asks in self.asks.items():
            started = self.now
            while self.asked[name]:
                index = asks.next(self.now)
                if index is None:
                    self.now = asks.due
                else:
                    self.asked[name].remove(index)
            assert self.now - started <= PASSED_MAX + HOLD + 1e-6


TestHistory = History.TestCase
