"""Is every asked chunk sent, in turn, and nothing twice before all once?"""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from p2pgrid.transfer.turns import WAIT, Turns

NAMES = ("ann", "bob", "cyd")


def drained(turns):
    order = []
    while (turn := turns.next()) is not None:
        order.append(turn)
    return order


def test_peers_are_served_in_turn():
    turns = Turns()
    turns.ask("ann", [0, 1, 2])
    turns.ask("bob", [3, 4])
    assert drained(turns) == [("ann", 0), ("bob", 3), ("ann", 1), ("bob", 4), ("ann", 2)]


def test_what_was_never_sent_goes_first():
    turns = Turns()
    for name in NAMES:
        turns.ask(name, [0])
        turns.ask(name, range(10, 14))
    first = [index for _, index in (turns.next() for _ in range(5))]
    assert sorted(first) == [0, 10, 11, 12, 13]


def test_nobody_starves():
    turns = Turns()
    turns.ask("ann", [0])
    assert turns.next() == ("ann", 0)
    turns.ask("bob", [0])
    turns.ask("ann", range(1, 1000))
    served = [turns.next() for _ in range(WAIT + 2)]
    assert ("bob", 0) in served


@given(st.lists(st.tuples(st.sampled_from("awlnn"), st.sampled_from(NAMES), st.integers(0, 9)), max_size=80))
def test_what_is_sent_is_what_is_asked(history):
    turns, asked = Turns(), set()
    for verb, name, index in history:
        match verb:
            case "a":
                turns.ask(name, [index])
                asked.add((name, index))
            case "w":
                turns.withdraw(name, index)
                asked.discard((name, index))
            case "l":
                turns.leave(name)
                asked = {ask for ask in asked if ask[0] != name}
            case "n":
                turn = turns.next()
                assert (turn is None) == (not asked)
                asked.discard(turn)
        assert len(turns) == len(asked)
    assert sorted(drained(turns)) == sorted(asked)
