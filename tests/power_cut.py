"""Cut the power: lose what was not synced, page by page, and start under another kernel.

A model of the worst that a disk may do to file *contents*: of each 4 KiB page that was
written since its file was last synced, either the old or the new bytes are there.  Names
(renames and unlinks) are taken to survive.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from unittest import mock

from p2pgrid.dht import marks

PAGE = 4096


class Power:
    """Watches syncs while `on`; `cut` makes the files under a folder what the disk might hold."""

    def __init__(self) -> None:
        self._synced: dict[int, bytes] = {}
        self._boots = 0

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        with (
            mock.patch.object(os, "fsync", self._sync),
            mock.patch.object(os, "fdatasync", self._sync),
            mock.patch.object(marks, "boot_id", self._boot_id),
        ):
            yield

    def _boot_id(self) -> str:
        return f"boot {self._boots}"

    def _sync(self, fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path.is_file():
            self._synced[os.fstat(fd).st_ino] = path.read_bytes()

    def cut(self, root: Path, random: Random) -> None:
        self._boots += 1
        for path in root.rglob("*"):
            if path.is_file():
                new = path.read_bytes()
                old = self._synced.get(path.stat().st_ino, b"")
                if old != new:
                    path.write_bytes(_torn(old, new, random))
                    self._synced[path.stat().st_ino] = path.read_bytes()


def _torn(old: bytes, new: bytes, random: Random) -> bytes:
    size = random.choice((len(old), len(new)))
    pages = []
    for at in range(0, size, PAGE):
        source = random.choice((old, new))
        pages.append(source[at : at + PAGE].ljust(min(PAGE, size - at), b"\0")[: size - at])
    return b"".join(pages)
