"""Are there never too many guests, and does everybody get in who waits?"""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from p2pgrid.transfer.guests import GONE, PATIENCE, STAY, Guests

KNOCK = 3.0


@given(
    most=st.integers(1, 4),
    history=st.lists(st.tuples(st.integers(0, 8), st.booleans(), st.floats(0, 40)), max_size=60),
)
def test_there_are_never_more_and_nobody_goes_early(most, history):
    guests, now, entered = Guests(most), 0.0, {}
    for who, leaves, pause in history:
        now += pause
        if leaves:
            guests.leave(who)
            entered.pop(who, None)
            continue
        full = len(entered) == most and who not in entered
        enters, gone = guests.knock(who, now)
        if gone is not None:
            assert full
            assert enters
            assert entered[gone] == min(entered.values()) <= now - STAY
            del entered[gone]
        assert enters or full, "who finds room is in"
        if enters:
            entered.setdefault(who, now)
        assert len(entered) <= most
        assert {w for w in range(9) if w in guests} == set(entered)


def test_who_cannot_reach_the_others_waits_its_turn():
    guests, now, got_in = Guests(2), 0.0, {}
    waiting = ["ann", "bob", "cyd", "dan", "eve"]
    while len(got_in) < len(waiting) and now < 1000:
        for who in waiting:
            if who not in guests and guests.knock(who, now)[0]:
                got_in.setdefault(who, now)
        now += KNOCK
    assert list(got_in) == waiting, "in the order they came"
    assert got_in["bob"] == 0.0
    assert STAY <= got_in["cyd"] <= STAY + KNOCK
    assert got_in["eve"] <= 2 * (STAY + KNOCK)


def test_who_has_not_knocked_for_long_does_not_wait():
    guests = Guests(1)
    assert guests.knock("ann", 0.0) == (True, None)
    assert guests.knock("bob", 0.0) == (False, None)
    assert guests.knock("cyd", 2 * GONE) == (False, None), "which forgets bob"
    assert guests.knock("bob", STAY) == (False, None)
    for at in range(int(STAY), int(STAY + PATIENCE), int(KNOCK)):
        assert guests.knock("bob", at) == (False, None)
    assert guests.knock("bob", STAY + PATIENCE) == (True, "ann")
