"""Make the scratch disk: an empty ext4 file system in a sparse file.

mke2fs only ever sees a file that it has just made, so it needs no jail; it gets a time limit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import trio

from p2pgrid.errors import Misconfigured

LABEL = "SCRATCH"
FEATURES = (
    "none,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,"
    "large_file,huge_file,dir_nlink,extra_isize,metadata_csum"
)
PATIENCE = 60.0
"""Seconds; it takes 10 ms where the disk is not very slow."""
SYSTEM_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin"


def find_program(name: str, package: str) -> str:
    """The path of `name`, looked for where only root's PATH goes, too.  Raises `Misconfigured`."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":" + SYSTEM_FOLDERS)
    if path is None:
        raise Misconfigured(why=f"{name} is not installed; on Debian and Ubuntu: apt install {package}")
    return path


async def make_scratch(path: Path, size: int) -> None:
    """Write an ext4 disk of `size` bytes to `path`, which must not exist.  Its root belongs to root.

    Features are spelled out, so that every release of mke2fs makes the same disk: no journal (nobody
    recovers this one), checksums so that the tables may stay unwritten: 8 GiB take 190 KB on the host.
    """
    command = [
        find_program("mke2fs", "e2fsprogs"), "-q", "-F", "-L", LABEL, "-m", "0", "-b", "4096", "-I", "256",
        "-i", "65536", "-O", FEATURES, "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0", str(path),
    ]  # fmt: skip
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, size)
    os.close(fd)
    with trio.fail_after(PATIENCE):
        done = await trio.run_process(
            command,
            check=False,
            capture_stdout=True,
            capture_stderr=True,
            stdin=subprocess.DEVNULL,
            env={"MKE2FS_CONFIG": "/dev/null", "LC_ALL": "C"},
        )
    if done.returncode:
        raise Misconfigured(why=f"mke2fs failed: {done.stderr.decode(errors='replace').strip()[-300:]}")
