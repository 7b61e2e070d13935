"""Say what a guest's base disk is read from: any place that answers `read(offset, length)`.

A `BlockSource` may take as long as it likes (a missing chunk is fetched first); the guest is
paused meanwhile.  It raises a `GridError` or `OSError` where the bytes cannot be had at all.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import attrs
import trio


class BlockSource(Protocol):
    """Read-only bytes of a disk; many reads may be under way at once."""

    @property
    def size(self) -> int:
        """Bytes of guest space."""
        ...

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; the range lies inside the disk."""
        ...


class FileSource:
    """A raw image in a file of our own; closed on leaving the `with` block."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._fd).st_size

    async def read(self, offset: int, length: int) -> bytes:
        data = await trio.to_thread.run_sync(os.pread, self._fd, length, offset)
        if len(data) != length:
            raise OSError(f"{length} bytes at {offset} lie past the end of the file")
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)


@attrs.define(eq=False)
class BlockCache:
    """Remember the blocks last read of a source whose reads are dear (a chunk is unpacked whole)."""

    source: BlockSource
    block: int = 256 * 1024
    """Bytes; a chunk, so that each is unpacked once and not for every 4 KiB of it."""
    most: int = 128
    """Blocks kept (32 MiB): a kernel and its initrd are read by the BIOS in small pieces, in order."""
    _blocks: OrderedDict[int, bytes] = attrs.field(factory=OrderedDict, init=False)
    _reading: dict[int, trio.Event] = attrs.field(factory=dict, init=False)

    @property
    def size(self) -> int:
        return self.source.size

    async def read(self, offset: int, length: int) -> bytes:
        parts = []
        end = offset + length
        while offset < end:
            index, skip = divmod(offset, self.block)
            part = (await self._block(index))[skip : skip + end - offset]
            if not part:
                raise OSError(f"the disk ends before {offset}")
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _block(self, index: int) -> bytes:
        while index not in self._blocks:
            if index in self._reading:  # one reader fetches, the others wait and look again
                await self._reading[index].wait()
                continue
            done = self._reading[index] = trio.Event()
            try:
                start = index * self.block
                data = await self.source.read(start, min(self.block, self.size - start))
                self._blocks[index] = data
                while len(self._blocks) > self.most:
                    self._blocks.popitem(last=False)
                return data
            finally:
                del self._reading[index]
                done.set()
        self._blocks.move_to_end(index)
        return self._blocks[index]
