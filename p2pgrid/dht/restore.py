"""Make files of a datum again: the very image that was put, or another container; a folder of a tree.

Every byte comes through `Shelf.read`, so its plain name was checked.  Written under a
temporary name, synced, renamed: cancelled means absent.  Paths of a tree come from
somebody else: they are walked with descriptors that follow no link, below a fresh folder.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs

from p2pgrid.dht.chunker import is_zero
from p2pgrid.dht.files import explained, sync_folder, write_all
from p2pgrid.dht.image import write_image
from p2pgrid.dht.manifest import (
    CHUNK_SIZE,
    FORMATS,
    Disk,
    File,
    Guest,
    Literal,
    Recipe,
    Tree,
    Zeros,
    decode_segments,
)
from p2pgrid.dht.press import Progress
from p2pgrid.dht.publish import FILES_MAX
from p2pgrid.dht.shelf import Shelf
from p2pgrid.dht.store import Store
from p2pgrid.errors import BadObject, Conflict, Misused, NotFound, Refused
from p2pgrid.ids import Cid


@attrs.frozen
class Restored:
    """What was written: `exact` says that it is the file that was put, byte for byte."""

    exact: bool
    format: str
    size: int
    """Bytes of the file."""


def restore_disk(
    store: Store, disk: Cid, out: Path, form: str | None = None, progress: Progress | None = None
) -> Restored:
    """Write `disk` to `out`, replacing it, in format `form` (None: the one it was put in).

    Raises `NotFound` when a chunk is missing, `ChunkCorrupt` when one has rotted.
    """
    if form is not None and form not in FORMATS:
        raise Misused(why=f"{form!r} is not a format; there are {', '.join(FORMATS)}")
    about = Disk.decode(store.get_object(disk))
    recipe = Recipe.decode(store.get_object(about.recipe))
    shelf = store.shelf(about.pack)
    if shelf is None or shelf.layout.cid != about.content:
        raise NotFound(what=f"the chunks of disk {disk}")
    form = form or recipe.format
    exact = recipe.exact and form == recipe.format
    with _temporary(out) as (part, fd):
        if exact:
            _rebuild(store, recipe, shelf, fd, part, progress)
        else:
            with explained(part, shelf.layout.content.size):
                _write_fresh(form, shelf, fd, progress)
        with explained(out):
            os.fsync(fd)
            size = os.fstat(fd).st_size
            os.rename(part, out)
        sync_folder(out.parent)
    return Restored(exact, form, size)


@contextlib.contextmanager
def _temporary(out: Path) -> Iterator[tuple[Path, int]]:
    """A new file beside `out`; gone afterwards unless it was renamed."""
    part = out.parent / f".p2pgrid-{secrets.token_hex(8)}.part"
    with explained(out):
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        yield part, fd
    finally:
        os.close(fd)
        part.unlink(missing_ok=True)


def _rebuild(
    store: Store, recipe: Recipe, shelf: Shelf, fd: int, part: Path, progress: Progress | None
) -> None:
    """Follow the recipe; zeros are left out, so the file is as sparse as it can be."""

    def at_file(at: int) -> None:
        if progress is not None:
            progress(at, recipe.size)

    at = 0
    for page in recipe.pages:
        for segment in decode_segments(store.get_object(page)):
            length = len(segment.data) if isinstance(segment, Literal) else segment.length
            if at + length > recipe.size:
                raise BadObject(why="a recipe longer than its file")
            with explained(part, recipe.size):
                match segment:
                    case Guest(offset, _):
                        _copy(shelf, offset, length, fd, at, at_file)
                    case Literal(data):
                        write_all(fd, data, at)
                    case Zeros():
                        pass
            at += length
            at_file(at)
    if at != recipe.size:
        raise BadObject(why="a recipe shorter than its file")
    with explained(part, recipe.size):
        os.ftruncate(fd, recipe.size)


def _copy(shelf: Shelf, offset: int, length: int, fd: int, at: int, told: Callable[[int], None]) -> None:
    """Guest bytes to `at` of the file, a chunk at a time, without those that are zero.

    `told` is called with where the file has got to, after each chunk.
    """
    if offset + length > shelf.layout.content.size:
        raise BadObject(why="a recipe that reads past the end of its content")
    names = shelf.layout.names
    end, ahead = offset + length, at - offset
    while offset < end:
        chunk = names.next_chunk(offset // CHUNK_SIZE) * CHUNK_SIZE
        if chunk > offset:  # a hole, however long
            offset = min(end, chunk)
        else:
            count = min(end - offset, CHUNK_SIZE - offset % CHUNK_SIZE)
            plain = shelf.read(offset, count)
            if not is_zero(plain):
                write_all(fd, plain, offset + ahead)
            offset += count
        told(offset + ahead)


def _write_fresh(form: str, shelf: Shelf, fd: int, progress: Progress | None) -> None:
    size = shelf.layout.content.size

    def read(offset: int, length: int) -> bytes:
        data = shelf.read(offset, length)
        if progress is not None:
            progress(min(offset + length, size), size)
        return data

    with os.fdopen(os.dup(fd), "w+b") as file:
        write_image(form, size, shelf.layout.extents(), read, file)


# --- trees -----------------------------------------------------------------------------


def restore_tree(
    store: Store, tree: Cid, folder: Path, most: int | None = None, progress: Progress | None = None
) -> Tree:
    """Write the files of `tree` into `folder`, which is made; `most` bounds their bytes.

    Raises `Conflict` when `folder` holds something, `Refused` above a bound, `BadObject` for
    files that cannot stand beside each other.
    """
    about = Tree.decode(store.get_object(tree))
    size = sum(file.size for file in about.files)
    if len(about.files) > FILES_MAX or (most is not None and size > most):
        raise Refused(why=f"{len(about.files)} files of {size} bytes are more than may be written here")
    shelf = store.shelf(about.pack or tree)
    if shelf is None or shelf.layout.content.size != size:
        raise NotFound(what=f"the chunks of tree {tree}")
    fresh = folder.parent / f".p2pgrid-{secrets.token_hex(8)}.part"
    with explained(folder):
        fresh.mkdir(mode=0o755)
    try:
        with explained(folder, size):
            _write_files(shelf, about.files, fresh, lambda at: progress(at, size) if progress else None)
        _take_place(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return about


def _take_place(fresh: Path, folder: Path) -> None:
    try:
        os.rename(fresh, folder)  # replaces an empty folder, and nothing else
    except OSError:
        raise Conflict(what=str(folder)) from None
    sync_folder(folder.parent)


def _write_files(shelf: Shelf, files: tuple[File, ...], fresh: Path, told: Callable[[int], None]) -> None:
    root = os.open(fresh, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        offset = 0
        for file in files:
            try:
                _write_file(root, file, shelf, offset, told)
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                raise BadObject(why=f"a file that cannot stand beside the others: {file.path!r}") from None
            offset += file.size
    finally:
        os.close(root)


def _write_file(root: int, file: File, shelf: Shelf, offset: int, told: Callable[[int], None]) -> None:
    """One file below the folder `root`; each step down is opened without following links."""
    *parents, name = file.path.split("/")
    with contextlib.ExitStack() as descriptors:
        folder = root
        for parent in parents:
            with contextlib.suppress(FileExistsError):
                os.mkdir(parent, 0o755, dir_fd=folder)
            folder = os.open(
                parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder
            )
            descriptors.callback(os.close, folder)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=folder)
        descriptors.callback(os.close, fd)
        os.ftruncate(fd, file.size)
        _copy(shelf, offset, file.size, fd, 0, lambda at: told(offset + at))
        os.fchmod(fd, 0o755 if file.executable else 0o644)
