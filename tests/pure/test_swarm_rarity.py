"""Are the bit-sliced counts what plain counting says, and is the rarest the rarest?"""

from __future__ import annotations

import random
import tracemalloc

import hypothesis.strategies as st
from hypothesis import given, settings

from p2pgrid.transfer.rarity import BLOCK, LOOKS, IndexSet, Rarity, blocks_of, indices, nth_bit


@given(st.sets(st.integers(0, 3000), min_size=1), st.data())
def test_nth_bit(places, data):
    n = data.draw(st.integers(0, len(places) - 1))
    assert nth_bit(sum(1 << p for p in places), n) == sorted(places)[n]


@given(
    st.integers(0, 3 * BLOCK),
    st.binary(max_size=BLOCK)
    | st.lists(st.integers(0, 300).map(lambda n: b"\xff" * n + b"\x5f")).map(b"".join),
)
def test_blocks_are_the_bitmap(count, bitmap):
    expected = [i for i in range(min(count, 8 * len(bitmap))) if bitmap[i // 8] >> i % 8 & 1]
    blocks = blocks_of(bitmap, count)
    assert list(indices(blocks)) == expected
    some = IndexSet(blocks)
    assert (list(some), len(some)) == (expected, len(expected))
    assert [i for i in range(-1, count + 1) if i in some] == expected


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32))
def test_counts_and_floors_are_those_of_plain_counting(seed):
    rng = random.Random(seed)
    count = rng.choice([5, BLOCK, 3 * BLOCK - 5])
    full = blocks_of(b"\xff" * (count // 8 + 1), count)
    rarity = Rarity(count, bytes(len(full) * BLOCK // 8))
    peers: list[list[int]] = []
    for _ in range(rng.randrange(1, 40)):
        block = rng.randrange(len(full))
        bits = rng.getrandbits(BLOCK) & full[block]
        match rng.choice(["join", "join", "join", "leave", "want", "unwant", "grow"]):
            case "join":
                density = rng.choice([0, 1, 2])
                have = [b & (rng.getrandbits(BLOCK) if density == 1 else -bool(density)) for b in full]
                peers.append(have)
                for number, part in enumerate(have):
                    rarity.add(number, part)
            case "leave" if peers:
                for number, part in enumerate(peers.pop(rng.randrange(len(peers)))):
                    rarity.remove(number, part)
            case "want":
                rarity.want(block, bits)
            case "unwant":
                rarity.unwant(block, bits)
            case "grow":
                more = rng.choice([0, 1, 7, BLOCK + 1]) if count < 2 * BLOCK else 0
                count, wanted = count + more, list(rarity.wanted)
                full = blocks_of(b"\xff" * (count // 8 + 1), count)
                fresh = rarity.grow(count)
                assert list(indices(fresh)) == list(range(count - more, count))
                assert list(indices(rarity.wanted)) == [*indices(wanted), *indices(fresh)]
                peers = [[*have, *[0] * (len(full) - len(have))] for have in peers]
    rarity.check()
    counts = [sum(p[i // BLOCK] >> i % BLOCK & 1 for p in peers) for i in range(count)]
    assert [rarity.count(i) for i in range(count)] == counts
    assert list(indices(rarity.lost())) == [i for i, n in enumerate(counts) if not n]
    wanted = set(indices(rarity.wanted))
    for have in [full, *peers[:3]]:
        block, bits, useful = rarity.rarest(have, (1 << len(full)) - 1, rng)
        able = {i for i in indices(have) if i in wanted}
        found = {block * BLOCK + at for at in range(BLOCK) if bits >> at & 1}
        assert len(full) <= LOOKS, "so that every block is looked into"
        least = min((counts[i] for i in able), default=0)
        assert bool(found) == bool(able)
        assert found == {i for i in able if counts[i] == least and i // BLOCK == block}
        for number in range(len(full)):
            assert useful >> number & 1 or not have[number] & rarity.wanted[number]


def test_what_nobody_has_is_no_list_of_numbers():
    """100 GiB full of data, and no peer: who looks every second takes bits, not 16 MiB."""
    count = 409_600
    rarity = Rarity(count, b"\x01")
    tracemalloc.start()
    try:
        some = IndexSet(rarity.lost())
        assert len(some) == sum(1 for _ in some) == count - 1
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < count
