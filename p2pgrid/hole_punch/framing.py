"""Cut a link's byte stream into messages, without copying them.

Pure.  A message on a link is:

    offset  size  meaning
    0       4     length of the body, unsigned, big endian, at most `MESSAGE_MAX`
    4       n     the body, never empty

The bytes are received straight into one reusable buffer: `space` says where the next ones
go, `filled` yields the bodies that are whole as views into that buffer, good until `space`
is asked again.  Any cut of the bytes gives the same bodies; noise only ever raises `BadFrame`.
"""

from __future__ import annotations

from collections.abc import Iterator

from p2pgrid.errors import BadFrame

HEADER = 4
MESSAGE_MAX = (1 << 20) + 64
"""Bytes of a body: one manifest object and its name."""
START = 512 * 1024
"""Bytes of buffer a link starts with: a whole chunk and a good part of the next."""
SPACE = 128 * 1024
"""Bytes of room below which what is there is moved to the front: it is less than one message."""


def header(length: int) -> bytes:
    """What goes before a body of `length` bytes."""
    assert length <= MESSAGE_MAX, f"our own message is too long: {length}"
    return length.to_bytes(HEADER, "big")


class Framing:
    """One direction of one link."""

    def __init__(self) -> None:
        self._view = memoryview(bytearray(START))
        self._start = self._end = 0
        self._wanted = HEADER
        """Bytes from `_start` on that the next message needs, as far as is known."""

    def space(self) -> memoryview:
        """Room for the next bytes; never empty.  Ends the life of the views given out."""
        if self._start == self._end:
            self._start = self._end = 0
        room = len(self._view) - self._end
        if self._start + self._wanted > len(self._view) or (room < SPACE and self._start):
            rest = self._view[self._start : self._end]
            if self._wanted > len(self._view):
                self._view = memoryview(bytearray(HEADER + MESSAGE_MAX))
            self._view[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        return self._view[self._end :]

    def filled(self, count: int) -> Iterator[memoryview]:
        """`count` bytes were put into `space`: the bodies that are whole now."""
        self._end += count
        while True:
            held = self._end - self._start
            if held >= HEADER:
                length = int.from_bytes(self._view[self._start : self._start + HEADER], "big")
                if length > MESSAGE_MAX:
                    raise BadFrame(why=f"a message of {length} bytes is longer than {MESSAGE_MAX}")
                self._wanted = HEADER + length
            if held < self._wanted:
                return
            body = self._view[self._start + HEADER : self._start + self._wanted]
            self._start += self._wanted
            self._wanted = HEADER
            yield body
