"""Pack a Linux kernel's first file system: files in a cpio, drivers in an order that loads.

No program runs here and no privilege is needed; equal input gives equal bytes.
Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs
import zstandard

# --- cpio (newc): what the kernel takes as its first file system -----------------------


@attrs.frozen
class Entry:
    """One file of the initramfs; `mode` carries the file's type."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def folder(name: str) -> Entry:
    return Entry(name, 0o040755)


def program(name: str, data: bytes) -> Entry:
    return Entry(name, 0o100755, data)


def link(name: str, target: str) -> Entry:
    return Entry(name, 0o120777, target.encode())


def cpio(entries: Iterable[Entry]) -> bytes:
    """The archive in "newc" form, everything owned by root and without times."""
    packed = bytearray()
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], start=1):
        name = entry.name.encode() + b"\0"
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
        packed += b"070701" + b"".join(b"%08X" % f for f in fields) + name
        packed += bytes(-len(packed) % 4)
        packed += entry.data
        packed += bytes(-len(packed) % 4)
    return bytes(packed)


# --- modules ---------------------------------------------------------------------------


def read_module(path: Path) -> bytes:
    """A kernel module's plain bytes; distributions keep them bare, in xz or in zstd."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data


def load_order(tree: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """`wanted` modules that `tree` (lib/modules/RELEASE) has, and all they need, in an order that loads.

    A name that is not there is built into the kernel, or not made for it: left out.  What a
    module needs is written in the module itself, so no index (depmod) has to exist.
    """
    files = {re.sub(r"\.ko(\.\w+)?$", "", f.name).replace("-", "_"): f for f in tree.rglob("*.ko*")}
    order: dict[str, bytes] = {}

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name not in files or name in order or name in above:
            return
        data = read_module(files[name])
        for needed in _needs(data):
            visit(needed, (*above, name))
        order[name] = data

    for name in wanted:
        visit(name, ())
    return order


def _needs(module: bytes) -> Iterator[str]:
    for names in re.findall(rb"\0depends=([\w,-]*)\0", module):
        yield from (n.replace("-", "_") for n in names.decode().split(",") if n)
    for soft in re.findall(rb"\0softdep=pre: ?([\w -]*)\0", module):
        yield from soft.decode().replace("-", "_").split()
