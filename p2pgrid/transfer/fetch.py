"""Complete one datum: its objects first, then the frames of its pack, from whoever has them.

    look for peers ───────────────────────────────────────────> (until complete)
    objects, each by name ─> begin the pack ─> Swarm: Ask … Arrived … Completed

One story; cancelling it leaves a shelf that the next fetch goes on with.  It never gives up by
itself: how long to wait is the caller's to say, and `Progress` says what is lacking, so that
"nobody has chunk 17" is known within seconds and not after a timeout.

Peers are found by hints, by the index, by being told of each other (`Peers`), and by their own
opening of the pack; so whoever fetches the same thing meets, and the putter is not all there is.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import attrs
import trio

from p2pgrid.dht.manifest import Content, decode_datum
from p2pgrid.dht.shelf import Shelf
from p2pgrid.dht.store import Store
from p2pgrid.drive import drive
from p2pgrid.errors import BadObject, GridError, NotFound, Refused, WorldError
from p2pgrid.ids import Cid, PeerId
from p2pgrid.machine import Tick
from p2pgrid.transfer.company import SEARCH, Company, Searching
from p2pgrid.transfer.lastresort import LastResort
from p2pgrid.transfer.messages import INDICES_MAX
from p2pgrid.transfer.ranges import is_origin
from p2pgrid.transfer.session import Session
from p2pgrid.transfer.swarm import (
    Arrived,
    Ask,
    Completed,
    Effect,
    Event,
    Held,
    Joined,
    Left,
    Shun,
    Swarm,
    Withdraw,
)

OBJECTS_AT_ONCE = 8
OBJECT_PATIENCE = 15.0
"""Seconds for an object (at most 1 MiB) before it is asked of another peer."""
GATHER = 0.005
"""Seconds that reports of links wait for more of them: a step and a message for each would cost
as much as the bytes.  Peers are asked for more than arrives in that time."""
ANNOUNCE = 0.025
"""Seconds that news of chunks wait for more of them."""
REPORT = 0.25
"""Seconds between two progress reports."""


@attrs.frozen
class Progress:
    """How far a fetch is.  Bytes are those of frames, as they are stored and sent."""

    bytes_done: int
    bytes_total: int
    """0 until the pack is known."""
    bytes_by_peer: dict[PeerId, int]
    local: int
    """Bytes copied from other packs of this store."""
    resumed: int
    """Bytes that an earlier fetch had brought."""
    rate: float
    """Bytes per second, lately."""
    peers: int
    missing: int
    """Chunks not here."""
    unavailable: int
    """Missing chunks that no connected peer has."""
    stalled_for: float
    """Seconds since something came."""
    troubles: dict[str, str] = attrs.field(factory=dict)
    """Why origins help no more, by origin."""


@attrs.frozen
class Fetched:
    """A fetch that is complete."""

    bytes_by_peer: dict[PeerId, int]
    local_bytes: int
    resumed_bytes: int
    seconds: float


class Peering(Searching, Protocol):
    """What a fetch needs of the exchange."""

    store: Store
    me: PeerId
    origins: Sequence[str]
    """Where to ask when no peer helps."""

    def show(self, shelf: Shelf) -> None:
        """Tell who has opened the shelf's pack what is here."""
        ...

    def tell(self, pack: Cid, indices: list[int]) -> None:
        """Tell who has opened `pack`, and whoever here wants it, that these are here."""
        ...


class Download:
    """One datum being completed; a `Wanter`.  Run it once."""

    def __init__(self, datum: Cid, peering: Peering, rng: random.Random, most: int | None) -> None:
        self.datum = datum
        self._most = most
        self.pack: Cid | None = None
        self.listeners: list[Callable[[Progress], None]] = []
        self._peering = peering
        self._store = peering.store
        self._rng = rng
        self._token = trio.lowlevel.current_trio_token()
        self._scope = trio.CancelScope()
        self._failure: GridError | None = None
        self.company = Company([datum], peering, self)
        self.resort = LastResort(self, peering.me, rng)
        self.resort.add(peering.origins)
        self._lock = threading.Lock()
        self._reports: list[Event] = []
        self._reported = trio.Event()
        self._inbox: trio.MemorySendChannel[Sequence[Event]] | None = None
        self._shelf: Shelf | None = None
        self._swarm: Swarm | None = None
        self._arrived = bytearray()
        self._fresh: list[int] = []
        self._freshly = trio.Event()
        self._bytes_by_peer: dict[PeerId, int] = {}
        self._done = self._total = self._local = self._resumed = 0
        self._started = self._last = trio.current_time()
        self._rate = 0.0

    # --- the story ------------------------------------------------------------------------

    async def run(self) -> Fetched:
        """Raises `BadObject` where the datum's own objects do not fit together, and what the
        store raises when it cannot take it."""
        try:
            with self._scope:
                if not await self._all_here():
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self.company.search)
                        nursery.start_soon(self.resort.run)
                        nursery.start_soon(self._report)
                        nursery.start_soon(self._collect)
                        nursery.start_soon(self._announce)
                        try:
                            await self._objects()
                            await self._begin()
                            await self._complete()
                        except GridError as wrong:
                            self._failure = wrong
                        nursery.cancel_scope.cancel()
                    await self._flush()
        finally:
            self.company.dismiss()
            self.resort.close()
        if self._failure is not None:
            await trio.to_thread.run_sync(self._store.abandon, self.datum)
            raise self._failure
        self._tell_listeners()
        return Fetched(
            dict(self._bytes_by_peer), self._local, self._resumed, trio.current_time() - self._started
        )

    async def _all_here(self) -> bool:
        if await trio.to_thread.run_sync(self._missing):
            return False
        await self._begin()
        assert self._shelf is not None
        return self._shelf.complete

    async def _objects(self) -> None:
        limit = trio.CapacityLimiter(OBJECTS_AT_ONCE)
        while missing := await trio.to_thread.run_sync(self._missing):
            async with trio.open_nursery() as nursery:
                for cid in missing:
                    nursery.start_soon(self._object, cid, limit)

    def _missing(self) -> list[Cid]:
        """The objects to ask for next.  Raises `Refused` as soon as the size is known and too large."""
        missing = self._store.missing_objects(self.datum)
        if self._most is not None:
            with contextlib.suppress(NotFound):
                top = decode_datum(self._store.get_object(self.datum))
                size = Content.decode(self._store.get_object(top.content)).size if top.content else 0
                if size > self._most:
                    raise Refused(why=f"{self.datum} is {size} bytes; {self._most} are allowed here")
        return missing

    async def _object(self, cid: Cid, limit: trio.CapacityLimiter) -> None:
        tried: set[Session] = set()
        while True:
            sessions = [s for s in self.company.sessions() if s not in tried]
            if not sessions:
                tried.clear()
                if await self._object_of_origin(cid):
                    return
                with trio.move_on_after(self.resort.wait(SEARCH)):
                    await self.company.news.wait()
                continue
            session = self._rng.choice(sessions)
            tried.add(session)
            async with limit:
                with trio.move_on_after(OBJECT_PATIENCE):
                    try:
                        data = await session.get_object(cid)
                    except BadObject:
                        self.company.shun(session.peer)
                        continue
                    if data is None:
                        continue
                    await self._keep(data)
                    return

    async def _object_of_origin(self, cid: Cid) -> bool:
        data = await self.resort.get_object(cid)
        if data is not None:
            await self._keep(data)
        return data is not None

    async def _keep(self, data: bytes) -> None:
        try:
            await trio.to_thread.run_sync(self._store.put_object, data)
        except WorldError as full:
            self._give_up(full)
        self._last = trio.current_time()

    async def _begin(self) -> None:
        """Make or find the shelf, and tell the others what is on it."""
        if self._shelf is not None:
            return

        def begin() -> tuple[Shelf, int, int, int]:
            pack = decode_datum(self._store.get_object(self.datum)).pack or self.datum
            before = self._store.shelf(pack)
            local = before.local_bytes if before is not None else 0
            shelf = self._store.begin(self.datum)
            return shelf, shelf.local_bytes - local, shelf.held_bytes(), shelf.size

        shelf, self._local, self._done, self._total = await trio.to_thread.run_sync(begin)
        self._resumed = self._done - self._local
        self._shelf = shelf
        self.pack = shelf.pack
        self.company.keys.append(shelf.layout.cid)
        self._arrived = bytearray(len(shelf.frames.lengths))
        if not shelf.complete:
            self._peering.show(shelf)

    async def _complete(self) -> None:
        shelf = self._shelf
        assert shelf is not None
        while not shelf.complete:  # again only where a chunk rotted while the others came
            if shelf.convicted:
                shelf.put_frame(0, b"")  # says why
            self.company.dismiss()
            self._arrived = bytearray(len(shelf.frames.lengths))
            self._swarm = Swarm(shelf.frames.lengths, shelf.have(), self._rng)
            # Bounded by what peers were asked for and by how much they may chatter.
            self._inbox, inbox = trio.open_memory_channel[Sequence[Event]](math.inf)
            self.company.gather(shelf)
            await drive(_Gathered(self._swarm), inbox, self._perform)

    async def _flush(self) -> None:
        if self._shelf is not None:
            await trio.to_thread.run_sync(self._shelf.flush)

    async def _perform(self, effects: Sequence[Effect]) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        for effect in effects:
            match effect:
                case Ask(peer, indices):
                    if want := self.company.want(peer):
                        for start in range(0, len(indices), INDICES_MAX):
                            want.ask(indices[start : start + INDICES_MAX])
                case Withdraw(peer, index):
                    if want := self.company.want(peer):
                        want.withdraw(index)
                case Shun(peer, _):
                    self.company.shun(peer)
                case Completed():
                    assert self._inbox is not None
                    self._inbox.close()

    # --- what the last resort wants to know -------------------------------------------------

    def lacking(self) -> tuple[Shelf, Swarm] | None:
        if self._shelf is None or self._swarm is None or self._swarm.complete:
            return None
        return self._shelf, self._swarm

    def peers(self) -> list[PeerId]:
        return [session.peer for session in self.company.sessions()]

    def brought(self) -> int:
        return sum(count for peer, count in self._bytes_by_peer.items() if not is_origin(peer))

    # --- what links report ----------------------------------------------------------------

    def report(self, event: Event) -> None:
        with self._lock:
            self._reports.append(event)
            if len(self._reports) > 1:
                return  # whoever was first has called already
        self._token.run_sync_soon(self._ring_reported)

    def fail(self, error: GridError) -> None:
        self._token.run_sync_soon(self._give_up, error)

    def hear_of(self, peers: tuple[tuple[PeerId, tuple[str, ...]], ...]) -> None:
        self._token.run_sync_soon(self.company.meet, peers)

    def _give_up(self, error: GridError) -> None:
        self._failure = self._failure or error
        self._scope.cancel()

    def left(self, peer: PeerId) -> None:
        """The company lost `peer`."""
        self._feed([Left(peer)])

    def _ring_reported(self) -> None:
        self._reported.set()

    async def _collect(self) -> None:
        """Take what links report, a moment's worth at a time, and let the swarm decide."""
        while True:
            await self._reported.wait()
            self._reported = trio.Event()
            with self._lock:
                events, self._reports = self._reports, []
            for event in events:
                if isinstance(event, Arrived) and not self._arrived[event.index]:
                    self._count(event.index, event.size)
                    self._bytes_by_peer[event.peer] = self._bytes_by_peer.get(event.peer, 0) + event.size
                    self._fresh.append(event.index)
                elif isinstance(event, Joined):
                    self.company.proved(event.peer)
            if self._fresh:
                self._freshly.set()
            self._feed(events)
            await trio.sleep(GATHER)

    def hold(self, indices: Iterable[int]) -> None:
        """These came in another way: by a fetch of another datum with the same pack."""
        if self._shelf is not None:
            fresh = [index for index in indices if not self._arrived[index]]
            for index in fresh:
                self._count(index, self._shelf.frames.lengths[index])
            if fresh:
                self._feed([Held(fresh)])

    def _count(self, index: int, size: int) -> None:
        self._arrived[index] = 1
        self._done += size
        self._last = trio.current_time()

    def _feed(self, events: Sequence[Event]) -> None:
        if self._inbox is not None:
            with contextlib.suppress(trio.ClosedResourceError, trio.BrokenResourceError):
                self._inbox.send_nowait(events)

    async def _announce(self) -> None:
        """Tell those who have opened the pack what came, a moment's worth at a time."""
        while True:
            await self._freshly.wait()
            await trio.sleep(ANNOUNCE)
            self._freshly = trio.Event()
            fresh, self._fresh = self._fresh, []
            assert self.pack is not None
            self._peering.tell(self.pack, fresh)

    # --- progress -------------------------------------------------------------------------

    async def _report(self) -> None:
        before, at = self._done, trio.current_time()
        while True:
            await trio.sleep(REPORT)
            now = trio.current_time()
            self._rate = 0.7 * self._rate + 0.3 * (self._done - before) / (now - at)
            before, at = self._done, now
            self._tell_listeners()

    def _tell_listeners(self) -> None:
        if not self.listeners:
            return
        swarm = self._swarm
        progress = Progress(
            self._done,
            self._total,
            dict(self._bytes_by_peer),
            self._local,
            self._resumed,
            self._rate,
            len(self.company.sessions()),
            swarm.missing if swarm is not None else 0,
            len(swarm.unavailable()) if swarm is not None and not swarm.complete else 0,
            trio.current_time() - self._last,
            self.resort.troubles(),
        )
        for listener in list(self.listeners):
            listener(progress)


class _Gathered:
    """A swarm that takes many events in one step, and says what to do in order, each peer asked once."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm

    @property
    def deadline(self) -> float:
        return self._swarm.deadline

    def step(self, events: Sequence[Event] | Tick, now: float) -> Iterator[list[Effect]]:
        asks: dict[PeerId, dict[int, None]] = {}
        effects: list[Effect] = []
        for event in (events,) if isinstance(events, Tick) else events:
            for effect in self._swarm.step(event, now):
                match effect:
                    case Ask(peer, indices):
                        asks.setdefault(peer, {}).update(dict.fromkeys(indices))
                    case Withdraw(peer, index) if index in asks.get(peer, {}):
                        del asks[peer][index]
                    case _:
                        effects.append(effect)
        effects += [Ask(peer, tuple(indices)) for peer, indices in asks.items() if indices]
        if effects:
            yield effects

    def check(self) -> None:
        self._swarm.check()
