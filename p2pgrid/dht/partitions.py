"""Say where the partitions of a guest's space lie: MBR with logical partitions, GPT, or none at all.

Pure.  What contradicts itself is refused, never guessed at: partitions that overlap or reach over
the end of the disk, a GPT whose checksums do not hold.  Sectors have 512 bytes.

      MBR, sector 0    446  four entries of 16 bytes: type at 4, first sector u32 at 8, sectors u32 at 12
                       510  55 AA
      GPT, sector 1      0  "EFI PART"     12  header bytes     72  first sector of the entries, u64
                        16  CRC-32 of the header with 0 here    80  entries, bytes of one, CRC-32 of all
      GPT entry          0  type, 16 bytes                      32  first and last sector, u64

(UEFI Specification 2.10, chapter 5.)
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Callable, Iterator

SECTOR = 512
EXTENDED = (0x05, 0x0F, 0x85)
PROTECTIVE = 0xEE
LOGICAL_MAX = 128
"""Logical partitions that a chain may have; Linux sees 60."""
ENTRIES_MAX = 1024
GPT_HEAD = struct.Struct("<8s4sIIIQQQQ16sQIII")

Read = Callable[[int, int], bytes]
"""(offset, length) in the guest's space."""
Need = Callable[[bool, str], None]
"""Raises `ImageRefused` with the reason unless it is true."""
Span = tuple[int, int]
"""(offset, length), bytes."""


def partitions(read: Read, size: int, need: Need) -> list[Span]:
    """The partitions by their place; empty where the space of `size` bytes has no table."""
    if size < 2 * SECTOR:
        return []
    table = _entries(read(0, SECTOR))
    if any(kind == PROTECTIVE for kind, _, _ in table):
        found = list(_gpt(read, size, need))
    else:
        found = []
        for kind, first, count in table:
            if kind in EXTENDED:
                found += _logical(read, first, size, need)
            else:
                found.append((first * SECTOR, count * SECTOR))
    found.sort()
    for offset, length in found:
        need(offset >= SECTOR and offset + length <= size, "a partition does not lie inside the disk")
    for (offset, length), (following, _) in itertools.pairwise(found):
        need(offset + length <= following, "two partitions overlap")
    return found


def _entries(sector: bytes) -> list[tuple[int, int, int]]:
    """(type, first sector, sectors) of what is no empty entry; a boot sector without a table has none."""
    if sector[510:] != b"\x55\xaa":
        return []
    found: list[tuple[int, int, int]] = []
    for at in range(446, 510, 16):
        first, count = struct.unpack_from("<II", sector, at + 8)
        if sector[at] & 0x7F:
            return []  # neither active nor inactive: code, or the boot sector of a file system
        if sector[at + 4] and count:
            found.append((sector[at + 4], first, count))
    return found


def _logical(read: Read, base: int, size: int, need: Need) -> Iterator[Span]:
    """The chain in an extended partition: each link tells one partition, and where the next link is."""
    link = base
    for _ in range(LOGICAL_MAX):
        need((link + 1) * SECTOR <= size, "a partition does not lie inside the disk")
        following = 0
        for kind, first, count in _entries(read(link * SECTOR, SECTOR)):
            if kind in EXTENDED:
                following = base + first
            else:
                yield (link + first) * SECTOR, count * SECTOR
        if not following:
            return
        need(following > link, "its logical partitions go round in a circle")
        link = following
    need(False, f"it has more than {LOGICAL_MAX} logical partitions")


def _gpt(read: Read, size: int, need: Need) -> Iterator[Span]:
    head = read(SECTOR, SECTOR)[: max(size - SECTOR, 0)]
    need(len(head) == SECTOR, "it is too small for its GPT")
    magic, _, length, crc, _, _, _, _, _, _, entries_at, count, span, entries_crc = GPT_HEAD.unpack_from(head)
    need(magic == b"EFI PART", "its MBR promises a GPT that is not there")
    need(GPT_HEAD.size <= length <= SECTOR, f"the header of its GPT claims {length} bytes")
    need(zlib.crc32(head[:16] + bytes(4) + head[20:length]) == crc, "the checksum of its GPT does not hold")
    need(count <= ENTRIES_MAX and span in (128, 256, 512), f"its GPT has {count} entries of {span} bytes")
    need((entries_at * SECTOR) + count * span <= size, "the entries of its GPT lie behind the disk's end")
    entries = read(entries_at * SECTOR, count * span)
    need(zlib.crc32(entries) == entries_crc, "the checksum of its GPT's entries does not hold")
    for at in range(0, len(entries), span):
        if any(entries[at : at + 16]):
            first, last = struct.unpack_from("<QQ", entries, at + 32)
            need(first <= last, "a partition ends before it begins")
            yield first * SECTOR, (last - first + 1) * SECTOR
