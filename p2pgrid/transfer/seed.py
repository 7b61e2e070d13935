"""Serve one peer what the store holds, as fast as its link takes it and no faster.

Whatever is here is served, packs that are still incomplete, too.  Requests wait as numbers,
not as bytes: a frame is read from the store, in the thread of links, when the link has
room for it.  Which one, and whether it waits a moment, `turns.py` decides; all links share what
it knows of a pack.  A frame that turns out to be missing or rotten is refused, never sent.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

import attrs

from p2pgrid.dht.growing import GrowingShelf
from p2pgrid.dht.shelf import Shelf
from p2pgrid.dht.store import Store
from p2pgrid.errors import BadFrame, BadObject, ChunkCorrupt, NotFound, WorldError
from p2pgrid.hole_punch.link import Link
from p2pgrid.ids import Cid
from p2pgrid.transfer.guests import Guests
from p2pgrid.transfer.messages import (
    BITS_MAX,
    INDICES_MAX,
    Bitfield,
    Cancel,
    Close,
    Frame,
    GetObject,
    Grown,
    Have,
    NoObject,
    Object,
    Open,
    Refuse,
    Request,
    encode,
)
from p2pgrid.transfer.slots import STUCK, Slots
from p2pgrid.transfer.turns import Asks, Turns

TOPICS_MAX = 1024
"""Packs that one peer wants at once."""
URGENT_MAX = 1 << 20
"""Bytes of urgent frames in a link beside the others: some seconds' worth of a slow one."""
REQUESTS_MAX = 65536
"""Frames and objects that one peer may have asked for and not got yet."""

Wish = Open | Request | Cancel | GetObject | Close
"""The messages that ask for something."""


class Audience:
    """Who has opened which pack here, under what number, and what of it was sent.  Thread-safe."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self._lock = threading.Lock()
        self._topics: dict[Cid, dict[tuple[Link, int], None]] = {}
        self._turns: dict[Cid, Turns] = {}
        self._slots: tuple[Slots[Link], Slots[Link]] = Slots(), Slots()
        self.guests: Guests[Link] = Guests()

    def slots(self, link: Link) -> Slots[Link]:
        """Those of the uplink that `link` goes through: not the same within the house as across its line."""
        return self._slots[link.near]

    def join(self, pack: Cid, link: Link, topic: int) -> None:
        with self._lock:
            self._topics.setdefault(pack, {})[link, topic] = None

    def leave(self, pack: Cid, link: Link, topic: int) -> None:
        with self._lock:
            topics = self._topics.get(pack, {})
            topics.pop((link, topic), None)
            if not topics:
                self._topics.pop(pack, None)

    def turns(self, pack: Cid, count: int, whole: bool = True) -> Turns:
        """What was sent of the pack, of `count` chunks, to those who have it open.

        It is remembered for a moment longer: whoever comes just after the last one left can
        have most of it from that one.
        """
        with self._lock:
            now = self.now()
            for other in [p for p, t in self._turns.items() if p not in self._topics and t.quiet(now)]:
                del self._turns[other]
            if pack not in self._turns:
                self._turns[pack] = Turns(count, whole)
            return self._turns[pack]

    def of(self, pack: Cid) -> list[tuple[Link, int]]:
        with self._lock:
            return list(self._topics.get(pack, ()))

    def tell(self, pack: Cid, indices: list[int], known: Callable[[Link], Callable[[int], bool]]) -> None:
        """Everyone who has opened `pack`: these are here now, but for what is `known` to be there, too."""
        for link, topic in self.of(pack):
            if link not in self.guests:
                continue
            there = known(link)
            news = tuple(index for index in indices if not there(index))
            for start in range(0, len(news), INDICES_MAX):
                link.send(*encode(Have(topic, news[start : start + INDICES_MAX])))

    def show(self, shelf: Shelf) -> None:
        """Everyone who has opened the shelf's pack, and need not wait: all that is here."""
        for link, topic in self.of(shelf.pack):
            self.receive(link, topic, shelf)

    def receive(self, link: Link, topic: int, shelf: Shelf) -> None:
        """Show what is here, unless there are too many guests; it opens the pack again soon."""
        enters, leaves = self.guests.knock(link, self.now())
        if leaves is not None:
            leaves.close("others have waited for long")
        if enters:
            show(link, topic, shelf)

    def grown(self, shelf: GrowingShelf) -> None:
        """Everyone who follows the series: it has grown."""
        for link, topic in self.of(shelf.pack):
            link.send(*encode(Grown(topic, shelf.newest_cid)))


def show(link: Link, topic: int, shelf: Shelf) -> None:
    bits = shelf.have()
    for start in range(0, len(bits), BITS_MAX):
        link.send(*encode(Bitfield(topic, 8 * start, bits[start : start + BITS_MAX])))
    if isinstance(shelf, GrowingShelf) and shelf.newest_cid != shelf.pack:
        link.send(*encode(Grown(topic, shelf.newest_cid)))


@attrs.define
class _Topic:
    """A pack that the peer has opened."""

    pack: Cid
    asks: Asks | None = None


class Seeding:
    """One peer's wishes.  All calls come in the reactor's thread."""

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
        self._topics: OrderedDict[int, _Topic] = OrderedDict()  # served last is last
        self._refusals: OrderedDict[tuple[int, int], None] = OrderedDict()  # a set of topic and index
        self._urgent: OrderedDict[tuple[int, int], Cid] = OrderedDict()  # topic and index, and the pack
        self._objects: deque[Cid] = deque()
        self._slots: Slots[Link] | None = None

    def take(self, wish: Wish) -> None:
        match wish:
            case Request(topic, indices, urgent):
                self._ask(topic, indices, urgent)
            case Cancel(topic, indices):
                for index in indices:
                    self._refusals.pop((topic, index), None)
                    self._urgent.pop((topic, index), None)
                    if topic in self._topics and (asks := self._topics[topic].asks) is not None:
                        asks.withdraw(index)
            case GetObject(cid):
                self._objects.append(cid)
                self._bound()
            case Open(topic, pack):
                self._open(topic, pack)
            case Close(topic):
                self._close(topic)

    def serve(self) -> float | None:
        """Send what was asked for while the link has room.

        Returns the seconds after which there is more to send, if nothing else happens before.
        """
        slots, link, wait = self._audience.slots(self._link), self._link, None
        if slots is not self._slots:  # perhaps its path is another one now
            if self._slots is not None:
                self._slots.leave(link)
            self._slots = slots
        slots.update(link, link.queued, self._audience.now())
        self._send_urgent()
        while link.queued < link.low:
            now = self._audience.now()
            if self._objects:
                self._send_object(self._objects.popleft())
            elif self._refusals:
                request, _ = self._refusals.popitem(last=False)
                link.send(*encode(Refuse(*request)))
            elif (due := self._due()) > now:
                slots.pause(link)
                wait = None if due == math.inf else due - now
                break
            elif not slots.may(link, now):
                wait = STUCK
                break
            else:
                self._send_frame(now)
            slots.update(link, link.queued, now)
        first = slots.first(self._audience.now())
        if first is not None and first is not link:
            first.wake()
        return wait

    def _due(self) -> float:
        """When there is a frame to send."""
        return min((t.asks.due for t in self._topics.values() if t.asks is not None), default=math.inf)

    def end(self) -> None:
        for topic in list(self._topics):
            self._close(topic)
        if self._slots is not None:
            self._slots.leave(self._link)

    def _open(self, topic: int, pack: Cid) -> None:
        known = self._topics.setdefault(topic, _Topic(pack))
        if known.pack != pack or len(self._topics) > TOPICS_MAX:
            raise BadFrame(why="a topic that is in use, or too many")
        self._audience.join(pack, self._link, topic)  # first: from now on it is told what comes
        shelf = self._shelf(pack)
        if shelf is not None:
            self._audience.receive(self._link, topic, shelf)
        self._opened(self._link, topic, pack)

    def _close(self, topic: int) -> None:
        closed = self._topics.pop(topic, None)
        if closed is not None:
            if closed.asks is not None:
                closed.asks.leave()
            for key in [key for key in self._urgent if key[0] == topic]:
                del self._urgent[key]
            self._audience.leave(closed.pack, self._link, topic)
            if not self._topics:
                self._audience.guests.leave(self._link)

    def _send_urgent(self) -> None:
        """Send what is urgent, before what is in the link already; not more than the link should hold."""
        while self._urgent and self._link.queued < self._link.low + URGENT_MAX:
            (topic, index), pack = self._urgent.popitem(last=False)
            self._send(topic, pack, index, bulk=False)

    def _ask(self, topic: int, indices: tuple[int, ...], urgent: bool) -> None:
        """Note what is here; the rest, and what topics closed meanwhile ask for, is refused."""
        known = self._topics.get(topic)
        shelf = self._shelf(known.pack) if known is not None else None
        here: list[int] = []
        if known is not None and shelf is not None:
            count = shelf.places
            here = [index for index in indices if index < count and shelf.holds(index)]
            if known.asks is None:
                known.asks = self._audience.turns(known.pack, count, shelf.whole).join(self._link.peer)
            if urgent:
                known.asks.urge(here, self._audience.now())
                self._urgent.update(((topic, index), known.pack) for index in here)
                self._send_urgent()
            else:
                known.asks.ask(here)
        if len(here) < len(indices):
            self._refusals.update(dict.fromkeys((topic, index) for index in set(indices) - set(here)))
        self._bound()

    def _bound(self) -> None:
        asked = sum(len(t.asks) for t in self._topics.values() if t.asks is not None)
        if asked + len(self._urgent) + len(self._refusals) + len(self._objects) > REQUESTS_MAX:
            raise BadFrame(why="more is asked for than anyone can take")

    def _shelf(self, pack: Cid) -> Shelf | None:
        try:
            return self._store.shelf(pack)
        except (BadObject, WorldError):
            return None

    def _send_frame(self, now: float) -> None:
        """Send one frame, topics in turn, unless all that is asked for has to wait."""
        for topic, known in self._topics.items():
            index = known.asks.next(now) if known.asks is not None else None
            if index is not None:
                self._topics.move_to_end(topic)
                self._send(topic, known.pack, index)
                return

    def _send(self, topic: int, pack: Cid, index: int, bulk: bool = True) -> None:
        shelf = self._shelf(pack)
        try:
            if shelf is None:
                raise NotFound(what=f"pack {pack}")
            frame = shelf.get_frame(index)
        except (ChunkCorrupt, WorldError):
            self._link.send(*encode(Refuse(topic, index)))
            return
        again = functools.partial(self._again, topic, pack, index)
        self._link.send(*encode(Frame(topic, index, frame)), bulk=bulk, again=again)
        self._sent(len(frame))

    def _again(self, topic: int, pack: Cid, index: int) -> tuple[bytes, ...] | None:
        """The frame for another connection: what lies on the disk need not be kept until it has arrived."""
        known, shelf = self._topics.get(topic), self._shelf(pack)
        if known is None or known.pack != pack or shelf is None:
            return None  # it is not wanted any more
        try:
            return encode(Frame(topic, index, shelf.get_frame(index)))
        except (ChunkCorrupt, WorldError):
            return encode(Refuse(topic, index))

    def _send_object(self, cid: Cid) -> None:
        try:
            data = self._store.get_object(cid)
        except WorldError:
            self._link.send(*encode(NoObject(cid)))
            return
        self._link.send(*encode(Object(cid, data)), bulk=True, again=functools.partial(self._object, cid))

    def _object(self, cid: Cid) -> tuple[bytes, ...]:
        try:
            return encode(Object(cid, self._store.get_object(cid)))
        except WorldError:
            return encode(NoObject(cid))
