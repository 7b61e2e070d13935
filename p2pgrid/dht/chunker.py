"""Say where a guest's space is cut, and which pieces are worth reading at all.

Pure.  Cuts are fixed, every `CHUNK_SIZE` bytes of guest address space, so that the same
disk in any container has the same chunks (`docs/decisions/0002-chunks.md`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from p2pgrid.dht.manifest import CHUNK_SIZE

_ZEROS = bytes(CHUNK_SIZE)


def positions(size: int, extents: Iterable[tuple[int, int]]) -> Iterator[int]:
    """Positions that `extents` (offset, length; ascending, disjoint) touch, each once, ascending."""
    following = 0
    for offset, length in extents:
        assert 0 <= offset <= offset + length <= size, "an extent outside of the space"
        if length:
            first = max(following, offset // CHUNK_SIZE)
            following = max(following, -(-(offset + length) // CHUNK_SIZE))
            yield from range(first, following)


def length_at(size: int, position: int) -> int:
    """Bytes of the chunk at `position` of a space of `size` bytes (the last may be short)."""
    return min(CHUNK_SIZE, size - position * CHUNK_SIZE)


def is_zero(plain: bytes | bytearray | memoryview) -> bool:
    """Whether `plain` (at most a chunk) is all zero; a comparison stops at the first difference.

    A `memoryview` is compared byte by byte: slow.
    """
    return plain == (_ZEROS if len(plain) == CHUNK_SIZE else _ZEROS[: len(plain)])
