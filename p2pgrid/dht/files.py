"""Put bytes into files so that they are whole or absent, and say clearly when there is no room.

Every write of the store goes through here: what the disk refuses becomes `NoSpace` or
`Temporary`, a file that was dropped meanwhile `NotFound`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from p2pgrid.errors import NoSpace, NotFound, Temporary

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
KEPT_MAX = 96
"""Files that are kept open between uses, over all packs: a node may hold thousands of small ones."""


class Descriptor:
    """An open file, closed when nobody refers to it any more: hold on to it while using `fd`."""

    __slots__ = ("fd",)

    def __init__(self, path: Path, flags: int) -> None:
        self.fd = -1
        self.fd = os.open(path, flags | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class Kept:
    """A file that stays open between uses.  Thread-safe.

    Opening and closing cost more than reading a chunk.  Where too many are kept, the one opened
    longest ago is let go of, and opened again when it is used.
    """

    _lock = threading.Lock()
    _open: OrderedDict[Kept, None] = OrderedDict()

    def __init__(self, path: Path, flags: int) -> None:
        self.path = path
        self._flags = flags
        self._descriptor: Descriptor | None = None

    def descriptor(self) -> Descriptor:
        """Raises what `opened` raises."""
        return self._descriptor or self._reopen()

    def let_go(self) -> None:
        """Before the file goes: who uses it next finds it gone."""
        with self._lock:
            self._open.pop(self, None)
            self._descriptor = None

    def _reopen(self) -> Descriptor:
        with self._lock:  # while opening, too: let go of after a rename, nothing old comes back
            try:
                descriptor = self._descriptor = Descriptor(self.path, self._flags)
            except OSError as refused:
                explain(refused, self.path)
            self._open[self] = None
            if len(self._open) > KEPT_MAX:
                other, _ = self._open.popitem(last=False)
                other._descriptor = None
        return descriptor


@contextlib.contextmanager
def opened(path: Path, flags: int, mode: int = 0o644) -> Iterator[int]:
    """A descriptor of `path` for a moment; the errors of this module's opening."""
    with explained(path):
        fd = os.open(path, flags | os.O_CLOEXEC, mode)
        try:
            yield fd
        finally:
            os.close(fd)


@contextlib.contextmanager
def explained(path: Path, wanted: int = 0) -> Iterator[None]:
    """Turn what the operating system says of `path` into an error for people."""
    try:
        yield
    except OSError as refused:
        explain(refused, path, wanted)


def explain(refused: OSError, path: Path, wanted: int = 0) -> NoReturn:
    """Raise for people what the operating system says of `path`."""
    if isinstance(refused, FileNotFoundError):
        raise NotFound(what=str(path)) from None
    if refused.errno in FULL:
        raise NoSpace(wanted=wanted, free=free(path.parent), where=str(path.parent)) from None
    raise Temporary(why=f"the disk refused {path}: {refused.strerror}") from refused


def free(folder: Path) -> int:
    """Bytes that an ordinary user may still write to the file system of `folder`."""
    try:
        about = os.statvfs(folder)
    except OSError:
        return 0
    return about.f_bavail * about.f_frsize


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """All of `data` at `offset`: a disk that runs full writes short first."""
    rest = memoryview(data)
    while rest:
        done = os.pwrite(fd, rest, offset)
        rest = rest[done:]
        offset += done


def replace(path: Path, data: bytes, scratch: Path) -> None:
    """Make `path` hold `data`, or leave it as it was; `scratch` is a folder of the same file system.

    The file is synced, its name is not: `sync_folder` where that matters.
    """
    temporary = scratch / f"{secrets.token_hex(8)}.tmp"
    try:
        with opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
            write_all(fd, data, 0)
            os.fsync(fd)
        with explained(path):
            os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    with opened(folder, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)
