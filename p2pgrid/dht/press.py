"""Turn a stream of chunks into a content and a pack: name, leave holes out, squeeze, write.

    caller's thread:  read a batch, drop zeros, name, drop what was seen │ ... │ write in order
    pool of threads:                                          compress   │ (hash and zstd
                                                                         │  release the GIL)

Frames land in one new file, in index order, each once.  A chunk that a pack of the same
signer holds already is not compressed again: its frame's place is left open and filled
at the end, unless the whole pack turns out to be here (the same disk put twice), and then
nothing is written at all.  Frames of other signers are never signed as ours.

Memory: `AHEAD` batches and about 100 bytes a chunk.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import attrs
from nacl.signing import SigningKey

from p2pgrid.dht.chunker import is_zero
from p2pgrid.dht.files import explained, write_all
from p2pgrid.dht.frame import compress
from p2pgrid.dht.manifest import (
    CHUNK_SIZE,
    PAGE_SPAN,
    Content,
    Names,
    Pack,
    encode_frames,
    encode_page,
    signed,
)
from p2pgrid.dht.shelf import Shelf
from p2pgrid.dht.store import Store
from p2pgrid.ids import Cid, digest

BATCH = 16
"""Chunks (4 MiB) that travel to a thread and back together."""
AHEAD = 3
"""Batches under way: one for each thread, and one so that none waits."""
THREADS = 2
SHORT = 1000
"""Frames of a pack that is looked through by one table with all short ones."""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all; what it raises ends the work, and leaves nothing."""


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
    key: SigningKey,
    size: int,
    chunks: Iterable[tuple[int, bytes]],
    staged: Path,
    progress: Progress | None,
) -> Pressed:
    """Press (position, plain bytes) pairs, ascending, of a space of `size` bytes; the rest is holes."""
    sheet = _Sheet(store, key, size, staged / "frames")
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            waiting: deque[Future[list[bytes | _Old]]] = deque()
            for batch in _batches(chunks):
                waiting.append(pool.submit(_squeeze, sheet.name(batch)))
                if len(waiting) > AHEAD:
                    sheet.write(waiting.popleft().result())
                if progress is not None:
                    progress(min(batch[-1][0] * CHUNK_SIZE + len(batch[-1][1]), size), size)
            while waiting:
                sheet.write(waiting.popleft().result())
        pressed = sheet.finish(staged)
    finally:
        sheet.close()
    if progress is not None:
        progress(size, size)
    return pressed


@attrs.frozen
class _Old:
    """A chunk whose frame lies at `index` of another pack that the same signer made."""

    shelf: Shelf
    index: int


def _squeeze(fresh: list[bytes | _Old]) -> list[bytes | _Old]:
    return [item if isinstance(item, _Old) else compress(item) for item in fresh]


def _batches(chunks: Iterable[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    batch: list[tuple[int, bytes]] = []
    for item in chunks:
        batch.append(item)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


class _Sheet:
    """The names, lengths and digests so far, and the file of frames that grows with them."""

    def __init__(self, store: Store, key: SigningKey, size: int, path: Path) -> None:
        self._store = store
        self._key = key
        self._size = size
        self._path = path
        self._names: Names = [None] * -(-size // CHUNK_SIZE)
        self._seen: set[bytes] = set()
        self._unique_bytes = 0
        self._lengths: list[int] = []
        self._digests: list[bytes] = []
        self._offset = 0
        self._open_places: list[tuple[int, _Old]] = []
        own = _shelves_of(store, key)
        self._long = [shelf for shelf in own if len(shelf.layout.frames) > SHORT]
        # A node holds thousands of result trees: to ask each of them for every chunk would be slow.
        self._short = {name: s for s in own if len(s.layout.frames) <= SHORT for name in s.layout.frames}
        with explained(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def close(self) -> None:
        os.close(self._fd)

    def name(self, batch: list[tuple[int, bytes]]) -> list[bytes | _Old]:
        """Name the chunks of `batch`; those that nobody has named before, in order."""
        fresh: list[bytes | _Old] = []
        for position, plain in batch:
            if is_zero(plain):
                continue
            name = digest(plain)
            self._names[position] = name
            if name not in self._seen:
                self._seen.add(name)
                self._unique_bytes += len(plain)
                fresh.append(self._old(name) or plain)
        return fresh

    def _old(self, name: bytes) -> _Old | None:
        short = self._short.get(name)
        for shelf in self._long if short is None else (short, *self._long):
            index = shelf.layout.index.get(name)
            if index is not None and shelf.holds(index):
                return _Old(shelf, index)
        return None

    def write(self, frames: list[bytes | _Old]) -> None:
        """Append `frames`; a place is left open for those that other packs hold."""
        self._store.check_room(self._offset, self._offset)
        for item in frames:
            if isinstance(item, _Old):
                length = item.shelf.frames.lengths[item.index]
                self._digests.append(item.shelf.frames.digests[item.index])
                self._open_places.append((self._offset, item))
            else:
                length = len(item)
                self._digests.append(digest(item))
                with explained(self._path, length):
                    write_all(self._fd, item, self._offset)
            self._lengths.append(length)
            self._offset += length

    def finish(self, staged: Path) -> Pressed:
        """Put the objects, and fill the open places unless the pack is here already."""
        content, pack = self._objects()
        shelf = self._store.shelf(pack)
        here = shelf is not None and shelf.complete
        if not here:
            self._store.check_room(self._offset, self._offset)
            for offset, old in self._open_places:
                frame = old.shelf.get_frame(old.index)
                with explained(self._path, len(frame)):
                    write_all(self._fd, frame, offset)
        holes = self._names.count(None)
        return Pressed(content, pack, None if here else staged, len(self._lengths), holes,
                       self._unique_bytes, self._offset)  # fmt: skip

    def _objects(self) -> tuple[Cid, Cid]:
        put = self._store.put_object
        pages: list[Cid | None] = []
        for first in range(0, len(self._names), PAGE_SPAN):
            page = encode_page(self._names[first : first + PAGE_SPAN])
            pages.append(None if page is None else put(page))
        content = put(Content(self._size, CHUNK_SIZE, tuple(pages)).encode())
        lists: list[Cid] = []
        for first in range(0, len(self._lengths), PAGE_SPAN):
            span = slice(first, first + PAGE_SPAN)
            lists.append(put(encode_frames(self._lengths[span], self._digests[span])))
        pack = Pack(content, len(self._lengths), tuple(lists), b"")
        return content, put(signed(pack, self._key).encode())


def _shelves_of(store: Store, key: SigningKey) -> list[Shelf]:
    """Packs here that `key` signed."""
    me = bytes(key.verify_key)
    return [shelf for shelf in store.shelves() if shelf.count and shelf.signer == me]
