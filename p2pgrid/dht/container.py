r"""Say where a guest's bytes lie in a container file, and read them from there.

No format is known here: `vdi.py`, `qcow2.py` and `vmdk.py` read a file's maps and hand over
`Runs`; `Mapped` answers for all of them.  Memory follows the maps that are really in
the file, never the size that a header claims.

    guest space   |--a--|······|--b--|--c--|······       · nothing allocated: zeros
                      \            |   /
    file       | maps |--b--|--a--|--c--|  ?  |          ? outside: literal bytes or zeros

Two claims on the same byte of the file are refused: then every byte of the file is either
one guest byte or outside the guest's space, and `segments` puts the file together again.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import os
import stat
import sys
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal as Among

from p2pgrid.dht.manifest import LITERAL_MAX, SIZE_MAX, Guest, Literal, Segment, Zeros
from p2pgrid.errors import ImageRefused, Misused, NotFound

SECTOR = 512
STRIDE = 1 << 20
"""Bytes that a writer asks of `read` at once: whole chunks, and whole blocks of every format."""
SORTED = 1 << 15
"""Runs that are sorted at a time: as Python's integers they take twenty times their room."""
CONVERT = "convert it with qemu-img convert on a machine you trust"

Extents = Iterable[tuple[int, int]]
Read = Callable[[int, int], bytes]
Unpack = Callable[[int, int, int], bytes]
"""(guest offset, file offset, packed bytes) -> the plain bytes from that guest offset on."""


class Source:
    """A regular file that only this process's reading may depend on.  Owns its descriptor."""

    def __init__(self, path: Path) -> None:
        """Raises `NotFound` and `Misused`."""
        self.path = path
        try:
            # A FIFO would block here without a writer.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(what=str(path)) from None
        except (OSError, ValueError) as broken:
            why = broken.strerror if isinstance(broken, OSError) else str(broken)
            raise Misused(why=f"{path} cannot be read: {why}") from None
        status = os.fstat(self._fd)
        why = ""
        if stat.S_ISDIR(status.st_mode):
            why = f"{path} is a directory, not a disk image"
        elif not stat.S_ISREG(status.st_mode):
            why = f"{path} is not a regular file; copy the device into a file first"
        elif status.st_size == 0:
            why = f"{path} is empty"
        if why:
            os.close(self._fd)
            raise Misused(why=why)
        self.file_size = status.st_size
        self._stamp = (status.st_size, status.st_mtime_ns)
        self._data = (0, 0)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def refusal(self, why: str) -> ImageRefused:
        return ImageRefused(path=str(self.path), why=why)

    def need(self, ok: bool, why: str) -> None:
        if not ok:
            raise self.refusal(why)

    def pread(self, offset: int, length: int, what: str = "its data") -> bytes:
        """Exactly `length` bytes."""
        self.need(offset + length <= self.file_size, f"the file ends inside {what}; it is truncated")
        parts: list[bytes] = []
        while length:
            try:
                part = os.pread(self._fd, length, offset)
            except OSError as broken:
                raise self.refusal(f"{what} cannot be read: {broken.strerror}") from None
            self.need(len(part) > 0, "the file became shorter while it was read")
            if not parts and len(part) == length:
                return part
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)

    def pread_into(self, offset: int, view: memoryview) -> None:
        """Fill `view`, which is somebody's buffer: nothing is allocated."""
        self.need(offset + len(view) <= self.file_size, "the file ends inside its data; it is truncated")
        while view:
            try:
                count = os.preadv(self._fd, [view], offset)
            except OSError as broken:
                raise self.refusal(f"its data cannot be read: {broken.strerror}") from None
            self.need(count > 0, "the file became shorter while it was read")
            view = view[count:]
            offset += count

    def table(
        self, code: Among["I", "Q"], offset: int, count: int, order: Among["big", "little"], what: str
    ) -> array[int]:
        """`count` unsigned integers of 4 or 8 bytes."""
        numbers = array(code)
        numbers.frombytes(self.pread(offset, count * numbers.itemsize, what))
        if order != sys.byteorder:
            numbers.byteswap()
        return numbers

    def data(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of what is not a hole of the file system in this part of the file."""
        end = offset + length
        while offset < end:
            start, stop = self._data
            if not start <= offset < stop:
                start, stop = self._data = self._find(offset)
            if start >= end:
                return
            offset = max(offset, start)
            stop = min(stop, end)
            yield offset, stop - offset
            offset = stop

    def _find(self, offset: int) -> tuple[int, int]:
        """The first run of data at or behind `offset`."""
        try:
            start = os.lseek(self._fd, offset, os.SEEK_DATA)
            return start, os.lseek(self._fd, start, os.SEEK_HOLE)
        except OSError as broken:
            if broken.errno == errno.ENXIO:
                return sys.maxsize, sys.maxsize
            return offset, sys.maxsize  # this file system does not tell

    def check_unchanged(self) -> None:
        """Raises `ImageRefused` if somebody wrote to the file since it was opened."""
        status = os.fstat(self._fd)
        self.need(
            (status.st_size, status.st_mtime_ns) == self._stamp,
            "it changed while it was read; stop the program that writes to it and try again",
        )


class Runs:
    """Claims on the file in guest order: neighbours in both spaces are one run.

    `packed` is 0, or how many bytes of the file hold the run compressed.
    """

    def __init__(self) -> None:
        self.guest = array("Q")
        self.host = array("Q")
        self.length = array("Q")
        self.packed = array("Q")

    def add(self, guest: int, host: int, length: int, packed: int = 0) -> None:
        if self.guest and not packed and not self.packed[-1]:
            last = self.length[-1]
            if self.host[-1] + last == host and self.guest[-1] + last == guest:
                self.length[-1] = last + length
                return
        self.guest.append(guest)
        self.host.append(host)
        self.length.append(length)
        self.packed.append(packed)

    def reserve(self, host: int, length: int) -> None:
        """Claim a part of the file that is not the guest's."""
        self.add(host, host, length)

    def in_file_order(self) -> Iterable[int]:
        """Indices of the runs by their place in the file."""
        host = self.host
        if all(a <= b for a, b in itertools.pairwise(host)):
            return range(len(host))
        cuts = (range(len(host))[first : first + SORTED] for first in range(0, len(host), SORTED))
        pieces = [array("I", sorted(cut, key=host.__getitem__)) for cut in cuts]
        return heapq.merge(*pieces, key=host.__getitem__)

    def claims(self) -> Iterator[tuple[int, int]]:
        """(offset, length) in file order.

        Packed runs may share a sector, and their length is an upper bound: only the first byte is theirs.
        """
        for i in self.in_file_order():
            yield self.host[i], 1 if self.packed[i] else self.length[i]


def check_claims(source: Source, *runs: Runs) -> None:
    """Raises `ImageRefused` unless all claims lie apart from each other and inside the file."""
    end = 0
    for start, length in heapq.merge(*(each.claims() for each in runs)):
        source.need(start >= end, f"byte {start} of the file is claimed twice by its header and maps")
        end = start + length
    source.need(
        end <= source.file_size, "its map points past the end of the file; it is truncated or corrupt"
    )


def check_size(source: Source, size: int) -> None:
    source.need(size > 0, "it claims a disk of no bytes")
    source.need(size <= SIZE_MAX, f"it claims a disk of {size} bytes; {SIZE_MAX} is the most")
    source.need(size % SECTOR == 0, f"it claims a disk of {size} bytes, which is not a multiple of {SECTOR}")


class Mapped:
    """An image whose guest bytes lie in the file as `runs` say.  Owns `source`; thread-safe."""

    def __init__(
        self, source: Source, form: str, size: int, runs: Runs, unpack: Unpack | None = None
    ) -> None:
        self.format = form
        self.size = size
        self.exact = unpack is None
        self.file_size = source.file_size
        self.freed = 0
        self._source = source
        self._runs = runs
        self._unpack = unpack
        self._kept = threading.local()  # what a thread unpacked last: the next chunk often lies in it

    def close(self) -> None:
        self._source.close()

    def check_unchanged(self) -> None:
        self._source.check_unchanged()

    def refusal(self, why: str) -> ImageRefused:
        return self._source.refusal(why)

    def extents(self) -> Iterator[tuple[int, int]]:
        """Parts of guest space that may hold data; at their end the file must be unchanged."""
        start = end = 0
        for offset, length in self._extents():
            if offset != end:
                if end > start:
                    yield start, end - start
                start = offset
            end = offset + length
        if end > start:
            yield start, end - start
        self.check_unchanged()

    def _extents(self) -> Iterator[tuple[int, int]]:
        runs = self._runs
        for guest, host, length, packed in zip(runs.guest, runs.host, runs.length, runs.packed, strict=True):
            if packed:
                yield guest, length
            else:
                for at, span in self._source.data(host, length):
                    yield guest + at - host, span

    def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the guest's bytes from `offset` on."""
        end = offset + len(view)
        assert 0 <= offset <= end <= self.size
        guest, host, lengths = self._runs.guest, self._runs.host, self._runs.length
        i = max(bisect_right(guest, offset) - 1, 0)
        while view:
            skip = offset - guest[i] if i < len(guest) else offset - end
            if skip < 0:
                span = min(-skip, len(view))
                view[:span] = bytes(span)
            else:
                span = max(min(lengths[i] - skip, len(view)), 0)
                if span and self._runs.packed[i]:
                    view[:span] = self._unpacked(i)[skip : skip + span]
                elif span:
                    self._source.pread_into(host[i] + skip, view[:span])
                i += 1
            view = view[span:]
            offset += span

    def _unpacked(self, i: int) -> bytes:
        last: tuple[int, bytes] = getattr(self._kept, "last", (-1, b""))
        if last[0] != i:
            assert self._unpack is not None
            runs = self._runs
            data = self._unpack(runs.guest[i], runs.host[i], runs.packed[i])
            self._source.need(len(data) >= runs.length[i], "a compressed block is shorter than it must be")
            last = self._kept.last = (i, data)
        return last[1]

    def segments(self) -> Iterator[Segment]:
        """The file from its first to its last byte; at the end it must be unchanged."""
        assert self.exact
        runs = self._runs
        at = 0
        for i in runs.in_file_order():
            yield from self._outside(at, runs.host[i])
            yield Guest(runs.guest[i], runs.length[i])
            at = runs.host[i] + runs.length[i]
        yield from self._outside(at, self.file_size)
        self.check_unchanged()

    def _outside(self, at: int, end: int) -> Iterator[Segment]:
        zeros = 0
        for start, length in self._source.data(at, end - at):
            zeros += start - at
            at = start + length
            for offset in range(start, at, LITERAL_MAX):
                for span in _split(self._source.pread(offset, min(LITERAL_MAX, at - offset))):
                    if isinstance(span, int):
                        zeros += span
                        continue
                    if zeros:
                        yield Zeros(zeros)
                        zeros = 0
                    yield Literal(span)
        zeros += end - at
        if zeros:
            yield Zeros(zeros)


def _split(piece: bytes) -> Iterator[int | bytes]:
    """Runs of zero sectors as their length, other sectors as bytes."""
    if is_zero(piece):
        yield len(piece)
        return
    sectors = range(0, len(piece), SECTOR)
    for zero, group in itertools.groupby(sectors, key=lambda i: is_zero(piece[i : i + SECTOR])):
        span = list(group)
        part = piece[span[0] : span[-1] + SECTOR]
        yield len(part) if zero else part


_ZEROS = bytes(STRIDE)


def is_zero(data: bytes) -> bool:
    return data == (_ZEROS if len(data) == STRIDE else bytes(len(data)))


def filled_blocks(size: int, extents: Extents, read: Read, block: int) -> Iterator[tuple[int, bytes]]:
    """(index, bytes) of the blocks of guest space that are not all zero, ascending; the last may be short."""
    assert STRIDE % block == 0
    done = 0
    for offset, length in extents:
        assert offset >= 0
        assert offset + length <= size
        for stride in range(max(offset // STRIDE, done), -(-(offset + length) // STRIDE)):
            start = stride * STRIDE
            data = read(start, min(STRIDE, size - start))
            done = stride + 1
            for at in range(0, len(data), block):
                piece = data[at : at + block]
                if not is_zero(piece):
                    yield (start + at) // block, piece
