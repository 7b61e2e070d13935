"""Does each of a site ask its share across the line, and nobody what a neighbour has?"""

from __future__ import annotations

import random

import hypothesis.strategies as st
from hypothesis import given

from p2pgrid.ids import PeerId
from p2pgrid.machine import Tick
from p2pgrid.transfer.near import NEWS, QUIET, SLOWER, Near
from p2pgrid.transfer.partner import Partner
from p2pgrid.transfer.rarity import BLOCK, blocks_of, indices
from p2pgrid.transfer.swarm import Arrived, Ask, Joined, Swarm, Told, Withdraw


def partner(name, order, have, count, *, near=True, now=0.0):
    bits = sum(1 << i for i in have)
    blocks = blocks_of(bits.to_bytes(-(-count // 8), "little"), count)
    return Partner(PeerId(name), order, blocks, near=near, news=now)


@given(data=st.data(), count=st.sampled_from([1, 9, 300, BLOCK, BLOCK + 1, 3 * BLOCK + 77]))
def test_shares_are_disjoint_and_together_all_that_nobody_near_has(data, count):
    names = [f"peer{number}" for number in range(data.draw(st.integers(2, 6)))]
    have = {name: data.draw(st.sets(st.integers(0, count - 1), max_size=20)) for name in names}
    shares = []
    for me in names:
        peers = [partner(n, order, have[n], count) for order, n in enumerate(names) if n != me]
        near = Near(PeerId(me), count)
        assert near.look([*peers, partner("far", 99, (), count, near=False)], 0.0)
        assert near.share is not None
        mine = {index for index in indices(near.share) if index < count}
        others = set().union(*(have[n] for n in names if n != me))
        assert not mine & others, "a neighbour has it"
        shares.append(mine)
    asked = [index for share in shares for index in share]
    assert len(asked) == len(set(asked))
    held_by_all_others = set().union(*have.values())
    assert set(asked) >= set(range(count)) - held_by_all_others


def test_without_neighbours_or_without_a_line_everything_may_be_asked():
    near = Near(PeerId("me"), 100)
    assert not near.look([partner("far", 1, range(100), 100, near=False)], 0.0)
    assert near.share is None
    near.changed()
    assert not near.look([partner("ann", 1, range(100), 100)], 0.0), "all are near"
    assert near.share is None


def test_who_is_silent_slow_or_brings_nothing_does_not_count():
    far = partner("far", 9, range(100), 100, near=False)
    far.pace.rate = 1e6
    ann = partner("ann", 1, (), 100)
    near = Near(PeerId("me"), 100)
    part = range(20, 80)

    def shares(now):
        near.changed()
        near.look([far, ann], now)
        return None if near.share is None else sum(1 for i in indices(near.share) if i < 100)

    assert shares(0.0) in part
    assert shares(NEWS + 1) == 100, "she brings nothing: all of it is ours"
    ann.news = NEWS + 2
    ann.asks[5] = ann.since = NEWS + 2
    assert shares(NEWS + 2) in part
    assert shares(NEWS + 2 + 2 * QUIET) is None, "she is silent, as if she were not there"
    ann.pace.rate, ann.pace.latency, ann.since, ann.outstanding = 1e6 / SLOWER / 2, 0.1, NEWS + 9, 10**9
    ann.asks[6] = NEWS + 9
    ann.news = NEWS + 9
    assert shares(NEWS + 9) is None, "she has more to do than she can"
    ann.pace.rate = 2e6 / SLOWER
    assert shares(NEWS + 9) in part


def asks(effects, peer):
    return [i for e in effects if isinstance(e, Ask) and e.peer == peer for i in e.indices]


def test_what_a_neighbour_tells_of_is_asked_there_and_no_longer_across_the_line():
    swarm = Swarm([1000] * 16, b"", random.Random(1), me=PeerId("me"))
    (first,) = asks(swarm.step(Joined(PeerId("far"), b"\xff\xff"), 0.0), "far")
    mine = asks(swarm.step(Arrived(PeerId("far"), first, 1000), 0.1), "far")
    assert len(mine) > 3
    swarm.step(Joined(PeerId("ann"), b"\x00\x00", near=True), 0.2)
    effects = swarm.step(Told(PeerId("ann"), [mine[3]]), 0.3)
    assert Withdraw(PeerId("far"), mine[3]) in effects
    assert asks(effects, "ann") == [mine[3]]


def test_what_a_neighbour_would_have_asked_is_asked_in_the_end():
    swarm = Swarm([1000] * 64, b"", random.Random(1), me=PeerId("me"))
    swarm.step(Joined(PeerId("ann"), b"\x00" * 8, near=True), 0.0)
    queue = asks(swarm.step(Joined(PeerId("far"), b"\xff" * 8), 0.0), "far")
    now = 0.0
    while not swarm.complete and now < 60:
        if queue:
            now += 0.01
            queue += asks(swarm.step(Arrived(PeerId("far"), queue.pop(0), 1000), now), "far")
        else:
            now = max(now, swarm.deadline)
            queue += asks(swarm.step(Tick(), now), "far")
        swarm.check()
    assert swarm.complete, "ann brought nothing"
    assert now < NEWS + 5
