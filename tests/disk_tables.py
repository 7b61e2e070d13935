"""Write partition tables: {offset: bytes} of what lies where on the disk."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

SECTOR = 512
LINUX = bytes.fromhex("af3dc60f838472478e793d69d8477de4")

Entry = tuple[int, int, int]
"""(type, offset, bytes)"""


def sector(entries: Sequence[Entry]) -> bytes:
    data = bytearray(SECTOR)
    for i, (kind, offset, length) in enumerate(entries):
        struct.pack_into("<B3xB3xII", data, 446 + 16 * i, 0, kind, offset // SECTOR, length // SECTOR)
    data[510:] = b"\x55\xaa"
    return bytes(data)


def mbr(primary: Sequence[Entry], logical: Sequence[Entry] = (), extended: int = 0) -> dict[int, bytes]:
    """A table; logical partitions are chained in an extended one that begins at `extended`."""
    if not logical:
        return {0: sector(primary)}
    end = max(offset + length for _, offset, length in logical)
    disk = {0: sector([*primary, (0x05, extended, end - extended)])}
    links = [extended, *(offset - SECTOR for _, offset, _ in logical[1:])]
    for i, (kind, offset, length) in enumerate(logical):
        entries = [(kind, offset - links[i], length)]
        if i + 1 < len(links):
            entries.append((0x05, links[i + 1] - extended, SECTOR + logical[i + 1][2]))
        disk[links[i]] = sector(entries)
    return disk


def gpt(size: int, spans: Sequence[tuple[int, int]]) -> dict[int, bytes]:
    """A protective MBR and the first table; nobody here reads the second."""
    entries = bytearray(128 * 128)
    for i, (offset, length) in enumerate(spans):
        first, last = offset // SECTOR, (offset + length) // SECTOR - 1
        struct.pack_into("<16s16sQQ", entries, 128 * i, LINUX, bytes([i + 1] * 16), first, last)

    def head(crc: int) -> bytes:
        return struct.pack("<8s4sIIIQQQQ16sQIII", b"EFI PART", b"\0\0\1\0", 92, crc, 0, 1, size // SECTOR - 1,
                           34, size // SECTOR - 34, bytes(16), 2, 128, 128, zlib.crc32(entries))  # fmt: skip

    return {
        0: sector([(0xEE, SECTOR, size - SECTOR)]),
        SECTOR: head(zlib.crc32(head(0))).ljust(SECTOR, b"\0"),
        2 * SECTOR: bytes(entries),
    }
