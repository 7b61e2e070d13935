"""Make a datum of what lies in files: a disk of an image, a tree of a folder.

One pass over the bytes, then the objects, then the marker: a put that is cancelled or
killed leaves nothing.  The same bytes under the same key give the same datum.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
from nacl.signing import SigningKey

from p2pgrid.dht.again import known_in, same_coding
from p2pgrid.dht.chunker import positions
from p2pgrid.dht.draft import MOST_MAX
from p2pgrid.dht.drafting import Drafting, Grown
from p2pgrid.dht.files import explained
from p2pgrid.dht.image import Image, open_image
from p2pgrid.dht.lineage import LOST, NotLike, Parent, as_parent, delta_coding, find_parent
from p2pgrid.dht.manifest import (
    CHUNK_SIZE,
    OBJECT_MAX,
    SIZE_MAX,
    Disk,
    File,
    Recipe,
    Tree,
    paged_segments,
    safe_path,
    signed,
)
from p2pgrid.dht.objects import recipe_pages_max
from p2pgrid.dht.press import Coding, Pressed, Progress, full_coding, press
from p2pgrid.dht.shelf import Shelf
from p2pgrid.dht.skip_free import SkipFree
from p2pgrid.dht.store import Store
from p2pgrid.errors import Misused, NotFound, Temporary
from p2pgrid.ids import Cid

FILES_MAX = 100_000
"""Files of a tree; its object's own bound (`OBJECT_MAX`) may come first."""


PAGES_MAX = (OBJECT_MAX - 1024) // 41
"""Pages whose names fit into a recipe's object, at 41 bytes a name."""


@attrs.frozen
class Published:
    """What was put.  `content` is None for a tree of nothing but empty files."""

    datum: Cid
    content: Cid | None
    size: int
    """Bytes of guest space, or of all files."""
    chunks: int
    """Distinct chunks."""
    holes: int
    """Positions that are all zero."""
    unique_bytes: int
    """Plain bytes of the distinct chunks."""
    wire_bytes: int
    """Bytes of their frames: what a node that has nothing yet fetches."""
    seconds: float
    freed: int = 0
    """Bytes of blocks that the guest had freed and that were left out."""
    parent: Cid | None = None
    """The content that it is told by; None where it is told in full."""
    delta_bytes: int = 0
    """What a node that has the parent fetches."""


class Auto:
    """The parent is to be found: whatever is here that resembles the new disk most."""


AUTO = Auto()


def publish_disk(
    store: Store,
    path: Path,
    key: SigningKey,
    progress: Progress | None = None,
    *,
    skip_free: bool = False,
    parent: Cid | Auto | None = AUTO,
    told: Callable[[Grown], None] | None = None,
) -> Published:
    """Put the disk image at `path`, signed with `key`.

    `parent` is the content to tell it by, of which a full pack is complete here (`NotFound`); where
    that takes more than half of what a full pack takes, it is told in full all the same.

    `skip_free` leaves out what the guest's ext4 file systems have freed: those blocks read as
    zeros, and the container file itself is not kept.

    `told` is called with the drafts of a new pack while it is pressed: others may fetch what there is of
    it from here until this returns.

    Raises `ImageRefused` or `Misused` for what is no image of ours or changes while it is
    read, `NoSpace` above the quota.
    """
    began = time.monotonic()
    file = open_image(path)
    try:
        image: Image = SkipFree(file, progress) if skip_free else file
        with contextlib.ExitStack() as stack:
            aside = stack.enter_context(store.staging())
            count = _write_pages(store, image, aside)  # first: what cannot travel is not pressed
            pressed, upon = _press_disk(store, image, key, progress, parent, stack, told)
            image.check_unchanged()
            pages = tuple(store.put_object((aside / str(n)).read_bytes()) for n in range(count))
            recipe = Recipe(image.format, image.exact, image.file_size, pages, image.freed)
            about = store.put_object(recipe.encode())
            disk = signed(Disk(pressed.content, pressed.pack, about, b""), key)
            datum = store.put_object(disk.encode())
            store.adopt(datum, pressed.staged)
        published = _published(datum, pressed, image.size, began, image.freed)
    finally:
        file.close()
    if upon is None:
        return published
    both = pressed.wire_bytes + upon.size
    return attrs.evolve(published, wire_bytes=both, parent=upon.layout.cid, delta_bytes=pressed.wire_bytes)


def _press_disk(
    store: Store,
    image: Image,
    key: SigningKey,
    progress: Progress | None,
    wanted: Cid | Auto | None,
    stack: contextlib.ExitStack,
    told: Callable[[Grown], None] | None,
) -> tuple[Pressed, Shelf | None]:
    """The disk's pack or delta, in a folder that lasts as long as `stack`; and the pack it is told by."""
    places = array("I", positions(image.size, image.extents()))

    def pressed(coding: Coding, drafting: Drafting | None = None) -> Pressed:
        staged = stack.enter_context(store.staging())
        return press(store, image.size, places, image.read_into, coding, staged, progress, drafting)

    def fits(shelf: Shelf) -> bool:
        upon = None if shelf.parent is None else shelf.parent.layout.cid
        return isinstance(wanted, Auto) or upon == wanted

    before = known_in(store, key, image.size, places, image.read_into, fits)
    if before:
        with contextlib.suppress(NotLike):
            done = pressed(same_coding(before))
            shelf = next(shelf for shelf in before if shelf.pack == done.pack)
            return attrs.evolve(done, wire_bytes=shelf.size), shelf.parent
    parent = _parent(store, image, places, progress, wanted)
    if parent is not None:
        with contextlib.suppress(NotLike, *LOST):
            done = pressed(delta_coding(store, key, parent))
            if done.pack == parent.shelf.pack:
                return attrs.evolve(done, wire_bytes=parent.shelf.size), None
            if parent.worth(done):
                return done, parent.shelf
    if told is None or len(places) > MOST_MAX:
        return pressed(full_coding(store, key)), None
    drafting = Drafting(store, key, len(places), told)
    stack.callback(drafting.close)
    return pressed(full_coding(store, key), drafting), None


def _parent(
    store: Store, image: Image, places: Sequence[int], progress: Progress | None, wanted: Cid | Auto | None
) -> Parent | None:
    if isinstance(wanted, Auto):
        return find_parent(store, image.size, places, image.read_into, progress)
    if wanted is None:
        return None
    shelf = store.full(wanted)
    found = as_parent(store, shelf, progress) if shelf is not None else None
    if found is None:
        raise NotFound(what=f"all chunks of content {wanted} here, in a full pack")
    return found


def _write_pages(store: Store, image: Image, aside: Path) -> int:
    """Write the pages of the recipe to files in `aside`, named by number; how many there are.

    Raises `ImageRefused` where they are more than a recipe may list: then much lies in the
    container outside of the guest's space (deleted snapshots, leaked clusters).
    """
    count = written = 0
    most = min(recipe_pages_max(image.size), PAGES_MAX)
    for page in paged_segments(image.segments()) if image.exact else ():
        if count == most:
            why = (
                f"more than {written >> 20} MiB of it lie outside of what the guest sees (deleted snapshots,"
                f" leaked clusters); `qemu-img convert -O {image.format}` makes a copy without them"
            )
            raise image.refusal(why)
        store.check_room(written, written)
        with explained(aside, len(page)):
            (aside / str(count)).write_bytes(page)
        count += 1
        written += len(page)
    return count


def _published(datum: Cid, pressed: Pressed, size: int, began: float, freed: int = 0) -> Published:
    return Published(datum, pressed.content, size, pressed.chunks, pressed.holes, pressed.unique_bytes,
                     pressed.wire_bytes, time.monotonic() - began, freed)  # fmt: skip


# --- trees -----------------------------------------------------------------------------


def publish_tree(store: Store, folder: Path, key: SigningKey, progress: Progress | None = None) -> Published:
    """Put the regular files under `folder`; links and special files are left out.

    Raises `Misused` for a name that cannot travel or too many files, `Temporary` when a
    file changes while it is read.
    """
    began = time.monotonic()
    files = _listed(folder)
    size = sum(file.size for file in files)
    if size > SIZE_MAX:
        raise Misused(why=f"the files in {folder} are longer than {SIZE_MAX} bytes together")
    if size == 0:
        datum = _put_tree(store, Tree(tuple(files), None, None, b""), key)
        with store.staging() as staged:
            store.adopt(datum, staged)
        return Published(datum, None, 0, 0, 0, 0, 0, time.monotonic() - began)
    with store.staging() as staged:
        run = _Run(folder, files)
        places = range(-(-size // CHUNK_SIZE))
        pressed = press(store, size, places, run.read_into, full_coding(store, key), staged, progress)
        run.check_unchanged()
        datum = _put_tree(store, Tree(tuple(files), pressed.content, pressed.pack, b""), key)
        store.adopt(datum, pressed.staged)
    return _published(datum, pressed, size, began)


def _put_tree(store: Store, tree: Tree, key: SigningKey) -> Cid:
    data = signed(tree, key).encode()
    if len(data) > OBJECT_MAX:
        raise Misused(why=f"{len(tree.files)} files with such names are too many for one tree")
    return store.put_object(data)


def _listed(folder: Path) -> list[File]:
    """The regular files under `folder`, sorted by path."""
    if not folder.is_dir():
        raise Misused(why=f"{folder} is not a folder")
    files: list[File] = []
    for parent, _, names in os.walk(folder, onerror=_unreadable):
        for name in names:
            about = os.lstat(Path(parent, name))
            if not stat.S_ISREG(about.st_mode):
                continue
            path = Path(parent, name).relative_to(folder).as_posix()
            if not safe_path(path):
                raise Misused(why=f"the name {path[:200]!r} cannot travel")
            files.append(File(path, about.st_size, bool(about.st_mode & stat.S_IXUSR)))
    if len(files) > FILES_MAX:
        raise Misused(why=f"{len(files)} files are more than {FILES_MAX}")
    return sorted(files, key=lambda file: file.path)


def _unreadable(refused: OSError) -> None:
    raise Misused(why=f"{refused.filename} cannot be read: {refused.strerror}") from refused


class _Run:
    """Files one after the other, read as one space.  Thread-safe."""

    def __init__(self, folder: Path, files: Sequence[File]) -> None:
        self._folder = folder
        self._files = files
        self._ends = list(itertools.accumulate(file.size for file in files))
        self._stamps = [self._stamp(file) for file in files]

    def read_into(self, offset: int, view: memoryview) -> None:
        """Raises `Temporary` for a file that is shorter by now."""
        at = bisect_right(self._ends, offset)
        while view:
            file = self._files[at]
            start = offset - self._ends[at] + file.size
            span = min(len(view), file.size - start)
            if span:
                _read_file(self._folder / file.path, start, view[:span])
            view = view[span:]
            offset += span
            at += 1

    def check_unchanged(self) -> None:
        """Raises `Temporary`."""
        for file, stamp in zip(self._files, self._stamps, strict=True):
            if stamp[0] != file.size or stamp != self._stamp(file):
                raise _changed(self._folder / file.path)

    def _stamp(self, file: File) -> tuple[int, int]:
        try:
            about = os.lstat(self._folder / file.path)
        except OSError:
            return 0, 0
        return about.st_size, about.st_mtime_ns


def _read_file(path: Path, offset: int, view: memoryview) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as refused:
        raise Misused(why=f"{path} cannot be read: {refused.strerror}") from refused
    try:
        while view:
            count = os.preadv(fd, [view], offset)
            if not count:
                raise _changed(path)
            view = view[count:]
            offset += count
    finally:
        os.close(fd)


def _changed(path: Path) -> Temporary:
    return Temporary(why=f"{path} changed while it was read")
