"""Decide which of the streams that have something to send goes next.

Pure.  Deficit round robin with the few-bytes-first rule of FQ-CoDel (RFC 8290, section 4): a stream that
begins to send goes before all that have been sending, until it has sent a quantum.  So what people type
overtakes what they download, and nobody has to say which is which:

    ready ──> beginning ──a quantum sent, or dry──> going on ──dry──> out
                                                      └──a quantum sent──> to the end of the row

A stream that is dry when it begins goes to the end of the row, too, before it may begin again: so that
many of few bytes do not keep the others waiting for ever.
"""

from __future__ import annotations

import collections
from typing import Generic, TypeVar

QUANTUM = 32 << 10
"""Bytes."""

T = TypeVar("T")


class Fair(Generic[T]):
    """The streams of one link that may have something to send."""

    def __init__(self) -> None:
        self._beginning: collections.deque[T] = collections.deque()
        self._row: collections.deque[T] = collections.deque()
        self._left: dict[T, int] = {}
        """Bytes that each may send before it is another's turn."""

    def __len__(self) -> int:
        return len(self._left)

    def ready(self, stream: T) -> None:
        """It has something to send."""
        if stream not in self._left:
            self._left[stream] = QUANTUM
            self._beginning.append(stream)

    def next(self) -> T | None:
        """Whose turn it is; tell `sent` what came of it."""
        while queue := self._beginning or self._row:
            stream = queue[0]
            if self._left[stream] > 0:
                return stream
            self._left[stream] += QUANTUM
            self._row.append(queue.popleft())
        return None

    def sent(self, stream: T, count: int, *, dry: bool) -> None:
        """The `stream` whose turn it was has sent so much, and has no more to send if it is `dry`."""
        self._left[stream] -= count
        if not dry:
            return
        if self._beginning and self._beginning[0] is stream:
            self._row.append(self._beginning.popleft())
        else:
            assert self._row[0] is stream
            self._row.popleft()
            del self._left[stream]

    def drop(self, stream: T) -> None:
        """It is over."""
        if self._left.pop(stream, None) is not None:
            for queue in (self._beginning, self._row):
                if stream in queue:
                    queue.remove(stream)
