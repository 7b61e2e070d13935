"""Find which parts of a parent resemble a chunk: a guess, which zstd then makes exact.

Pure: chunks in, ranges of the parent out.  Import it only where a delta is made: numpy takes 30 MB.

    block of the chunk   in the parent?                            the dictionary
    ──────────────────   ──────────────────────────────────────    ──────────────────────────
    zero                                                           nothing, or a hole
    equal to a block     looked up by name: 32 bits of a hash      that block
    new                  marks: a few hashes of 32 bytes,          the block with most votes, and
                         each hit a vote for a block, and for      the next best in front of all
                         its neighbours' neighbours

Blocks are 4 KiB because file systems align files to them.  Marks are taken of the parent every
16 bytes, as compilers align functions, and of a new block at *every* byte (rsync's asymmetry:
Tridgell, 1999); of both only those whose hash begins with `RARE` zero bits, so that both
sides choose the same ones without knowing of each other (Manber, 1994).

What moved moves together.  A vote for parent block p by block t is also one, `FADE` times
weaker for each step, that t+1 resembles p+1.  So two marks in a block are enough, where without
it eight were too few (`docs/decisions/0010-deltas.md`).

Blocks stand in the dictionary as they stand in the chunk, so runs of equal ones are one
match at one distance, whatever order the parent has them in.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from p2pgrid.dht.content import CHUNK_SIZE
from p2pgrid.dht.delta import BLOCK, Range
from p2pgrid.ids import DIGEST_SIZE, digest

BLOCKS_MAX = 2 << 20
"""Blocks (8 GiB) of a parent that are looked at: memory is 8 bytes for each and for each mark, 24 in all."""
RARE = 7
"""Bits: one hash in 128 is a mark, two in a block."""
COMMON = 16
"""Places of a mark; one that has more tells nothing."""
HITS_MAX = 1024
"""Pairs of alike blocks that vote for one chunk: what repeats itself is not worth more."""
REACH = 16
"""Blocks to each side that a vote counts for."""
FADE = 0.8
LEAST = 0.1
"""Votes below which a block is not worth reading."""

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
Votes = NDArray[np.float64]
I64 = NDArray[np.int64]
Plain = bytes | bytearray | memoryview

_WORD = np.dtype("<u8")
_WORDS = BLOCK // 8
_PHASES = 8
_WINDOW = 4
"""Words of which a mark is made."""
_ODD = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xFF51AFD7ED558CCD],
    np.uint64,
)
_BLOCK_ODD = (np.arange(1, 2 * _WORDS, 2, dtype=np.uint64) * _ODD[0]) ^ _ODD[1] | np.uint64(1)
_RARELY = np.uint64(1 << (64 - RARE))
_PIECE = 8192
"""Words worked on at a time: arrays that stay in the cache, and that are not mapped anew each time."""
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
_CHUNK = CHUNK_SIZE // BLOCK
_ZERO, _NEW = -2, -1
_HEAD = struct.Struct("<8sQQQQ")
_MAGIC = b"likely 2"
_BODY = DIGEST_SIZE + _HEAD.size + 2 * DIGEST_SIZE
"""Where the two arrays begin in a file: behind a digest of the head, the head, and a digest of each."""


class Likeness:
    """What is known of one parent.  Not changed after it was made, so any thread may ask."""

    def __init__(self, blocks: U64, marks: U64, end: int, hole: int) -> None:
        self._blocks = blocks
        """Of each block that is not zero its name and, in the lower half, which block it is; sorted."""
        self._marks = marks
        """Each mark and, in the lower half, the block it lies in; sorted."""
        self._end = end
        """Blocks from here on are not known."""
        self._hole = hole
        """The first block of a hole of at least a chunk; -1 where there is none."""

    @classmethod
    def of(cls, chunks: Iterable[tuple[int, Plain]]) -> Likeness:
        """Look at a parent's (offset, plain bytes), ascending; what is left out is holes."""
        blocks, marks = bytearray(), bytearray()  # they grow where they are, and are sorted there
        left = BLOCKS_MAX
        end, widest, hole = 0, 0, -1
        for offset, plain in chunks:
            first = offset // BLOCK
            assert offset == first * BLOCK >= end * BLOCK, "not in order"
            words = _words(plain)
            if first - end > widest:
                widest, hole = first - end, end
            end = first + len(words) // _WORDS
            named = _block_names(words)
            filled = np.flatnonzero(named)
            blocks += _paired(named[filled], filled + first).data
            at, found = _marks(words, 2)
            marks += _paired(found, at // _WORDS + first).data
            left -= len(filled)
            if left < 0:
                break
        return cls(_sorted(blocks), _telling(_sorted(marks)), end, hole if widest >= _CHUNK else -1)

    def save(self, path: Path) -> None:
        """Write to `path`, whole or not at all; it may be made again, so nothing is synced."""
        parts = [each.astype(_WORD, copy=False).view(np.uint8).data for each in (self._blocks, self._marks)]
        head = _HEAD.pack(_MAGIC, len(self._blocks), len(self._marks), self._end, self._hole + 1)
        head += b"".join(map(digest, parts))
        aside = path.with_name(path.name + ".new")
        try:
            with aside.open("wb") as out:
                out.write(digest(head) + head)
                for part in parts:
                    out.write(part)
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path) -> Likeness | None:
        """What was saved; None where that is nothing, another version, or damaged."""
        try:
            data = memoryview(path.read_bytes())
        except OSError:
            return None
        head, body = data[DIGEST_SIZE:_BODY], data[_BODY:]
        if len(head) < _BODY - DIGEST_SIZE or digest(head) != data[:DIGEST_SIZE]:
            return None
        magic, blocks, marks, end, hole = _HEAD.unpack_from(head)
        if magic != _MAGIC or len(body) != 8 * (blocks + marks):
            return None
        parts = (body[: 8 * blocks], body[8 * blocks :])
        if b"".join(map(digest, parts)) != head[_HEAD.size :]:
            return None
        told, found = (np.frombuffer(part, _WORD).astype(np.uint64, copy=False) for part in parts)
        return cls(told, found, end, hole - 1)

    def ranges(self, plain: Plain, near: int) -> list[Range]:
        """Which parts of the parent to tell the chunk at offset `near` by; none if nothing is alike."""
        words = _words(plain)
        guess = self._equal(words, near // BLOCK)
        new = np.flatnonzero(guess == _NEW)
        if not len(new):
            return _joined(self._with_holes(guess))
        best, second = self._alike(words, guess, new)
        guess[new] = best
        told = guess[guess >= 0]
        more = np.setdiff1d(second[second >= 0], told)
        return _joined(more) + _joined(told)

    def resemblance(self, sample: Sequence[Plain]) -> float:
        """How much of the chunks in `sample` is in the parent, 0 to 1; a block that is alike counts half."""
        filled, found = 0, 0.0
        for plain in sample:
            words = _words(plain)
            guess = self._equal(words, 0)
            new = np.flatnonzero(guess == _NEW)
            filled += int(np.count_nonzero(guess != _ZERO))
            found += int(np.count_nonzero(guess >= 0))
            if len(new):
                found += len(np.unique(self._hits(words, new)[0])) / 2
        return found / filled if filled else 0.0

    # --- equal ------------------------------------------------------------------------

    def _equal(self, words: U64, near: int) -> I64:
        """For each block of the chunk the equal one of the parent, or `_ZERO` or `_NEW`."""
        names = _block_names(words)
        low, high = _span(self._blocks, names)
        count = high - low
        guess = np.where(names == 0, _ZERO, np.full(len(names), _NEW))
        guess[count == 1] = self._blocks[low[count == 1]] & _LOW
        shift = near
        for i in np.flatnonzero(count > 1).tolist():
            # Where there is a choice, what goes on where the last one ended: a run costs least.
            if i and guess[i - 1] >= 0:
                shift = int(guess[i - 1]) + 1 - i
            equal = self._blocks[low[i] : high[i]]
            nearest = np.searchsorted(equal, (equal[0] & ~_LOW) + np.uint64(i + shift))
            guess[i] = equal[min(int(nearest), len(equal) - 1)] & _LOW
        return guess

    def _with_holes(self, guess: I64) -> I64:
        """Holes where the chunk is zero, so that all of it is in the dictionary."""
        if self._hole < 0:
            return guess[guess >= 0]
        return np.where(guess == _ZERO, self._hole + np.arange(len(guess)), guess)

    # --- alike ------------------------------------------------------------------------

    def _alike(self, words: U64, guess: I64, new: I64) -> tuple[I64, I64]:
        """For each `new` block of the chunk the two that resemble it most; -1 for none."""
        ours, theirs, votes = self._hits(words, new)
        edges = np.flatnonzero((guess >= 0) & (_beside(guess == _NEW)))
        ours = np.concatenate([ours, edges])
        theirs = np.concatenate([theirs, guess[edges]])
        votes = np.concatenate([votes, np.ones(len(edges))])

        steps = np.arange(-REACH, REACH + 1)
        block = (ours[:, None] + steps).ravel()
        place = (theirs[:, None] + steps).ravel()
        votes = (votes[:, None] * FADE ** np.abs(steps)).ravel()
        rank = np.full(len(guess) + 2 * REACH, -1)  # of a new block among them; what is outside is none
        rank[new] = np.arange(len(new))
        row = rank[block]
        good = (row >= 0) & (place >= 0) & (place < self._end)
        row, place, votes = _summed(row[good], place[good], votes[good])
        good = votes >= LEAST
        row, place, votes = row[good], place[good], votes[good]
        order = np.lexsort((-votes, row))
        row, place = row[order], place[order]

        best = np.full(len(new), -1)
        second = np.full(len(new), -1)
        top = np.flatnonzero(np.diff(row, prepend=-1))
        best[row[top]] = place[top]
        top = top[:-1] if len(top) and top[-1] + 1 == len(row) else top
        top = top[row[top + 1] == row[top]]
        second[row[top]] = place[top + 1]
        return best, second

    def _hits(self, words: U64, new: I64) -> tuple[I64, I64, Votes]:
        """Pairs of a `new` block and one of the parent, and the marks they share: rare ones count more."""
        rows = words.reshape(-1, _WORDS)[new]
        plain = np.append(rows.ravel(), np.uint64(0)).view(np.uint8)
        ours: list[I64] = []
        found: list[U32] = []
        for phase in range(_PHASES):
            at, marks = _marks(plain[phase : phase - _PHASES].copy().view(np.uint64), 1)
            ours.append(new[at // _WORDS])
            found.append(marks)
        # Each mark once for a block: what repeats itself would bring millions.
        both = np.unique(
            np.concatenate(found).astype(np.uint64) << 32 | np.concatenate(ours).astype(np.uint64)
        )
        low, high = _span(self._marks, (both >> 32).astype(np.uint32))
        count = high - low
        which = np.repeat(np.arange(len(count)), count)
        nth = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
        theirs = (self._marks[low[which] + nth] & _LOW).astype(np.int64)
        pairs = _summed((both & 0xFFFFFFFF).astype(np.int64)[which], theirs, 1.0 / count[which])
        if len(pairs[0]) <= HITS_MAX:
            return pairs
        kept = np.argsort(-pairs[2], kind="stable")[:HITS_MAX]
        return pairs[0][kept], pairs[1][kept], pairs[2][kept]


# --- hashes ----------------------------------------------------------------------------


def _words(plain: Plain) -> U64:
    """`plain` as words; zeros fill the last block up."""
    short = -len(plain) % BLOCK
    return np.frombuffer(bytes(plain) + bytes(short) if short else plain, _WORD).astype(np.uint64, copy=False)


def _block_names(words: U64) -> U32:
    """A number for each block; a zero block has 0."""
    names = np.einsum("ij,j->i", words.reshape(-1, _WORDS), _BLOCK_ODD)
    return (_scrambled(names) >> 32).astype(np.uint32)


def _marks(words: U64, step: int) -> tuple[I64, U32]:
    """At which words marks begin, looking at every `step`th, and the marks: 32 bytes are hashed."""
    at: list[I64] = []
    marks: list[U32] = []
    for first in range(0, len(words) - _WINDOW + 1, _PIECE):
        piece = words[first : first + _PIECE + _WINDOW - 1]
        last = len(piece) - _WINDOW + 1
        hashes = piece[:last:step] * _ODD[0]
        for i in range(1, _WINDOW):
            hashes += piece[i : last + i : step] * _ODD[i]
        hashes = _scrambled(hashes)
        here = np.flatnonzero((hashes < _RARELY) & (hashes != 0))
        at.append(here * step + first)
        marks.append(hashes[here].astype(np.uint32))
    return np.concatenate(at), np.concatenate(marks)


def _scrambled(hashes: U64) -> U64:
    """Make all bits depend on all; changes `hashes`."""
    hashes ^= hashes >> 32
    hashes *= _ODD[_WINDOW]
    return hashes


# --- arrays ----------------------------------------------------------------------------


def _paired(keys: U32, values: I64) -> U64:
    """Keys in the upper halves, values in the lower ones."""
    return keys.astype(np.uint64) << _HALF | values.astype(np.uint64) & _LOW


def _sorted(pairs: bytearray) -> U64:
    """The very bytes of `pairs`, by key, and by value where keys are equal."""
    both = np.frombuffer(pairs, np.uint64)
    both.sort()
    return both


def _telling(pairs: U64) -> U64:
    """Of the sorted `pairs` those whose key stands there at most `COMMON` times; moved up within `pairs`."""
    crowded = np.zeros(len(pairs), np.bool_)
    for first in range(0, len(pairs) - COMMON, _PIECE):
        near = pairs[first : first + _PIECE][: len(pairs) - COMMON - first]
        far = (pairs[first + COMMON :][: len(near)] ^ near) <= _LOW
        if far.any():
            for nth in range(first, first + COMMON + 1):
                crowded[nth : nth + len(far)] |= far
    kept = 0
    for first in range(0, len(pairs), _PIECE):
        some = pairs[first : first + _PIECE][~crowded[first : first + _PIECE]]
        pairs[kept : kept + len(some)] = some
        kept += len(some)
    return pairs[:kept]


def _span(pairs: U64, keys: U32) -> tuple[I64, I64]:
    """From where to where in the sorted `pairs` each of `keys` stands."""
    least = keys.astype(np.uint64) << _HALF
    return np.searchsorted(pairs, least, "left"), np.searchsorted(pairs, least | _LOW, "right")


def _summed(row: I64, place: I64, votes: Votes) -> tuple[I64, I64, Votes]:
    """Each pair (row, place) once, with the sum of its votes."""
    pairs, nth = np.unique(row << 32 | place, return_inverse=True)
    summed = np.bincount(nth, votes, len(pairs)).astype(np.float64)
    return pairs >> 32, pairs & 0xFFFFFFFF, summed


def _beside(marked: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What stands before or behind a marked one."""
    beside = np.zeros_like(marked)
    beside[1:] |= marked[:-1]
    beside[:-1] |= marked[1:]
    return beside


def _joined(blocks: I64) -> list[Range]:
    """The ranges of a sequence of blocks."""
    cuts = np.flatnonzero(np.diff(blocks, prepend=-2) != 1)
    lengths = np.diff(cuts, append=len(blocks))
    return list(zip(blocks[cuts].tolist(), lengths.tolist(), strict=True))
