"""Keep the frames of packs that are still being pressed: a shelf that grows with its drafts.

    tmp/RANDOM/frames     as a pack's (`shelf.py`), for as many frames as the newest draft tells
               have, durable, boot    for as many as there may come to be

It lies among what is being written: a store that is opened again has none, so nobody who dies leaves one
behind.  When the pack itself is begun and goes on from the newest draft, the folder becomes the pack's
(`packs.py`): renamed, cut to length, nothing copied, and from then on it lives as any pack.  The putter
lends the folder that it presses into.

Drafts and their lists (`draft.py`) are kept in memory, at 36 bytes a frame, and go with the shelf.
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path

from p2pgrid.dht.content import CHUNK_SIZE, Content, Layout
from p2pgrid.dht.dagcbor import need
from p2pgrid.dht.draft import Draft, going_on, read_list, two_stories
from p2pgrid.dht.files import explained, opened, sync_folder
from p2pgrid.dht.flat import Digests
from p2pgrid.dht.marks import Marks
from p2pgrid.dht.pack import Frames
from p2pgrid.dht.room import Room
from p2pgrid.dht.shelf import Shelf
from p2pgrid.errors import NotFound
from p2pgrid.ids import Cid, object_cid


class GrowingShelf(Shelf):
    """What is known, and here, of one series of drafts.  One thread extends it, any may use it."""

    def __init__(self, folder: Path, series: Cid, data: bytes, *, made_here: bool) -> None:
        first = Draft.decode(data)
        need(first.first is None, "no first draft")
        frames = Frames(digests=Digests(bytearray()))
        nothing = Layout.of(series, Content(0, CHUNK_SIZE, ()), [])
        super().__init__(folder, series, nothing, frames, first.signer, first.most)
        self.newest = first
        self.newest_cid = series
        self.objects = {series: data}
        """The drafts that peers may still ask for, and all lists."""
        self.made_here = made_here
        self.over = False
        """It was dropped, or has become the pack's: nothing is read or written here any more."""

    @staticmethod
    def lay_out(folder: Path, most: int) -> None:
        """What a shelf for `most` frames needs in `folder`."""
        with opened(folder / "frames", os.O_WRONLY | os.O_CREAT):
            pass
        Marks.create(folder, bytes(-(-most // 8)))

    @property
    def complete(self) -> bool:
        return False

    @property
    def whole(self) -> bool:
        return self.made_here

    def held_bytes(self) -> int:
        return sum(n for index, n in enumerate(self.frames.lengths) if self.holds(index))

    def wanting(self, draft: Draft) -> tuple[Cid, ...]:
        """The lists that `draft` adds."""
        return draft.lists[len(self.newest.lists) :]

    def read(self, offset: int, length: int) -> bytes:
        raise NotFound(what=f"the guest's bytes in draft {self.pack}: a draft has none")

    def lists_of(self, draft: Draft, lists: Mapping[Cid, bytes]) -> tuple[array[int], bytes]:
        """The frames that `draft` adds.  Raises `BadObject`, `VerificationFailed`."""
        lengths, digests = array("I"), bytearray()
        for cid in self.wanting(draft):
            some, names = read_list(lists[cid])
            lengths += some
            digests += names
        if self.newest.count + len(lengths) != draft.count:
            raise two_stories(self.pack)
        return lengths, bytes(digests)

    def extend(
        self, draft: Draft, data: bytes, lists: Mapping[Cid, bytes], lengths: array[int], digests: bytes
    ) -> None:
        """Know `lengths` and `digests`, too; their places are behind those there are."""
        self.frames.extend(lengths, digests)
        if self.newest_cid != self.pack:
            del self.objects[self.newest_cid]
        self.newest, self.newest_cid = draft, object_cid(data)
        self.objects |= {**lists, self.newest_cid: data}

    def wrote(self, indices: Iterable[int]) -> None:
        """The putter has written these frames where they belong."""
        for index in indices:
            self._marks.set(index)

    def begins(self, frames: Frames) -> bool:
        """Whether a pack of `frames` goes on from here."""
        mine, count = self.frames, len(self.frames.lengths)
        if not 0 < count <= len(frames.lengths) or frames.lengths[:count] != mine.lengths:
            return False
        assert isinstance(mine.digests, Digests)
        told = frames.digests
        return isinstance(told, Digests) and told.packed.startswith(bytes(mine.digests.packed))

    def become(self, frames: Frames) -> None:
        """Have the folder be that of a pack of `frames`.  What comes in meanwhile is fetched once more."""
        self.over = True
        have, durable = self._marks.cut(len(frames.lengths))
        with opened(self.folder / "frames", os.O_WRONLY) as fd:
            os.ftruncate(fd, sum(frames.lengths))
        bits = -(-len(frames.lengths) // 8)
        Marks.create(self.folder, have.ljust(bits, b"\0"), durable.ljust(bits, b"\0"))
        sync_folder(self.folder)
        self.let_go()

    def end(self) -> None:
        """Nothing is read or written here any more."""
        self.over = True
        self.let_go()

    def _refuse_convicted(self) -> None:
        if self.over:
            raise NotFound(what=f"draft {self.pack}")


class Drafts:
    """The series that are here; new folders are made in `scratch`.  Thread-safe under the store's `lock`."""

    def __init__(self, scratch: Path, room: Room, lock: threading.RLock) -> None:
        self._scratch = scratch
        self._room = room
        self._lock = lock
        self._shelves: dict[Cid, GrowingShelf] = {}

    def get(self, series: Cid) -> GrowingShelf | None:
        return self._shelves.get(series)

    def followed(self) -> list[Cid]:
        """The series of other nodes."""
        with self._lock:
            return [series for series, shelf in self._shelves.items() if not shelf.made_here]

    def size(self) -> int:
        """Bytes that are counted for those."""
        with self._lock:
            return sum(shelf.size for shelf in self._shelves.values() if not shelf.made_here)

    def object(self, cid: Cid) -> bytes | None:
        """A draft, or a list of one."""
        for shelf in list(self._shelves.values()):
            if (data := shelf.objects.get(cid)) is not None:
                return data
        return None

    def begin(self, data: bytes) -> GrowingShelf:
        """The shelf of the series whose first draft is `data`; new, or as it stands.  Raises `BadObject`."""
        with self._lock:
            here = self._shelves.get(object_cid(data))
            if here is not None:
                return here
            most = Draft.decode(data).most
            self._room.check(-(-most // 4))
            folder = self._scratch / secrets.token_hex(8)
            with explained(folder):
                folder.mkdir()
            try:
                return self._add(folder, data, made_here=False)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise

    def lend(self, folder: Path, data: bytes) -> GrowingShelf:
        """The shelf of a series that is made here, in the folder into which its pack is pressed."""
        with self._lock:
            return self._add(folder, data, made_here=True)

    def _add(self, folder: Path, data: bytes, *, made_here: bool) -> GrowingShelf:
        series = object_cid(data)
        GrowingShelf.lay_out(folder, Draft.decode(data).most)
        shelf = self._shelves[series] = GrowingShelf(folder, series, data, made_here=made_here)
        if not made_here:
            self._room.count_pack(series, folder / "frames", 0)
        return shelf

    def extend(self, series: Cid, data: bytes, lists: Mapping[Cid, bytes]) -> range:
        """Take a draft that goes on, with the lists that it adds; the indices that are new.

        Raises `BadObject`, `VerificationFailed`, `NoSpace`, and `NotFound` for a series that is not here.
        """
        with self._lock:
            shelf = self._shelves.get(series)
            if shelf is None:
                raise NotFound(what=f"draft {series}")
            draft = going_on(series, shelf.newest, data)
            if draft is None:
                return range(0)
            lengths, digests = shelf.lists_of(draft, lists)
            if not shelf.made_here:
                self._room.grow_pack(series, shelf.folder / "frames", shelf.size + sum(lengths))
            known = shelf.newest.count
            shelf.extend(draft, data, lists, lengths, digests)
            return range(known, draft.count)

    def of(self, signer: bytes, frames: Frames) -> GrowingShelf | None:
        """A series of another node that a pack of `frames` goes on from."""
        others = [s for s in self._shelves.values() if not s.made_here and s.signer == signer]
        found = [shelf for shelf in others if shelf.begins(frames)]
        return max(found, key=lambda shelf: shelf.newest.count, default=None)

    def forget(self, series: Cid) -> None:
        """It has become a pack, which is counted by itself."""
        with self._lock:
            self._shelves.pop(series, None)
            self._room.forget_pack(series)

    def drop(self, series: Cid) -> None:
        """Have nothing of the series here any more.  Raises `NotFound`."""
        with self._lock:
            shelf = self._shelves.pop(series, None)
            if shelf is None:
                raise NotFound(what=f"draft {series}")
            self._room.forget_pack(series)
            shelf.end()
        if not shelf.made_here:  # what is lent is its owner's
            shutil.rmtree(shelf.folder, ignore_errors=True)

    def let_go(self) -> None:
        """The store is closed."""
        for shelf in list(self._shelves.values()):
            self.drop(shelf.pack)
