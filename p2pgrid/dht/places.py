"""Say which chunk stands at which position, at the cost of the chunks only.

Pure.  Holes are runs: a space of 32 TiB with one chunk in it takes a few bytes, so that a
size which somebody only claims costs nobody memory.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import overload


class Places(Sequence[bytes | None]):
    """The chunk's name at each position, None in a hole; grows at its end.

    A chunk's *index* is the place of its name in the order of first positions.
    """

    def __init__(self, names: Iterable[bytes | None] = ()) -> None:
        self.by_name: dict[bytes, int] = {}
        """Name to index, in the order of the indices."""
        self._names: list[bytes] = []
        self._length = 0
        self._firsts = array("Q")  # of each run of chunks: its first position,
        self._begins = array("Q")  # and where its indices begin in `_indices`
        self._indices = array("I")
        self.extend(names)

    def extend(self, names: Iterable[bytes | None]) -> None:
        position, hole = self._length, not self._indices or self._end() < self._length
        for name in names:
            if name is None:
                hole = True
            else:
                if hole:
                    self._firsts.append(position)
                    self._begins.append(len(self._indices))
                    hole = False
                index = self.by_name.get(name)
                if index is None:
                    index = self.by_name[name] = len(self._names)
                    self._names.append(name)
                self._indices.append(index)
            position += 1
        self._length = position

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
        return None if index is None else self._names[index]

    def _stretch(self, start: int, stop: int) -> list[bytes | None]:
        names: list[bytes | None] = [None] * (stop - start)
        for run in range(max(bisect_right(self._firsts, start) - 1, 0), bisect_left(self._firsts, stop)):
            first, begin = self._firsts[run], self._begins[run]
            low, high = max(start, first), min(stop, first + self._stop(run) - begin)
            if low < high:
                indices = self._indices[begin + low - first : begin + high - first]
                names[low - start : high - start] = [self._names[index] for index in indices]
        return names

    def _stop(self, run: int) -> int:
        return self._begins[run + 1] if run + 1 < len(self._begins) else len(self._indices)

    def _end(self) -> int:
        """The position behind the last run."""
        return self._firsts[-1] + len(self._indices) - self._begins[-1]
