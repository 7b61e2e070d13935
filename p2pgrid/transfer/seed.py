"""Serve one peer what the store holds, as fast as its link takes it and no faster.

Whatever is here is served, packs that are still incomplete, too.  Requests wait as numbers,
not as bytes: a frame is read from the store, in the link's own thread, when the link has
room for it.  A frame that turns out to be missing or rotten is refused, never sent.
"""

from __future__ import annotations

import collections
import itertools
import math
import threading
from collections.abc import Callable

from p2pgrid.dht.shelf import Shelf
from p2pgrid.dht.store import Store
from p2pgrid.errors import BadFrame, BadObject, ChunkCorrupt, NotFound, WorldError
from p2pgrid.hole_punch.link import LOW, Link
from p2pgrid.ids import Cid
from p2pgrid.transfer.messages import (
    BITS_MAX,
    INDICES_MAX,
    Bitfield,
    Cancel,
    Close,
    Frame,
    GetObject,
    Have,
    NoObject,
    Object,
    Open,
    Refuse,
    Request,
    encode,
)

TOPICS_MAX = 1024
"""Packs that one peer wants at once."""
REQUESTS_MAX = 65536
"""Frames and objects that one peer may have asked for and not got yet."""
CHOICE = 64
"""Requests looked at for the one to serve next: a peer's whole window."""

Wish = Open | Request | Cancel | GetObject | Close
"""The messages that ask for something."""


class Audience:
    """Who has opened which pack here, under what number, and what they were sent.  Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._topics: dict[Cid, dict[Link, int]] = {}
        self._copies: dict[Cid, collections.Counter[int]] = {}

    def join(self, pack: Cid, link: Link, topic: int) -> None:
        with self._lock:
            self._topics.setdefault(pack, {})[link] = topic

    def leave(self, pack: Cid, link: Link) -> None:
        with self._lock:
            topics = self._topics.get(pack, {})
            topics.pop(link, None)
            if not topics:
                self._topics.pop(pack, None)
                self._copies.pop(pack, None)

    def sent(self, pack: Cid, index: int) -> None:
        with self._lock:
            if pack in self._topics:
                self._copies.setdefault(pack, collections.Counter())[index] += 1

    def copies(self, pack: Cid | None, index: int) -> int:
        """How often the chunk was sent while anybody had the pack open."""
        copies = self._copies.get(pack) if pack is not None else None
        return copies[index] if copies is not None else 0

    def of(self, pack: Cid) -> list[tuple[Link, int]]:
        with self._lock:
            return list(self._topics.get(pack, {}).items())

    def tell(self, pack: Cid, indices: list[int]) -> None:
        """Everyone who has opened `pack`: these are here now."""
        for start in range(0, len(indices), INDICES_MAX):
            some = tuple(indices[start : start + INDICES_MAX])
            for link, topic in self.of(pack):
                link.send(*encode(Have(topic, some)))

    def show(self, shelf: Shelf) -> None:
        """Everyone who has opened the shelf's pack: all that is here."""
        for link, topic in self.of(shelf.pack):
            show(link, topic, shelf)


def show(link: Link, topic: int, shelf: Shelf) -> None:
    bits = shelf.have()
    for start in range(0, len(bits), BITS_MAX):
        link.send(*encode(Bitfield(topic, 8 * start, bits[start : start + BITS_MAX])))


class Seeding:
    """One peer's wishes.  All calls come in the link's thread."""

    def __init__(
        self,
        link: Link,
        store: Store,
        audience: Audience,
        opened: Callable[[Link, int, Cid], None],
        sent: Callable[[int], None],
    ) -> None:
        self._link = link
        self._store = store
        self._audience = audience
        self._opened = opened
        self._sent = sent
        self._topics: dict[int, Cid] = {}
        self._requests: dict[tuple[int, int], None] = {}  # an ordered set of topic and index
        self._objects: collections.deque[Cid] = collections.deque()

    def take(self, wish: Wish) -> None:
        match wish:
            case Request(topic, indices):
                # Topics that were closed meanwhile, and unknown ones, are refused when their turn comes.
                self._requests.update(dict.fromkeys(zip(itertools.repeat(topic), indices, strict=False)))
            case Cancel(topic, index):
                self._requests.pop((topic, index), None)
            case GetObject(cid):
                self._objects.append(cid)
            case Open(topic, pack):
                self._open(topic, pack)
            case Close(topic):
                pack_or_none = self._topics.pop(topic, None)
                if pack_or_none is not None:
                    self._audience.leave(pack_or_none, self._link)
        if len(self._requests) + len(self._objects) > REQUESTS_MAX:
            raise BadFrame(why="more is asked for than anyone can take")

    def serve(self) -> None:
        """Send what was asked for while the link has room."""
        while self._link.queued < LOW:
            if self._objects:
                self._send_object(self._objects.popleft())
            elif self._requests:
                request = self._choose()
                del self._requests[request]
                self._send_frame(*request)
            else:
                return

    def end(self) -> None:
        for pack in self._topics.values():
            self._audience.leave(pack, self._link)

    def _open(self, topic: int, pack: Cid) -> None:
        if self._topics.get(topic, pack) != pack or len(self._topics) >= TOPICS_MAX:
            raise BadFrame(why="a topic that is in use, or too many")
        self._topics[topic] = pack
        self._audience.join(pack, self._link, topic)  # first: from now on it is told what comes
        shelf = self._shelf(pack)
        if shelf is not None:
            show(self._link, topic, shelf)
        self._opened(self._link, topic, pack)

    def _shelf(self, pack: Cid | None) -> Shelf | None:
        try:
            return None if pack is None else self._store.shelf(pack)
        except (BadObject, WorldError):
            return None

    def _choose(self) -> tuple[int, int]:
        """The request to serve next; the first one for a chunk that nobody was sent yet, as a rule."""
        best, fewest = (0, 0), math.inf
        for topic, index in itertools.islice(self._requests, CHOICE):
            copies = self._audience.copies(self._topics.get(topic), index)
            if copies < fewest:
                best, fewest = (topic, index), copies
                if copies == 0:
                    break
        return best

    def _send_frame(self, topic: int, index: int) -> None:
        pack = self._topics.get(topic)
        shelf = self._shelf(pack)
        try:
            if pack is None or shelf is None:
                raise NotFound(what=f"topic {topic}")
            frame = shelf.get_frame(index)
        except (ChunkCorrupt, WorldError):
            self._link.send(*encode(Refuse(topic, index)))
            return
        self._link.send(*encode(Frame(topic, index, frame)))
        self._audience.sent(pack, index)
        self._sent(len(frame))

    def _send_object(self, cid: Cid) -> None:
        try:
            data = self._store.get_object(cid)
        except WorldError:
            self._link.send(*encode(NoObject(cid)))
            return
        self._link.send(*encode(Object(cid, data)))
