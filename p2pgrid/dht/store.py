"""Keep objects and packs on disk: what this node holds, and never more than its owner allows.

    lock            held by the one process that has this store open
    objects/xx/CID  manifest objects, each whole under its name or absent
    packs/PACK/     frames (`shelf.py`)
    datums/DATUM    a datum that was begun; the file names its pack
    tmp/            whatever is being written; emptied when the store is opened

The marker in `datums` is written last and removed first, so at any moment a datum is
begun with all that it needs, or not at all.  What no datum needs is removed when a datum
is dropped and when the store is opened.  What came in since and was not begun
yet is left alone (`objects.py`).

Synchronous and thread-safe; one lock around what is here, none around moving bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import attrs

from p2pgrid.dht.files import explained, free, opened, replace, sync_folder
from p2pgrid.dht.manifest import (
    CHUNK_SIZE,
    Content,
    Frames,
    Layout,
    Pack,
    Tree,
    decode_datum,
    read_frames,
    read_layout,
)
from p2pgrid.dht.objects import Objects
from p2pgrid.dht.shelf import Shelf
from p2pgrid.errors import (
    BadObject,
    ChunkCorrupt,
    Misconfigured,
    NoSpace,
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

    A tree of empty files has no content and no pack; its own name stands for both.
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
        """Open or make the store.  `quota` bounds the bytes of all packs, begun ones in full.

        Raises `Misconfigured` when another process has it open.
        """
        self.root = root
        self.quota = quota
        self.min_free = min_free
        self._lock = threading.RLock()
        self._shelves: dict[Cid, Shelf] = {}
        self._packs, self._datums, self._tmp = root / "packs", root / "datums", root / "tmp"
        for folder in (root, root / "objects", self._packs, self._datums, self._tmp):
            with explained(folder):
                folder.mkdir(parents=True, exist_ok=True)
        self._objects = Objects(root / "objects", self._tmp)
        self._begun: dict[Cid, Cid] = {}  # datum to pack
        self._lock_fd = _locked(root / "lock")
        try:
            self._sweep()
        except BaseException:
            os.close(self._lock_fd)
            raise

    def close(self) -> None:
        """Sync what was put, and let go of the store.  Idempotent."""
        with self._lock:
            if self._lock_fd < 0:
                return
            try:
                self.flush()
            finally:
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
        with self._lock:
            shelves = list(self._shelves.values())
        for shelf in shelves:
            with contextlib.suppress(NotFound):  # dropped meanwhile
                shelf.flush()

    # --- objects (`objects.py`) --------------------------------------------------------

    def put_object(self, data: bytes) -> Cid:
        """Keep an object under its name, which the caller compares with what it wanted."""
        return self._objects.put(data)

    def get_object(self, cid: Cid) -> bytes:
        """The object's bytes, verified.  Raises `NotFound`; one that has rotted is removed."""
        return self._objects.get(cid)

    def has_object(self, cid: Cid) -> bool:
        return self._objects.has(cid)

    def missing_objects(self, datum: Cid) -> list[Cid]:
        """Objects that `datum` needs and that are not here, as far as those here can tell.

        Fetch them and ask again; empty means that `begin` will find them all.  Raises
        `BadObject` when an object is not what its place in the datum promises.
        """
        return self._objects.missing(datum)

    # --- packs ------------------------------------------------------------------------

    def begin(self, datum: Cid) -> Shelf:
        """Make room for the datum's pack, and take from other packs here what they share.

        All its objects are here already (`NotFound`), and fit together (`BadObject`).  Its
        whole pack is counted from now on: `NoSpace` above the quota or when the disk is too
        full.  A datum that was begun before goes on where it stood.
        """
        if missing := self.missing_objects(datum):
            raise NotFound(what=f"object {missing[0]} of {datum}")
        top = decode_datum(self.get_object(datum))
        pack = top.pack or datum
        layout, frames = self._read_pack(pack)
        if top.content is not None and layout.cid != top.content:
            raise BadObject(why="the pack is of another content than its datum")
        if isinstance(top, Tree) and sum(f.size for f in top.files) != layout.content.size:
            raise BadObject(why="the files of a tree are not as long as its content")
        with self._lock:
            shelf = self.shelf(pack)
            if shelf is None:
                self.check_room(sum(frames.lengths))
                with self.staging() as staged:
                    Shelf.create(staged, frames, full=False)
                    self._install(staged, pack)
                shelf = self._shelves[pack] = Shelf(self._packs / str(pack), pack, layout, frames)
            self._mark(datum, pack)
        if not shelf.complete and not shelf.convicted:
            self._share(shelf)
        return shelf

    def shelf(self, pack: Cid) -> Shelf | None:
        """The frames of `pack`, if any datum here began it."""
        with self._lock:
            shelf = self._shelves.get(pack)
            if shelf is None and (self._packs / str(pack)).is_dir():
                try:
                    shelf = Shelf(self._packs / str(pack), pack, *self._read_pack(pack))
                except NotFound:
                    return None  # an object has rotted; its datum is fetched and begun again
                self._shelves[pack] = shelf
            return shelf

    def shelves(self) -> list[Shelf]:
        """All packs that are here, in part or whole."""
        with self._lock:
            packs = sorted(set(self._begun.values()), key=str)
        return [shelf for shelf in map(self.shelf, packs) if shelf is not None]

    def held(self) -> list[Held]:
        """The datums that are here, in part or whole; not those whose objects have rotted."""
        found: list[Held] = []
        with self._lock:
            begun = sorted(self._begun.items(), key=lambda item: str(item[0]))
        for datum, pack in begun:
            shelf = self.shelf(pack)
            if shelf is not None and self._objects.here(datum):
                total = len(shelf.frames.lengths)
                held = Held(datum, shelf.layout.cid, pack, shelf.count, total, shelf.held_bytes())
                found.append(held)
        return found

    def drop(self, datum: Cid) -> None:
        """Forget `datum`, and remove what no other datum here needs.  Raises `NotFound`."""
        with self._lock:
            pack = self._begun.pop(datum, None)
            if pack is None:
                raise NotFound(what=f"datum {datum}")
            (self._datums / str(datum)).unlink(missing_ok=True)
            sync_folder(self._datums)
            needed = {cid for other in self._begun for cid in self._kin(other)}
            self._objects.remove(self._kin(datum) - needed)
            if pack not in self._begun.values():
                self._shelves.pop(pack, None)
                self._remove_pack(pack)

    def used(self) -> int:
        """Bytes that count for the quota: all packs, begun ones in full."""
        return sum(size for size, _ in self._sizes())

    def check_room(self, wanted: int, written: int = 0) -> None:
        """Raise `NoSpace` unless a pack of `wanted` bytes may be begun, `written` of them in `staging`."""
        sizes = list(self._sizes())
        if self.quota is not None:
            left = self.quota - sum(size for size, _ in sizes)
            if wanted > left:
                raise NoSpace(wanted=wanted, free=max(left, 0), where=f"the quota of {self.root}")
        promised = sum(max(size - written, 0) for size, written in sizes)
        left = free(self.root) - self.min_free - promised
        if wanted - written > left:
            raise NoSpace(wanted=wanted - written, free=max(left, 0), where=str(self.root))

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A fresh folder on the store's file system; gone afterwards unless it was installed."""
        folder = self._tmp / secrets.token_hex(8)
        with explained(folder):
            folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def adopt(self, datum: Cid, staged: Path | None) -> Shelf:
        """Keep a datum that was made here: its objects are put, all its frames lie in `staged`.

        With None, its pack is here already, complete.
        """
        top = decode_datum(self.get_object(datum))
        pack = top.pack or datum
        layout, frames = self._read_pack(pack)
        with self._lock:
            shelf = self.shelf(pack)
            if shelf is not None and staged is not None and not shelf.complete:
                self._fill(shelf, staged)
            elif shelf is None:
                if staged is None:
                    raise Temporary(why=f"{datum} was dropped while it was put again")
                self.check_room(sum(frames.lengths), sum(frames.lengths))
                Shelf.create(staged, frames, full=True)
                self._install(staged, pack)
                shelf = self._shelves[pack] = Shelf(self._packs / str(pack), pack, layout, frames)
            self._mark(datum, pack)
            return shelf

    # --- inside -----------------------------------------------------------------------

    def _read_pack(self, cid: Cid) -> tuple[Layout, Frames]:
        """A pack's content and frames; an empty tree stands for its own empty pack."""
        data = self.get_object(cid)
        try:
            pack = Pack.decode(data)
        except BadObject:
            tree = Tree.decode(data)
            if tree.pack is not None:
                raise
            return Layout.of(cid, Content(0, CHUNK_SIZE, ()), []), Frames((), ())
        layout, frames = read_layout(pack.content, self.get_object), read_frames(pack, self.get_object)
        if len(layout.frames) != len(frames.lengths):
            raise BadObject(why="a pack with another number of frames than its content has chunks")
        return layout, frames

    def _share(self, shelf: Shelf) -> None:
        """Copy frames that other packs here hold, each checked as it leaves."""
        wanted = {d: i for i, d in enumerate(shelf.frames.digests) if not shelf.holds(i)}
        for other in self.shelves():
            if other is shelf:
                continue
            for index, name in enumerate(other.frames.digests):
                if name in wanted and other.holds(index) and not shelf.holds(wanted[name]):
                    with contextlib.suppress(ChunkCorrupt, NotFound, Temporary, VerificationFailed):
                        frame = other.get_frame(index)
                        shelf.put_frame(wanted[name], frame)
                        shelf.local_bytes += len(frame)

    def _fill(self, shelf: Shelf, staged: Path) -> None:
        """Complete a pack that was being fetched with the frames just made here."""
        at = 0
        with opened(staged / "frames", os.O_RDONLY) as fd:
            for index, length in enumerate(shelf.frames.lengths):
                if not shelf.holds(index):
                    shelf.put_frame(index, os.pread(fd, length, at))
                at += length

    def _install(self, staged: Path, pack: Cid) -> None:
        with explained(staged):
            os.rename(staged, self._packs / str(pack))
        sync_folder(self._packs)

    def _mark(self, datum: Cid, pack: Cid) -> None:
        """Write the datum's marker, once everything that it needs is sure to be on disk."""
        self._objects.settle(self._kin(datum))
        if datum not in self._begun:
            replace(self._datums / str(datum), str(pack).encode(), self._tmp)
            sync_folder(self._datums)
            self._begun[datum] = pack

    def _kin(self, datum: Cid) -> set[Cid]:
        with contextlib.suppress(BadObject):
            return set(self._objects.family(datum))
        return set()

    def _sizes(self) -> Iterator[tuple[int, int]]:
        """Of each pack: its bytes when whole, and those written."""
        for folder in self._packs.iterdir():
            with contextlib.suppress(FileNotFoundError):
                about = (folder / "frames").stat()
                yield about.st_size, about.st_blocks * 512

    def _remove_pack(self, pack: Cid) -> None:
        """Away under its name first, so that a crash leaves no half of it."""
        doomed = self._tmp / secrets.token_hex(8)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._packs / str(pack), doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _sweep(self) -> None:
        """Read the markers, and remove what a crash left and what no datum needs."""
        for left in self._tmp.iterdir():
            _remove(left)
        for marker in self._datums.iterdir():
            try:
                self._begun[Cid.parse(marker.name)] = Cid.parse(marker.read_text())
            except (BadObject, UnicodeDecodeError):
                _remove(marker)
        packs = {str(pack) for pack in self._begun.values()}
        for folder in self._packs.iterdir():
            if folder.name not in packs:
                _remove(folder)
            for left in folder.glob("*.tmp"):
                _remove(left)
        needed = {cid for datum in self._begun for cid in self._kin(datum)}
        # Where one has rotted, its siblings cannot be told from orphans, and will be wanted again.
        if all(self._objects.here(cid) for cid in needed):
            self._objects.keep_only(needed)


def _locked(path: Path) -> int:
    with explained(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise Misconfigured(why=f"another process has {path.parent} open") from None
    return fd


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
