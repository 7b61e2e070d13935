"""Keep manifest objects, each whole under its name or absent, and say which a datum needs.

    ROOT/objects/xx/CID     xx: the last two characters of the name

Written to a temporary name, synced, renamed; compared with its name whenever it is read.
An object is *young* from the moment somebody put it or asked for it until a datum that
needs it has been begun: young ones are never removed, their siblings are on the way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from p2pgrid.dht.files import explained, opened, replace, sync_folder
from p2pgrid.dht.manifest import OBJECT_MAX, Content, Disk, Pack, Recipe, decode_datum, verified
from p2pgrid.errors import BadObject, NotFound
from p2pgrid.ids import Cid, object_cid


class Objects:
    """The objects in `folder`; `scratch` is a folder of the same file system.  Thread-safe."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._folder = folder
        self._scratch = scratch
        self._lock = threading.Lock()
        self._young: set[Cid] = set()

    def put(self, data: bytes) -> Cid:
        assert len(data) <= OBJECT_MAX
        cid = object_cid(data)
        path = self._path(cid)
        with self._lock:
            self._young.add(cid)
        if not path.exists():
            with explained(path):
                path.parent.mkdir(exist_ok=True)
            replace(path, data, self._scratch)
        return cid

    def get(self, cid: Cid) -> bytes:
        path = self._path(cid)
        with opened(path, os.O_RDONLY) as fd:
            data = os.read(fd, OBJECT_MAX + 1)
        try:
            return verified(cid, data)
        except BadObject:
            path.unlink(missing_ok=True)
            raise NotFound(what=f"object {cid}: its file has rotted and was removed") from None

    def has(self, cid: Cid) -> bool:
        with self._lock:
            here = self._path(cid).exists()
            if here:
                self._young.add(cid)  # the answer must stay true until its datum is begun
            return here

    def missing(self, datum: Cid) -> list[Cid]:
        family = self.family(datum)
        with self._lock:
            self._young.update(family)
        return [cid for cid in family if not self._path(cid).exists()]

    def family(self, datum: Cid) -> list[Cid]:
        """Every object that `datum` needs, as far as those that are here tell.

        Raises `BadObject` when one is not what its place in the datum promises.
        """
        return list(dict.fromkeys(self._walk(datum)))

    def _walk(self, datum: Cid) -> Iterator[Cid]:
        yield datum
        try:
            top = decode_datum(self.get(datum))
        except NotFound:
            return
        roots: list[tuple[Cid | None, type[Content | Pack | Recipe]]]
        roots = [(top.content, Content), (top.pack, Pack)]
        if isinstance(top, Disk):
            roots.append((top.recipe, Recipe))
        for cid, kind in roots:
            if cid is None:
                continue
            yield cid
            try:
                pages: Iterable[Cid | None] = kind.decode(self.get(cid)).pages
            except NotFound:
                continue
            yield from (page for page in pages if page is not None)

    def settle(self, cids: Iterable[Cid]) -> None:
        """Make the names of these survive a power cut; they are young no longer."""
        cids = set(cids)
        for folder in {self._path(cid).parent for cid in cids}:
            sync_folder(folder)
        sync_folder(self._folder)
        with self._lock:
            self._young -= cids

    def remove(self, cids: Iterable[Cid]) -> None:
        """Remove these unless they are young."""
        with self._lock:
            for cid in set(cids) - self._young:
                self._path(cid).unlink(missing_ok=True)

    def keep_only(self, cids: Iterable[Cid]) -> None:
        """Remove every file that is none of these; for a store that nobody uses yet."""
        kept = {str(cid) for cid in cids}
        for folder in self._folder.iterdir():
            for path in folder.iterdir():
                if path.name not in kept:
                    path.unlink(missing_ok=True)

    def here(self, cid: Cid) -> bool:
        return self._path(cid).exists()

    def _path(self, cid: Cid) -> Path:
        name = str(cid)
        return self._folder / name[-2:] / name
