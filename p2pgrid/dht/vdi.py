"""Read and write VirtualBox disk images (VDI 1.1), dynamic and fixed.

      0  text, 64 bytes           76  type: 1 dynamic, 2 fixed, 4 differencing
     64  signature 0xBEDA107F    340  offset of the map      368  size of the disk, u64
     68  version 0x00010001      344  offset of the blocks   376  block size, then extra bytes
     72  bytes of the header     360  sector size            384  blocks, blocks allocated
                                                             392  four UUIDs: image, its last
                                                                  change, parent, parent's change

All little endian.  The map has one u32 for every block of the disk: its place among the blocks
in the file, or never allocated, or discarded; both read as zeros.  VirtualBox puts the blocks at
2 MiB, qemu-img right behind the map.  (VirtualBox: `VDICore.h`; QEMU: `block/vdi.c`.)
"""

from __future__ import annotations

import struct
import sys
import uuid
from array import array
from typing import BinaryIO

from p2pgrid.dht.container import (
    CONVERT,
    SECTOR,
    Extents,
    Mapped,
    Read,
    Runs,
    Source,
    check_claims,
    check_size,
    filled_blocks,
)

SIGNATURE = 0xBEDA107F
SIGNATURE_AT = 64
VERSION = 0x00010001
BLOCK = 1 << 20
NEVER = 0xFFFFFFFF
ZERO = 0xFFFFFFFE
HEAD = struct.Struct("<64s 4I I 256s 2I 4I I Q 4I 16s16s16s16s")
"""Up to the UUIDs; VirtualBox adds a geometry that nobody needs."""
HEADER_SIZE = 400
"""Bytes of the header as VirtualBox counts them: from 72 on, with that geometry."""
DYNAMIC, FIXED, DIFFERENCING = 1, 2, 4


def open_vdi(source: Source) -> Mapped:
    """Raises `ImageRefused`."""
    need = source.need
    head = HEAD.unpack(source.pread(0, HEAD.size, "its header"))
    _, signature, version, _, kind, _, _, map_at, data_at = head[:9]
    _, _, _, sector, _, size, block, extra, blocks, allocated = head[9:19]
    need(signature == SIGNATURE, "it has no VDI signature")
    need(version == VERSION, f"its VDI version {version >> 16}.{version & 0xFFFF} is not 1.1; {CONVERT}")
    need(
        kind != DIFFERENCING and not any(map(any, head[21:23])),
        "it is a differencing image, which needs its parent; flatten it first (VBoxManage clonemedium)",
    )
    need(kind in (DYNAMIC, FIXED), f"its VDI type {kind} is neither dynamic nor fixed")
    need(sector == SECTOR, f"its sectors have {sector} bytes, not {SECTOR}")
    need(block == BLOCK and extra == 0, f"its blocks have {block} + {extra} bytes, not {BLOCK}; {CONVERT}")
    check_size(source, size)
    need(
        blocks == -(-size // BLOCK),
        f"it counts {blocks} blocks, but a disk of {size} bytes has another number",
    )
    need(allocated <= blocks, f"it counts {allocated} allocated blocks of {blocks}")
    need(map_at % SECTOR == 0 and data_at % SECTOR == 0, "its map or its blocks do not begin at a sector")
    need(map_at >= SECTOR, "its map lies in its header")
    need(map_at + 4 * blocks <= data_at, "its map and its blocks overlap")

    runs = Runs()
    slots = source.table("I", map_at, blocks, "little", "its block map")
    for index, slot in enumerate(slots):
        if slot < allocated:
            guest = index * BLOCK
            runs.add(guest, data_at + slot * BLOCK, min(BLOCK, size - guest))
        elif slot < ZERO:
            raise source.refusal(f"its map has block {slot}, but only {allocated} are allocated")
    check_claims(source, runs)
    return Mapped(source, "vdi", size, runs)


def write_vdi(size: int, extents: Extents, read: Read, out: BinaryIO) -> None:
    """A dynamic image; `size` is a multiple of 512."""
    blocks = -(-size // BLOCK)
    data_at = -(-(SECTOR + 4 * blocks) // BLOCK) * BLOCK
    slots = array("I", [NEVER]) * blocks
    allocated = 0
    out.seek(data_at)
    for index, data in filled_blocks(size, extents, read, BLOCK):
        out.write(data.ljust(BLOCK, b"\0"))
        slots[index] = allocated
        allocated += 1
    out.truncate(data_at + allocated * BLOCK)
    if sys.byteorder == "big":
        slots.byteswap()
    text = b"<<< Oracle VM VirtualBox Disk Image >>>\n"
    none = bytes(16)
    out.seek(0)
    out.write(HEAD.pack(
        text, SIGNATURE, VERSION, HEADER_SIZE, DYNAMIC, 0, b"", SECTOR, data_at,
        0, 0, 0, SECTOR, 0, size, BLOCK, 0, blocks, allocated,
        uuid.uuid4().bytes_le, uuid.uuid4().bytes_le, none, none,
    ))  # fmt: skip
    out.seek(SECTOR)
    out.write(slots.tobytes())
