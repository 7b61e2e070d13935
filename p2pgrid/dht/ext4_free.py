"""Say which blocks of an ext4 (or ext3, ext2) file system nobody uses, without mounting it.

Pure, and the file system is hostile.  A block is free if the bitmap of its group says so; everything
that makes this doubtful is refused: features that change what a bit means or that we do not know, a
journal that must be replayed first, a file system with errors, checksums that do not hold, a bitmap
that counts other free blocks than its group's descriptor.  Blocks of bitmaps and inode tables are
never free here, whatever a bitmap says.

    superblock (byte 1024) ──> descriptors, 32 or 64 bytes a group ──> one bitmap block a group

A group whose bitmap was never written (BLOCK_UNINIT) is free but for what mke2fs put there; which is
computed and compared with the descriptor's count, as the kernel does.  Bitmaps are all checked
when the file system is opened, and read again when they are needed: memory does not grow with it.
(Linux: `fs/ext4/balloc.c`, `Documentation/filesystems/ext4/`.)
"""

from __future__ import annotations

import functools
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from p2pgrid.dht.partitions import Need, Read, Span

SUPERBLOCK_AT = 1024
SUPERBLOCK_SIZE = 1024
MAGIC = 0xEF53
GROUPS_MAX = 1 << 18
"""Groups that are looked through: 32 TiB in blocks of 4 KiB."""
BITMAPS_KEPT = 64
"""Bitmaps in memory (256 KiB): threads read neighbouring chunks."""

CLEAN, ERRORS = 1, 2
RECOVER, META_BG, WIDE, CSUM_SEED = 0x4, 0x10, 0x80, 0x2000
INCOMPAT = (
    0x2 | META_BG | 0x40 | WIDE | 0x100 | 0x200 | 0x400 | CSUM_SEED | 0x4000 | 0x8000 | 0x10000 | 0x20000
)
"""File types, extents, 64 bit, multiple mount protection, flexible groups, values in inodes, large
directories, inline data, encryption, casefolding: none changes what a bitmap says."""
SPARSE_SUPER, GDT_CSUM, METADATA_CSUM = 0x1, 0x10, 0x400
RO_COMPAT = (
    SPARSE_SUPER
    | 0x2
    | 0x4
    | 0x8
    | GDT_CSUM
    | 0x20
    | 0x40
    | 0x100
    | METADATA_CSUM
    | 0x1000
    | 0x2000
    | 0x8000
    | 0x10000
)
"""Not snapshots (0x80), not clusters of blocks (bigalloc, 0x200), not shared blocks (0x4000)."""
SPARSE_SUPER2 = 0x200
BLOCK_UNINIT = 0x2


class Group(NamedTuple):
    """What a descriptor says of its group; blocks count from the file system's beginning."""

    bitmap: int
    inode_bitmap: int
    inode_table: int
    free: int
    flags: int
    checksum: int
    """Of the bitmap."""


def looks_like_ext(read: Read, start: int, length: int) -> bool:
    """Whether a superblock lies where one would."""
    if length < SUPERBLOCK_AT + SUPERBLOCK_SIZE:
        return False
    return read(start + SUPERBLOCK_AT + 0x38, 2) == MAGIC.to_bytes(2, "little")


class Ext4:
    """The free blocks of the file system in `length` bytes from `start` on.  Thread-safe."""

    def __init__(self, read: Read, start: int, length: int, need: Need) -> None:
        """Raises what `need` raises."""
        self.start = start
        self._read = read
        self._refuse_unless = need
        self._take_superblock(read(start + SUPERBLOCK_AT, SUPERBLOCK_SIZE), length)
        self._kept = functools.lru_cache(BITMAPS_KEPT)(self._bitmap)
        self._tables = functools.lru_cache(BITMAPS_KEPT)(self._table)
        self._own = self._metadata()
        self.free_bytes = self.block * sum(self._checked(index) for index in range(self.groups))

    def _need(self, ok: bool, why: str) -> None:
        self._refuse_unless(ok, f"the ext4 file system at byte {self.start}: {why}")

    def _take_superblock(self, data: bytes, length: int) -> None:
        need = self._need

        def u16(at: int) -> int:
            return int.from_bytes(data[at : at + 2], "little")

        def u32(at: int) -> int:
            return int.from_bytes(data[at : at + 4], "little")

        need(u16(0x38) == MAGIC, "it has no superblock")
        self._compat, incompat, ro_compat = u32(0x5C), u32(0x60), u32(0x64)
        self._incompat, self._ro_compat = incompat, ro_compat
        need(u32(0x4C) <= 1, f"its revision {u32(0x4C)} is unknown")
        need(not incompat & RECOVER, "its journal has not been replayed; start the guest and shut it down")
        need(not ro_compat & 0x200, "it counts in clusters (bigalloc), which is not read here")
        unknown = incompat & ~INCOMPAT, ro_compat & ~RO_COMPAT
        need(unknown == (0, 0), f"it has features that are not read here ({unknown[0]:#x}, {unknown[1]:#x})")
        clean = u16(0x3A) & (CLEAN | ERRORS) == CLEAN
        need(clean, "it was not unmounted, or has errors; start the guest and shut it down, or run e2fsck")
        self._checked_by_crc = bool(ro_compat & METADATA_CSUM)
        if self._checked_by_crc:
            need(data[0x175] == 1, "its checksums are of an unknown kind")
            need(_crc32c(data[:0x3FC]) == u32(0x3FC), "the checksum of its superblock does not hold")
        uuid = data[0x68:0x78]
        self._uuid_crc16 = _crc16(uuid)
        self._seed = u32(0x270) if incompat & CSUM_SEED else _crc32c(uuid)

        need(u32(0x18) <= 6, f"its blocks have 2^{10 + u32(0x18)} bytes")
        self.block = 1024 << u32(0x18)
        self.blocks = u32(0x04) | (u32(0x150) << 32 if incompat & WIDE else 0)
        self.first = u32(0x14)
        self.per_group = u32(0x20)
        need(self.first == (1 if self.block == 1024 else 0), "its first block is not where it must be")
        need(0 < self.per_group <= 8 * self.block and self.per_group % 8 == 0, "its groups are malformed")
        need(self.blocks > self.first, "it has no blocks")
        need(self.blocks * self.block <= length, "it is larger than where it lies")
        self.groups = -(-(self.blocks - self.first) // self.per_group)
        need(self.groups <= GROUPS_MAX, f"it has {self.groups} groups, more than {GROUPS_MAX}")
        self._width = u16(0xFE) if incompat & WIDE else 32
        need(self._width in (32, 64), f"its group descriptors have {self._width} bytes")
        self._per_block = self.block // self._width
        inode_size = u16(0x58) if u32(0x4C) else 128
        self._table_blocks = -(-u32(0x28) * inode_size // self.block)
        need(0 < self._table_blocks < self.blocks, "its inode tables are larger than it is")
        self._reserved = u16(0xCE)
        self._first_meta = u32(0x104) if incompat & META_BG else -(-self.groups // self._per_block)
        need(self._first_meta <= -(-self.groups // self._per_block), "its descriptors are malformed")
        self._backups = u32(0x24C), u32(0x250)

    # --- groups ------------------------------------------------------------------------

    def _table(self, index: int) -> bytes:
        """The block of descriptors with number `index`."""
        if index < self._first_meta:
            at = self.first + 1 + index
        else:  # in the first group that it describes
            group = index * self._per_block
            at = self.first + group * self.per_group + self._has_super(group)
        self._need(at < self.blocks, "a group descriptor lies behind its end")
        return self._read(self.start + at * self.block, self.block)

    def _group(self, index: int) -> Group:
        number, place = divmod(index, self._per_block)
        data = self._tables(number)[place * self._width : (place + 1) * self._width]
        low = struct.unpack_from("<IIIHHHHIHHHH", data)
        high = struct.unpack_from("<IIIHHHHIHHI", data, 32) if self._width == 64 else (0,) * 11
        self._need(self._sealed(index, data) == low[11], f"the checksum of group {index} does not hold")
        return Group(
            low[0] | high[0] << 32,
            low[1] | high[1] << 32,
            low[2] | high[2] << 32,
            low[3] | high[3] << 16,
            low[6],
            low[8] | high[8] << 16,
        )

    def _sealed(self, index: int, data: bytes) -> int:
        """What the checksum in a descriptor must be."""
        number = index.to_bytes(4, "little")
        if self._checked_by_crc:
            return _crc32c(number + data[:30] + bytes(2) + data[32:], self._seed) & 0xFFFF
        if self._ro_compat & GDT_CSUM:
            return _crc16(number + data[:30] + data[32:], self._uuid_crc16)
        return int.from_bytes(data[30:32], "little")

    def _metadata(self) -> list[Span]:
        """(first block, blocks) of all bitmaps and inode tables, merged, ascending."""
        spans: list[Span] = []
        for index in range(self.groups):
            group = self._group(index)
            spans += [(group.bitmap, 1), (group.inode_bitmap, 1), (group.inode_table, self._table_blocks)]
        spans.sort()
        merged: list[Span] = []
        for first, count in spans:
            self._need(first > self.first and first + count <= self.blocks, "its tables lie outside of it")
            if merged and first <= sum(merged[-1]):
                merged[-1] = (merged[-1][0], max(sum(merged[-1]), first + count) - merged[-1][0])
            else:
                merged.append((first, count))
        return merged

    def _has_super(self, group: int) -> bool:
        if self._compat & SPARSE_SUPER2:
            return group == 0 or group in self._backups
        if group <= 1 or not self._ro_compat & SPARSE_SUPER:
            return True
        return any(_is_power(group, base) for base in (3, 5, 7))

    def _base(self, group: int) -> int:
        """Blocks at the group's beginning: the superblock's copy, descriptors, room for more of them."""
        head = int(self._has_super(group))
        number, place = divmod(group, self._per_block)
        if number < self._first_meta:
            return head and head + self._first_meta + self._reserved
        return head + (place in (0, 1, self._per_block - 1))

    # --- bitmaps -----------------------------------------------------------------------

    def _blocks_in(self, index: int) -> int:
        return min(self.per_group, self.blocks - self.first - index * self.per_group)

    def _bitmap(self, index: int) -> int:
        """Bit i is set where block i of the group is used."""
        group = self._group(index)
        if group.flags & BLOCK_UNINIT:
            return self._never_written(index, group)
        return int.from_bytes(
            self._read(self.start + group.bitmap * self.block, self.per_group // 8), "little"
        )

    def _never_written(self, index: int, group: Group) -> int:
        begin, count = self.first + index * self.per_group, self._blocks_in(index)
        base = self._base(index)
        self._need(base <= count, f"group {index} has no room for its descriptors")
        used = (1 << base) - 1
        for first, span in (
            (group.bitmap, 1),
            (group.inode_bitmap, 1),
            (group.inode_table, self._table_blocks),
        ):
            if begin <= first < begin + count:
                used |= ((1 << span) - 1) << (first - begin)
        return used

    def _checked(self, index: int) -> int:
        """How many blocks of the group are free, which its descriptor must count, too."""
        group, bits, count = self._group(index), self._bitmap(index), self._blocks_in(index)
        if self._checked_by_crc and not group.flags & BLOCK_UNINIT:
            mask = 0xFFFFFFFF if self._width == 64 else 0xFFFF
            crc = _crc32c(bits.to_bytes(self.per_group // 8, "little"), self._seed) & mask
            self._need(crc == group.checksum, f"the checksum of the bitmap of group {index} does not hold")
        free = count - (bits & ((1 << count) - 1)).bit_count()
        self._need(
            free == group.free,
            f"group {index} counts {group.free} free blocks, its bitmap {free}; run e2fsck",
        )
        return free

    def free(self, offset: int, length: int) -> Iterator[Span]:
        """(offset, length) of what is free, ascending, within this part of the guest's space."""
        begin = max(offset, self.start + self.first * self.block)
        end = min(offset + length, self.start + self.blocks * self.block)
        low = (begin - self.start) // self.block
        high = -(-(end - self.start) // self.block)
        while low < high:
            index, place = divmod(low - self.first, self.per_group)
            count = min(high - low, self._blocks_in(index) - place)
            unused = ~(self._kept(index) >> place) & ((1 << count) - 1) & ~self._tables_in(low, count)
            for first, span in _ones(unused):
                at = self.start + (low + first) * self.block
                start, stop = max(at, begin), min(at + span * self.block, end)
                yield start, stop - start
            low += count

    def _tables_in(self, low: int, count: int) -> int:
        """Bits of the blocks from `low` on that hold bitmaps and inode tables."""
        bits = 0
        after = bisect_left(self._own, (low + count, 0))
        for first, span in self._own[max(bisect_right(self._own, (low, self.blocks)) - 1, 0) : after]:
            start, stop = max(first, low), min(first + span, low + count)
            if start < stop:
                bits |= ((1 << (stop - start)) - 1) << (start - low)
        return bits


def _ones(bits: int) -> Iterator[Span]:
    """(first, count) of each run of ones, from the lowest on."""
    at = 0
    while bits:
        skip = (bits & -bits).bit_length() - 1
        bits >>= skip
        run = (~bits & (bits + 1)).bit_length() - 1
        yield at + skip, run
        bits >>= run
        at += skip + run


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1


def _table_of(polynomial: int) -> tuple[int, ...]:
    """One step of a reflected CRC for every byte."""
    table: list[int] = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (polynomial if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_CRC32C = _table_of(0x82F63B78)
_CRC16 = _table_of(0xA001)


def _crc32c(data: bytes, crc: int = 0xFFFFFFFF) -> int:
    """As ext4 keeps it: not inverted at the end."""
    for byte in data:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    return crc


def _crc16(data: bytes, crc: int = 0xFFFF) -> int:
    for byte in data:
        crc = crc >> 8 ^ _CRC16[(crc ^ byte) & 0xFF]
    return crc
