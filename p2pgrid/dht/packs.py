"""Keep packs, each laid out in a folder or absent, as long as somebody needs them.

    packs/PACK/     frames (`shelf.py`); of a delta also
               parent      the full pack through which it is read here (`delta_shelf.py`)
               likeness    what is looked up to make a delta on it, once one was made (`lineage.py`)

A pack is needed by each datum that began it, and a full pack also by each delta here that is read
through it: so a disk may be removed and what builds on it stays whole.

The parent of a delta is found *by content*: any complete full pack of it, whoever signed it.
Where there is none, the delta's own `base` is begun.  One that was convicted meanwhile is exchanged
for another.

A pack that goes on from drafts which were followed here (`growing.py`) takes over their folder.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import attrs

from p2pgrid.dht.delta_shelf import DeltaShelf
from p2pgrid.dht.files import explained, replace, sync_folder
from p2pgrid.dht.growing import Drafts, GrowingShelf
from p2pgrid.dht.manifest import (
    CHUNK_SIZE,
    Content,
    Delta,
    Frames,
    Layout,
    Tree,
    decode_pack,
    read_frames,
    read_layout,
)
from p2pgrid.dht.objects import Objects
from p2pgrid.dht.room import Room
from p2pgrid.dht.shelf import Shelf
from p2pgrid.errors import BadObject, NotFound, Temporary
from p2pgrid.ids import Cid

BESIDE = ("likeness",)
"""Files that may lie beside the frames of a pack, and can be made again."""


@attrs.frozen
class Told:
    """What objects tell of a pack."""

    pack: Cid
    layout: Layout
    frames: Frames
    signer: bytes
    delta: Delta | None = None


class Packs:
    """The packs in `folder`; `scratch` is a folder of the same file system.

    Thread-safe under `lock`, which is the store's and may be entered again.
    """

    def __init__(
        self,
        folder: Path,
        scratch: Path,
        room: Room,
        objects: Objects,
        lock: threading.RLock,
        drafts: Drafts,
    ) -> None:
        self._folder = folder
        self._scratch = scratch
        self._room = room
        self._objects = objects
        self._lock = lock
        self._drafts = drafts
        self._shelves: dict[Cid, Shelf] = {}
        self._users: Counter[Cid] = Counter()
        """How many data and deltas need each pack."""
        self._beside: Counter[Cid] = Counter()
        """Bytes of what lies beside the frames of a pack, and can be made again."""
        self._parents: dict[Cid, Cid] = {}
        """Delta to the full pack through which it is read."""

    # --- what there is ----------------------------------------------------------------

    def shelf(self, pack: Cid) -> Shelf | None:
        """The frames of `pack`, if it was begun here and its objects, and its parent's, are here."""
        with self._lock:
            shelf = self._shelves.get(pack)
            if shelf is None and self._at(pack).is_dir():
                try:
                    shelf = self._opened(self.read(pack))
                except NotFound:
                    return None  # an object has rotted; its datum is fetched and begun again
                self._shelves[pack] = shelf
            return shelf

    def all(self) -> list[Shelf]:
        """All packs that are here, in part or whole."""
        with self._lock:
            packs = [pack for pack, users in self._users.items() if users]
        return [shelf for shelf in map(self.shelf, packs) if shelf is not None]

    def loaded(self) -> list[Shelf]:
        """Those that were looked at since the store was opened."""
        with self._lock:
            return list(self._shelves.values())

    def full(self, content: Cid) -> Shelf | None:
        """A complete full pack of `content`, whoever signed it."""
        found = [s for s in self.all() if s.layout.cid == content and s.parent is None and s.complete]
        return min(found, key=lambda shelf: shelf.pack.digest, default=None)

    def base(self, pack: Cid, delta: Delta) -> Cid:
        """The full pack through which `delta`, whose name is `pack`, is or would be read here."""
        with self._lock:
            known = self._parents.get(pack)
        shelf = self.shelf(known) if known is not None else None
        if shelf is None or shelf.convicted:
            shelf = self.full(delta.parent)
        return delta.base if shelf is None else shelf.pack

    def read(self, cid: Cid) -> Told:
        """What the objects tell of a pack; an empty tree stands for its own empty pack.

        Raises `NotFound`, and `BadObject` where they do not fit together.
        """
        get = self._objects.get
        data = get(cid)
        try:
            pack = decode_pack(data)
        except BadObject:
            tree = Tree.decode(data)
            if tree.pack is not None:
                raise
            return Told(cid, Layout.of(cid, Content(0, CHUNK_SIZE, ()), []), Frames(), tree.signer)
        layout, frames = read_layout(pack.content, get), read_frames(pack, get)
        if len(layout.frames) != len(frames.lengths):
            raise BadObject(why="a pack with another number of frames than its content has chunks")
        return Told(cid, layout, frames, pack.signer, pack if isinstance(pack, Delta) else None)

    # --- laying out -------------------------------------------------------------------

    def stand(self, told: Told, base: Told | None, staged: Path | None = None) -> Shelf:
        """The shelf of a pack, laid out unless it is here; all its frames lie in `staged`, if given.

        `base` tells of the pack that `base()` names, where it is a delta.  Called under the lock,
        before `use`; where something fails in between, `tidy`.  Raises `NoSpace`.
        """
        if told.delta is None or base is None:
            return self.shelf(told.pack) or self._laid(told, None, staged)
        if base.delta is not None or base.layout.cid != told.delta.parent:
            raise BadObject(why="a base that is no full pack of the delta's parent")
        names = zip(told.layout.frames, told.frames.lengths, strict=True)
        if not all(length or name in base.layout.index for name, length in names):
            raise BadObject(why="a delta that takes from its parent what the parent does not have")
        if self.base(told.pack, told.delta) != base.pack:
            raise Temporary(why=f"what {told.pack} builds on was dropped just now")
        parent = self.shelf(base.pack) or self._laid(base, None, None)
        if self._at(told.pack).is_dir():
            self._lean(told.pack, parent)
        return self.shelf(told.pack) or self._laid(told, parent, staged)

    def _laid(self, told: Told, parent: Shelf | None, staged: Path | None) -> Shelf:
        growing = self._drafts.of(told.signer, told.frames) if staged is None and parent is None else None
        if growing is not None:
            self._promote(growing, told)
        elif staged is None:
            with self.staging() as empty:
                self._install(empty, told, full=False)
        else:
            self._install(staged, told, full=True)
        try:
            if parent is not None:
                self._lean(told.pack, parent)
            shelf = self._shelves[told.pack] = self._opened(told)
        except BaseException:
            discard(self._doom(told.pack))
            raise
        return shelf

    def _opened(self, told: Told) -> Shelf:
        folder = self._at(told.pack)
        if told.delta is None:
            return Shelf(folder, told.pack, told.layout, told.frames, told.signer)
        known = self._parents.get(told.pack)
        parent = self.shelf(known) if known is not None else None
        if parent is None:
            raise NotFound(what=f"the parent of pack {told.pack}")
        return DeltaShelf(folder, told.pack, told.layout, told.frames, told.signer, parent)

    def _lean(self, pack: Cid, parent: Shelf) -> None:
        """Have the delta `pack` read through `parent`."""
        before = self._parents.get(pack)
        if before == parent.pack:
            return
        replace(self._at(pack) / "parent", str(parent.pack).encode(), self._scratch)
        sync_folder(self._at(pack))
        self._parents[pack] = parent.pack
        self._users[parent.pack] += 1
        shelf = self._shelves.get(pack)
        if isinstance(shelf, DeltaShelf):
            shelf.read_through(parent)
        if before is not None:
            discard(self.release(before))

    def _install(self, staged: Path, told: Told, *, full: bool) -> None:
        """Take room for the pack and lay it out; where it is `full`, its frames lie in `staged`."""
        size, folder = sum(told.frames.lengths), self._at(told.pack)
        written = size if full else 0
        take = self._room.take_pack
        self._objects.relieved(lambda: take(told.pack, folder / "frames", size, written))
        try:
            Shelf.create(staged, told.frames, full=full)
            with explained(staged):
                os.rename(staged, folder)
        except BaseException:
            self._room.forget_pack(told.pack)
            raise
        sync_folder(self._folder)

    def _promote(self, growing: GrowingShelf, told: Told) -> None:
        """Take room for what the pack has beyond its draft, whose folder becomes the pack's."""
        size, folder = sum(told.frames.lengths), self._at(told.pack)
        with explained(growing.folder):
            written = (growing.folder / "frames").stat().st_blocks * 512
        take = self._room.take_pack
        self._room.forget_pack(growing.pack)
        try:
            self._objects.relieved(lambda: take(told.pack, folder / "frames", size, min(written, size)))
            growing.become(told.frames)
            with explained(folder):
                os.rename(growing.folder, folder)
        except BaseException:
            self._room.forget_pack(told.pack)
            self._drafts.drop(growing.pack)
            raise
        self._drafts.forget(growing.pack)
        sync_folder(self._folder)

    def keep_beside(self, shelf: Shelf, name: str, save: Callable[[Path], None]) -> None:
        """Have `save` write file `name` into a pack's folder, counted and gone with it.  `NoSpace`."""
        with self.staging() as fresh:
            save(fresh / name)
            size = (fresh / name).stat().st_size
            with self._lock:
                if self._shelves.get(shelf.pack) is not shelf:
                    raise NotFound(what=f"pack {shelf.pack}")
                self._room.check(size, size)
                os.rename(fresh / name, self._at(shelf.pack) / name)
                self._count_beside(shelf.pack)

    def _count_beside(self, pack: Cid) -> None:
        size = 0
        for name in BESIDE:
            with contextlib.suppress(FileNotFoundError):
                size += (self._at(pack) / name).stat().st_size
        self._room.count(size - self._beside[pack])
        self._beside[pack] = size

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A fresh folder on the store's file system; gone afterwards unless it was installed."""
        folder = self._scratch / secrets.token_hex(8)
        with explained(folder):
            folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # --- who needs what ---------------------------------------------------------------

    def use(self, pack: Cid) -> None:
        """One datum more needs `pack`."""
        self._users[pack] += 1

    def release(self, pack: Cid) -> list[Path]:
        """One datum, or delta, fewer needs `pack`; folders that are to be removed, out of the lock."""
        self._users[pack] -= 1
        return self._doom(pack) if self._users[pack] <= 0 else []

    def tidy(self) -> None:
        """Remove what was laid out and then not needed."""
        for pack in [pack for pack in self._shelves if not self._users[pack]]:
            discard(self._doom(pack))

    def _doom(self, pack: Cid) -> list[Path]:
        """Forget a pack; away under its name first, so that a crash leaves no half of it."""
        doomed = [self._scratch / secrets.token_hex(8)]
        del self._users[pack]
        shelf = self._shelves.pop(pack, None)
        self._room.forget_pack(pack)
        self._room.count(-self._beside.pop(pack, 0))
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._at(pack), doomed[0])
        if shelf is not None:
            shelf.let_go()
        parent = self._parents.pop(pack, None)
        return doomed if parent is None else doomed + self.release(parent)

    def sweep(self, begun: Iterable[Cid]) -> None:
        """Take over what an earlier life left: the packs that data `begun` need, and no others."""
        self._users.update(begun)
        for pack in list(self._users):
            with contextlib.suppress(FileNotFoundError, BadObject, UnicodeDecodeError):
                self._parents[pack] = Cid.parse((self._at(pack) / "parent").read_text())
        self._users.update(self._parents.values())
        packs = {str(pack): pack for pack in self._users}
        for folder in self._folder.iterdir():
            if folder.name not in packs:
                remove(folder)
                continue
            for left in folder.glob("*.tmp"):
                remove(left)
            with contextlib.suppress(FileNotFoundError):
                frames = folder / "frames"
                self._room.count_pack(packs[folder.name], frames, frames.stat().st_size)
            self._count_beside(packs[folder.name])

    def _at(self, pack: Cid) -> Path:
        return self._folder / str(pack)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def discard(folders: Iterable[Path]) -> None:
    """Remove folders: it takes long for a long file, so nobody waits for it under a lock."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
