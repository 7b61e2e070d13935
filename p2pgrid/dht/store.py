"""Keep objects and packs on disk: what this node holds, and never more than its owner allows.

    lock            held by the one process that has this store open
    objects/xx/CID  manifest objects, each whole under its name or absent
    packs/PACK/     frames (`shelf.py`, `packs.py`)
    datums/DATUM    a datum that was begun; the file names its pack
    tmp/            whatever is being written; emptied when the store is opened

The marker in `datums` is written last and removed first, so at any moment a datum is
begun with all that it needs, its delta's parent included, or not at all.  What no datum needs
is removed when a datum is dropped and when the store is opened.  What came in since and was not begun
yet is left alone (`objects.py`).

Synchronous and thread-safe; one lock around what is here, none around moving bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import attrs

from p2pgrid.dht.files import explained, opened, replace, sync_folder
from p2pgrid.dht.growing import Drafts
from p2pgrid.dht.manifest import Delta, Tree, decode_datum
from p2pgrid.dht.objects import Objects
from p2pgrid.dht.packs import Packs, Told, discard, remove
from p2pgrid.dht.room import Room
from p2pgrid.dht.shelf import Shelf
from p2pgrid.errors import (
    BadObject,
    ChunkCorrupt,
    Misconfigured,
    NotFound,
    Temporary,
    VerificationFailed,
)
from p2pgrid.ids import Cid

MIN_FREE = 1 << 30
"""Bytes that the store leaves free on its file system, quota or not."""


@attrs.frozen
class Held:
    """What is here of one datum.

    A tree of empty files has no content and no pack; its own name stands for both.  Chunks and
    bytes are those of frames, for a delta its parent's, too, and not what it takes from there.
    """

    datum: Cid
    content: Cid
    pack: Cid
    chunks: int
    chunks_total: int
    bytes: int
    """Bytes of frames that are here."""


class Store:
    """Objects and packs under `root`; closed by `close` or by leaving `with`."""

    def __init__(self, root: Path, quota: int | None = None, min_free: int = MIN_FREE) -> None:
        """Open or make the store.  `quota` bounds the bytes of all packs, begun ones in full, and objects.

        Raises `Misconfigured` when another process has it open.
        """
        self.root = root
        self.quota = quota
        self._lock = threading.RLock()
        self._datums, self._tmp = root / "datums", root / "tmp"
        for folder in (root, root / "objects", root / "packs", self._datums, self._tmp):
            with explained(folder):
                folder.mkdir(parents=True, exist_ok=True)
        self._room = Room(root, quota, min_free)
        self._begun: dict[Cid, Cid] = {}
        """Datum to pack."""
        self._lock_fd = _locked(root / "lock")
        try:
            self._objects = Objects(root / "objects", self._tmp, self._room, self._base)
            self.drafts = Drafts(self._tmp, self._room, self._lock)
            """What is known of packs that are still being pressed, here or elsewhere (`growing.py`)."""
            self._packs = Packs(root / "packs", self._tmp, self._room, self._objects, self._lock, self.drafts)
            self._sweep()
        except BaseException:
            os.close(self._lock_fd)
            raise

    @property
    def min_free(self) -> int:
        """Bytes that are left free on the file system; grows with what else is spoken for there."""
        return self._room.min_free

    @min_free.setter
    def min_free(self, min_free: int) -> None:
        self._room.min_free = min_free

    def close(self) -> None:
        """Sync what was put, and let go of the store.  Idempotent."""
        with self._lock:
            if self._lock_fd < 0:
                return
            try:
                self.flush()
            finally:
                for shelf in self._packs.loaded():
                    shelf.let_go()
                self.drafts.let_go()
                os.close(self._lock_fd)
                self._lock_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def flush(self) -> None:
        """Make everything that was put survive a power cut."""
        for shelf in self._packs.loaded():
            with contextlib.suppress(NotFound):  # dropped meanwhile
                shelf.flush()

    # --- objects (`objects.py`) --------------------------------------------------------

    def put_object(self, data: bytes) -> Cid:
        """Keep an object under its name, which the caller compares with what it wanted.

        It counts like a pack from now on: `NoSpace` above the quota or when the disk is too full.
        """
        return self._objects.relieved(lambda: self._objects.put(data))

    def get_object(self, cid: Cid) -> bytes:
        """The object's bytes, verified.  Raises `NotFound`; one that has rotted is removed."""
        told = self.drafts.object(cid)
        return self._objects.get(cid) if told is None else told

    def has_object(self, cid: Cid) -> bool:
        return self._objects.has(cid)

    def missing_objects(self, datum: Cid) -> list[Cid]:
        """Objects that `datum` needs and that are not here, as far as those here can tell.

        Fetch them and ask again; empty means that `begin` will find them all.  Raises
        `BadObject` when an object is not what its place in the datum promises, or lists more
        than the datum's size justifies.
        """
        return self._objects.missing(datum)

    def family(self, datum: Cid) -> list[Cid]:
        """The names of all objects that `datum` needs, itself first.  Raises `BadObject`."""
        return self._objects.family(datum)

    def abandon(self, datum: Cid) -> None:
        """Its fetch was given up for good: its objects go as soon as others need their room."""
        self._objects.abandon(datum)

    # --- packs ------------------------------------------------------------------------

    def begin(self, datum: Cid) -> Shelf:
        """Make room for the datum's pack, and take from other packs here what they share.

        All its objects are here already (`NotFound`), and fit together (`BadObject`).  Its
        whole pack is counted from now on, and of a delta also the parent's: `NoSpace` above the
        quota or when the disk is too full.  A datum that was begun before goes on where it stood.
        """
        if missing := self.missing_objects(datum):
            raise NotFound(what=f"object {missing[0]} of {datum}")
        shelf = self._stand(datum, *self._plan(datum))
        for part in shelf.parts:
            if not part.complete and not part.convicted:
                self._share(part)
        return shelf

    def shelf(self, pack: Cid) -> Shelf | None:
        """The frames of `pack`, if any datum here began it, or of a series of drafts."""
        return self.drafts.get(pack) or self._packs.shelf(pack)

    def shelves(self) -> list[Shelf]:
        """All packs that are here, in part or whole."""
        return self._packs.all()

    def full(self, content: Cid) -> Shelf | None:
        """A complete full pack of `content`, whoever signed it: what a delta may build on."""
        return self._packs.full(content)

    def held(self) -> list[Held]:
        """The datums that are here, in part or whole; not those whose objects have rotted."""
        found: list[Held] = []
        with self._lock:
            begun = sorted(self._begun.items(), key=lambda item: item[0].digest)
        for datum, pack in begun:
            shelf = self.shelf(pack)
            if shelf is not None and self._objects.here(datum):
                chunks, total, size = (sum(some) for some in zip(*map(_inventory, shelf.parts), strict=True))
                found.append(Held(datum, shelf.layout.cid, pack, chunks, total, size))
        return found

    def begun(self, datum: Cid) -> bool:
        """Whether room was made for it."""
        with self._lock:
            return datum in self._begun

    def complete(self, datum: Cid) -> bool:
        """Whether every chunk of `datum` is here; looks at nothing else."""
        with self._lock:
            pack = self._begun.get(datum)
        shelf = self.shelf(pack) if pack is not None and self._objects.here(datum) else None
        return shelf is not None and shelf.complete

    def drop(self, datum: Cid) -> None:
        """Forget `datum`, and remove what no other datum here needs; or a series of drafts.

        Raises `NotFound`.
        """
        if self.drafts.get(datum) is not None:
            self.drafts.drop(datum)
            return
        with self._lock:
            pack = self._begun.pop(datum, None)
            if pack is None:
                raise NotFound(what=f"datum {datum}")
            (self._datums / str(datum)).unlink(missing_ok=True)
            sync_folder(self._datums)
            self._objects.release(datum)
            doomed = self._packs.release(pack)
        discard(doomed)

    def used(self) -> int:
        """Bytes that count for the quota: all packs, begun ones in full, and all objects."""
        return self._room.used

    def keep_beside(self, shelf: Shelf, name: str, save: Callable[[Path], None]) -> None:
        """Have `save` write file `name` into a pack's folder, counted and gone with it.  `NoSpace`."""
        self._packs.keep_beside(shelf, name, save)

    def check_room(self, wanted: int, written: int = 0) -> None:
        """Raise `NoSpace` unless a pack of `wanted` bytes may be begun, `written` of them in `staging`."""
        self._objects.relieved(lambda: self._room.check(wanted, written))

    def staging(self) -> contextlib.AbstractContextManager[Path]:
        """A fresh folder on the store's file system; gone afterwards unless it was installed."""
        return self._packs.staging()

    def adopt(self, datum: Cid, staged: Path | None) -> Shelf:
        """Keep a datum that was made here: its objects are put, all its frames lie in `staged`.

        With None, its pack is here already, complete.  What a delta builds on is here, too:
        otherwise it was dropped meanwhile, `Temporary`.
        """
        told, base = self._plan(datum)
        with self._lock:
            here = self.shelf(told.pack)
            if here is None and staged is None:
                raise Temporary(why=f"{datum} was dropped while it was put again")
            if base is not None and ((parent := self.shelf(base.pack)) is None or not parent.complete):
                raise Temporary(why=f"what {datum} builds on was dropped while it was put")
            if here is not None and staged is not None and not here.complete:
                self._fill(here, staged)
            return self._stand(datum, told, base, staged if here is None else None)

    # --- inside -----------------------------------------------------------------------

    def _base(self, pack: Cid, delta: Delta) -> Cid:
        return self._packs.base(pack, delta)

    def _plan(self, datum: Cid) -> tuple[Told, Told | None]:
        """What tells of the datum's pack, and of the one through which it is read, if it is a delta."""
        top = decode_datum(self.get_object(datum))
        told = self._packs.read(top.pack or datum)
        if top.content is not None and told.layout.cid != top.content:
            raise BadObject(why="the pack is of another content than its datum")
        if isinstance(top, Tree) and sum(f.size for f in top.files) != told.layout.content.size:
            raise BadObject(why="the files of a tree are not as long as its content")
        if told.delta is None:
            return told, None
        return told, self._packs.read(self._base(told.pack, told.delta))

    def _stand(self, datum: Cid, told: Told, base: Told | None, staged: Path | None = None) -> Shelf:
        """Have all that `datum` needs laid out, and then its marker."""
        with self._lock:
            try:
                shelf = self._packs.stand(told, base, staged)
                self._mark(datum, told.pack)
            except BaseException:
                self._packs.tidy()
                raise
            return shelf

    def _share(self, shelf: Shelf) -> None:
        """Copy frames that other packs here hold, each checked as it leaves."""
        others = [other for other in self.shelves() if other is not shelf]
        find = shelf.frames.digests.finder() if others else lambda name: None
        for other in others:
            for index, name in enumerate(other.frames.digests):
                place = find(name)
                if place is not None and other.holds(index) and not shelf.holds(place):
                    with contextlib.suppress(ChunkCorrupt, NotFound, Temporary, VerificationFailed):
                        frame = other.get_frame(index)
                        shelf.put_frame(place, frame)
                        shelf.local_bytes += len(frame)

    def _fill(self, shelf: Shelf, staged: Path) -> None:
        """Complete a pack that was being fetched with the frames just made here."""
        at = 0
        with opened(staged / "frames", os.O_RDONLY) as fd:
            for index, length in enumerate(shelf.frames.lengths):
                if not shelf.holds(index):
                    shelf.put_frame(index, os.pread(fd, length, at))
                at += length

    def _mark(self, datum: Cid, pack: Cid) -> None:
        """Write the datum's marker, once everything that it needs is sure to be on disk."""
        family = self._kin(datum)
        self._objects.settle(family)
        if datum not in self._begun:
            replace(self._datums / str(datum), str(pack).encode(), self._tmp)
            sync_folder(self._datums)
            self._begun[datum] = pack
            self._packs.use(pack)
        self._objects.hold(datum, family)

    def _kin(self, datum: Cid) -> list[Cid]:
        with contextlib.suppress(BadObject):
            return self._objects.family(datum)
        return []

    def _sweep(self) -> None:
        """Read the markers, and remove what a crash left and what no datum needs."""
        for left in self._tmp.iterdir():
            remove(left)
        for marker in self._datums.iterdir():
            try:
                self._begun[Cid.parse(marker.name)] = Cid.parse(marker.read_text())
            except (BadObject, UnicodeDecodeError):
                remove(marker)
        self._packs.sweep(self._begun.values())
        whole = True
        for datum in self._begun:
            family = self._kin(datum)
            self._objects.hold(datum, family)
            whole = whole and all(map(self._objects.here, family))
        # Where one has rotted, its siblings cannot be told from orphans, and will be wanted again.
        if whole:
            self._objects.remove_stale()


def _inventory(shelf: Shelf) -> tuple[int, int, int]:
    """Frames of a shelf that are here, frames of it in all, bytes that are here."""
    total = len(shelf.frames.lengths)
    return max(0, shelf.count - shelf.taken), total - shelf.taken, shelf.held_bytes()


def _locked(path: Path) -> int:
    with explained(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise Misconfigured(why=f"another process has {path.parent} open") from None
    return fd
