"""Remember which frames of a pack are here, so that neither kill -9 nor a power cut can lie.

Two bitmaps, bit i (LSB first) for index i, beside the frames:

    have       set right after the frame was written: true as long as the page cache lives
    durable    set only after the frames were synced: true after a power cut, too
    boot       the kernel's boot id under which `have` was written

Opened under the same boot id, the page cache has survived whatever killed us and `have`
is believed as it stands.  Under another one `durable` is believed and only
`have & ~durable` is hashed again: at most what had not been synced yet.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from p2pgrid.dht.files import Kept, explain, opened, replace, sync_folder, write_all

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """This run of the kernel; empty where the kernel does not tell, and then never trusted."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


class Marks:
    """The bits of one pack of `count` frames in `folder`.  Thread-safe.

    `check(index)` says whether the frame that lies there is the right one; it is asked
    only for bits that a power cut left in doubt.
    """

    def __init__(self, folder: Path, count: int, check: Callable[[int], bool]) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._kept = {name: Kept(folder / name, os.O_WRONLY) for name in ("have", "durable")}
        self._have = self._load("have", count)
        self._durable = self._load("durable", count)
        now = boot_id()
        if not now or _text(folder / "boot") != now:
            self._recover(count, check)
        self.count = self._have_int().bit_count()

    @staticmethod
    def create(folder: Path, bits: bytes, durable: bytes | None = None) -> None:
        """Write the bits of a new pack; those in `durable` were synced, if that is given."""
        synced = bits if durable is None else durable
        for name, data in (("have", bits), ("durable", synced), ("boot", boot_id().encode())):
            replace(folder / name, data, folder)

    def holds(self, index: int) -> bool:
        return bool(self._have[index >> 3] >> (index & 7) & 1)

    def have(self) -> bytes:
        with self._lock:
            return bytes(self._have)

    def cut(self, count: int) -> tuple[bytes, bytes]:
        """Which of the first `count` frames are here, and which of them were synced."""
        with self._lock:
            return bytes(self._have[: -(-count // 8)]), bytes(self._durable[: -(-count // 8)])

    def unsynced(self) -> list[int]:
        """Indices that a power cut would put in doubt."""
        with self._lock:
            doubt = [h & ~d for h, d in zip(self._have, self._durable, strict=True)]
        return [8 * at + bit for at, byte in enumerate(doubt) if byte for bit in range(8) if byte >> bit & 1]

    def set(self, index: int) -> bool:
        """The frame at `index` has been written.  False if it was here already."""
        with self._lock:
            if self.holds(index):
                return False
            self._write("have", self._have, index, True)
            self.count += 1
            return True

    def clear(self, index: int) -> bool:
        """The frame at `index` is rotten.  False if it was not here anyway.

        The durable bit goes first and is synced: the place is about to be written again.
        """
        with self._lock:
            if not self.holds(index):
                return False
            self._write("durable", self._durable, index, False)
            self._sync("durable")
            self._write("have", self._have, index, False)
            self.count -= 1
            return True

    def promote(self, snapshot: bytes) -> None:
        """The frames of `snapshot` (what `have` was before) have been synced."""
        with self._lock:
            kept = int.from_bytes(snapshot, "little") & self._have_int()
            bits = (int.from_bytes(self._durable, "little") | kept).to_bytes(len(self._durable), "little")
            self._durable[:] = bits
            self._store("durable", bits)

    def let_go(self) -> None:
        """Keep no file open: the folder is going."""
        for kept in self._kept.values():
            kept.let_go()

    def _recover(self, count: int, check: Callable[[int], bool]) -> None:
        for index in range(count):
            byte, bit = index >> 3, 1 << (index & 7)
            if self._durable[byte] & bit or (self._have[byte] & bit and check(index)):
                self._durable[byte] |= bit
        self._have[:] = self._durable
        # The new boot id vouches for `have`, so it is written last.
        self._store("durable", bytes(self._durable))
        self._store("have", bytes(self._have))
        replace(self._folder / "boot", boot_id().encode(), self._folder)
        sync_folder(self._folder)

    def _have_int(self) -> int:
        return int.from_bytes(self._have, "little")

    def _load(self, name: str, count: int) -> bytearray:
        """Whatever a crash left of the file, cut or filled up to `count` bits."""
        try:
            data = (self._folder / name).read_bytes()
        except FileNotFoundError:
            data = b""
        ones = _ones(count)
        return bytearray(a & b for a, b in zip(data.ljust(len(ones), b"\0"), ones, strict=False))

    def _write(self, name: str, bits: bytearray, index: int, on: bool) -> None:
        """One byte, in place, and only then in memory: a full disk must not leave us believing."""
        at, bit = index >> 3, 1 << (index & 7)
        value = bits[at] | bit if on else bits[at] & ~bit
        kept = self._kept[name]
        file = kept.descriptor()
        try:
            os.pwrite(file.fd, bytes((value,)), at)  # one byte is never written short
        except OSError as refused:
            explain(refused, kept.path)
        bits[at] = value

    def _store(self, name: str, bits: bytes) -> None:
        with opened(self._folder / name, os.O_WRONLY | os.O_CREAT) as fd:
            write_all(fd, bits, 0)
            os.fdatasync(fd)

    def _sync(self, name: str) -> None:
        with opened(self._folder / name, os.O_WRONLY) as fd:
            os.fdatasync(fd)


def _ones(count: int) -> bytes:
    return ((1 << count) - 1).to_bytes(-(-count // 8), "little")


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, UnicodeDecodeError):
        return ""
