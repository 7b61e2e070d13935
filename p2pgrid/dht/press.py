"""Turn a space of bytes into a content and a pack: read, leave holes out, name, squeeze, write.

    pool of threads, a batch of positions at a time            caller's thread
    read into a buffer │ zero? │ name │ known? │ squeeze  ──>  in order: index, write
    (reading, hashing and zstd release the GIL)

Nobody but the pool touches plain bytes; the caller's thread keeps the order.  Frames land in
one new file, in index order, each once.  Which frames those are is the `Coding`'s business:
how a chunk is squeezed, which packs here have frames that may be taken as they are, and what
object lists them.  A frame that lies here already is not made again: its place is left open
and filled at the end, unless the whole pack turns out to be here (the same disk put twice),
and then nothing is written at all.

A chunk that stands in many places is squeezed where it stands first, whichever thread
meets it first: the same bytes give the same pack.

Memory: a batch of frames for each thread and `AHEAD` more, and about 90 bytes a chunk.
"""

from __future__ import annotations

import itertools
import os
import threading
from array import array
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import attrs
from nacl.signing import SigningKey

from p2pgrid.dht.chunker import is_zero, length_at
from p2pgrid.dht.files import explained, write_all
from p2pgrid.dht.flat import digests_of
from p2pgrid.dht.frame import compress
from p2pgrid.dht.manifest import (
    CHUNK_SIZE,
    PAGE_SPAN,
    Content,
    Pack,
    encode_frames,
    encode_page,
    signed,
)
from p2pgrid.dht.places import Places
from p2pgrid.dht.shelf import Shelf
from p2pgrid.dht.store import Store
from p2pgrid.ids import Cid, digest

BATCH = 16
"""Chunks (4 MiB) that a thread takes at a time: a few ms of work, so that cancelling is quick."""
AHEAD = 2
"""Batches that wait beside those in work, so that no thread does."""
THREADS_MAX = 8
"""A thread that reads and names needs the GIL for a tenth of its time."""
SYNC_BYTES = 32 << 20
"""Bytes written before they are synced beside the work, so that nobody waits for all of them at the end."""
SHORT = 1000
"""Frames of a pack that is looked through by one table with all short ones."""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all; what it raises ends the work, and leaves nothing."""
Read = Callable[[int, memoryview], None]
"""(offset, view): fill the view with the bytes of the space from `offset` on.  Called in any thread."""
Squeeze = Callable[[int, bytearray], bytes]
"""(position, plain bytes): the chunk's frame.  Called in any thread, out of order; the plain bytes are
good until it returns."""
Seal = Callable[[Cid, Sequence[int], Sequence[bytes]], Cid]
"""(content, lengths, digests of the frames by index): put the objects that list the frames.  An empty
frame has an empty digest."""


class Growth(Protocol):
    """Who wants to know of frames before the last one is made (`drafting.py`)."""

    def wrote(
        self, folder: Path, lengths: Sequence[int], digests: bytearray, size: int, absent: Container[int]
    ) -> None:
        """So many bytes of frames lie in `folder`, but for those that are `absent` as yet."""
        ...


@attrs.frozen
class Coding:
    """One way to make the frames of a pack."""

    squeeze: Squeeze
    known: Sequence[Shelf]
    """Packs here whose frames may be taken as they are."""
    seal: Seal
    taken: Container[bytes] = frozenset()
    """Names of chunks that need no frame: theirs is empty."""


def full_coding(store: Store, key: SigningKey) -> Coding:
    """Frames that need nothing else; those of other signers are never signed as ours."""
    me = bytes(key.verify_key)

    def seal(content: Cid, lengths: Sequence[int], digests: Sequence[bytes]) -> Cid:
        lists: list[Cid] = []
        for first in range(0, len(lengths), PAGE_SPAN):
            span = slice(first, first + PAGE_SPAN)
            lists.append(store.put_object(encode_frames(lengths[span], digests[span])))
        return store.put_object(signed(Pack(content, len(lengths), tuple(lists), b""), key).encode())

    full = (shelf for shelf in store.shelves() if shelf.parent is None)
    known = [shelf for shelf in full if shelf.count and shelf.signer == me]
    return Coding(lambda position, plain: compress(plain), known, seal)


@attrs.frozen
class Pressed:
    """A content and its pack, both put; where its frames lie in `staged`, None if here already."""

    content: Cid
    pack: Cid
    staged: Path | None
    chunks: int
    holes: int
    unique_bytes: int
    wire_bytes: int


def press(
    store: Store,
    size: int,
    positions: Iterable[int],
    read: Read,
    coding: Coding,
    staged: Path,
    progress: Progress | None = None,
    growth: Growth | None = None,
) -> Pressed:
    """Press the chunks at `positions` (ascending) of a space of `size` bytes; the rest is holes."""
    threads = min(len(os.sched_getaffinity(0)), THREADS_MAX)
    sheet = _Sheet(store, size, coding, staged, progress, growth)
    bench = _Bench(size, read, coding, sheet.names.by_name)
    pool = ThreadPoolExecutor(threads, "press")
    try:
        waiting: deque[Future[list[_Piece]]] = deque()
        for batch in _batches(positions):
            waiting.append(pool.submit(bench.work, batch))
            if len(waiting) >= threads + AHEAD:
                _write(waiting.popleft().result(), sheet, bench)
        while waiting:
            _write(waiting.popleft().result(), sheet, bench)
        return sheet.finish()
    finally:
        pool.shutdown(cancel_futures=True)
        sheet.close()


def _write(pieces: list[_Piece], sheet: _Sheet, bench: _Bench) -> None:
    sheet.write(pieces)
    bench.settle(pieces)


def _batches(positions: Iterable[int]) -> Iterator[list[int]]:
    following = iter(positions)
    while batch := list(itertools.islice(following, BATCH)):
        yield batch


class _Old(NamedTuple):
    """The frame of a pack here that stands at index `place`."""

    shelf: Shelf
    place: int


class _Fresh(NamedTuple):
    """A frame that was just made, and its digest; both empty where none is needed."""

    frame: bytes
    digest: bytes


_EMPTY = _Fresh(b"", b"")


class _Piece(NamedTuple):
    """What a thread found at a position: a hole, a chunk that was met before, or one with its frame."""

    position: int
    length: int
    name: bytes | None
    frame: _Old | _Fresh | None


class _Bench:
    """What the threads of the pool share."""

    def __init__(self, size: int, read: Read, coding: Coding, indexed: Container[bytes]) -> None:
        self._size = size
        self._read = read
        self._squeeze = coding.squeeze
        self._taken = coding.taken
        self._indexed = indexed
        """Names that were written: the caller's thread adds them."""
        self._claims: dict[bytes, int] = {}
        """Name to the lowest position that a thread met it at, until it is written."""
        self._mine = threading.local()
        self._long = [shelf for shelf in coding.known if len(shelf.layout.frames) > SHORT]
        # A node holds thousands of result trees: to ask each of them for every chunk would be slow.
        self._short = {
            name: shelf
            for shelf in coding.known
            if len(shelf.layout.frames) <= SHORT
            for name in shelf.layout.frames
        }

    def work(self, batch: list[int]) -> list[_Piece]:
        """Read and name the chunks of `batch`, and squeeze those that were not met before."""
        if not hasattr(self._mine, "buffer"):
            self._mine.buffer = bytearray(CHUNK_SIZE)
        return [self._piece(position, self._mine.buffer) for position in batch]

    def _piece(self, position: int, buffer: bytearray) -> _Piece:
        length = length_at(self._size, position)
        plain = buffer if length == CHUNK_SIZE else bytearray(length)
        self._read(position * CHUNK_SIZE, memoryview(plain))
        if is_zero(plain):
            return _Piece(position, length, None, None)
        name = digest(plain)
        if name in self._indexed or not self._claim(name, position):
            return _Piece(position, length, name, None)
        if name in self._taken:
            return _Piece(position, length, name, _EMPTY)
        old = self._old(name)
        if old is not None:
            return _Piece(position, length, name, old)
        frame = self._squeeze(position, plain)
        return _Piece(position, length, name, _Fresh(frame, digest(frame)))

    def _claim(self, name: bytes, position: int) -> bool:
        """Whether no thread met `name` at a lower position; then its frame is made here.

        Two threads may both be told so, and the caller's thread takes what stands first.
        """
        if self._claims.setdefault(name, position) < position:
            return False
        self._claims[name] = position
        return True

    def settle(self, pieces: list[_Piece]) -> None:
        """Forget the claims of what was written."""
        for piece in pieces:
            if piece.name is not None:
                self._claims.pop(piece.name, None)

    def _old(self, name: bytes) -> _Old | None:
        short = self._short.get(name)
        for shelf in self._long if short is None else (short, *self._long):
            index = shelf.layout.index.get(name)
            if index is not None and shelf.holds(index):
                return _Old(shelf, index)
        return None


class _Sheet:
    """The names, lengths and digests so far, and the file of frames that grows with them."""

    def __init__(
        self,
        store: Store,
        size: int,
        coding: Coding,
        staged: Path,
        progress: Progress | None,
        growth: Growth | None,
    ) -> None:
        self.names = Places()
        self._store = store
        self._size = size
        self._seal = coding.seal
        self._staged = staged
        self._path = staged / "frames"
        self._tell = progress or (lambda done, total: None)
        self._growth = growth
        self._unique_bytes = 0
        self._lengths = array("I")
        self._digests = bytearray()
        self._offset = 0
        self._open_from: list[Shelf] = []  # of each place that is left open: who has its frame,
        self._open_place = array("I")  # at which index,
        self._open_at = array("Q")  # and where it goes
        self._absent: set[int] = set()
        """The indices of those places."""
        self._syncing = ThreadPoolExecutor(1, "sync")
        self._synced = 0
        self._sync: Future[None] | None = None
        with explained(self._path):
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def close(self) -> None:
        self._syncing.shutdown()
        os.close(self._fd)

    def write(self, pieces: list[_Piece]) -> None:
        """Append what a thread found next."""
        if any(isinstance(piece.frame, _Fresh) and piece.frame.frame for piece in pieces):
            self._store.check_room(self._offset, self._offset)
        for piece in pieces:
            if piece.name is None:
                continue
            self.names.skip(piece.position - len(self.names))
            count = len(self.names.by_name)
            self.names.fill(piece.name)
            if len(self.names.by_name) > count:
                self._unique_bytes += piece.length
                self._append(piece.frame)
        self._start_sync()
        if self._growth is not None:
            self._growth.wrote(self._staged, self._lengths, self._digests, self._offset, self._absent)
        last = pieces[-1]
        self._tell(last.position * CHUNK_SIZE + last.length, self._size)

    def _start_sync(self) -> None:
        """Have the disk take what was written, unless it is still busy with what was before."""
        if self._offset - self._synced < SYNC_BYTES or (self._sync and not self._sync.done()):
            return
        self._end_sync()
        self._synced = self._offset
        self._sync = self._syncing.submit(os.fdatasync, self._fd)

    def _end_sync(self) -> None:
        if self._sync is not None:
            with explained(self._path):
                self._sync.result()  # an error that is not asked for here is never told again

    def _append(self, made: _Old | _Fresh | None) -> None:
        """The frame with the next index; a place is left open for one that another pack holds."""
        match made:
            case _Fresh(frame, name):
                length = len(frame)
                if frame:
                    with explained(self._path, length):
                        write_all(self._fd, frame, self._offset)
            case _Old(shelf, place):
                length, name = shelf.frames.lengths[place], shelf.frames.digests[place]
                self._open_from.append(shelf)
                self._open_place.append(place)
                self._open_at.append(self._offset)
                self._absent.add(len(self._lengths))
            case None:
                raise AssertionError("the first of equal chunks has a frame")
        self._lengths.append(length)
        self._digests += name
        self._offset += length

    def finish(self) -> Pressed:
        """Put the objects, and fill the open places unless the pack is here already."""
        self.names.skip(-(-self._size // CHUNK_SIZE) - len(self.names))
        content = self._put_content()
        pack = self._seal(content, self._lengths, digests_of(self._lengths, self._digests))
        shelf = self._store.shelf(pack)
        here = shelf is not None and shelf.complete
        if not here:
            self._fill()
        self._end_sync()
        self._tell(self._size, self._size)
        return Pressed(content, pack, None if here else self._staged, len(self._lengths), self.names.holes,
                       self._unique_bytes, self._offset)  # fmt: skip

    def _put_content(self) -> Cid:
        pages: list[Cid | None] = []
        for first in range(0, len(self.names), PAGE_SPAN):
            hole = self.names.next_chunk(first) >= first + PAGE_SPAN
            page = None if hole else encode_page(self.names[first : first + PAGE_SPAN])
            pages.append(None if page is None else self._store.put_object(page))
        return self._store.put_object(Content(self._size, CHUNK_SIZE, tuple(pages)).encode())

    def _fill(self) -> None:
        self._store.check_room(self._offset, self._offset)
        for shelf, place, offset in zip(self._open_from, self._open_place, self._open_at, strict=True):
            frame = shelf.get_frame(place)
            with explained(self._path, len(frame)):
                write_all(self._fd, frame, offset)
            self._tell(self._size, self._size)
