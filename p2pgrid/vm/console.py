"""Keep what a guest says: the console's head and tail, and the exit status it tells.

The console may speak without end; the file never holds more than `KEPT` bytes of it (and one
line that says how much is missing).  The head is written as it comes, so that it can be followed.
"""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

KEPT = 1 << 20
"""Bytes of console kept: the first half, and the last."""
LINE_MAX = 256
"""Bytes of a status line; a longer one is no line of ours."""
_EXIT = re.compile(rb"exit ([0-9]{1,3})")


class Console:
    """A file that takes the first and the last `kept` / 2 bytes written to it; entered."""

    def __init__(self, path: Path, kept: int = KEPT) -> None:
        self._file = path.open("xb", buffering=0)
        self._head_left = kept // 2
        self._tail: deque[bytes] = deque()
        self._tail_max = kept - kept // 2
        self._tail_size = 0
        self._dropped = 0

    def write(self, data: bytes) -> None:
        head, data = data[: self._head_left], data[self._head_left :]
        if head:
            self._file.write(head)
            self._head_left -= len(head)
        if data:
            self._tail.append(data)
            self._tail_size += len(data)
        while self._tail_size > self._tail_max:
            self._drop(self._tail_size - self._tail_max)

    def _drop(self, surplus: int) -> None:
        first = self._tail.popleft()
        if len(first) > surplus:
            self._tail.appendleft(first[surplus:])
        gone = min(surplus, len(first))
        self._tail_size -= gone
        self._dropped += gone

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file as file:
            if self._dropped:
                file.write(b"\n[%d bytes left out]\n" % self._dropped)
            file.write(b"".join(self._tail))


class ExitStatus:
    """What the status channel told: the first well-formed `exit N`."""

    def __init__(self) -> None:
        self.value: int | None = None
        self._line = bytearray()

    def feed(self, data: bytes) -> None:
        for piece in data.splitlines(keepends=True):
            self._line += piece[: LINE_MAX + 2 - len(self._line)] if len(self._line) <= LINE_MAX else b""
            if piece.endswith(b"\n"):
                self._take(bytes(self._line).rstrip(b"\r\n"))
                self._line.clear()

    def _take(self, line: bytes) -> None:
        told = _EXIT.fullmatch(line)
        if told and self.value is None and int(told[1]) <= 255:
            self.value = int(told[1])
