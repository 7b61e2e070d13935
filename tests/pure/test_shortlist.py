"""What is told of more data than a beat takes?"""

from __future__ import annotations

import random

from p2pgrid.node.shortlist import Here, shortlist

MOST = 8192


def test_disks_are_told_first_and_then_the_newest_trees():
    rng = random.Random(5)
    here = [Here(f"d{i}", True, rng.random()) for i in range(100)]
    here += [Here(f"t{i}", False, float(i)) for i in range(19_900)]
    rng.shuffle(here)
    told = shortlist(here, MOST)
    assert len(told) == MOST
    assert set(told[:100]) == {f"d{i}" for i in range(100)}
    assert told[100:] == tuple(f"t{i}" for i in reversed(range(19_900 - (MOST - 100), 19_900)))


def test_the_same_data_make_the_same_list():
    here = [Here(f"t{i}", False, 1.0) for i in range(50)]
    assert shortlist(here, 20) == shortlist(reversed(here), 20)
