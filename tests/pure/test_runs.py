"""Are runs that lie in any order in a file told in its order, without taking much room?"""

from __future__ import annotations

import random
import tracemalloc
from itertools import pairwise

from p2pgrid.dht.container import SORTED, Runs

COUNT = 3 * SORTED + 17
BLOCK = 4096


def scattered() -> Runs:
    places = list(range(COUNT))
    random.Random(1).shuffle(places)
    runs = Runs()
    for guest, place in enumerate(places):
        runs.add(guest * BLOCK, place * BLOCK, BLOCK)
    return runs


def test_any_order_becomes_the_file_s():
    runs = scattered()
    claims = list(runs.claims())
    assert sum(length for _, length in claims) == COUNT * BLOCK
    assert all(start + length == following for (start, length), (following, _) in pairwise(claims))
    assert sorted(runs.in_file_order()) == list(range(len(runs.host)))


def test_sorting_takes_four_bytes_a_run():
    runs = scattered()
    tracemalloc.start()
    try:
        assert sum(1 for _ in runs.in_file_order()) == len(runs.host)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 4.5 * COUNT + 80 * SORTED + (1 << 16)
