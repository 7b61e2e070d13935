"""Count how many peers have each chunk we miss, and find the rarest that is wanted.

Pure.  The counts are exact and kept *bit-sliced*: indices lie in blocks of `BLOCK`, and a
block keeps plane 0, 1, 2, … of its counts, each plane one integer with a bit per index:

    index        7 6 5 4 3 2 1 0
    plane 1      0 0 1 0 0 1 1 0      index 5 is at 3 peers, 2 at 2, 1 at 3, 0 at 1, 7 at none
    plane 0      0 0 1 0 0 0 1 1

One more peer is an addition with carry over whole blocks, and the rarest of a set is found
by walking the planes from the top and leaving out every index whose bit is set, while any
are left.  So neither depends on how many chunks there are.  Each block's *floor*, the
rarest count of what is wanted there, says which block to look into: for a peer that has
everything the choice is the rarest of all; for others it is the best of `LOOKS` blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

BLOCK = 2048
LOOKS = 4
"""Blocks looked into for one decision, at most."""

Blocks = list[int]
"""A set of indices: one integer per block, bit i of block b = index b * BLOCK + i."""


class Chance(Protocol):
    """Where ties are broken: a seeded `random.Random`."""

    def randrange(self, stop: int, /) -> int: ...


def blocks_of(bitmap: bytes, count: int) -> Blocks:
    """The set of a bitmap (LSB first) of `count` indices; what is cut off is not in it."""
    step = BLOCK // 8
    blocks = [int.from_bytes(bitmap[at : at + step], "little") for at in range(0, -(-count // 8), step)]
    if count % BLOCK:  # the last block is not whole
        blocks[-1] &= (1 << count % BLOCK) - 1
    return blocks


def indices(blocks: Blocks) -> Iterator[int]:
    """The indices in a set, ascending."""
    for block, bits in enumerate(blocks):
        yield from indices_of(block, bits)


def indices_of(block: int, bits: int) -> Iterator[int]:
    """The indices in one block of a set, ascending."""
    at = block * BLOCK
    while bits:
        skip = (bits & -bits).bit_length() - 1
        bits >>= skip
        run = (~bits & bits + 1).bit_length() - 1  # how many ones are at its end
        bits >>= run
        yield from range(at + skip, at + skip + run)
        at += skip + run


class IndexSet(Collection[int]):
    """A set of indices, ascending; none is an object until somebody looks at it."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    def __len__(self) -> int:
        return sum(bits.bit_count() for bits in self._blocks)

    def __iter__(self) -> Iterator[int]:
        return indices(self._blocks)

    def __contains__(self, index: object) -> bool:
        if not isinstance(index, int) or not 0 <= index < len(self._blocks) * BLOCK:
            return False
        return bool(self._blocks[index // BLOCK] >> index % BLOCK & 1)


def nth_bit(bits: int, n: int) -> int:
    """The place of the `n`-th (from 0) set bit."""
    assert 0 <= n < bits.bit_count()
    at = 0
    half = 1 << (bits.bit_length() - 1).bit_length() >> 1
    while half:
        low = bits & ((1 << half) - 1)
        below = low.bit_count()
        if n < below:
            bits = low
        else:
            n -= below
            bits >>= half
            at += half
        half >>= 1
    return at


class Rarity:
    """What is held, what of the rest is wanted, and how many peers have each index."""

    def __init__(self, count: int, have: bytes) -> None:
        """`have`: what is held of `count` indices (bitmap, LSB first); all others are wanted."""
        everything = blocks_of(b"\xff" * -(-count // 8), count)
        self._held = blocks_of(have, count)
        self.wanted = [a & ~h for a, h in zip(everything, self._held, strict=True)]
        self._everything = everything
        self.missing = sum(bits.bit_count() for bits in self.wanted)
        self._planes: list[list[int]] = [[] for _ in everything]
        self._floor = [-1] * len(everything)
        self._blocks_at: list[int] = []  # by floor: the blocks with that floor, as bits
        self._levels = 0  # the floors that some block has, as bits
        for block in range(len(everything)):
            self._refresh(block)

    def grow(self, count: int) -> Blocks:
        """There are `count` indices now; the new ones, which it returns, are wanted, and nobody has them."""
        everything = blocks_of(b"\xff" * -(-count // 8), count)
        for _ in range(len(everything) - len(self._everything)):
            for blocks in (self._everything, self._held, self.wanted):
                blocks.append(0)
            self._planes.append([])
            self._floor.append(-1)
        fresh = [new & ~old for new, old in zip(everything, self._everything, strict=True)]
        self._everything = everything
        self.missing += sum(bits.bit_count() for bits in fresh)
        for block, bits in enumerate(fresh):
            if bits:
                self.want(block, bits)
        return fresh

    def count(self, index: int) -> int:
        """How many peers have `index`."""
        at = index % BLOCK
        return sum((plane >> at & 1) << k for k, plane in enumerate(self._planes[index // BLOCK]))

    @property
    def nothing_wanted(self) -> bool:
        """Whether all that is wanted lies in blocks of which nobody has some of it."""
        return not self._levels >> 1

    def holds(self, index: int) -> bool:
        return bool(self._held[index // BLOCK] >> index % BLOCK & 1)

    def asked(self, block: int, bits: int) -> int:
        """What of `bits` is missing, but not wanted: an answering peer is asked for it."""
        return bits & self._everything[block] & ~self._held[block] & ~self.wanted[block]

    def hold(self, index: int) -> None:
        """`index` is held; no longer missing or wanted."""
        if not self.holds(index):
            self._held[index // BLOCK] |= 1 << index % BLOCK
            self.missing -= 1
            self.unwant(index // BLOCK, 1 << index % BLOCK)

    def lost(self) -> Blocks:
        """What is missing and no peer has."""
        lost = [a ^ h for a, h in zip(self._everything, self._held, strict=True)]
        for block, planes in enumerate(self._planes):
            for plane in planes:
                lost[block] &= ~plane
        return lost

    def add_all(self, have: Blocks) -> None:
        """One more peer, with all it has."""
        for block, bits in enumerate(have):
            if bits:
                self.add(block, bits)

    def remove_all(self, have: Blocks) -> None:
        """One peer less, with all it had."""
        for block, bits in enumerate(have):
            if bits:
                self.remove(block, bits)

    def add(self, block: int, bits: int) -> None:
        """One more peer has `bits` of `block`."""
        touched = bits & self.wanted[block]
        planes = self._planes[block]
        for k, plane in enumerate(planes):
            if not bits:
                break
            planes[k] = plane ^ bits
            bits &= plane
        if bits:
            planes.append(bits)
        if touched:
            self._refresh(block)

    def remove(self, block: int, bits: int) -> None:
        """One peer less has `bits` of `block`."""
        touched = bits & self.wanted[block]
        planes = self._planes[block]
        for k, plane in enumerate(planes):
            if not bits:
                break
            planes[k] = plane ^ bits
            bits &= ~plane
        assert not bits, "a count went below zero"
        while planes and not planes[-1]:
            planes.pop()
        if touched:
            self._refresh(block)

    def want(self, block: int, bits: int) -> None:
        """`bits` of `block` are wanted from now on."""
        self.wanted[block] |= bits
        self._refresh(block)

    def unwant(self, block: int, bits: int) -> None:
        """`bits` of `block` are no longer wanted."""
        if self.wanted[block] & bits:
            self.wanted[block] &= ~bits
            self._refresh(block)

    def rarest(
        self, have: Blocks, useful: int, rng: Chance, within: Blocks | None = None
    ) -> tuple[int, int, int]:
        """(block, bits, useful): bits that are wanted, in `have` and equally rare; none if 0.

        `useful` tells (as bits) the blocks where `have` may hold something wanted; it comes
        back without those that were looked into in vain.  Nothing but what is `within` comes.
        """
        best = (0, 0, 0)  # count, block, bits
        seen = looks = 0
        levels = self._levels
        while levels and looks < LOOKS:
            level = (levels & -levels).bit_length() - 1
            if best[2] and best[0] <= level:
                break
            blocks = self._blocks_at[level] & useful & ~seen
            if not blocks:
                levels &= levels - 1
                continue
            block = nth_bit(blocks, rng.randrange(blocks.bit_count()))
            bits = self.wanted[block] & have[block]
            if within is not None:
                bits &= within[block]
            if not bits:
                useful ^= 1 << block
                continue
            looks += 1
            seen |= 1 << block
            count, bits = self._rarest_in(block, bits)
            if not best[2] or count < best[0]:
                best = (count, block, bits)
        return best[1], best[2], useful

    def _rarest_in(self, block: int, bits: int) -> tuple[int, int]:
        count = 0
        planes = self._planes[block]
        for k in range(len(planes) - 1, -1, -1):
            more = bits & planes[k]
            if more == bits:
                count |= 1 << k
            else:
                bits ^= more
        return count, bits

    def _refresh(self, block: int) -> None:
        wanted = self.wanted[block]
        floor = self._rarest_in(block, wanted)[0] if wanted else -1
        old = self._floor[block]
        if floor == old:
            return
        self._floor[block] = floor
        bit = 1 << block
        if old >= 0:
            self._blocks_at[old] ^= bit
            if not self._blocks_at[old]:
                self._levels ^= 1 << old
        if floor >= 0:
            while len(self._blocks_at) <= floor:
                self._blocks_at.append(0)
            self._blocks_at[floor] |= bit
            self._levels |= 1 << floor

    def check(self) -> None:
        """Assert that the floors are what the counts say."""
        missing = [a ^ h for a, h in zip(self._everything, self._held, strict=True)]
        assert self.missing == sum(bits.bit_count() for bits in missing)
        assert not any(wanted & ~bits for wanted, bits in zip(self.wanted, missing, strict=True))
        for block, wanted in enumerate(self.wanted):
            counts = [self.count(block * BLOCK + at) for at in range(wanted.bit_length()) if wanted >> at & 1]
            assert self._floor[block] == min(counts, default=-1)
        for level, blocks in enumerate(self._blocks_at):
            assert blocks == sum(1 << b for b, floor in enumerate(self._floor) if floor == level)
            assert bool(blocks) == bool(self._levels >> level & 1)
