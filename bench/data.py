"""Build the disks of the benchmarks: a Debian with compilers, the same upgraded, the same rebuilt.

    python -m bench.data [--facts]        as root; minutes, once

    v1     Debian 12, kernel, compilers, git, vim, python: 1.2 GiB of data in a disk of 2.4 GiB
    v2     v1 upgraded *in place* by apt: openssl, ssh, curl, sudo; nginx, htop, tmux and strace
           are new.  The file system is v1's: what apt replaced lies freed on the disk
    v2r    the tree of v2 laid out afresh, by another file system: what a rebuilt image looks like

Each is there as a raw disk (.raw, sparse) and as a VDI (.vdi), which is what a peer that moves files is
given.  v1 gets the newest version *but one* that the distribution's own sources serve of the packages in
`UPGRADED`, so that an upgrade has something to do.

What exists is not built again; a file has its name only when it is whole.  Mounts live in a
mount namespace that ends with its last process, so nothing stays behind, whatever happens.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard
from blake3 import blake3

from bench.lab import stoppable
from p2pgrid.vm import debian
from p2pgrid.vm.boot_disk import PARTITION, mke2fs, write_disk
from p2pgrid.vm.distribution import need, run

MIB = 1 << 20
DISK = 2500 * MIB
"""Bytes of guest space; about half of it is never written."""
PACKAGES = (
    *("gcc", "g++", "libc6-dev", "make", "git", "vim", "python3-numpy", "linux-image-amd64"),
    *("openssh-server", "ca-certificates", "iproute2"),
)
UPGRADED = (
    *("openssl", "libssl3", "openssh-client", "openssh-server", "openssh-sftp-server"),
    *("curl", "libcurl4", "libcurl3-gnutls", "sudo"),
)
NEW = ("nginx", "htop", "tmux", "strace")
BLOCK = 4096
"""Bytes; ext4 places files at multiples of it, so what two disks share, they share in such blocks."""
GROUP = 16
"""Blocks compressed together when the size of an update is estimated: 64 KiB."""

UPGRADE = f"""
set -eu
mount -t proc proc "$1/proc"
mount --bind /dev "$1/dev"
for folder in tmp run var/lib/apt/lists var/cache/apt; do mount -t tmpfs none "$1/$folder"; done
mkdir "$1/var/cache/apt/archives" "$1/var/cache/apt/archives/partial"
: > "$1/etc/resolv.conf"
mount --bind /etc/resolv.conf "$1/etc/resolv.conf"
mount --bind /etc/hosts "$1/etc/hosts"
printf '#!/bin/sh\\nexit 101\\n' > "$1/usr/sbin/policy-rc.d"
chmod +x "$1/usr/sbin/policy-rc.d"
apt="chroot $1 apt-get -q -o APT::Sandbox::User=root -o APT::Install-Recommends=false"
$apt update
$apt -y install {" ".join((*UPGRADED, *NEW))}
umount "$1/etc/resolv.conf" "$1/etc/hosts"
rm "$1/etc/resolv.conf" "$1/usr/sbin/policy-rc.d"
for folder in proc dev tmp run var/lib/apt/lists var/cache/apt; do umount "$1/$folder"; done
"""
"""Shell: upgrade the tree "$1".  Lists and packages go to memory: they are no part of what is measured."""


def folder() -> Path:
    """Where the disks are kept: below XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "p2pgrid-bench"


def disk(
    name: str, tell: Callable[[str], None] = lambda what: print(f"data: {what}", file=sys.stderr)
) -> Path:
    """The file `name` ("v1.vdi", "v2r.raw"), built if it is missing.

    Needs root, the programs of a template, and the distribution's package sources.  Raises `Misconfigured`.
    """
    place = folder()
    place.mkdir(parents=True, exist_ok=True)
    out = place / name
    if not out.exists():
        with tempfile.TemporaryDirectory(prefix=".work-", dir=place) as scratch:
            work = Path(scratch)
            tell(f"build {name}")
            _build(name, work, tell)
            os.replace(work / name, out)
    return out


def _build(name: str, work: Path, tell: Callable[[str], None]) -> None:
    """Make `work`/`name` from what it is made of."""
    if name.endswith(".vdi"):
        run(["qemu-img", "convert", "-f", "raw", "-O", "vdi", disk(f"{name[:-4]}.raw", tell), work / name])
    elif name == "v1.raw":
        debian.build(work, [*PACKAGES, *previous()], tell)
        _lay_out(work / "partition", 0, work, work / name)
        shutil.copytree(work / "packages", folder() / "grub", dirs_exist_ok=True, symlinks=True)
    elif name == "v2.raw":
        run(["cp", "--sparse=always", disk("v1.raw", tell), work / name])
        tell("upgrade it in place")
        _mounted(work / name, PARTITION, "rw", work, UPGRADE)
    elif name == "v2r.raw":
        older = disk("v2.raw", tell)
        (work / "packages").symlink_to(folder() / "grub")
        _lay_out(older, PARTITION, work, work / name)
    else:
        raise ValueError(f"there is no disk {name}")


def previous() -> list[str]:
    """`package=version` for each of `UPGRADED`: the newest version but one that the sources still serve."""
    found = []
    for package in UPGRADED:
        rows = run(["apt-cache", "madison", package]).splitlines()
        versions = {row.split("|")[1].strip() for row in rows if "Sources" not in row}
        ranked = sorted(versions, key=functools.cmp_to_key(_compare))
        found.append(f"{package}={ranked[-2 if len(ranked) > 1 else -1]}")
    return found


def _compare(one: str, other: str) -> int:
    """Order versions as dpkg does."""
    script = 'dpkg --compare-versions "$0" lt "$1" && echo -1 || echo 1'
    return int(run(["sh", "-c", script, one, other]))


def _lay_out(image: Path, offset: int, work: Path, out: Path) -> None:
    """Make the disk `out` with a new file system that has the files of the one at `offset` in `image`."""
    partition = work / "partition.new"
    words = list(map(str, mke2fs(partition, _tree(work), DISK - PARTITION, "P2PROOT", "ext4")))
    seed = "70327067-7269-6400-8000-" + blake3(out.name.encode()).hexdigest(6)
    place = words.index("-d")  # what is said last counts: another identity, another order of names
    words[place:place] = ["-U", seed, "-E", f"hash_seed={seed},root_owner=0:0"]
    _mounted(image, offset, "ro,noload", work, shlex.join(words))
    write_disk(out, work / "packages", "configfile /boot/grub/grub.cfg\n", partition)


def _tree(work: Path) -> Path:
    return work / "tree.mounted"


def _mounted(image: Path, offset: int, options: str, work: Path, script: str) -> None:
    """Run the shell `script` with "$1" the tree in `image`, in a mount namespace of its own."""
    tree = _tree(work)
    tree.mkdir(exist_ok=True)
    whole = f"""set -eu
mount -o loop,offset={offset},{options} {shlex.quote(str(image))} "$1"
{script}
umount "$1"
"""
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    run([*unshare, "sh", "-c", whole, "sh", tree])


def blocks(image: Path) -> Iterator[tuple[bytes, bytes]]:
    """(name, bytes) of each block of a raw disk that is not zero."""
    zero = bytes(BLOCK)
    with image.open("rb") as file:
        while part := file.read(4 * MIB):
            for at in range(0, len(part), BLOCK):
                block = part[at : at + BLOCK]
                if block != zero:
                    yield blake3(block).digest(16), block


def facts() -> dict[str, dict[str, float]]:
    """Sizes, and for each disk the data that v1 does not have: MB, after dropping zero and double blocks."""
    known: set[bytes] = set()
    found = {}
    for name in ("v1", "v2", "v2r"):
        fresh: dict[bytes, bytes] = {}
        filled = 0
        for key, block in blocks(disk(f"{name}.raw")):
            filled += 1
            if key not in known:
                fresh.setdefault(key, block)
        found[name] = {
            "vdi_mb": disk(f"{name}.vdi").stat().st_size / 1e6,
            "raw_mb": disk(f"{name}.raw").stat().st_size / 1e6,
            "filled_mb": filled * BLOCK / 1e6,
            "new_mb": len(fresh) * BLOCK / 1e6,
            "new_zstd_mb": _squeezed(list(fresh.values())) / 1e6,
        }
        known = known or set(fresh)
    return {name: {key: round(value, 1) for key, value in row.items()} for name, row in found.items()}


def _squeezed(data: list[bytes]) -> int:
    press = zstandard.ZstdCompressor(level=3)
    return sum(len(press.compress(b"".join(data[at : at + GROUP]))) for at in range(0, len(data), GROUP))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Let nobody else build here meanwhile; what one who was killed left goes first."""
    folder().mkdir(parents=True, exist_ok=True)
    with (folder() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder().glob(".work-*"):
            shutil.rmtree(left)
        yield


ALL = ("v1.raw", "v1.vdi", "v2.raw", "v2.vdi", "v2r.raw", "v2r.vdi")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--facts", action="store_true", help="print what the disks share, too")
    given = arguments.parse_args()
    need(("qemu-img", "qemu-utils"), ("unshare", "util-linux"), ("mount", "mount"))
    with stoppable(), _alone():
        for name in ALL:
            print(disk(name))
    if given.facts:
        print(json.dumps(facts(), indent=4))


if __name__ == "__main__":
    main()
