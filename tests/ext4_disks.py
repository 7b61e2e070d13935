"""Make small ext4 file systems in which something was deleted, with e2fsprogs."""

from __future__ import annotations

import functools
import os
import random
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
MISSING = [tool for tool in ("mke2fs", "debugfs", "e2fsck", "dumpe2fs") if not shutil.which(tool, path=PATH)]

KEPT = b"this file is kept " * 30_000
KEEP, SMALL = 8, 60
DELETED = b"this file was deleted "
MIB = 1 << 20


def tool(*words: str | Path, feed: str = "", good: tuple[int, ...] = (0,)) -> str:
    environment = {**os.environ, "PATH": PATH, "LC_ALL": "C"}
    done = subprocess.run(words, input=feed, capture_output=True, text=True, env=environment)
    assert done.returncode in good, (words, done.stdout, done.stderr)
    return done.stdout


def file_system(folder: Path, *options: str, size: int = 20 * MIB) -> Path:
    """A clean file system with some files, in the middle of which others were deleted."""
    path = folder / "fs"
    path.write_bytes(_made(options, size))
    return path


@functools.lru_cache(2)
def _made(options: tuple[str, ...], size: int) -> bytes:
    with tempfile.TemporaryDirectory(prefix="p2pgrid-ext4-") as folder:
        path, source = Path(folder, "fs"), Path(folder, "source")
        (source / "small").mkdir(parents=True)
        for i in range(KEEP):
            (source / f"kept {i}").write_bytes(KEPT)
            (source / f"gone {i}").write_bytes(DELETED * (1000 + 7000 * i))
        for i in range(SMALL):
            (source / "small" / str(i)).write_bytes(random.Random(i).randbytes(i * 100))
        path.touch()
        os.truncate(path, size)
        tool("mke2fs", "-q", "-F", "-d", source, *options, path)
        gone = [f'rm "gone {i}"' for i in range(KEEP)] + [f"rm small/{i}" for i in range(0, SMALL, 3)]
        tool("debugfs", "-w", "-f", "-", path, feed="\n".join(gone) + "\n")
        tool("e2fsck", "-fy", path, good=(0, 1))  # debugfs does not count what its rm freed in every summary
        data = path.read_bytes()
        assert DELETED * 100 in data
        return data


def free_blocks(path: Path) -> tuple[int, list[tuple[int, int]]]:
    """Bytes of a block, and (first, count) of the free ones, as dumpe2fs tells them."""
    told = tool("dumpe2fs", path)
    block = int(re.search(r"^Block size: +(\d+)", told, re.MULTILINE)[1])
    runs = []
    for line in re.findall(r"^  Free blocks: (.+)$", told, re.MULTILINE):
        for run in line.split(", "):
            first, _, last = run.partition("-")
            runs.append((int(first), int(last or first) - int(first) + 1))
    return block, runs


def check(path: Path) -> None:
    """Raises unless e2fsck finds nothing, and every kept file is what it was."""
    tool("e2fsck", "-fn", path)
    with tempfile.TemporaryDirectory(prefix="p2pgrid-ext4-") as folder:
        tool("debugfs", "-R", f"rdump / {folder}", path)
        assert [Path(folder, f"kept {i}").read_bytes() == KEPT for i in range(KEEP)] == [True] * KEEP
        small = {int(file.name): file.read_bytes() for file in Path(folder, "small").iterdir()}
    assert small == {i: random.Random(i).randbytes(i * 100) for i in range(SMALL) if i % 3}


def alter(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
