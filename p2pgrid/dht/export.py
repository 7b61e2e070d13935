"""Write a datum as static files, so that any HTTP server can be its origin of last resort.

    FOLDER/objects/CID    each manifest object
    FOLDER/packs/CID      each pack: its frames in index order; a delta's parent's, too

A pack is written beside its name (`.part`), synced and renamed; the datum's own object comes last,
so that whoever finds it finds all.  What is there already is compared, not trusted, and
kept where it is good.  Cancelled, an export leaves whole files only; killed, it also leaves
its `.part`, from which the next one goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs

from p2pgrid.dht.files import explained, opened, replace, sync_folder, write_all
from p2pgrid.dht.manifest import decode_datum
from p2pgrid.dht.pack import Delta, decode_pack
from p2pgrid.dht.shelf import Shelf
from p2pgrid.dht.store import Store
from p2pgrid.errors import Conflict, NotFound
from p2pgrid.ids import Cid, digest

Progress = Callable[[int, int], None]
"""Bytes done and in all; what it raises cancels the export."""


@attrs.frozen
class Exported:
    """What an export came to.  Bytes are those of objects and frames."""

    objects: int
    packs: int
    bytes: int
    written: int
    """Of these, those that were not there."""


def export_datum(store: Store, datum: Cid, folder: Path, progress: Progress | None = None) -> Exported:
    """Write `datum`, which is complete here, to `folder`, beside what is there of others.

    Raises `NotFound` where a chunk or object is missing or has rotted, `NoSpace`, `Conflict` where
    another export writes there or where nobody could build on the delta that is here.
    """
    if not store.complete(datum):
        raise NotFound(what=f"all of {datum} here")
    shelf = store.begin(datum)
    _check_base(store, datum, shelf)
    family = store.family(datum)
    packs = [part for part in shelf.parts if part.size]
    size = total = sum(part.size for part in packs)
    written = done = 0
    with _alone(folder):
        for part in packs:

            def report(count: int, before: int = done) -> None:
                if progress:
                    progress(before + count, total)

            written += _write_pack(part, folder / "packs" / str(part.pack), report)
            done += part.size
        for cid in reversed(family):  # the datum itself last
            data = store.get_object(cid)
            written += _write_object(folder / "objects" / str(cid), data)
            size += len(data)
            if progress:
                progress(total, total)
        sync_folder(folder / "objects")
    return Exported(len(family), len(packs), size, written)


def _check_base(store: Store, datum: Cid, shelf: Shelf) -> None:
    if shelf.parent is None:
        return
    pack = decode_datum(store.get_object(datum)).pack
    assert pack is not None
    delta = decode_pack(store.get_object(pack))
    if isinstance(delta, Delta) and delta.base != shelf.parent.pack:
        raise Conflict(what=f"the parent of {datum}: it is here in another pack than the disk names")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One export at a time writes to `folder`."""
    for name in ("objects", "packs"):
        with explained(folder):
            (folder / name).mkdir(parents=True, exist_ok=True)
    with opened(folder, os.O_RDONLY | os.O_DIRECTORY) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(what=f"an export that writes to {folder} just now") from None
        for left in (folder / "objects").glob("*.tmp"):
            left.unlink(missing_ok=True)
        yield


def _write_object(path: Path, data: bytes) -> int:
    """Bytes written."""
    with contextlib.suppress(NotFound), opened(path, os.O_RDONLY) as fd:
        if os.read(fd, len(data) + 1) == data:
            return 0
    replace(path, data, path.parent)
    return len(data)


def _write_pack(shelf: Shelf, path: Path, progress: Callable[[int], None]) -> int:
    """Bytes written."""
    with contextlib.suppress(NotFound), opened(path, os.O_RDONLY) as fd:
        if os.fstat(fd).st_size == shelf.size and not _fill(shelf, fd, path, progress, write=False):
            return 0
    part = path.with_name(path.name + ".part")
    try:
        with opened(part, os.O_RDWR | os.O_CREAT) as fd:
            written = _fill(shelf, fd, part, progress, write=True)
            with explained(part):
                os.ftruncate(fd, shelf.size)
                os.fsync(fd)
        with explained(path):
            os.rename(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return written


def _fill(shelf: Shelf, fd: int, path: Path, progress: Callable[[int], None], *, write: bool) -> int:
    """Bytes of frames that do not lie in `fd` as they should; with `write` they do afterwards."""
    lacking = at = 0
    for index, (length, name) in enumerate(zip(shelf.frames.lengths, shelf.frames.digests, strict=True)):
        if length and digest(os.pread(fd, length, at)) != name:
            lacking += length
            if not write:
                break
            with explained(path, length):
                write_all(fd, shelf.get_frame(index), at)
        at += length
        progress(at)
    return lacking
