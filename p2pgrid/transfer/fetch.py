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

import math
import random
from collections.abc import Callable, Iterable, Sequence

import trio

from p2pgrid.dht.shelf import Shelf
from p2pgrid.errors import GridError, WorldError
from p2pgrid.ids import Cid, PeerId
from p2pgrid.machine import Tick
from p2pgrid.transfer.company import Company
from p2pgrid.transfer.lastresort import LastResort
from p2pgrid.transfer.messages import INDICES_MAX
from p2pgrid.transfer.objects import Objects
from p2pgrid.transfer.peering import Fetched, Peering
from p2pgrid.transfer.progress import Progress, stretches
from p2pgrid.transfer.ranges import is_origin
from p2pgrid.transfer.reports import Reports, gathered
from p2pgrid.transfer.session import Wanter
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

GATHER = 0.05
"""Seconds that reports of links wait for more of them; peers are asked for more than arrives in that time,
once they are at it."""
GATHERED = 64
"""Reports that are not waited with: a fast peer brings all it was asked for within `GATHER`."""
GATHER_DRY = 0.005
"""The same while somebody had nothing to do: it is asked for too little, we do not know yet what it can."""
ANNOUNCE = 0.05
"""Seconds that news of chunks wait for more of them."""
REPORT = 0.25
"""Seconds between two progress reports."""


class Download:
    """One datum being completed; a `Wanter`.  Run it once."""

    def __init__(self, datum: Cid, peering: Peering, rng: random.Random, most: int | None) -> None:
        self.datum = datum
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
        self._objects = Objects(
            datum, most, self._store, self.company, self.resort, rng, self._note_progress, self._give_up
        )
        self._reports = Reports()
        self._top: Shelf | None = None
        """The datum's own."""
        self._shelf: Shelf | None = None
        """The one that is being completed: its parent's, perhaps."""
        self._swarm: Swarm | None = None
        self._arrived = bytearray()
        self._urgent: dict[int, None] = {}
        self._fresh: list[int] = []
        """Indices that came, and of which nobody was told yet."""
        self._stale = trio.Event()
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
                        nursery.start_soon(self._keep_synced)
                        try:
                            await self._objects.bring()
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
        if await self._objects.missing():
            return False
        return (await self._begin()).complete

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
            self._reports.take()  # of another pack
            self.company.gather(shelf)
            if self._urgent and shelf is top:
                self._feed([Urgent(tuple(self._urgent))])
            await self._steer(self._swarm)

    async def _steer(self, swarm: Swarm) -> None:
        """Let the swarm decide about what links report, and do as it says, until it is complete."""
        tell_at = -math.inf
        while True:
            now = trio.current_time()
            events = self._take_reports()
            done = self._perform(gathered(swarm.steps(events or (Tick(),), now)))
            if self._shelf is not None and self._shelf.stale:
                self._stale.set()
            if self._fresh and tell_at <= now:
                self._tell_fresh()
                tell_at = now + ANNOUNCE
            if done:
                return
            if events:
                await self._reports.wait(GATHERED, now + (GATHER_DRY if swarm.dry else GATHER))
            await self._reports.wait(1, min(swarm.deadline, tell_at if self._fresh else math.inf))

    def _perform(self, effects: Sequence[Effect]) -> bool:
        """Do it; whether that was all."""
        done = False
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
                    done = True
        return done

    async def _keep_synced(self) -> None:
        while True:
            await self._stale.wait()
            self._stale = trio.Event()
            if self._shelf is not None and self._shelf.stale:
                try:
                    await trio.to_thread.run_sync(self._shelf.flush)
                except WorldError as refused:
                    self._give_up(refused)

    async def _flush(self) -> None:
        for part in self._top.parts if self._top is not None else ():
            await trio.to_thread.run_sync(part.flush)

    # --- what the last resort wants to know -------------------------------------------------

    def lacking(self) -> tuple[Shelf, Swarm] | None:
        if self._shelf is None or self._swarm is None or self._swarm.complete:
            return None
        return self._shelf, self._swarm

    def paused(self) -> bool:
        return bool(self._peering.links.paused)

    def peers(self) -> list[PeerId]:
        return [session.peer for session in self.company.sessions()]

    def unheard(self) -> bool:
        return self.company.unheard

    def brought(self) -> int:
        return sum(count for peer, count in self._bytes_by_peer.items() if not is_origin(peer))

    # --- what links report ----------------------------------------------------------------

    def about(self, shelf: Shelf) -> Wanter:
        return _About(self, shelf)

    def report(self, shelf: Shelf, event: Event) -> None:
        self._reports.put(shelf, event)

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

    def _take_reports(self) -> list[Event]:
        """What links have reported of the pack since it was asked last, counted."""
        # What was under way when its pack was complete has indices of another one.
        events = [event for shelf, event in self._reports.take() if shelf is self._shelf]
        for event in events:
            if isinstance(event, Arrived) and not self._arrived[event.index]:
                self._count(event.index, event.size)
                self._bytes_by_peer[event.peer] = self._bytes_by_peer.get(event.peer, 0) + event.size
                self._fresh.append(event.index)
            elif isinstance(event, Joined):
                self.company.proved(event.peer)
        return events

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
        self._note_progress()

    def _note_progress(self) -> None:
        self._last = trio.current_time()

    def _feed(self, events: Sequence[Event]) -> None:
        self._reports.put_at_once(self._shelf, events)

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
