"""Keep one pack's frames on disk and give them out only as what their names promise.

    packs/PACK/frames      one sparse file: frames in index order, each at the sum of
                           the lengths before it, whether it is here or not
               have, durable, boot    which are here (`marks.py`)
               convicted   the index of a frame that proves the pack a lie, if there is one

Checked in pairs.  A frame's digest is compared with the pack's when it enters and when
it leaves; a chunk for the guest is expanded and compared with its plain name, too.  A
frame that has rotted is marked missing, so that it is fetched again.  A frame that is
what the pack says but not what the content says convicts the pack: from then on it
holds nothing and takes nothing.

The frame digest decides, never the plain name alone: another encoding of the same chunk
has another length and no place in this file.

A delta's frames lie on a `DeltaShelf` (`delta_shelf.py`), which reads through its `parent`.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from p2pgrid.dht.chunker import length_at
from p2pgrid.dht.files import Kept, explain, opened, replace, sync_folder, write_all
from p2pgrid.dht.frame import expand
from p2pgrid.dht.manifest import CHUNK_SIZE, Frames, Layout
from p2pgrid.dht.marks import Marks
from p2pgrid.errors import BadFrame, ChunkCorrupt, NotFound, Temporary, VerificationFailed
from p2pgrid.ids import Cid, digest

SYNC_BYTES = 64 << 20
"""Bytes put before they are synced: what a power cut costs at most."""
CACHE_CHUNKS = 64
"""Expanded chunks kept for the guest (16 MiB): it reads a chunk in many small pieces."""


class Shelf:
    """One pack's frames.  Thread-safe; `Store` makes and closes it."""

    def __init__(
        self,
        folder: Path,
        pack: Cid,
        layout: Layout,
        frames: Frames,
        signer: bytes,
        places: int | None = None,
    ) -> None:
        assert len(layout.frames) == len(frames.lengths)
        self.places = len(frames.lengths) if places is None else places
        """Indices that there are, or may be once it has grown (`growing.py`)."""
        self.pack = pack
        self.layout = layout
        self.frames = frames
        self.signer = signer
        self.taken = 0
        """Chunks that are the parent's, under the same name: they have no frame."""
        self.local_bytes = 0
        """Bytes of frames copied from other packs of this store instead of being fetched."""
        self.folder = self._folder = folder
        """Where it lies; gone once its pack is needed no more."""
        self._writing = Kept(folder / "frames", os.O_WRONLY)
        self._reading = Kept(folder / "frames", os.O_RDONLY)
        self._offsets = frames.offsets()
        self._syncing = threading.Lock()
        self._count_lock = threading.Lock()
        self._plain: OrderedDict[int, bytes] = OrderedDict()
        self._plain_lock = threading.Lock()
        self._convicted = (folder / "convicted").exists()
        self._marks = Marks(folder, self.places, self._sound)
        self._unsynced = sum(frames.lengths[i] for i in self._marks.unsynced())

    @staticmethod
    def create(folder: Path, frames: Frames, *, full: bool) -> None:
        """Lay a pack's folder out, synced; where it is `full`, its frames lie there already."""
        size = sum(frames.lengths)
        with opened(folder / "frames", os.O_WRONLY | os.O_CREAT) as fd:
            os.ftruncate(fd, size)
            os.fsync(fd)
        Marks.create(folder, bitmap(bool(n) and full for n in frames.lengths))
        sync_folder(folder)

    # --- what is here -----------------------------------------------------------------

    @property
    def parent(self) -> Shelf | None:
        """What this one is read through, where it is a delta's."""
        return None

    @property
    def parts(self) -> tuple[Shelf, ...]:
        """The shelves whose frames a read may need: the parent's, if there is one, and this."""
        return (self,) if self.parent is None else (self.parent, self)

    @property
    def complete(self) -> bool:
        """Whether every read will find what it needs."""
        return self.count == len(self.frames.lengths) and not self._convicted

    @property
    def whole(self) -> bool:
        """Whether nothing comes in here any more that others could have first."""
        return self.complete

    @property
    def convicted(self) -> bool:
        """Whether a frame proved that this pack's signer lied."""
        return self._convicted

    @property
    def count(self) -> int:
        """How many frames are here."""
        return 0 if self._convicted else self._marks.count

    @property
    def size(self) -> int:
        """Bytes of the whole pack."""
        return self._offsets[-1]

    def have(self) -> bytes:
        """Bit i (LSB first) tells whether index i is here."""
        bits = self._marks.have()
        return bytes(len(bits)) if self._convicted else bits

    def holds(self, index: int) -> bool:
        return not self._convicted and self._marks.holds(index)

    def held_bytes(self) -> int:
        """Bytes of the frames that are here."""
        if self.complete:
            return self.size
        return sum(n for index, n in enumerate(self.frames.lengths) if self.holds(index))

    # --- frames -----------------------------------------------------------------------

    def put_frame(self, index: int, frame: bytes | memoryview, *, sync: bool = True) -> None:
        """Keep the frame at `index`; without `sync` the caller must `flush` when it is `stale`.

        Raises `ChunkCorrupt` unless it is the one that the pack names, `NoSpace` or
        `Temporary` when the disk does not take it, `VerificationFailed` for a convicted pack.
        """
        self._refuse_convicted()
        if not 0 <= index < len(self.frames.lengths):
            raise ChunkCorrupt(wanted=f"one of {len(self.frames.lengths)} frames", got=f"index {index}")
        length, wanted = self.frames.lengths[index], self.frames.digests[index]
        if len(frame) != length:
            raise ChunkCorrupt(wanted=f"{length} bytes at index {index}", got=f"{len(frame)} bytes")
        if (got := digest(frame)) != wanted:
            raise ChunkCorrupt(wanted=wanted.hex(), got=got.hex())
        if self._marks.holds(index):
            return
        file = self._writing.descriptor()
        try:
            write_all(file.fd, frame, self._offsets[index])
        except OSError as refused:
            explain(refused, self._writing.path)
        if self._marks.set(index):
            with self._count_lock:
                self._unsynced += length
            if sync and self.stale and not self._syncing.locked():
                self.flush()

    @property
    def stale(self) -> bool:
        """Whether much of what was put would be lost in a power cut."""
        return self._unsynced >= SYNC_BYTES

    def get_frame(self, index: int) -> bytes:
        """The frame at `index`, as the pack names it.

        Raises `NotFound` when it is not here, `ChunkCorrupt` when it has rotted: it is missing now.
        """
        self._refuse_convicted()
        if not 0 <= index < len(self.frames.lengths) or not self._marks.holds(index):
            raise NotFound(what=f"chunk {index} of pack {self.pack}")
        frame = self._load(index)
        if (got := digest(frame)) != self.frames.digests[index]:
            self._forget(index)
            raise ChunkCorrupt(wanted=self.frames.digests[index].hex(), got=got.hex())
        return frame

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[int]:
        """Hash every frame that is here; the indices that have rotted, marked missing."""
        self._refuse_convicted()
        bad: list[int] = []
        for index in range(len(self.frames.lengths)):
            if self._marks.holds(index):
                try:
                    self.get_frame(index)
                except ChunkCorrupt:
                    bad.append(index)
            if progress is not None:
                progress(self._offsets[index + 1], self.size)
        return bad

    def flush(self) -> None:
        """Make what was put survive a power cut."""
        with self._syncing:
            pending = self._unsynced
            if not pending:
                return
            snapshot = self._marks.have()
            with opened(self._folder / "frames", os.O_WRONLY) as fd:
                os.fdatasync(fd)
            self._marks.promote(snapshot)
            with self._count_lock:
                self._unsynced -= pending

    def let_go(self) -> None:
        """Keep no file open: the folder is going, or the store is closed."""
        self._writing.let_go()
        self._reading.let_go()
        self._marks.let_go()

    # --- the guest's view -------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        """`length` guest bytes from `offset` on, all inside the guest's space.

        Raises `NotFound` when a chunk is missing, `ChunkCorrupt` when one has just been found
        rotten (and is missing now), `VerificationFailed` when the pack lies.
        """
        size = self.layout.content.size
        assert 0 <= offset <= offset + length <= size, "outside of the guest's space"
        parts: list[bytes] = []
        while length:
            position, start = divmod(offset, CHUNK_SIZE)
            count = min(length, CHUNK_SIZE - start)
            index = self.layout.names.index_at(position)
            if index is None:
                parts.append(bytes(count))
            else:
                plain = self._chunk(index)
                if len(plain) != length_at(size, position):
                    self._convict(index)
                parts.append(plain if count == len(plain) else plain[start : start + count])
            offset += count
            length -= count
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def index_at(self, offset: int) -> int | None:
        """The index of the chunk that tells guest byte `offset`; None in a hole."""
        return self.layout.names.index_at(offset // CHUNK_SIZE)

    def _chunk(self, index: int) -> bytes:
        with self._plain_lock:
            plain = self._plain.get(index)
            if plain is not None:
                self._plain.move_to_end(index)
                return plain
        frame = self.get_frame(index)
        try:
            plain = self._expand(frame)
        except BadFrame:
            self._convict(index)
        if digest(plain) != self.layout.frames[index]:
            self._convict(index)
        with self._plain_lock:
            self._plain[index] = plain
            while len(self._plain) > CACHE_CHUNKS:
                self._plain.popitem(last=False)
        return plain

    # --- inside -----------------------------------------------------------------------

    def _expand(self, frame: bytes) -> bytes:
        """The plain bytes of `frame`.  `BadFrame` proves that the signer lied."""
        return expand(frame, CHUNK_SIZE)

    def _load(self, index: int) -> bytes:
        """What lies at `index`, right or wrong; an unreadable sector reads as nothing."""
        try:
            file = self._reading.descriptor()
            return os.pread(file.fd, self.frames.lengths[index], self._offsets[index])
        except (Temporary, OSError):
            return b""

    def _sound(self, index: int) -> bool:
        return digest(self._load(index)) == self.frames.digests[index]

    def _forget(self, index: int) -> None:
        with self._syncing:  # or a sync under way would call the rotten frame durable
            self._marks.clear(index)
        with self._plain_lock:
            self._plain.pop(index, None)

    def _convict(self, index: int) -> NoReturn:
        self._convicted = True
        with self._plain_lock:
            self._plain.clear()
        replace(self._folder / "convicted", str(index).encode(), self._folder)
        self._refuse_convicted()
        raise AssertionError

    def _refuse_convicted(self) -> None:
        if self._convicted:
            why = "a frame is what the pack says, but not what the content says: its signer lied"
            raise VerificationFailed(what=f"pack {self.pack}", why=why)


def bitmap(flags: Iterable[bool]) -> bytes:
    """Bit i (LSB first) is flag i."""
    bits = bytearray()
    for index, flag in enumerate(flags):
        if not index & 7:
            bits.append(0)
        if flag:
            bits[-1] |= 1 << (index & 7)
    return bytes(bits)
