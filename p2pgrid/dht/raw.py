"""Read and write raw disk images: the file is the guest's space, byte for byte.

Any size above nothing will do; the guest sees as many bytes as the file has.  Holes of the
file system are not read.
"""

from __future__ import annotations

from typing import BinaryIO

from p2pgrid.dht.container import Extents, Mapped, Read, Runs, Source, filled_blocks
from p2pgrid.dht.manifest import SIZE_MAX

BLOCK = 64 * 1024
"""Bytes. Blocks of zeros of this size become holes of the file system."""


def open_raw(source: Source) -> Mapped:
    source.need(source.file_size <= SIZE_MAX, f"it is larger than {SIZE_MAX} bytes")
    runs = Runs()
    runs.add(0, 0, source.file_size)
    return Mapped(source, "raw", source.file_size, runs)


def write_raw(size: int, extents: Extents, read: Read, out: BinaryIO) -> None:
    for index, data in filled_blocks(size, extents, read, BLOCK):
        out.seek(index * BLOCK)
        out.write(data)
    out.truncate(size)
