"""Read a delta: chunks of its parent by their names, the others built from parts of the parent.

    packs/DELTA/     as any pack's (`shelf.py`); frames of length 0 take no place
               parent     the full pack through which it is read here (`packs.py`)

What the parent's shelf gives has been compared with plain names, so whose fault it is can be told.
A frame that is the delta's and does not give its chunk convicts the delta: its signer had the same
parent.  A chunk of the parent that is missing or has rotted is the parent's business: it is
fetched again, and convicts nobody.

No lock is held while the parent is read, so two shelves never wait for each other.
"""

from __future__ import annotations

from pathlib import Path

from p2pgrid.dht.content import CHUNK_SIZE, Layout
from p2pgrid.dht.delta import delta_refs, expand_delta, gather
from p2pgrid.dht.pack import Frames
from p2pgrid.dht.shelf import Shelf, bitmap
from p2pgrid.ids import Cid


class DeltaShelf(Shelf):
    """The frames of a delta, on top of the shelf of a full pack of its parent."""

    def __init__(
        self, folder: Path, pack: Cid, layout: Layout, frames: Frames, signer: bytes, parent: Shelf
    ) -> None:
        """What it takes the parent has: `Packs` looks before anything is laid out."""
        super().__init__(folder, pack, layout, frames, signer)
        self._parent = parent
        self.taken = frames.lengths.count(0)
        self._taken_bits = int.from_bytes(bitmap(not length for length in frames.lengths), "little")

    @property
    def parent(self) -> Shelf:
        return self._parent

    def read_through(self, parent: Shelf) -> None:
        """Read through another shelf of the same content from now on."""
        assert parent.layout.cid == self._parent.layout.cid
        self._parent = parent

    @property
    def complete(self) -> bool:
        return super().complete and self.parent.complete

    @property
    def count(self) -> int:
        return 0 if self.convicted else self._marks.count + self.taken

    def have(self) -> bytes:
        bits = super().have()
        if self.convicted:
            return bits
        return (int.from_bytes(bits, "little") | self._taken_bits).to_bytes(len(bits), "little")

    def holds(self, index: int) -> bool:
        return not self.convicted and (not self.frames.lengths[index] or super().holds(index))

    def _chunk(self, index: int) -> bytes:
        if self.frames.lengths[index]:
            return super()._chunk(index)
        self._refuse_convicted()
        return self.parent._chunk(self.parent.layout.index[self.layout.frames[index]])

    def _expand(self, frame: bytes) -> bytes:
        parent = self.parent
        size = parent.layout.content.size
        ranges, body = delta_refs(frame, size)
        return expand_delta(body, gather(ranges, size, parent.read), CHUNK_SIZE)
