"""Make a disk that a BIOS can boot, without mounting anything: file system, GRUB, partition table.

    sector 0         boot.img: GRUB's first 440 bytes, then our partition table
    sector 1 …       core.img: GRUB with the drivers it needs to read the partition
    1 MiB …          one partition with the file system, to the end

boot.img looks for core.img in sector 1, so nothing has to be patched and no GRUB
program ever touches a disk of this machine.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3

from p2pgrid.errors import Misconfigured
from p2pgrid.vm.distribution import run

SECTOR = 512
MIB = 1 << 20
PARTITION = MIB
"""Where the partition starts, in bytes: what every partitioning program does today."""

GRUB_MODULES = ("biosdisk", "part_msdos", "ext2", "linux", "normal", "configfile", "test")
EPOCH = "1600000000"
"""Seconds; the time of all that we write, so that the same packages give the same bytes."""

Extents = list[tuple[int, int]]
"""Where a raw disk may hold data: (offset, length) in bytes, ascending, disjoint."""


def mke2fs(out: Path | str, root: Path | str, size: int, label: str, kind: str) -> list[str | Path]:
    """The command that makes a file system of `size` bytes in `out` with the files below `root`.

    `kind` is ext2 or ext4, with features that GRUB 2.06 can read whatever the defaults are.
    """
    identity = "70327067-7269-6400-8000-" + blake3(label.encode()).hexdigest(6)
    features = "filetype,sparse_super,large_file,dir_index,resize_inode,ext_attr"
    if kind == "ext4":
        features += ",has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize"
    words = ["mke2fs", "-q", "-F", "-t", kind, "-m", "0", "-O", f"none,{features}", "-L", label]
    words += ["-U", identity, "-E", f"hash_seed={identity},root_owner=0:0"]
    return [*words, "-d", root, out, f"{size // 1024}k"]


def write_disk(out: Path, grub: Path, config: str, partition: Path) -> tuple[int, Extents]:
    """Write a raw disk: GRUB, which runs the commands of `config`, and one partition.

    `grub` is the folder into which the packages grub-common and grub-pc-bin were unpacked.
    Returns the disk's size and where data may be.  Raises `Misconfigured`.
    """
    boot, core = _grub(grub, config, out.with_name("core.img"))
    length = partition.stat().st_size
    assert length % SECTOR == 0
    if len(boot) != SECTOR or SECTOR + len(core) > PARTITION:
        raise Misconfigured(why="the boot loader does not fit in front of the partition")
    extents = [(0, PARTITION)]
    with out.open("wb") as disk, partition.open("rb") as file:
        disk.truncate(PARTITION + length)
        disk.write(boot[:440] + _table(length) + core)
        for at in _allocated(file.fileno(), length):
            file.seek(at)
            data = file.read(MIB)
            if data.count(0) != len(data):
                disk.seek(PARTITION + at)
                disk.write(data)
                extents.append((PARTITION + at, len(data)))
    return PARTITION + length, extents


def _allocated(file: int, length: int) -> Iterator[int]:
    """Offsets of the MiB of a sparse file that may hold data."""
    at = 0
    while at < length:
        try:
            at = max(at, os.lseek(file, at, os.SEEK_DATA) // MIB * MIB)
        except OSError as none_left:
            if none_left.errno == errno.ENXIO:
                return
            raise
        yield at
        at += MIB


def _grub(tree: Path, config: str, core: Path) -> tuple[bytes, bytes]:
    source = core.with_name("grub.cfg")
    source.write_text(config)
    words: list[str | Path] = [tree / "usr/bin/grub-mkimage", "-O", "i386-pc", "-o", core, "-c", source]
    words += ["-d", tree / "usr/lib/grub/i386-pc", "-p", "(,msdos1)/boot/grub", *GRUB_MODULES]
    libraries = f"{tree}/lib/x86_64-linux-gnu:{tree}/usr/lib/x86_64-linux-gnu"
    run(words, env={"LD_LIBRARY_PATH": libraries})
    return (tree / "usr/lib/grub/i386-pc/boot.img").read_bytes(), core.read_bytes()


def _table(length: int) -> bytes:
    """Disk signature, one active Linux partition, boot signature: the last 72 bytes of sector 0."""
    unset_geometry = b"\xfe\xff\xff"
    entry = b"\x80" + unset_geometry + b"\x83" + unset_geometry
    entry += (PARTITION // SECTOR).to_bytes(4, "little") + (length // SECTOR).to_bytes(4, "little")
    return b"P2PG" + bytes(2) + entry + bytes(48) + b"\x55\xaa"
