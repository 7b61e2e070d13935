"""Read and write VMware disk images in one file: monolithicSparse, and streamOptimized to read.

      0  "KDMV", version, flags       44  grains of a table (512)    72  1: not closed properly
     12  sectors of the disk, u64     48  second directory, u64      73  "\\n \\r\\n"
     20  sectors of a grain, u64      56  directory, u64             77  compression: 1 deflate
     28  descriptor: where, u64       64  sectors of all maps, u64
     36  its sectors, u64

All little endian, offsets in sectors.  The directory names tables, a table has the sector of each
grain, u32; 0 is not allocated, 1 is zeros where a flag says so.  A directory at 2^64-1 means that
the real header is in the footer, the third sector from the end.  A compressed grain begins with a
marker: its guest sector u64, its bytes u32, then a zlib stream.

The descriptor inside is text, and may name other files: we open none, and refuse what needs any.
(VMware: *Virtual Disk Format 5.0*; QEMU: `block/vmdk.c`.)
"""

from __future__ import annotations

import re
import secrets
import struct
import sys
import zlib
from array import array
from typing import BinaryIO, NamedTuple

from p2pgrid.dht.container import (
    CONVERT,
    SECTOR,
    Extents,
    Mapped,
    Read,
    Runs,
    Source,
    Unpack,
    check_claims,
    check_size,
    filled_blocks,
)
from p2pgrid.errors import Misused

SIGNATURE = b"KDMV"
HEAD = struct.Struct("<4sII QQQQ I QQQ B4sH")
FLAG_NEWLINES, FLAG_SECOND, FLAG_ZERO_GRAIN = 1 << 0, 1 << 1, 1 << 2
FLAG_COMPRESSED, FLAG_MARKERS = 1 << 16, 1 << 17
NEWLINES = b"\n \r\n"
AT_END = (1 << 64) - 1
PER_TABLE = 512
GRAIN = 64 * 1024
DIRECTORY_MAX = 32 << 20
DESCRIPTOR_MAX = 64 * 1024
DESCRIPTOR_AT, DESCRIPTOR_SECTORS = 1, 20
SIZE_MAX = 1 << 41
"""Bytes (2 TiB) that sectors in a u32 can tell apart."""
MARKER = struct.Struct("<QI")
END_OF_STREAM, FOOTER = 0, 3
_TELLING = ("createtype", "parentcid", "parentfilenamehint")


class Header(NamedTuple):
    magic: bytes
    version: int
    flags: int
    capacity: int
    grain: int
    descriptor_at: int
    descriptor_sectors: int
    per_table: int
    second_at: int
    directory_at: int
    maps: int
    unclean: int
    newlines: bytes
    compression: int


def open_vmdk(source: Source) -> Mapped:
    """Raises `ImageRefused`."""
    need = source.need
    if source.pread(0, 1) == b"#":
        raise source.refusal(f"it is a text descriptor, and its data is in other files; {CONVERT}")
    first = head = _header(source, 0)
    _check_descriptor(source, head)
    if head.directory_at == AT_END:
        head = _footer(source)
        need(
            (head.capacity, head.grain, head.flags) == (first.capacity, first.grain, first.flags),
            "its footer contradicts its header",
        )
    size = head.capacity * SECTOR
    compressed = bool(head.flags & FLAG_COMPRESSED)
    reserved = Runs()
    reserved.reserve(0, SECTOR)
    reserved.reserve(first.descriptor_at * SECTOR, first.descriptor_sectors * SECTOR)
    span = head.grain * SECTOR * PER_TABLE
    count = -(-size // span)
    need(4 * count <= DIRECTORY_MAX, f"its directory has {count} tables, more than any disk needs")
    # A table that would begin behind every file is no number for an array, either.
    need(head.directory_at < SIZE_MAX // SECTOR, "its directory is past the end of the file")
    directory = source.table("I", head.directory_at * SECTOR, count, "little", "its grain directory")
    used = count - directory.count(0)
    need(used * 4 * PER_TABLE <= source.file_size, "its directory names more tables than it has room for")
    reserved.reserve(head.directory_at * SECTOR, 4 * count)
    for sector in directory:
        if sector:
            reserved.reserve(sector * SECTOR, 4 * PER_TABLE)
    check_claims(source, reserved)  # before any table is read: no table is read twice

    runs = Runs()
    lowest = 1 if compressed else head.maps
    zero = 1 if head.flags & FLAG_ZERO_GRAIN else 0
    for i, sector in enumerate(directory):
        if sector:
            table = source.table("I", sector * SECTOR, PER_TABLE, "little", "a grain table")
            _take(source, head, runs, i * span, table, lowest, zero)
    check_claims(source, reserved, runs)
    return Mapped(source, "vmdk", size, runs, _unpacker(source, head) if compressed else None)


def _header(source: Source, at: int) -> Header:
    need = source.need
    head = Header(*HEAD.unpack(source.pread(at, SECTOR, "its header")[: HEAD.size]))
    need(head.magic == SIGNATURE, "it has no VMDK signature")
    need(1 <= head.version <= 3, f"its VMDK version {head.version} is not 1, 2 or 3; {CONVERT}")
    need(not head.flags & FLAG_NEWLINES or head.newlines == NEWLINES, "a text transfer has mangled it")
    need(head.unclean == 0, f"it was not closed properly; shut its machine down, or {CONVERT}")
    check_size(source, head.capacity * SECTOR)
    need(
        8 <= head.grain <= 4096 and head.grain & (head.grain - 1) == 0,
        f"its grains have {head.grain} sectors; a power of two from 8 to 4096 is possible",
    )
    need(head.per_table == PER_TABLE, f"its tables have {head.per_table} grains, not {PER_TABLE}")
    need(head.compression <= 1, f"its compression {head.compression} is unknown; {CONVERT}")
    both = FLAG_COMPRESSED | FLAG_MARKERS
    need(head.flags & both in (0, both), "it is half a stream: compressed without markers, or the reverse")
    need(
        bool(head.flags & FLAG_COMPRESSED) == (head.compression == 1),
        "its header contradicts itself on compression",
    )
    return head


def _footer(source: Source) -> Header:
    """The header that stands behind the grains of a stream."""
    at = source.file_size - 3 * SECTOR
    source.need(at > 0, "the file ends before its footer; it is truncated")
    tail = source.pread(at, 3 * SECTOR, "its footer")
    value, size, kind = struct.unpack_from("<QII", tail)
    source.need((value, size, kind) == (1, 0, FOOTER), "it does not end in a footer; it is truncated")
    ending = struct.unpack_from("<QII", tail, 2 * SECTOR)
    source.need(
        ending == (0, 0, END_OF_STREAM), "it does not end in an end-of-stream marker; it is truncated"
    )
    head = _header(source, at + SECTOR)
    source.need(head.directory_at != AT_END, "its footer has no directory")
    return head


def _check_descriptor(source: Source, head: Header) -> None:
    """Refuse whatever says that the disk is more than this file."""
    need = source.need
    need(head.descriptor_at > 0, f"it is one extent of a larger disk; {CONVERT} from its descriptor")
    length = head.descriptor_sectors * SECTOR
    need(0 < length <= DESCRIPTOR_MAX, f"its descriptor claims {length} bytes")
    need(head.descriptor_at < SIZE_MAX // SECTOR, "its descriptor is past the end of the file")
    raw = source.pread(head.descriptor_at * SECTOR, length, "its descriptor").split(b"\0", 1)[0]
    lines = [line.strip() for line in raw.decode("utf-8", "replace").splitlines()]
    facts: dict[str, str] = {}
    extents: list[str] = []
    for line in lines:
        if re.match(r"(RW|RDONLY|NOACCESS)\s", line, re.IGNORECASE):
            extents.append(line)
        elif "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            key = key.strip().lower()
            need(key not in facts or key not in _TELLING, f"its descriptor says {key!r} twice")
            facts[key] = value.strip().strip('"').lower()
    kind = facts.get("createtype", "")
    need(
        kind in ("monolithicsparse", "streamoptimized"),
        f"its type {kind!r} is neither monolithicSparse nor streamOptimized; {CONVERT}",
    )
    parentless = facts.get("parentcid", "ffffffff") == "ffffffff" and "parentfilenamehint" not in facts
    need(parentless, f"it is a child of another disk; flatten it first, or {CONVERT}")
    need(not any("encrypt" in k or "keysafe" in k for k in facts), f"it is encrypted; {CONVERT}")
    need(len(extents) == 1, f"its descriptor names {len(extents)} extents, not one; {CONVERT}")
    own = re.fullmatch(
        r'(?:RW|RDONLY)\s+(\d{1,15})\s+SPARSE\s+"([^"/\\]+)"(\s+0)?', extents[0], re.IGNORECASE
    )
    need(own is not None, f"its descriptor names an extent that is not this file; {CONVERT}")
    need(
        own is not None and int(own[1]) == head.capacity, "its descriptor contradicts its header on the size"
    )


def _take(
    source: Source, head: Header, runs: Runs, guest: int, table: array[int], lowest: int, zero: int
) -> None:
    """One grain table; its first entry is about guest byte `guest`."""
    grain, size = head.grain * SECTOR, head.capacity * SECTOR
    packed = 1 if head.flags & FLAG_COMPRESSED else 0
    for sector in table:
        if sector > zero:
            source.need(guest < size, "its map goes on behind the end of the disk")
            source.need(sector >= lowest, f"the grain of guest byte {guest} lies in the header or the maps")
            runs.add(guest, sector * SECTOR, min(grain, size - guest), packed)
        guest += grain


def _unpacker(source: Source, head: Header) -> Unpack:
    grain = head.grain * SECTOR

    def unpack(guest: int, host: int, packed: int) -> bytes:
        sector, length = MARKER.unpack(source.pread(host, MARKER.size, "a grain's marker"))
        source.need(sector == guest // SECTOR, f"the grain of guest byte {guest} is marked as another one")
        source.need(0 < length <= 2 * grain, f"the grain of guest byte {guest} claims {length} bytes")
        data = source.pread(host + MARKER.size, length, "a grain")
        try:
            return zlib.decompressobj().decompress(data, grain)
        except zlib.error as broken:
            raise source.refusal(f"the grain of guest byte {guest} is corrupt: {broken}") from None

    return unpack


def write_vmdk(size: int, extents: Extents, read: Read, out: BinaryIO) -> None:
    """monolithicSparse; `size` is a multiple of 512.  All tables are there, twice, as VMware has them."""
    tables = -(-size // (GRAIN * PER_TABLE))
    directory_sectors = -(-4 * tables // SECTOR)
    table_sectors = 4 * PER_TABLE // SECTOR
    second_at = DESCRIPTOR_AT + DESCRIPTOR_SECTORS
    first_at = second_at + directory_sectors + tables * table_sectors
    copies = [at + directory_sectors for at in (second_at, first_at)]
    maps = -(-(copies[1] + tables * table_sectors) * SECTOR // GRAIN) * GRAIN // SECTOR
    if maps * SECTOR + size > SIZE_MAX:
        raise Misused(why=f"a disk of {size} bytes does not fit into a VMDK file of 2 TiB; use qcow2 or vdi")
    at = maps
    group = -1
    table = array("I", bytes(4 * PER_TABLE))

    def finish() -> None:
        for copy in copies if group >= 0 else ():
            out.seek((copy + group * table_sectors) * SECTOR)
            out.write(_little(table))

    for index, data in filled_blocks(size, extents, read, GRAIN):
        if index // PER_TABLE != group:
            finish()
            group = index // PER_TABLE
            table = array("I", bytes(4 * PER_TABLE))
            out.seek(at * SECTOR)
        out.write(data.ljust(GRAIN, b"\0"))
        table[index % PER_TABLE] = at
        at += GRAIN // SECTOR
    finish()
    out.truncate(at * SECTOR)
    for directory_at, copy in zip((second_at, first_at), copies, strict=True):
        out.seek(directory_at * SECTOR)
        out.write(_little(array("I", range(copy, copy + tables * table_sectors, table_sectors))))
    out.seek(0)
    out.write(HEAD.pack(
        SIGNATURE, 1, FLAG_NEWLINES | FLAG_SECOND, size // SECTOR, GRAIN // SECTOR,
        DESCRIPTOR_AT, DESCRIPTOR_SECTORS, PER_TABLE, second_at, first_at, maps, 0, NEWLINES, 0,
    ))  # fmt: skip
    out.seek(DESCRIPTOR_AT * SECTOR)
    out.write(_descriptor(size // SECTOR))


def _descriptor(sectors: int) -> bytes:
    return f"""\
# Disk DescriptorFile
version=1
CID={secrets.randbelow(0xFFFFFFFE):08x}
parentCID=ffffffff
createType="monolithicSparse"

# Extent description
RW {sectors} SPARSE "disk.vmdk"

# The Disk Data Base
#DDB

ddb.virtualHWVersion = "4"
ddb.geometry.cylinders = "{min(sectors // (16 * 63), 16383)}"
ddb.geometry.heads = "16"
ddb.geometry.sectors = "63"
ddb.adapterType = "ide"
""".encode()


def _little(numbers: array[int]) -> bytes:
    if sys.byteorder == "big":
        numbers = array("I", numbers)
        numbers.byteswap()
    return numbers.tobytes()
