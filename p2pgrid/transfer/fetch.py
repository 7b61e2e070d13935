"""Complete one datum: its objects first, then the frames of its pack, from whoever has them.

    look for peers ───────────────────────────────────────────> (until complete)
    objects, each by name ─> begin the pack ─> Swarm: Ask … Arrived … Completed
                                               one for each pack: of a delta, the parent's first

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
from p2pgrid.hole_punch.bulk import Links
from p2pgrid.ids import Cid, PeerId
from p2pgrid.machine import Tick
from p2pgrid.transfer.company import SEARCH, Company, Searching
from p2pgrid.transfer.lastresort import LastResort
from p2pgrid.transfer.messages import INDICES_MAX
from p2pgrid.transfer.progress import Progress, stretches
from p2pgrid.transfer.ranges import is_origin
from p2pgrid.transfer.session import Session, Wanter
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
    Urgent,
    Withdraw,
)

OBJECTS_AT_ONCE = 8
OBJECT_PATIENCE = 15.0
"""Seconds for an object (at most 1 MiB) before it is asked of another peer."""
GATHER = 0.05
"""Seconds that reports of links wait for more of them: a step and a message for each would cost
as much as the bytes.  Peers are asked for more than arrives in that time, once they are at it."""
GATHERED = 32
"""Reports that are not waited with: a fast peer brings all it was asked for within `GATHER`."""
GATHER_FIRST = 0.005
"""The same while somebody has not brought `FIRST` bytes: it is asked for little, and would be idle."""
FIRST = 2 << 20
ANNOUNCE = 0.05
"""Seconds that news of chunks wait for more of them."""
REPORT = 0.25
"""Seconds between two progress reports."""


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
    links: Links
    origins: Sequence[str]
    """Where to ask when no peer helps."""

    def show(self, shelf: Shelf) -> None:
        """Tell who has opened the shelf's pack what is here."""
        ...

    def tell(self, pack: Cid, indices: list[int]) -> None:
        """Tell who has opened `pack`, and whoever here wants it, that these are here."""
        ...

    def grown(self, series: Cid) -> None:
        """Tell who follows `series` that it has grown."""
        ...

    def settle(self) -> None:
        """Have no series followed that is not here any more: it became a pack, or was dropped."""
        ...


class Download:
    """One datum being completed; a `Wanter`.  Run it once."""

    def __init__(self, datum: Cid, peering: Peering, rng: random.Random, most: int | None) -> None:
        self.datum = datum
        self._most = most
        self.pack: Cid | None = None
        """The one that is being completed."""
        self.packs: frozenset[Cid] = frozenset()
        """All that the datum needs."""
        self.listeners: list[Callable[[Progress], None]] = []
        self._peering = peering
        self._store = peering.store
        self._rng = rng
        self._token = trio.lowlevel.current_trio_token()
        self._scope = trio.CancelScope()
        self._failure: GridError | None = None
        self.company = Company([datum], peering, self)
        self.resort = LastResort(self, peering.me, rng, peering.links.rates)
        self.resort.add(peering.origins)
        self._lock = threading.Lock()
        self._reports: list[tuple[Shelf, Event]] = []
        self._reported = trio.Event()
        self._gathered = trio.Event()
        self._inbox: trio.MemorySendChannel[Sequence[Event]] | None = None
        self._top: Shelf | None = None
        """The datum's own."""
        self._shelf: Shelf | None = None
        """The one that is being completed: its parent's, perhaps."""
        self._swarm: Swarm | None = None
        self._arrived = bytearray()
        self._urgent: dict[int, None] = {}
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
                        nursery.start_soon(self._keep_synced)
                        nursery.start_soon(self._announce)
                        try:
                            await self._objects()
                            await self._complete(await self._begin())
                        except GridError as wrong:
                            self._failure = wrong
                        nursery.cancel_scope.cancel()
                    await self._flush()
        finally:
            self._tell_fresh()  # what came last, too: others may lack just that
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
        return (await self._begin()).complete

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

    async def _begin(self) -> Shelf:
        """Make or find the shelf, and tell the others what is on it."""
        if self._top is not None:
            return self._top
        top, parts, self._local = await trio.to_thread.run_sync(self._begun)
        self._peering.settle()
        self._done = sum(part.held_bytes() for part in parts)
        self._total = sum(part.size for part in parts)
        self._resumed = self._done - self._local
        self._top, self.packs = top, frozenset(part.pack for part in top.parts)
        for part in parts:
            self.company.keys.append(part.layout.cid)
            if not part.complete:
                self._peering.show(part)
        self._work_on(top)
        return top

    def _begun(self) -> tuple[Shelf, list[Shelf], int]:
        """The datum's shelf, those that count (not a parent that was complete), bytes copied just now."""
        store = self._store
        before = {shelf.pack: shelf.local_bytes for shelf in store.shelves()}
        whole = {shelf.pack for shelf in store.shelves() if shelf.complete}
        top = store.begin(self.datum)
        parts = [part for part in top.parts if part is top or part.pack not in whole]
        return top, parts, sum(part.local_bytes - before.get(part.pack, 0) for part in parts)

    def _work_on(self, shelf: Shelf) -> None:
        self._tell_fresh()
        self._shelf, self.pack = shelf, shelf.pack
        self._arrived = bytearray(len(shelf.frames.lengths))

    async def _complete(self, top: Shelf) -> None:
        while not top.complete:  # a parent first; again where a chunk rotted while the others came
            shelf = next(part for part in top.parts if not part.complete)
            if shelf.convicted:
                shelf.put_frame(0, b"")  # says why
            self.company.dismiss()
            self._work_on(shelf)
            self._swarm = Swarm(shelf.frames.lengths, shelf.have(), self._rng, me=self._peering.me)
            # Bounded by what peers were asked for and by how much they may chatter.
            self._inbox, inbox = trio.open_memory_channel[Sequence[Event]](math.inf)
            self.company.gather(shelf)
            if self._urgent and shelf is top:
                self._feed([Urgent(tuple(self._urgent))])
            await drive(Gathered(self._swarm), inbox, self._perform)

    async def _keep_synced(self) -> None:
        while True:
            await self._freshly.wait()
            if self._shelf is not None and self._shelf.stale:
                try:
                    await trio.to_thread.run_sync(self._shelf.flush)
                except WorldError as refused:
                    self._give_up(refused)
            await trio.sleep(ANNOUNCE)

    async def _flush(self) -> None:
        for part in self._top.parts if self._top is not None else ():
            await trio.to_thread.run_sync(part.flush)

    async def _perform(self, effects: Sequence[Effect]) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        withdrawn: dict[PeerId, list[int]] = {}
        for effect in effects:
            if isinstance(effect, Withdraw):
                withdrawn.setdefault(effect.peer, []).append(effect.index)
        for peer, gone in withdrawn.items():
            if want := self.company.want(peer):
                for start in range(0, len(gone), INDICES_MAX):
                    want.withdraw(tuple(gone[start : start + INDICES_MAX]))
        for effect in effects:
            match effect:
                case Ask(peer, indices, urgent):
                    if want := self.company.want(peer):
                        for start in range(0, len(indices), INDICES_MAX):
                            want.ask(indices[start : start + INDICES_MAX], urgent)
                case Shun(peer, _):
                    self.company.shun(peer)
                case Completed():
                    self._completed()

    def _completed(self) -> None:
        assert self._inbox is not None
        self._inbox.close()

    # --- what the last resort wants to know -------------------------------------------------

    def lacking(self) -> tuple[Shelf, Swarm] | None:
        if self._shelf is None or self._swarm is None or self._swarm.complete:
            return None
        return self._shelf, self._swarm

    def paused(self) -> bool:
        return bool(self._peering.links.paused)

    def peers(self) -> list[PeerId]:
        return [session.peer for session in self.company.sessions()]

    def brought(self) -> int:
        return sum(count for peer, count in self._bytes_by_peer.items() if not is_origin(peer))

    # --- what links report ----------------------------------------------------------------

    def about(self, shelf: Shelf) -> Wanter:
        return _About(self, shelf)

    def report(self, shelf: Shelf, event: Event) -> None:
        with self._lock:
            self._reports.append((shelf, event))
            count = len(self._reports)
        if count == 1:
            self._token.run_sync_soon(self._ring_reported)
        elif count == GATHERED:
            self._token.run_sync_soon(self._ring_gathered)

    def fail(self, error: GridError) -> None:
        self._token.run_sync_soon(self._give_up, error)

    def hear_of(self, peers: tuple[tuple[PeerId, tuple[str, ...]], ...]) -> None:
        self._token.run_sync_soon(self.company.meet, peers)

    def grown(self, peer: PeerId, draft: Cid) -> None:
        """A pack does not grow: who says so is not listened to."""

    def _give_up(self, error: GridError) -> None:
        self._failure = self._failure or error
        self._scope.cancel()

    def left(self, peer: PeerId) -> None:
        """The company lost `peer`."""
        self._feed([Left(peer)])

    def quiet_for(self) -> float:
        return trio.current_time() - self._last

    def _ring_reported(self) -> None:
        self._reported.set()

    def _ring_gathered(self) -> None:
        self._gathered.set()

    async def _collect(self) -> None:
        """Take what links report, a moment's worth at a time, and let the swarm decide."""
        while True:
            await self._reported.wait()
            self._reported, self._gathered = trio.Event(), trio.Event()
            events = self._take_reports()
            if self._fresh:
                self._freshly.set()
            self._feed(events)
            with trio.move_on_after(GATHER_FIRST if any(map(self._is_first, events)) else GATHER):
                await self._gathered.wait()

    def _take_reports(self) -> list[Event]:
        """What links have reported of the pack since it was asked last, counted."""
        with self._lock:
            reports, self._reports = self._reports, []
        # What was under way when its pack was complete has indices of another one.
        events = [event for shelf, event in reports if shelf is self._shelf]
        for event in events:
            if isinstance(event, Arrived) and not self._arrived[event.index]:
                self._count(event.index, event.size)
                self._bytes_by_peer[event.peer] = self._bytes_by_peer.get(event.peer, 0) + event.size
                self._fresh.append(event.index)
            elif isinstance(event, Joined):
                self.company.proved(event.peer)
        return events

    def _is_first(self, event: Event) -> bool:
        """Whether a peer that has not shown yet what it can do has brought something, or has come."""
        return isinstance(event, Arrived | Joined) and self._bytes_by_peer.get(event.peer, 0) < FIRST

    def hold(self, indices: Iterable[int]) -> None:
        """These came in another way: by a fetch of another datum with the same pack."""
        if self._shelf is not None:
            fresh = [index for index in indices if not self._arrived[index]]
            for index in fresh:
                self._count(index, self._shelf.frames.lengths[index])
            if fresh:
                self._feed([Held(fresh)])

    def urge(self, indices: Iterable[int]) -> None:
        """These chunks of the datum's own pack are needed first."""
        self._urgent.update(dict.fromkeys(indices))
        if self._top is not None and self._top is self._shelf:
            self._feed([Urgent(tuple(self._urgent))])

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
            self._tell_fresh()

    def _tell_fresh(self) -> None:
        fresh, self._fresh = self._fresh, []
        if fresh and self.pack is not None:
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

    def _later(self) -> int:
        """Chunks missing of the pack whose turn comes after this one."""
        top = self._top
        return len(top.frames.lengths) - top.count if top is not None and top is not self._shelf else 0

    def _tell_listeners(self) -> None:
        if not self.listeners:
            return
        swarm, shelf = self._swarm, self._shelf
        lost = swarm.unavailable() if swarm is not None and not swarm.complete else []
        progress = Progress(
            self._done,
            self._total,
            dict(self._bytes_by_peer),
            self._local,
            self._resumed,
            self._rate,
            len(self.company.sessions()),
            swarm.missing + self._later() if swarm is not None else 0,
            len(lost),
            self.quiet_for(),
            self.resort.troubles(),
            len(shelf.frames.lengths) if shelf is not None else 0,
            stretches(lost),
            swarm.silent if swarm is not None else 0,
            self.company.heard,
            self.company.looked,
        )
        for listener in list(self.listeners):
            listener(progress)


class _About:
    """What is reported about one shelf's pack; a `Wanter`."""

    def __init__(self, download: Download, shelf: Shelf) -> None:
        self._download = download
        self._shelf = shelf

    def report(self, event: Event) -> None:
        self._download.report(self._shelf, event)

    def fail(self, error: GridError) -> None:
        self._download.fail(error)

    def hear_of(self, peers: tuple[tuple[PeerId, tuple[str, ...]], ...]) -> None:
        self._download.hear_of(peers)

    def grown(self, peer: PeerId, draft: Cid) -> None:
        self._download.grown(peer, draft)


class Gathered:
    """A swarm that takes many events in one step, and says what to do in order, each peer asked once."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm

    @property
    def deadline(self) -> float:
        return self._swarm.deadline

    def step(self, events: Sequence[Event] | Tick, now: float) -> Iterator[list[Effect]]:
        asks: dict[PeerId, dict[int, None]] = {}
        effects: list[Effect] = []
        for effect in self._swarm.steps((events,) if isinstance(events, Tick) else events, now):
            match effect:
                case Ask(peer, indices, urgent=True):
                    for index in indices:
                        asks.get(peer, {}).pop(index, None)
                    effects.append(effect)
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
