"""Decide whether more bytes may be kept: what the owner allows, and what the file system has left.

Packs count in full from the moment they are begun, objects as long as they are; what begun
packs still lack is taken for used.  Looking at it costs what is incomplete, not what is held.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from p2pgrid.dht.files import free
from p2pgrid.errors import NoSpace
from p2pgrid.ids import Cid


class Room:
    """The bytes under `root`.  Thread-safe."""

    def __init__(self, root: Path, quota: int | None, min_free: int) -> None:
        self._root = root
        self._quota = quota
        self.min_free = min_free
        """May change at any time: what else on this disk is spoken for."""
        self._lock = threading.RLock()
        self._used = 0
        self._packs: dict[Cid, int] = {}
        self._unwritten: dict[Cid, Path] = {}
        """Frames of packs that had holes when they were looked at last."""

    @property
    def used(self) -> int:
        """Bytes that count for the quota."""
        with self._lock:
            return self._used

    def check(self, wanted: int, written: int = 0) -> None:
        """Raise `NoSpace` unless `wanted` more bytes may be kept, `written` of them on the disk already."""
        with self._lock:
            if self._quota is not None and wanted > self._quota - self._used:
                left = max(self._quota - self._used, 0)
                raise NoSpace(wanted=wanted, free=left, where=f"the quota of {self._root}")
            left = free(self._root) - self.min_free - self._promised()
            if wanted - written > left:
                raise NoSpace(wanted=wanted - written, free=max(left, 0), where=str(self._root))

    def take(self, count: int) -> None:
        """Count `count` more bytes.  Raises `NoSpace`."""
        with self._lock:
            self.check(count)
            self._used += count

    def take_pack(self, pack: Cid, frames: Path, size: int, written: int) -> None:
        """Count a pack of `size` bytes, whose file will be `frames`.  Raises `NoSpace`."""
        with self._lock:
            self.check(size, written)
            self.count_pack(pack, frames, size)

    def grow_pack(self, pack: Cid, frames: Path, size: int) -> None:
        """Count a pack as `size` bytes that was counted as fewer.  Raises `NoSpace`."""
        with self._lock:
            self.check(size - self._packs.get(pack, 0))
            self.count_pack(pack, frames, size)

    def count(self, count: int) -> None:
        """Count bytes that are here whatever is allowed; negative when they have gone."""
        with self._lock:
            self._used += count

    def count_pack(self, pack: Cid, frames: Path, size: int) -> None:
        """Count a pack that is here whatever is allowed."""
        with self._lock:
            self.forget_pack(pack)
            self._used += size
            self._packs[pack] = size
            self._unwritten[pack] = frames

    def forget_pack(self, pack: Cid) -> None:
        with self._lock:
            self._used -= self._packs.pop(pack, 0)
            self._unwritten.pop(pack, None)

    def _promised(self) -> int:
        """Bytes that begun packs still lack.  What was written once stays written."""
        promised = 0
        for pack, frames in list(self._unwritten.items()):
            lacking = self._packs[pack]
            with contextlib.suppress(FileNotFoundError):
                lacking -= frames.stat().st_blocks * 512
            if lacking <= 0:
                del self._unwritten[pack]
            promised += max(lacking, 0)
        return promised
