"""Keep manifest objects, each whole under its name or absent, and say which a datum needs.

    ROOT/objects/xx/CID     xx: the last two characters of the name

Written to a temporary name, synced, renamed; compared with its name whenever it is read.
All are counted (`room.py`), needed or not, and a datum may list no more than its size justifies.

An object is *young* from the moment somebody put it or asked for it until a datum that needs it
has been begun: young ones are not removed, their siblings are on the way.  After `PATIENCE`
without anybody asking, their fetch was given up, and they go as soon as room is short.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from p2pgrid.dht.dagcbor import need
from p2pgrid.dht.files import explained, opened, replace, sync_folder
from p2pgrid.dht.manifest import (
    OBJECT_MAX,
    Content,
    Delta,
    Disk,
    Pack,
    Recipe,
    decode_datum,
    decode_pack,
    verified,
)
from p2pgrid.dht.room import Room
from p2pgrid.errors import BadObject, NoSpace, NotFound
from p2pgrid.ids import Cid, object_cid

T = TypeVar("T")

PATIENCE = 3600.0
"""Seconds that an object waits for its datum when others need its room."""
RECIPE_PAGES = 4096
"""Pages any recipe may list: a GiB of literal bytes, as an honest putter fills them (256 KiB)."""
RECIPE_SPAN = 32 << 20
"""Bytes of guest space that justify one page more: a container in which every 4 KiB lie apart."""


def recipe_pages_max(size: int) -> int:
    """How many pages the recipe of a disk of `size` bytes of guest space may list."""
    return RECIPE_PAGES + size // RECIPE_SPAN


class Objects:
    """The objects in `folder`; `scratch` is a folder of the same file system.  Thread-safe.

    `base(delta's name, delta)` names the full pack through which a delta is read here.
    """

    def __init__(self, folder: Path, scratch: Path, room: Room, base: Callable[[Cid, Delta], Cid]) -> None:
        self._base = base
        self._folder = folder
        self._scratch = scratch
        self._room = room
        self._lock = threading.Lock()
        self._young: dict[Cid, float] = {}
        """When somebody wanted it last."""
        self._sizes: dict[Cid, int] = {}
        self._families: dict[Cid, tuple[Cid, ...]] = {}
        self._uses: Counter[Cid] = Counter()
        """How many held families each object is in."""
        for path in folder.glob("*/*"):
            try:
                self._note(Cid.parse(path.name), path.stat().st_size)
            except BadObject:
                path.unlink(missing_ok=True)

    def put(self, data: bytes) -> Cid:
        """Raises `NoSpace` where it would be more than may be kept."""
        assert len(data) <= OBJECT_MAX
        cid = object_cid(data)
        path = self._path(cid)
        with self._lock:
            self._young[cid] = time.monotonic()
        if not path.exists():
            self._room.take(len(data))
            try:
                with explained(path):
                    path.parent.mkdir(exist_ok=True)
                replace(path, data, self._scratch)
            except BaseException:
                self._room.count(-len(data))
                raise
            with self._lock:
                self._room.count(-len(data))
                self._note(cid, len(data))
        return cid

    def get(self, cid: Cid) -> bytes:
        path = self._path(cid)
        with opened(path, os.O_RDONLY) as fd:
            data = os.read(fd, OBJECT_MAX + 1)
        try:
            return verified(cid, data)
        except BadObject:
            with self._lock:
                self._remove(cid)
            raise NotFound(what=f"object {cid}: its file has rotted and was removed") from None

    def has(self, cid: Cid) -> bool:
        with self._lock:
            here = self._path(cid).exists()
            if here:
                self._young[cid] = time.monotonic()  # the answer must stay true until its datum is begun
            return here

    def here(self, cid: Cid) -> bool:
        """Whether it is, as far as is known without looking at the disk."""
        return cid in self._sizes

    def missing(self, datum: Cid) -> list[Cid]:
        family = self.family(datum)
        with self._lock:
            self._young.update(dict.fromkeys(family, time.monotonic()))
        return [cid for cid in family if not self._path(cid).exists()]

    # --- what a datum needs -----------------------------------------------------------

    def family(self, datum: Cid) -> list[Cid]:
        """Every object that `datum` needs, as far as those that are here tell.

        Raises `BadObject` when one is not what its place in the datum promises, or lists
        more than it may.
        """
        return list(dict.fromkeys(self._walk(datum)))

    def _walk(self, datum: Cid) -> Iterator[Cid]:
        yield datum
        top = self._read(datum, decode_datum)
        if top is None or top.content is None or top.pack is None:
            return
        yield from (top.content, top.pack)
        if isinstance(top, Disk):
            yield top.recipe
        content = self._read(top.content, Content.decode)
        if content is None:
            return  # its size says how much the others may list
        yield from (page for page in content.pages if page is not None)
        if pack := self._read(top.pack, decode_pack):
            need(pack.count <= content.positions, "a pack with more frames than its content has chunks")
            yield from pack.pages
            if isinstance(pack, Delta):
                need(isinstance(top, Disk), "a tree in a delta")
                yield from self._walk_parent(top.pack, pack)
        if isinstance(top, Disk) and (recipe := self._read(top.recipe, Recipe.decode)):
            most = recipe_pages_max(content.size)
            need(len(recipe.pages) <= most, f"a recipe of {len(recipe.pages)} pages; {most} are allowed")
            yield from recipe.pages

    def _walk_parent(self, cid: Cid, delta: Delta) -> Iterator[Cid]:
        base = self._base(cid, delta)
        yield from (delta.parent, base)
        content = self._read(delta.parent, Content.decode)
        if content is None:
            return
        yield from (page for page in content.pages if page is not None)
        if pack := self._read(base, Pack.decode):
            need(pack.content == delta.parent, "a base of another content than the parent")
            need(pack.count <= content.positions, "a pack with more frames than its content has chunks")
            yield from pack.pages

    def _read(self, cid: Cid, decode: Callable[[bytes], T]) -> T | None:
        try:
            return decode(self.get(cid))
        except NotFound:
            return None

    def settle(self, cids: Iterable[Cid]) -> None:
        """Make the names of these survive a power cut."""
        for folder in {self._path(cid).parent for cid in cids}:
            sync_folder(folder)
        sync_folder(self._folder)

    def hold(self, datum: Cid, family: Iterable[Cid]) -> None:
        """`datum` was begun: its family stays until it is released, and is young no longer."""
        with self._lock:
            self._uses.subtract(self._families.get(datum, ()))
            self._families[datum] = family = tuple(family)
            self._uses.update(family)
            for cid in family:
                self._young.pop(cid, None)

    def release(self, datum: Cid) -> None:
        """Remove what only `datum` needed, unless it is young."""
        with self._lock:
            for cid in self._families.pop(datum, ()):
                self._uses[cid] -= 1
                if self._uses[cid] <= 0:
                    del self._uses[cid]
                    if cid not in self._young:
                        self._remove(cid)

    def abandon(self, datum: Cid) -> None:
        """The fetch of `datum` was given up: nothing here waits for it any longer."""
        with contextlib.suppress(BadObject):
            for cid in self._walk(datum):
                with self._lock:
                    self._young.pop(cid, None)

    def relieved(self, take: Callable[[], T]) -> T:
        """Do what takes room; where it is short, without the objects that nobody wants any more."""
        try:
            return take()
        except NoSpace:
            if not self.remove_stale():
                raise
            return take()

    def remove_stale(self) -> bool:
        """Remove what no datum needs and nobody has wanted for long; whether there was something."""
        before = time.monotonic() - PATIENCE
        with self._lock:
            stale = [c for c in self._sizes if c not in self._uses and self._young.get(c, before) <= before]
            for cid in stale:
                self._remove(cid)
                self._young.pop(cid, None)
            return bool(stale)

    def _remove(self, cid: Cid) -> None:
        self._path(cid).unlink(missing_ok=True)
        self._room.count(-self._sizes.pop(cid, 0))

    def _note(self, cid: Cid, size: int) -> None:
        """Count it once, also where two put it at once or its file was lost meanwhile."""
        self._room.count(size - self._sizes.get(cid, 0))
        self._sizes[cid] = size

    def _path(self, cid: Cid) -> Path:
        name = str(cid)
        return self._folder / name[-2:] / name
