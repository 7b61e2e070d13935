"""Say which chunk stands at which position, at the cost of the chunks only.

Pure.  Holes are runs: a space of 32 TiB with one chunk in it takes a few bytes, so that a
size which somebody only claims costs nobody memory.
"""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from p2pgrid.dht.flat import Index
from p2pgrid.ids import DIGEST_SIZE


class Places(Sequence[bytes | None]):
    """The chunk's name at each position, None in a hole; grows at its end.

    A chunk's *index* is the place of its name in the order of first positions.
    """

    def __init__(self, names: Iterable[bytes | None] = ()) -> None:
        self.by_name = Index()
        """Name to index, in the order of the indices."""
        self._length = 0
        self._firsts = array("Q")  # of each run of chunks: its first position,
        self._begins = array("Q")  # and where its indices begin in `_indices`
        self._indices = array("I")
        self.extend(names)

    def extend(self, names: Iterable[bytes | None]) -> None:
        for filled, group in itertools.groupby(names, key=lambda name: name is not None):
            if filled:
                self.fill(b"".join(name for name in group if name is not None))
            else:
                self.skip(sum(1 for _ in group))

    def fill(self, packed: bytes) -> None:
        """Add chunks: their names, one after the other."""
        if not self._indices or self._end() < self._length:
            self._firsts.append(self._length)
            self._begins.append(len(self._indices))
        self._indices.extend(self.by_name.add_all(packed))
        self._length += len(packed) // DIGEST_SIZE

    def skip(self, count: int) -> None:
        """Add `count` holes."""
        self._length += count

    def index_at(self, position: int) -> int | None:
        """The index of the chunk at `position`; None in a hole."""
        run = bisect_right(self._firsts, position) - 1
        if run < 0:
            return None
        at = self._begins[run] + position - self._firsts[run]
        return self._indices[at] if at < self._stop(run) else None

    def next_chunk(self, position: int) -> int:
        """The first position from `position` on that is no hole; the length where all are."""
        if self.index_at(position) is not None:
            return position
        run = bisect_right(self._firsts, position)
        return self._firsts[run] if run < len(self._firsts) else self._length

    def runs(self) -> Iterator[tuple[int, int]]:
        """The stretches (first position, count) that are not holes."""
        for run, first in enumerate(self._firsts):
            yield first, self._stop(run) - self._begins[run]

    @property
    def holes(self) -> int:
        return self._length - len(self._indices)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, at: int) -> bytes | None: ...
    @overload
    def __getitem__(self, at: slice) -> list[bytes | None]: ...
    def __getitem__(self, at: int | slice) -> bytes | list[bytes | None] | None:
        if isinstance(at, slice):
            start, stop, step = at.indices(self._length)
            if step == 1:
                return self._stretch(start, max(start, stop))
            return [self[i] for i in range(start, stop, step)]
        index = self.index_at(range(self._length)[at])
        return None if index is None else self.by_name.digests[index]

    def _stretch(self, start: int, stop: int) -> list[bytes | None]:
        names: list[bytes | None] = [None] * (stop - start)
        for run in range(max(bisect_right(self._firsts, start) - 1, 0), bisect_left(self._firsts, stop)):
            first, begin = self._firsts[run], self._begins[run]
            low, high = max(start, first), min(stop, first + self._stop(run) - begin)
            if low < high:
                indices = self._indices[begin + low - first : begin + high - first]
                names[low - start : high - start] = map(self.by_name.digests.__getitem__, indices)
        return names

    def _stop(self, run: int) -> int:
        return self._begins[run + 1] if run + 1 < len(self._begins) else len(self._indices)

    def _end(self) -> int:
        """The position behind the last run."""
        return self._firsts[-1] + len(self._indices) - self._begins[-1]
