"""Is little committed that has not left, everybody served in turn, and nobody held up by who is slow?"""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from p2pgrid.transfer.slots import AHEAD, LEAST, STUCK, Slots

CHUNK = 96 << 10


def commit(slots, who, queued, now):
    """Commit chunks while there may be any; what is queued then."""
    while slots.may(who, now):
        queued += CHUNK
        slots.update(who, queued, now)
        if queued > 100 * CHUNK:
            break
    slots.pause(who)
    return queued


def test_a_slow_uplink_holds_some_chunks_and_not_some_of_each_link():
    slots = Slots()
    held = [commit(slots, who, 0, 0.0) for who in range(20)]
    assert LEAST <= sum(held) < LEAST + CHUNK
    assert held[1:] == [0] * 19
    assert slots.first(0.0) is None, "no room"


def test_who_waits_is_served_in_turn_a_chunk_each():
    slots, now = Slots(), 0.0
    under_way = ["ann"] * (commit(slots, "ann", 0, now) // CHUNK)
    for who in ("ann", "bob", "cyd"):
        assert not slots.may(who, now)
    sent = []
    for _ in range(15):
        now += 0.05
        sent.append(under_way.pop(0))
        slots.update(sent[-1], under_way.count(sent[-1]) * CHUNK, now)
        first = slots.first(now)
        assert slots.may(first, now)
        under_way.append(first)
        slots.update(first, under_way.count(first) * CHUNK, now)
        assert not slots.may(first, now), "it wants more, but there are others"
    assert sent[-12:] == ["ann", "bob", "cyd"] * 4


def test_a_fast_uplink_has_room_for_all():
    slots, now = Slots(), 0.0
    queued = commit(slots, "ann", 0, now)
    for _ in range(200):
        now += CHUNK / 25e6
        slots.update("ann", queued - CHUNK, now)
        slots.update("ann", queued, now)
    assert 20e6 < slots.rate < 30e6
    others = [commit(slots, who, 0, now) for who in range(8)]
    assert sum(others) + queued > 0.9 * slots.rate * AHEAD


def test_a_peer_that_takes_nothing_holds_nobody():
    slots = Slots()
    commit(slots, "stuck", 0, 0.0)
    assert not slots.may("ann", 0.0)
    slots.rate = 1e6
    now = STUCK + 2 * (LEAST + CHUNK) / slots.rate + 0.1
    assert slots.first(now) == "ann"
    assert slots.may("ann", now)
    slots.leave("stuck")
    assert slots.may("bob", now)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5 * CHUNK), st.floats(0, 2)), max_size=60))
def test_all_that_leaves_makes_room_again(history):
    slots, now = Slots(), 0.0
    for who, queued, pause in history:
        now += pause
        if slots.may(who, now):
            slots.update(who, queued, now)
    for who in "abc":
        slots.update(who, 0, now)
        slots.pause(who)
    assert slots.first(now) is None, "nobody waits"
    assert slots.may("d", now)
    assert slots._total == 0
