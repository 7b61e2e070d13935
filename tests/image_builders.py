"""Disk images put together by hand, so that each field can be told a lie.

The product writes only what is simple (tight VDI, plain qcow2, monolithicSparse); what others write
is built here: VirtualBox's VDI, qcow2 version 2, compressed clusters, streamOptimized VMDK.
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import zstandard

from p2pgrid.dht.image import Image, open_image, write_image
from p2pgrid.dht.manifest import Guest, Literal, Zeros

MIB = 1 << 20
KIB64 = 1 << 16


def pattern(seed: int, length: int) -> bytes:
    """Bytes that no two seeds share and that compress by half."""
    return (hashlib.shake_128(seed.to_bytes(8, "big")).digest(-(-length // 2)) + b"p" * length)[:length]


class Disk:
    """A guest's space in memory: `size` bytes, zeros but for `blocks` (offset to bytes)."""

    def __init__(self, size: int, blocks: Mapping[int, bytes]) -> None:
        self.plain = bytearray(size)
        self.extents: list[tuple[int, int]] = []
        for offset, data in sorted(blocks.items()):
            data = data[: size - offset]
            self.plain[offset : offset + len(data)] = data
            self.extents.append((offset, len(data)))

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.plain[offset : offset + length])


def written(form: str, disk: Disk) -> bytes:
    """What the product writes."""
    with tempfile.TemporaryFile() as out:
        write_image(form, len(disk.plain), disk.extents, disk.read, out)
        out.seek(0)
        return out.read()


def vdi(
    size: int, slots: Iterable[int], blocks: Iterable[bytes], kind: int = 1, data_at: int = 2 * MIB
) -> bytes:
    """As VirtualBox lays it out: map at 1 MiB, blocks at 2 MiB, in the order given."""
    slots, blocks = list(slots), list(blocks)
    head = bytearray(MIB)
    head[:40] = b"<<< Oracle VM VirtualBox Disk Image >>>\n"
    struct.pack_into("<IIII", head, 64, 0xBEDA107F, 0x10001, 400, kind)
    struct.pack_into("<II", head, 340, MIB, data_at)
    struct.pack_into("<I", head, 360, 512)
    struct.pack_into("<QIIII", head, 368, size, MIB, 0, len(slots), len(blocks))
    head[392:424] = bytes(range(32))
    table = b"".join(s.to_bytes(4, "little") for s in slots)
    return (bytes(head) + table).ljust(data_at, b"\0") + b"".join(b.ljust(MIB, b"\0") for b in blocks)


def deflated(data: bytes) -> bytes:
    """As QEMU does it: no zlib header, a window of 4 KiB."""
    packer = zlib.compressobj(6, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


def qcow2(
    size: int,
    clusters: Mapping[int, bytes],
    *,
    version: int = 3,
    pack: str = "",
    zeros: Iterable[int] = (),
    kept: Iterable[int] = (),
) -> bytes:
    """Clusters of 64 KiB by number, `pack` is "", "deflate" or "zstd".

    `zeros` read as zeros with nothing allocated, `kept` with a cluster of old bytes kept for them.
    Header, L1, refcount table and block, L2, data; counts are not filled in: nobody here reads them.
    """
    l2 = [0] * 8192
    body = bytearray()
    data_at = 5 * KIB64
    for number, data in clusters.items():
        data = data.ljust(KIB64, b"\0")
        at = data_at + len(body)
        if pack:
            raw = deflated(data) if pack == "deflate" else zstandard.compress(data)
            sectors = (at % 512 + len(raw) - 1) // 512
            l2[number] = 1 << 62 | sectors << 54 | at
            body += raw
        else:
            l2[number] = 1 << 63 | at
            body += data
    body += bytes(-len(body) % KIB64)
    for number in kept:
        l2[number] = 1 << 63 | data_at + len(body) | 1
        body += pattern(number, KIB64)
    for number in zeros:
        l2[number] = 1
    head = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", version, 0, 0, 16, size, 0, 1, KIB64, 2 * KIB64, 1, 0, 0
    )
    if version == 3:
        kind = 8 if pack == "zstd" else 0
        head += struct.pack(">QQQII", kind, 0, 0, 4, 112) + bytes([kind // 8]).ljust(8, b"\0")
        head += struct.pack(">II", 0x6803F857, 48) + bytes(48) + bytes(8)
    tables = [head, struct.pack(">Q", 4 * KIB64 | 1 << 63), struct.pack(">Q", 3 * KIB64), b"\0\1" * 5]
    return b"".join(t.ljust(KIB64, b"\0") for t in [*tables, struct.pack(">8192Q", *l2)]) + bytes(body)


def descriptor(sectors: int, kind: str = "streamOptimized", parent: str = "ffffffff", more: str = "") -> str:
    return (
        f'# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID={parent}\ncreateType="{kind}"\n'
        f'{more}\n# Extent description\nRW {sectors} SPARSE "any name.vmdk"\n\nddb.adapterType = "ide"\n'
    )


def stream_vmdk(size: int, grains: Mapping[int, bytes], text: str | None = None) -> bytes:
    """streamOptimized, as `ovftool` and qemu-img write it: directory and header at the end."""
    out = bytearray(512 * 128)

    def header(directory: int) -> bytes:
        return struct.pack(
            "<4sIIQQQQIQQQB4sH", b"KDMV", 3, 0x30001, size // 512, 128, 1, 20, 512, 0, directory, 128, 0,
            b"\n \r\n", 1,
        ).ljust(512, b"\0")  # fmt: skip

    def pad() -> None:
        out.extend(bytes(-len(out) % 512))

    tables: dict[int, list[int]] = {}
    for number, data in sorted(grains.items()):
        packed = zlib.compress(data.ljust(KIB64, b"\0"))
        tables.setdefault(number // 512, [0] * 512)[number % 512] = len(out) // 512
        out += struct.pack("<QI", number * 128, len(packed)) + packed
        pad()
    directory = [0] * -(-size // (512 * KIB64))
    for i, table in tables.items():
        out += struct.pack("<QII", 4, 0, 1).ljust(512, b"\0")
        directory[i] = len(out) // 512
        out += struct.pack("<512I", *table)
    out += struct.pack("<QII", 1, 0, 2).ljust(512, b"\0")
    at = len(out) // 512
    out += struct.pack(f"<{len(directory)}I", *directory)
    pad()
    out += struct.pack("<QII", 1, 0, 3).ljust(512, b"\0") + header(at) + bytes(512)
    out[:512] = header((1 << 64) - 1)
    text = descriptor(size // 512) if text is None else text
    out[512 : 512 + len(text)] = text.encode()
    return bytes(out)


def opened(path: Path, data: bytes) -> Image:
    path.write_bytes(data)
    return open_image(path)


def guest_bytes(image: Image, size: int | None = None) -> bytes:
    """Guest space by its extents, `size` bytes of it."""
    plain = bytearray(image.size if size is None else size)
    end = 0
    for offset, length in image.extents():
        assert offset >= end, "extents ascend and are disjoint"
        end = offset + length
        assert length > 0
        assert end <= image.size
        for at in range(offset, min(end, len(plain)), 256 * 1024):
            data = image.read(at, min(256 * 1024, end - at))
            plain[at : at + len(data)] = data
    return bytes(plain[: image.size if size is None else size])


def rebuilt(image: Image) -> bytes:
    """The container file by its segments."""
    parts: list[bytes] = []
    for segment in image.segments():
        match segment:
            case Guest(offset, length):
                parts.append(image.read(offset, length))
            case Literal(data):
                parts.append(data)
            case Zeros(length):
                parts.append(bytes(length))
    return b"".join(parts)
