"""Speak the bulk protocol on one link: what the peer wants goes to `seed.py`, what it brings is
verified and stored here, in the thread of links, and reported to whoever wants it.

    link thread:  bytes ─> message ─┬─ Open, Request, GetObject ─> Seeding
                                    ├─ Frame ─> shelf (hash, write) ─> Arrived | Rejected
                                    └─ Object ─> name checked ─> whoever waits for it
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import trio

from p2pgrid.dht.manifest import verified
from p2pgrid.dht.shelf import Shelf
from p2pgrid.errors import BadFrame, BadObject, ChunkCorrupt, GridError, WorldError
from p2pgrid.hole_punch.link import Link
from p2pgrid.ids import Cid, PeerId
from p2pgrid.transfer.messages import (
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
    Peers,
    Refuse,
    Request,
    decode,
    encode,
)
from p2pgrid.transfer.seed import Seeding
from p2pgrid.transfer.swarm import Arrived, Event, Joined, Refused, Rejected, Told

CHATTER = 8
"""How often a peer may tell of each chunk before it is only wasting our time."""


class Wanter(Protocol):
    """Who wants a pack.  All calls come in a reactor's thread."""

    def report(self, event: Event) -> None: ...

    def fail(self, error: GridError) -> None:
        """Nothing more can be stored."""
        ...

    def hear_of(self, peers: tuple[tuple[PeerId, tuple[str, ...]], ...]) -> None: ...

    def grown(self, peer: PeerId, draft: Cid) -> None:
        """`peer` has a draft of what is wanted, perhaps a newer one."""
        ...


class Want:
    """What one peer is to one wanter: a topic on its link."""

    def __init__(self, link: Link, topic: int, shelf: Shelf, wanter: Wanter) -> None:
        self._link = link
        self._topic = topic
        self._shelf = shelf
        self._wanter = wanter
        self._count = shelf.places
        self._bits = bytearray(-(-self._count // 8))
        self._chatter = 0
        self.shown = False
        """Whether the peer has told all that it has, once."""
        self.closed = False

    @property
    def peer(self) -> PeerId:
        return self._link.peer

    @property
    def pack(self) -> Cid:
        return self._shelf.pack

    def open(self) -> None:
        """Say what is wanted; again where the peer did not have any of it, but may now."""
        self._link.send(*encode(Open(self._topic, self._shelf.pack)))

    def ask(self, indices: tuple[int, ...], urgent: bool = False) -> None:
        self._link.send(*encode(Request(self._topic, indices, urgent)))

    def withdraw(self, indices: tuple[int, ...]) -> None:
        self._link.send(*encode(Cancel(self._topic, indices)))

    def has(self, index: int) -> bool:
        """Whether the peer told that it has `index`."""
        return bool(self._bits[index >> 3] >> (index & 7) & 1)

    def close(self) -> None:
        self.closed = True
        self._link.send(*encode(Close(self._topic)))

    def tell(self) -> None:
        """Have it reported again what the peer has: there are more indices now than there were."""
        if self.shown:
            self._wanter.report(Joined(self.peer, bytes(self._bits), self._link.near))

    def take(self, message: Bitfield | Have | Frame | Refuse | Peers | Grown) -> None:
        """In the reactor's thread."""
        match message:
            case Frame(_, index, data):
                self._store(index, data)
            case Have(_, indices):
                self._listen(len(indices))
                self._need_known(max(indices))
                for index in indices:
                    self._bits[index >> 3] |= 1 << (index & 7)
                self._wanter.report(Told(self.peer, indices))
            case Bitfield(_, first, bits):
                self._listen(8 * len(bits))
                self._show(first, bits)
            case Refuse(_, index):
                self._listen(1)
                self._need_known(index)
                self._wanter.report(Refused(self.peer, index))
            case Peers(_, peers):
                self._listen(len(peers))
                self._wanter.hear_of(peers)
            case Grown(_, draft):
                self._listen(1)
                self._wanter.grown(self.peer, draft)

    def _store(self, index: int, data: bytes | memoryview) -> None:
        try:
            self._shelf.put_frame(index, data, sync=False)  # which would keep all links waiting
        except ChunkCorrupt:
            self._wanter.report(Rejected(self.peer, index))
        except WorldError as full:
            self._wanter.fail(full)
        else:
            self._wanter.report(Arrived(self.peer, index, len(data)))

    def _show(self, first: int, bits: bytes) -> None:
        start = first // 8
        end = start + len(bits)
        if end > len(self._bits):
            raise BadFrame(why="a bitmap that is longer than the pack")
        merged = int.from_bytes(self._bits[start:end], "little") | int.from_bytes(bits, "little")
        self._bits[start:end] = merged.to_bytes(len(bits), "little")
        if end == len(self._bits):
            if self._count % 8:
                self._bits[-1] &= (1 << self._count % 8) - 1
            self.shown = True
            self._wanter.report(Joined(self.peer, bytes(self._bits), self._link.near))

    def _need_known(self, index: int) -> None:
        if index >= self._count:
            raise BadFrame(why="an index that the pack does not have")

    def _listen(self, cost: int) -> None:
        self._chatter += cost
        if self._chatter > CHATTER * self._count + 65536:
            raise BadFrame(why="it tells the same again and again")


class Session:
    """One link and all that is said on it; a `Receiver`."""

    def __init__(
        self,
        link: Link,
        seeding: Callable[[Link], Seeding],
        ended: Callable[[Session, str], None],
        token: trio.lowlevel.TrioToken,
    ) -> None:
        self.link = link
        self._seeding = seeding(link)
        self._ended = ended
        self._token = token
        self._lock = threading.Lock()
        self._wants: dict[int, Want] = {}
        self._next = 0
        self._objects: dict[Cid, list[Answer]] = {}
        self._over = False

    @property
    def peer(self) -> PeerId:
        return self.link.peer

    # --- from trio ------------------------------------------------------------------------

    def want(self, shelf: Shelf, wanter: Wanter) -> Want:
        """Open the shelf's pack with this peer."""
        with self._lock:
            while self._next in self._wants:
                self._next = (self._next + 1) % 65536
            topic = self._next
            self._next = (topic + 1) % 65536
            want = self._wants[topic] = Want(self.link, topic, shelf, wanter)
        want.open()
        return want

    def known(self, pack: Cid) -> Callable[[int], bool]:
        """Tells which chunks of `pack` the peer is known to have."""
        with self._lock:
            wants = [want for want in self._wants.values() if want.pack == pack]
        return wants[0].has if wants else lambda index: False

    def unwant(self, want: Want) -> None:
        with self._lock:
            self._wants = {topic: other for topic, other in self._wants.items() if other is not want}
        want.close()

    async def get_object(self, cid: Cid) -> bytes | None:
        """The object's bytes, or None where the peer does not have it or the link ended.

        Raises `BadObject` when what came is not what `cid` names.  The caller bounds the time.
        """
        answer = Answer()
        with self._lock:
            if self._over:
                return None
            waiting = self._objects.setdefault(cid, [])
            waiting.append(answer)
        if len(waiting) == 1:
            self.link.send(*encode(GetObject(cid)))
        try:
            await answer.came.wait()
        finally:
            with self._lock:
                if answer in waiting:
                    waiting.remove(answer)
                if not waiting and self._objects.get(cid) is waiting:
                    del self._objects[cid]
        if answer.wrong is not None:
            raise answer.wrong
        return answer.data

    # --- in the reactor's thread ----------------------------------------------------------

    def received(self, message: memoryview) -> None:
        match decode(message):
            case Bitfield() | Have() | Frame() | Refuse() | Peers() | Grown() as brought:
                want = self._wants.get(brought.topic)
                if want is not None and not want.closed:  # it may have been closed while this was under way
                    want.take(brought)
            case Object(cid, data):
                self._object(cid, data)
            case NoObject(cid):
                self._answer(cid, None, None)
            case wish:
                self._seeding.take(wish)

    def drained(self) -> float | None:
        return self._seeding.serve()

    def left(self, why: str) -> None:
        with self._lock:
            self._over = True
            objects = list(self._objects)
        for cid in objects:
            self._answer(cid, None, None)
        self._seeding.end()
        self._soon(self._ended, self, why)

    def _object(self, cid: Cid, data: bytes) -> None:
        try:
            self._answer(cid, verified(cid, data), None)
        except BadObject as wrong:
            self._answer(cid, None, wrong)

    def _answer(self, cid: Cid, data: bytes | None, wrong: BadObject | None) -> None:
        with self._lock:
            waiting = list(self._objects.pop(cid, ()))
        for answer in waiting:
            answer.data, answer.wrong = data, wrong
            self._soon(answer.came.set)

    def _soon(self, call: Callable[..., None], *args: object) -> None:
        self._token.run_sync_soon(call, *args)


class Answer:
    """What came for one request of an object."""

    def __init__(self) -> None:
        self.came = trio.Event()
        self.data: bytes | None = None
        self.wrong: BadObject | None = None
