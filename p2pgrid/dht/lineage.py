"""Choose the disk that a new one is told by, and say how its frames are made then.

A sample of the new disk is looked for in the full packs that are here complete, whoever signed
them: whole chunks by name first, which costs nothing, then blocks and marks (`likeness.py`) in
the few that come into question.  What is known of a parent's likeness is kept beside its pack.

A delta is worth it while it is at most half of a full pack; the caller looks when it is made.
The same bytes, the same parent and the same key give the same delta.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import attrs
from nacl.signing import SigningKey

from p2pgrid.dht.chunker import is_zero, length_at
from p2pgrid.dht.delta import encode_delta, gather
from p2pgrid.dht.manifest import CHUNK_SIZE, PAGE_SPAN, Delta, encode_frames, signed
from p2pgrid.dht.press import Coding, Pressed, Progress, Read
from p2pgrid.dht.shelf import Shelf
from p2pgrid.dht.store import Store
from p2pgrid.errors import ChunkCorrupt, NoSpace, NotFound, VerificationFailed
from p2pgrid.ids import Cid, digest

if TYPE_CHECKING:
    from p2pgrid.dht.likeness import Likeness

SIZE_MIN = 8 << 20
"""Bytes of guest space; what is smaller is not worth looking for a parent."""
SAMPLE = 64
"""Chunks that are looked at to choose a parent."""
CANDIDATES = 3
"""Packs whose likeness is looked at: it takes seconds to make for each GiB."""
ALIKE = 0.5
"""Share of the sample that a parent must have."""
SURE = 0.9
"""Share of the sample that a pack has chunk by chunk, and need not be compared with others."""
WORTH = 0.5
"""Share of a full pack's bytes that a delta may have."""


LOST = (ChunkCorrupt, NotFound, VerificationFailed)
"""What is raised where a parent is not what it was taken for, or is dropped meanwhile."""


class NotLike(Exception):
    """The disk is not what the coding takes it for; or the parent is the very same, by somebody else."""


@attrs.frozen
class Parent:
    """What a disk is told by."""

    shelf: Shelf
    """Of a full pack, complete."""
    likeness: Likeness

    def worth(self, pressed: Pressed) -> bool:
        """Whether the delta is small, compared with what a full pack would probably be."""
        plain = len(self.shelf.layout.frames) * CHUNK_SIZE
        return pressed.wire_bytes * plain <= WORTH * self.shelf.size * pressed.unique_bytes


def find_parent(
    store: Store, size: int, positions: Sequence[int], read: Read, progress: Progress | None
) -> Parent | None:
    """The pack here that most resembles a space of `size` bytes with chunks at `positions`."""
    if size < SIZE_MIN:
        return None
    sample = list(sampled(size, positions, read))
    names = [digest(plain) for plain in sample]

    def shared(shelf: Shelf) -> tuple[int, bytes]:
        return -sum(name in shelf.layout.index for name in names), shelf.pack.digest

    full = [
        s for s in store.shelves() if s.parent is None and s.complete and 8 * s.layout.content.size >= size
    ]
    best, found = ALIKE, None
    for shelf in sorted(full, key=shared)[:CANDIDATES]:
        parent = as_parent(store, shelf, progress)
        if parent is not None and -shared(shelf)[0] >= SURE * len(names) > 0:
            return parent
        if parent is not None and (share := parent.likeness.resemblance(sample)) > best:
            best, found = share, parent
    return found


def as_parent(store: Store, shelf: Shelf, progress: Progress | None = None) -> Parent | None:
    """A full pack that is complete as a parent; None where a chunk of it proves not to be good."""
    from p2pgrid.dht.likeness import Likeness  # numpy takes 30 MB, and few nodes put disks

    path = shelf.folder / "likeness"
    known = Likeness.load(path)
    if known is None:
        try:
            known = Likeness.of(_chunks(shelf, progress))
        except LOST:
            return None
        with contextlib.suppress(NoSpace, NotFound, OSError):
            store.keep_beside(shelf, "likeness", known.save)
    return Parent(shelf, known)


def sampled(size: int, positions: Sequence[int], read: Read) -> Iterator[bytearray]:
    """Chunks evenly from all over, without holes."""
    count = len(positions)
    for nth in range(min(SAMPLE, count)):
        position = positions[nth * count // min(SAMPLE, count)]
        plain = bytearray(length_at(size, position))
        read(position * CHUNK_SIZE, memoryview(plain))
        if not is_zero(plain):
            yield plain


def _chunks(shelf: Shelf, progress: Progress | None) -> Iterator[tuple[int, bytes]]:
    size = shelf.layout.content.size
    for offset, length in shelf.layout.extents():
        for start in range(offset, offset + length, CHUNK_SIZE):
            yield start, shelf.read(start, min(CHUNK_SIZE, offset + length - start))
            if progress is not None:
                progress(0, size)


def delta_coding(store: Store, key: SigningKey, parent: Parent) -> Coding:
    """Frames that build on `parent`; none for its own chunks, wherever they stand."""
    shelf, me = parent.shelf, bytes(key.verify_key)
    size = shelf.layout.content.size

    def squeeze(position: int, plain: bytearray) -> bytes:
        ranges = parent.likeness.ranges(plain, position * CHUNK_SIZE)
        return encode_delta(bytes(plain), ranges, gather(ranges, size, shelf.read))

    def seal(content: Cid, lengths: Sequence[int], digests: Sequence[bytes]) -> Cid:
        if content == shelf.layout.cid:
            if shelf.signer != me:
                raise NotLike
            return shelf.pack
        lists: list[Cid] = []
        for first in range(0, len(lengths), PAGE_SPAN):
            span = slice(first, first + PAGE_SPAN)
            lists.append(store.put_object(encode_frames(lengths[span], digests[span])))
        delta = Delta(content, shelf.layout.cid, shelf.pack, len(lengths), tuple(lists), b"")
        return store.put_object(signed(delta, key).encode())

    known = [
        other
        for other in store.shelves()
        if other.parent is not None
        and other.parent.layout.cid == shelf.layout.cid
        and other.count
        and other.signer == me
    ]
    return Coding(squeeze, known, seal, shelf.layout.index)
