"""Parse a scratch disk, in a child that has given up every right, and tell of its regular files.

Run as `python -m p2pgrid.vm.reader FD PARENT UID FILES DISK MEMORY SECONDS`; speaks to `results.py`
on stdout.  Everything is imported before the rights go: the libraries may lie where only their owner
can read.  What is known to go wrong is told as `Failed`; anything else ends this process, which refuses
the result as well.
"""

from __future__ import annotations

import _strptime  # type: ignore[import-not-found]
import encodings.utf_16_be
import os
import sys
from collections.abc import Iterator
from typing import Any

import ext4
from pycdlib import PyCdlib
from pycdlib.pycdlibexception import PyCdlibException

from p2pgrid import wire
from p2pgrid.dht.manifest import safe_path
from p2pgrid.vm.findings import PIECE, Begin, Bytes, Done, Failed, Told
from p2pgrid.vm.jail import lock_down

LATE = (_strptime, encodings.utf_16_be)
"""What pycdlib would import when it needs it: too late."""
EXT4_MAGIC_AT, EXT4_MAGIC = 1024 + 56, b"\x53\xef"
INCOMPATIBLE_AT = 1024 + 96
EXTENTS = 0x40
READABLE = 0x2 | EXTENTS | 0x80 | 0x200 | 0x2000 | 0x4000
"""filetype, extent, 64bit, flex_bg, csum_seed, largedir: of disks with more (inline data, a journal that
must be replayed, encryption) the library would leave files out without a word."""
ISO_MAGIC_AT, ISO_MAGIC = 32768, b"\x01CD001"
REGULAR, FOLDER = 0o10, 0o04
"""The two kinds of inode looked at; everything else is left out."""


class Unreadable(Exception):
    """The disk is not what it should be."""


def tell_disk(fd: int) -> Iterator[Told]:
    """All regular files on the disk, whatever its file system."""
    if os.pread(fd, 2, EXT4_MAGIC_AT) == EXT4_MAGIC:
        yield from tell_ext4(fd)
    elif os.pread(fd, 6, ISO_MAGIC_AT) == ISO_MAGIC:
        yield from tell_iso(fd)
    else:
        raise Unreadable("the scratch disk holds neither ext4 nor ISO 9660")
    yield Done()


# --- ext4 ------------------------------------------------------------------------------


def tell_ext4(fd: int) -> Iterator[Told]:
    features = int.from_bytes(os.pread(fd, 4, INCOMPATIBLE_AT), "little")
    if features & ~READABLE or not features & EXTENTS:
        raise Unreadable(
            f"the scratch disk is an ext4 of a kind that is not read here (features {features:#x})"
        )
    volume = ext4.Volume(os.fdopen(fd, "rb", closefd=False))
    yield from _tell_folder(fd, volume, volume.root, "", {int(volume.root.i_no)})


def _tell_folder(fd: int, volume: Any, folder: Any, above: str, seen: set[int]) -> Iterator[Told]:
    for entry, _kind in folder.opendir():
        path = above + bytes(entry.name_bytes).decode("utf-8", "surrogateescape")
        number = int(entry.inode)
        if path == "lost+found" or not number or not safe_path(path):
            continue
        inode = volume.inodes[number]
        kind = int(inode.i_mode) >> 12
        if kind in (FOLDER, REGULAR) and not inode.has_extents:
            raise Unreadable(f"{path[:100]!r} is stored in a way that is not read here")
        if kind == FOLDER and number not in seen:  # a folder inside itself is read once
            seen.add(number)
            yield from _tell_folder(fd, volume, inode, path + "/", seen)
        elif kind == REGULAR:
            yield Begin(path, int(inode.i_size), bool(int(inode.i_mode) & 0o100))
            yield from _tell_file(fd, volume, inode)


def _tell_file(fd: int, volume: Any, inode: Any) -> Iterator[Told]:
    size = int(inode.i_size)
    block = int(volume.block_size)
    for extent in inode.extents:
        if not extent.is_initialized:  # reserved, never written: zeros
            continue
        start = int(extent.ee_block) * block
        end = min(start + int(extent.len) * block, size)
        at = int(extent.ee_start) * block - start
        yield from _pieces(fd, start, end, at)


def _pieces(fd: int, start: int, end: int, shift: int) -> Iterator[Told]:
    """File bytes `start` to `end`, which lie on the disk `shift` bytes further."""
    for offset in range(start, end, PIECE):
        length = min(PIECE, end - offset)
        data = os.pread(fd, length, offset + shift)
        if len(data) != length:
            raise Unreadable("a file lies past the end of the disk")
        if data.count(0) != length:
            yield Bytes(offset, data)


# --- ISO 9660 --------------------------------------------------------------------------


def tell_iso(fd: int) -> Iterator[Told]:
    iso = PyCdlib()
    iso.open_fp(os.fdopen(fd, "rb", closefd=False))
    if not iso.has_rock_ridge():
        raise Unreadable("the scratch disk's ISO 9660 has no Rock Ridge names")
    for above, _folders, files in iso.walk(rr_path="/"):
        for name in files:
            path = f"{above.strip('/')}/{name}".lstrip("/")
            record = iso.get_record(rr_path=f"/{path}")
            if not safe_path(path) or not record.is_file() or record.rock_ridge.is_symlink():
                continue
            mode = record.rock_ridge.get_file_mode()
            if mode >> 12 != REGULAR:
                continue
            yield Begin(path, record.get_data_length(), bool(mode & 0o100))
            yield from _pieces(fd, 0, record.get_data_length(), record.extent_location() * 2048)


def main() -> None:
    fd, *limits = (int(word) for word in sys.argv[1:])
    out = sys.stdout.buffer
    lock_down(*limits)
    try:
        for told in tell_disk(fd):
            out.write(wire.encode(told))
    except BrokenPipeError:
        return
    except (Unreadable, PyCdlibException, ext4.MagicError, ext4.ChecksumError, ValueError, OSError) as broken:
        out.write(wire.encode(Failed(f"{type(broken).__name__}: {broken}"[:300])))
    out.flush()


if __name__ == "__main__":
    main()
