"""Does placement give each datum as many holders as it wishes, and no node more than fits?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.scheduler.job import JobSpec
from p2pgrid.scheduler.messages import Capacity
from p2pgrid.scheduler.placement import (
    EVERYWHERE,
    Candidate,
    Holder,
    Wish,
    expected_workers,
    fits,
    should_hold,
    why_pending,
)

GIB = 1 << 30
DISK = "b" + "a" * 58
SPEC = JobSpec(DISK, memory=2 * GIB, cpus=2, scratch=GIB, needs=("root",))
ROOM = Capacity(slots=1, memory=4 * GIB, cpus=4, disk=8 * GIB)


def holder(peer="ann", holds=(), room=1000):
    return Holder(peer, set(holds), room)


@pytest.mark.parametrize(
    ("replica", "owners", "expected", "held"),
    [
        (0, [], [], False),
        (0, [], ["ann"], True),
        (1, [], [], True),
        (1, ["bob"], [], False),
        (2, ["bob"], [], True),
        (2, ["ann", "bob"], [], True),
        (EVERYWHERE, ["bob", "cid"], [], True),
        (1, ["bob"], ["ann"], True),
        (1, ["bob"], ["eve"], False),
    ],
)
def test_algorithm_1_and_expected_workers(replica, owners, expected, held):
    wanted = should_hold(holder(), [Wish("d", replica, 10)], {"d": owners}, {"d": expected})
    assert wanted == ({"d"} if held else set())


def test_what_is_held_is_kept_and_what_is_expected_comes_first():
    data = [Wish("kept", 0, 10**9), Wish("everywhere", EVERYWHERE, 60), Wish("due", 0, 60)]
    wanted = should_hold(holder(holds={"kept"}, room=100), data, {}, {"due": ["ann"]})
    assert wanted == {"kept", "due"}


@given(
    st.lists(st.tuples(st.integers(-1, 4), st.integers(1, 50)), max_size=6),
    st.lists(st.integers(0, 120), min_size=1, max_size=8),
    st.permutations(range(8)),
)
def test_a_round_of_heartbeats_settles(wishes, rooms, turns):
    """However nodes take turns: no datum has more holders than wished, and none less that could have."""
    data = [Wish(f"d{i}", replica, size) for i, (replica, size) in enumerate(wishes)]
    owners: dict[str, list[str]] = {w.datum: [] for w in data}
    held: dict[str, set[str]] = {f"n{i}": set() for i in range(len(rooms))}
    room = {f"n{i}": rooms[i] for i in range(len(rooms))}
    for turn in [t for t in turns if t < len(rooms)] * 2:
        peer = f"n{turn}"
        wanted = should_hold(Holder(peer, held[peer], room[peer]), data, owners, {})
        assert held[peer] <= wanted
        for datum in wanted - held[peer]:
            owners[datum].append(peer)
            room[peer] -= next(w.bytes for w in data if w.datum == datum)
        held[peer] = wanted
        assert room[peer] >= 0
    for wish in data:
        count = len(owners[wish.datum])
        goal = len(rooms) if wish.replica == EVERYWHERE else min(wish.replica, len(rooms))
        assert count <= goal
        if count < goal:
            assert all(wish.datum in held[p] or wish.bytes > room[p] for p in held)


def candidate(peer, *, free=True, total=ROOM, shares=("root",)):
    return Candidate(peer, total, ROOM if free else Capacity(), shares)


def test_expected_are_those_that_can_and_soon_will():
    missing = {"busy": 0, "far": 100, "near": 5, "weak": 0, "plain": 0}
    candidates = [
        candidate("busy", free=False),
        candidate("far"),
        candidate("near"),
        candidate("weak", total=Capacity(slots=1, memory=GIB, cpus=4, disk=8 * GIB)),
        candidate("plain", shares=()),
    ]
    assert expected_workers(SPEC, 9, candidates, missing) == ["near", "far", "busy"]
    assert expected_workers(SPEC, 2, candidates, missing) == ["near", "far"]


@pytest.mark.parametrize(
    ("change", "fit"),
    [
        ({}, True),
        ({"slots": 0}, False),
        ({"memory": 2 * GIB - 1}, False),
        ({"cpus": 1}, False),
        ({"disk": GIB - 1}, False),
        ({"memory": 2 * GIB, "cpus": 2, "disk": GIB}, True),
    ],
)
def test_fits(change, fit):
    offer = {"slots": 1, "memory": 4 * GIB, "cpus": 4, "disk": 8 * GIB} | change
    assert fits(SPEC, Capacity(**offer), ("root", "qemu")) is fit
    assert not fits(SPEC, Capacity(**offer), ("qemu",))


def test_why_pending_names_the_condition_nobody_meets():
    small = Capacity(slots=1, memory=GIB, cpus=4, disk=8 * GIB)
    missing = dict.fromkeys(("ann", "bob", "cid"), 0)
    assert why_pending(SPEC, [], {}, {}) == "no worker is online"
    assert (
        why_pending(SPEC, [candidate("ann", shares=())], missing, {})
        == "of 1 workers online none shares root"
    )
    both = [candidate("ann", shares=()), candidate("bob", total=small)]
    assert why_pending(SPEC, both, missing, {}) == (
        "of 2 workers online none of those that meet the rest offers 2048 MiB of memory"
    )
    assert "1 can run it" in why_pending(SPEC, [*both, candidate("cid")], missing, {})
