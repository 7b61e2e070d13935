"""Is a stall named with a reason that somebody can do something about?"""

import itertools

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.ids import PeerId
from p2pgrid.transfer.progress import STALLED, Progress, stretches

GOING = Progress(
    bytes_done=10, bytes_total=100, bytes_by_peer={PeerId("a"): 7, PeerId("origin h"): 3}, local=0, resumed=0,
    rate=1.0, peers=2, missing=9, unavailable=0, stalled_for=0.1, chunks=4410, heard=5, looked=1,
)  # fmt: skip


def stalled(**more) -> str:
    return attrs.evolve(GOING, stalled_for=STALLED + 1, **more).stall


def test_what_comes_does_not_stall():
    assert GOING.stall == ""
    assert attrs.evolve(GOING, unavailable=3, silent=2, stalled_for=STALLED - 0.1).stall == ""
    assert stalled(bytes_done=100) == ""


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (
            {"unavailable": 3, "lost": ((17, 17), (20, 21))},
            "no peer has chunks 17, 20-21 (3 of 4410)",
        ),
        ({"unavailable": 1, "lost": ((4, 4),)}, "no peer has chunk 4 (1 of 4410)"),
        (
            {"unavailable": 99, "lost": ((1, 2), (4, 4), (6, 6), (8, 8))},
            "no peer has chunks 1-2, 4, 6, 8, … (99 of 4410)",
        ),
        ({"silent": 2}, "2 peers connected, none answers"),
        ({"silent": 1, "peers": 1, "unavailable": 9}, "1 peer connected, none answers"),
        ({"silent": 1}, "2 peers connected, 1 do not answer"),
        ({"peers": 0, "heard": 0}, "nobody found yet: looked in the index, and nobody is known to have it"),
        (
            {"peers": 0, "heard": 0, "looked": 0},
            "nobody found yet: the index has not answered yet, and nobody is known to have it",
        ),
        ({"peers": 0, "heard": 3}, "nobody can be reached: looked in the index, tried 3 peers"),
        ({"chunks": 0, "bytes_total": 0}, "2 peers connected, none has what the disk is made of"),
        ({}, "2 peers connected, nothing has come for 9 s"),
        (
            {"silent": 2, "troubles": {"https://h/d": "it answers 404 Not Found"}},
            "2 peers connected, none answers; https://h/d: it answers 404 Not Found",
        ),
    ],
)
def test_a_stall_has_a_reason(facts, reason):
    assert stalled(**facts) == reason


def test_sources_are_told_apart():
    assert (GOING.from_peers, GOING.from_origins) == (7, 3)


@given(st.sets(st.integers(0, 60)), st.integers(1, 8))
def test_stretches_are_the_first_ones_and_exact(indices, most):
    found = stretches(sorted(indices), most)
    told = [index for first, last in found for index in range(first, last + 1)]
    assert told == sorted(indices)[: len(told)]
    assert len(found) <= most
    assert len(told) == len(indices) or len(found) == most
    assert all(b[0] > a[1] + 1 for a, b in itertools.pairwise(found))
