"""Read what a hostile guest left on its scratch disk, without believing any of it.

Nobody mounts the disk.  A child process without rights, with little time and memory, parses it
and tells us on a pipe what it found; we write that down, and check each word as a peer's:

    scratch.img ──fd 3──> child: ext4 or ISO 9660, regular files only ──stdout──> Sink ──> folder

Sent are `wire` frames: `Begin` a file, `Bytes` for it (holes are not sent), at last `Done` or `Failed`.
Symbolic links, devices and paths that are not safe are left out; what is beyond the caps, or is not a
file system, refuses the whole result: it is never silently shorter.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import attrs
import trio

from p2pgrid import wire
from p2pgrid.dht.files import free
from p2pgrid.dht.manifest import safe_path
from p2pgrid.dht.store import MIN_FREE
from p2pgrid.errors import BadFrame, NoSpace, WorldError
from p2pgrid.vm.child import Limits, running
from p2pgrid.vm.findings import Begin, Bytes, Done, Failed, Told

PATIENCE = 300.0
"""Seconds for a whole disk; a sound one of 8 GiB takes about ten."""
CPU = 240
"""Seconds of CPU for the reader."""
MEMORY = 1 << 30
"""Bytes of address space of the reader: mostly Python's own libraries."""


@attrs.frozen(kw_only=True, slots=False)
class ResultsRefused(WorldError):
    """The guest's results could not be read."""

    exit_code = 7
    why: str


@attrs.frozen(kw_only=True)
class Caps:
    """How much a result may be."""

    bytes: int = 8 << 30
    """Of all files together, holes included: nobody can send a hole back as cheaply as it was made."""
    files: int = 100_000


class Sink:
    """Write down what the reader tells, inside `folder` and nowhere else; `close` it.

    `folder` is new and ours.  Raises `ResultsRefused` for anything out of order or beyond `caps`,
    `NoSpace` before less than `min_free` bytes are free.
    """

    def __init__(self, folder: Path, caps: Caps, min_free: int = MIN_FREE) -> None:
        self._root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._folder = folder
        self._caps = caps
        self._min_free = min_free
        self._file: int | None = None
        self._size = 0
        self._files = 0
        self._promised = 0
        self._written = 0
        self.done = False

    def take(self, messages: Iterable[Told]) -> None:
        for message in messages:
            if self.done:
                raise ResultsRefused(why="the reader went on after its end")
            match message:
                case Begin():
                    self._begin(message)
                case Bytes(offset, data):
                    self._write(offset, data)
                case Done():
                    self.done = True
                case Failed(why):
                    raise ResultsRefused(why=why[:300])

    def _begin(self, file: Begin) -> None:
        self._end_file()
        if not safe_path(file.path) or file.size < 0:
            raise ResultsRefused(why=f"a file named {file.path[:200]!r}")
        self._files += 1
        self._promised += file.size
        if self._files > self._caps.files:
            raise ResultsRefused(why=f"more than {self._caps.files} files")
        if self._promised > self._caps.bytes:
            raise ResultsRefused(why=f"more than {self._caps.bytes} bytes")
        self._file = self._create(file.path.split("/"), 0o755 if file.executable else 0o644)
        self._size = file.size
        os.ftruncate(self._file, file.size)

    def _create(self, parts: list[str], mode: int) -> int:
        folder = os.dup(self._root)
        try:
            for part in parts[:-1]:
                with suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=folder)
                inner = os.open(
                    part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder
                )
                os.close(folder)
                folder = inner
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(parts[-1], flags, mode, dir_fd=folder)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise ResultsRefused(why=f"two files named {'/'.join(parts)[:200]!r}") from None
        finally:
            os.close(folder)

    def _write(self, offset: int, data: bytes) -> None:
        self._written += len(data)
        if (
            self._file is None
            or offset < 0
            or offset + len(data) > self._size
            or self._written > self._promised
        ):
            raise ResultsRefused(why="bytes outside their file")
        left = free(self._folder) - len(data)
        if left < self._min_free:
            raise NoSpace(
                wanted=len(data), free=max(0, left + len(data) - self._min_free), where=str(self._folder)
            )
        view = memoryview(data)
        while view:
            count = os.pwrite(self._file, view, offset)
            view, offset = view[count:], offset + count

    def _end_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def close(self) -> None:
        self._end_file()
        os.close(self._root)


async def extract(image: Path, folder: Path, caps: Caps, patience: float = PATIENCE) -> None:
    """Copy the regular files on the scratch disk `image` to `folder`, which is empty.

    Raises `ResultsRefused` (part of the files may be there then), `NoSpace`.
    """
    sink = Sink(folder, caps)
    try:
        with trio.move_on_after(patience) as time:
            await _listen(image, sink)
        if time.cancelled_caught:
            raise ResultsRefused(why=f"reading them took more than {patience:g} s")
    except OSError as failed:
        if failed.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise ResultsRefused(why=f"they cannot be written: {failed.strerror}") from None
        raise NoSpace(wanted=sink._promised, free=free(folder), where=str(folder)) from None
    finally:
        sink.close()


async def _listen(image: Path, sink: Sink) -> None:
    ours, theirs = os.pipe()
    disk = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    limits = Limits(disk=0, memory=MEMORY, seconds=CPU)
    command = [sys.executable, "-m", "p2pgrid.vm.reader", str(disk), *limits.arguments()]
    try:
        async with (
            trio.lowlevel.FdStream(ours) as pipe,
            running(command, fds=[disk], stdout=theirs) as child,
        ):
            os.close(theirs)
            theirs = -1
            await _copy(pipe, sink)
            code = await child.wait()
    finally:
        os.close(disk)
        if theirs >= 0:
            os.close(theirs)
    if not sink.done:
        raise ResultsRefused(why=f"their reader ended early (code {code})")


async def _copy(pipe: trio.abc.ReceiveStream, sink: Sink) -> None:
    frames = wire.Frames()
    try:
        while data := await pipe.receive_some(1 << 20):
            told = [wire.decode(body, Told) for body in frames.feed(bytes(data))]
            await trio.to_thread.run_sync(sink.take, told)
    except BadFrame as bad:
        raise ResultsRefused(why=f"their reader was taken over: {bad.why}") from None
