"""Read and write QEMU disk images: qcow2 version 2 and 3.

      0  "QFI\\xfb", version       32  encryption, entries of L1    72  incompatible features, u64
      8  backing file: where, u64  40  offset of L1, u64            80  compatible, autoclear, u64
     16  its name's bytes          48  refcount table, u64          96  refcount order, header bytes
     20  cluster bits              56  its clusters, snapshots     104  compression: 0 deflate, 1 zstd
     24  size of the disk, u64     64  where the snapshots are

All big endian; from 72 on in version 3 only.  L1 holds offsets of L2 tables, one cluster each; an
L2 entry tells where a cluster of the guest's space lies, or that it is zero, or its compressed bytes.
Reference counts are not believed and not needed: a cluster that two entries name is refused.

Refused because the guest's space is not all in this file, or not only this space: backing and data
files, internal snapshots, encryption, subclusters.  (QEMU: `docs/interop/qcow2.txt`.)
"""

from __future__ import annotations

import struct
import zlib
from array import array
from typing import BinaryIO

import zstandard

from p2pgrid.dht.container import (
    CONVERT,
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

SIGNATURE = b"QFI\xfb"
HEAD = struct.Struct(">4sI QI I Q II QQ II Q")
HEAD3 = struct.Struct(">QQQ II")
CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
L1_MAX = 32 << 20
REFCOUNTS_MAX = 8 << 20
"""Bytes of the L1 and the refcount table: QEMU's own bounds."""
EXTENSIONS_MAX = 1000
COPIED = 1 << 63
COMPRESSED = 1 << 62
OFFSET = (1 << 56) - (1 << 9)
ALL_ZEROS = 1
CRYPTO, DATA_FILE = 0x0537BE77, 0x44415441
WINDOW_MAX = 8 << 20
"""Bytes that a zstd frame may make us keep; a cluster has 2 MiB at most."""

_INCOMPATIBLE = (
    (1 << 0, "it was not closed properly (dirty); run qemu-img check -r all on a machine you trust"),
    (1 << 1, "it is marked corrupt; run qemu-img check -r all on a machine you trust"),
    (1 << 2, f"its data is in another file; {CONVERT}"),
    (1 << 4, f"it has subclusters (extended L2 entries); {CONVERT}"),
)
COMPRESSION = 1 << 3


def open_qcow2(source: Source) -> Mapped:
    """Raises `ImageRefused`."""
    need = source.need
    head = HEAD.unpack(source.pread(0, HEAD.size, "its header"))
    (
        signature,
        version,
        backing,
        backing_size,
        bits,
        size,
        crypt,
        l1_size,
        l1_at,
        refs_at,
        refs,
        snapshots,
        _,
    ) = head
    need(signature == SIGNATURE, "it has no qcow2 signature")
    need(version in (2, 3), f"its qcow version {version} is neither 2 nor 3; {CONVERT}")
    need(9 <= bits <= 21, f"its clusters have 2^{bits} bytes; 2^9 to 2^21 are possible")
    need(backing == 0 and backing_size == 0, "it needs a backing file; flatten it first (qemu-img convert)")
    need(crypt == 0, f"it is encrypted; decrypt it first, or {CONVERT}")
    need(snapshots == 0, "it has internal snapshots; delete them first (qemu-img snapshot -d)")
    check_size(source, size)
    cluster = 1 << bits
    zstd = version == 3 and _version3(source, cluster)

    per_table = cluster // 8
    need(-(-size // (cluster * per_table)) <= l1_size, "its L1 table is too small for its disk")
    need(8 * l1_size <= L1_MAX, f"its L1 table has {l1_size} entries, more than any disk needs")
    need(0 < cluster * refs <= REFCOUNTS_MAX, f"its refcount table has {refs} clusters")
    need(l1_at % cluster == 0 and refs_at % cluster == 0, "its tables do not begin at a cluster")
    reserved = Runs()
    reserved.reserve(0, cluster)
    reserved.reserve(l1_at, 8 * l1_size)
    reserved.reserve(refs_at, cluster * refs)

    l1 = source.table("Q", l1_at, l1_size, "big", "its L1 table")
    used = l1_size - l1.count(0)
    need(used * cluster <= source.file_size, "its L1 table names more tables than it has room for")
    tables: list[tuple[int, int]] = []
    for index, entry in enumerate(l1):
        if entry:
            offset = entry & OFFSET
            need(entry & ~(OFFSET | COPIED) == 0 and offset % cluster == 0, f"L1 entry {index} is malformed")
            if offset:
                tables.append((index, offset))
                reserved.reserve(offset, cluster)
    check_claims(source, reserved)  # before any table is read: no table is read twice

    clusters = _Clusters(source, size, bits, version)
    for index, offset in tables:
        clusters.take(index * per_table, source.table("Q", offset, per_table, "big", "an L2 table"))
    check_claims(source, reserved, clusters.reserved, clusters.runs)
    unpack = _unpacker(source, cluster, zstd) if clusters.compressed else None
    return Mapped(source, "qcow2", size, clusters.runs, unpack)


def _version3(source: Source, cluster: int) -> bool:
    """Whether compressed clusters are zstd frames.  Refuses features that change what a guest sees."""
    need = source.need
    incompatible, _, _, refcount_order, length = HEAD3.unpack(
        source.pread(HEAD.size, HEAD3.size, "its header")
    )
    for bit, why in _INCOMPATIBLE:
        need(not incompatible & bit, why)
    unknown = incompatible & ~COMPRESSION
    need(unknown == 0, f"it needs features that we do not know ({unknown:#x}); {CONVERT}")
    need(refcount_order <= 6, f"its reference counts have 2^{refcount_order} bits")
    need(104 <= length <= cluster and length % 8 == 0, f"its header claims {length} bytes")
    compression = source.pread(104, 1, "its header")[0] if length > 104 else 0
    need(compression <= 1, f"its compression type {compression} is unknown; {CONVERT}")
    need(
        (compression != 0) == bool(incompatible & COMPRESSION), "its header contradicts itself on compression"
    )

    at = length
    for _ in range(EXTENSIONS_MAX):
        if at + 8 > cluster:
            break
        kind, span = struct.unpack(">II", source.pread(at, 8, "its header"))
        if kind == 0:
            return compression == 1
        need(kind != CRYPTO, f"it is encrypted; decrypt it first, or {CONVERT}")
        need(kind != DATA_FILE, f"its data is in another file; {CONVERT}")
        at += 8 + (span + 7) // 8 * 8
    raise source.refusal("its header extensions do not end in the first cluster")


class _Clusters:
    """What the L2 tables say: where the guest's clusters are, and which are kept for zeros."""

    def __init__(self, source: Source, size: int, bits: int, version: int) -> None:
        self.runs = Runs()
        self.reserved = Runs()
        self.compressed = False
        self._source = source
        self._size = size
        self._bits = bits
        self._zero_flag = ALL_ZEROS if version == 3 else 0

    def take(self, index: int, table: array[int]) -> None:
        """One L2 table; its first entry is about the guest's cluster `index`."""
        need, cluster, size = self._source.need, 1 << self._bits, self._size
        known = OFFSET | COPIED | self._zero_flag
        guest = index * cluster - cluster
        for entry in table:
            guest += cluster
            if entry == 0:
                continue
            if entry & COMPRESSED:
                need(guest < size, "its map goes on behind the end of the disk")
                self._pack(guest, entry)
                continue
            offset = entry & OFFSET
            if entry & ~known or offset & (cluster - 1):
                raise self._source.refusal(f"the L2 entry of guest byte {guest} is malformed")
            if offset == 0:
                need(not entry & COPIED, f"the L2 entry of guest byte {guest} points at the header")
            elif entry & self._zero_flag:
                self.reserved.reserve(offset, cluster)
            else:
                need(guest < size, "its map goes on behind the end of the disk")
                self.runs.add(guest, offset, min(cluster, size - guest))

    def _pack(self, guest: int, entry: int) -> None:
        split = 62 - (self._bits - 8)
        offset = entry & ((1 << split) - 1)
        sectors = (entry & (COMPRESSED - 1)) >> split
        self._source.need(not entry & COPIED, f"the L2 entry of guest byte {guest} is malformed")
        self.compressed = True
        length = min(1 << self._bits, self._size - guest)
        self.runs.add(guest, offset, length, (sectors + 1) * 512 - offset % 512)


def _unpacker(source: Source, cluster: int, zstd: bool) -> Unpack:
    def unpack(guest: int, host: int, packed: int) -> bytes:
        # The length is rounded up to sectors and may reach over the end of the file.
        data = source.pread(host, min(packed, source.file_size - host))
        try:
            plain = _unzstd(data, cluster) if zstd else zlib.decompressobj(-12).decompress(data, cluster)
        except (zlib.error, zstandard.ZstdError) as broken:
            raise source.refusal(
                f"the compressed cluster of guest byte {guest} is corrupt: {broken}"
            ) from None
        source.need(len(plain) == cluster, f"the compressed cluster of guest byte {guest} is too short")
        return plain

    return unpack


def _unzstd(data: bytes, most: int) -> bytes:
    """Up to `most` bytes of the first frame in `data`, whatever it claims."""
    reader = zstandard.ZstdDecompressor(max_window_size=WINDOW_MAX).stream_reader(data)
    parts: list[bytes] = []
    while most and (part := reader.read(most)):
        parts.append(part)
        most -= len(part)
    return b"".join(parts)


def write_qcow2(size: int, extents: Extents, read: Read, out: BinaryIO) -> None:
    """Version 3; `size` is a multiple of 512.  Each L2 table stands behind the clusters it names."""
    per_table = CLUSTER // 8
    l1 = array("Q", bytes(8 * -(-size // (CLUSTER * per_table))))
    l2 = array("Q", bytes(CLUSTER))
    at = 1 + -(-8 * len(l1) // CLUSTER)
    out.seek(at * CLUSTER)
    group = -1

    def finish() -> int:
        if group < 0:
            return at
        out.write(_big(l2))
        l1[group] = at * CLUSTER | COPIED
        return at + 1

    for index, data in filled_blocks(size, extents, read, CLUSTER):
        if index // per_table != group:
            at = finish()
            group = index // per_table
            l2 = array("Q", bytes(CLUSTER))
        out.write(data.ljust(CLUSTER, b"\0"))
        l2[index % per_table] = at * CLUSTER | COPIED
        at += 1
    at = finish()
    refs_at, refs = _write_refcounts(at, out)
    out.seek(0)
    out.write(HEAD.pack(SIGNATURE, 3, 0, 0, CLUSTER_BITS, size, 0, len(l1), CLUSTER, refs_at, refs, 0, 0))
    out.write(HEAD3.pack(0, 0, 0, 4, 104) + bytes(8))
    out.seek(CLUSTER)
    out.write(_big(l1))


def _write_refcounts(used: int, out: BinaryIO) -> tuple[int, int]:
    """Count `used` clusters and the counts' own, each once.

    Returns the refcount table's offset and its clusters.
    """
    per_block, per_table = CLUSTER // 2, CLUSTER // 8
    blocks = tables = 0
    while (total := used + blocks + tables) > blocks * per_block or blocks > tables * per_table:
        blocks = -(-total // per_block)
        tables = -(-blocks // per_table)
    for i in range(blocks):
        count = min(per_block, total - i * per_block)
        out.write((b"\0\1" * count).ljust(CLUSTER, b"\0"))
    table = array("Q", [(used + i) * CLUSTER for i in range(blocks)])
    out.write(_big(table).ljust(tables * CLUSTER, b"\0"))
    return (used + blocks) * CLUSTER, tables


def _big(numbers: array[int]) -> bytes:
    return b"".join(n.to_bytes(8, "big") for n in numbers)
