"""Follow a pack that is still being pressed: fetch what its drafts tell, as they come.

    first draft ─> shelf of the series ─> Swarm, of no chunks yet
    Grown, from a peer ─> that draft ─> the lists that it adds ─> the shelf and the swarm grow
                                                                  └─> our own followers are told

A download whose end is not known.  It ends when the shelf is there no more: because the disk itself was
begun, and its pack took the shelf over, or because somebody dropped it.  Drafts and lists are asked of
who told of them; a peer that tells what is no draft of this series is shunned, and a signer that tells
two stories ends it all.
"""

from __future__ import annotations

import random

import trio

from p2pgrid.dht.draft import going_on
from p2pgrid.dht.growing import GrowingShelf
from p2pgrid.errors import BadObject, GridError, Temporary
from p2pgrid.ids import Cid, PeerId
from p2pgrid.transfer.fetch import Download
from p2pgrid.transfer.objects import OBJECT_PATIENCE, OBJECTS_AT_ONCE
from p2pgrid.transfer.peering import Fetched, Peering
from p2pgrid.transfer.session import Session
from p2pgrid.transfer.swarm import Extended, Held, Swarm

RETRY = 1.0
"""Seconds until the first draft is asked for once more of who did not have it."""
FIRST_PATIENCE = 60.0
"""Seconds after which nobody is thought to have it: the coordinator says whether that matters."""
PATIENCE = 3600.0
"""Seconds without a byte or a word after which nobody is believed to press it any more."""


class Following(Download):
    """One series being followed.  Run it once."""

    def __init__(self, series: Cid, peering: Peering, rng: random.Random) -> None:
        super().__init__(series, peering, rng, None)
        self.company.keys.clear()  # the index does not know of what lasts so shortly
        self._growing: GrowingShelf | None = None
        self._known = 0
        """Frames that the swarm knows of."""
        self._tellers: dict[PeerId, Cid] = {}
        """The newest draft that each peer told of, until it was looked at."""
        self._hearing: set[PeerId] = set()
        self._looking: dict[Cid, trio.Event] = {}
        self._seen: set[Cid] = set()
        """Drafts of this series, whatever they told."""
        self._told = trio.Event()

    async def run(self) -> Fetched:
        """What came, by peer, when it ended."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.company.search)
                    nursery.start_soon(self._keep_synced)
                    try:
                        await self._follow(nursery)
                    except GridError as wrong:
                        self._failure = self._failure or wrong
                    nursery.cancel_scope.cancel()
        finally:
            self._take_reports()  # what came last counts, too
            self._tell_fresh()
            self.company.dismiss()
            self.resort.close()
        if self._failure is not None and not self.over:
            raise self._failure
        return Fetched(dict(self._bytes_by_peer), 0, 0, trio.current_time() - self._started)

    @property
    def over(self) -> bool:
        """Whether the shelf is there no more."""
        return self._growing is not None and self._growing.over

    def end_if_over(self) -> None:
        if self.over:
            self._scope.cancel()

    async def _follow(self, nursery: trio.Nursery) -> None:
        data = await self._first()
        growing = await trio.to_thread.run_sync(self._store.drafts.begin, data)
        self._growing = self._shelf = growing
        self.pack, self.packs = growing.pack, frozenset({growing.pack})
        self._arrived = bytearray(growing.places)
        lengths = growing.frames.lengths[:]
        self._known = len(lengths)
        self._swarm = Swarm(lengths, growing.have(), self._rng, me=self._peering.me)
        nursery.start_soon(self._go_on, self._swarm)
        self._peering.show(growing)
        self.company.gather(growing)
        while True:
            with trio.move_on_after(PATIENCE):
                await self._told.wait()
            self._told = trio.Event()
            if not self._tellers and self.quiet_for() >= PATIENCE:
                raise Temporary(why=f"nothing new was told of draft {growing.pack} for an hour")
            for peer in self._tellers.keys() - self._hearing:  # one that does not answer keeps nobody waiting
                self._hearing.add(peer)
                nursery.start_soon(self._hear, growing, peer)

    async def _go_on(self, swarm: Swarm) -> None:
        while True:  # what is complete is all that was known so far
            await self._steer(swarm)

    async def _first(self) -> bytes:
        """The draft that names the series, from whoever has it.  Raises `Temporary`."""
        until = trio.current_time() + FIRST_PATIENCE
        while trio.current_time() < until:
            for session in self.company.sessions():
                data = await self._object_of(session, self.datum)
                if data is not None:
                    return data
            with trio.move_on_after(RETRY):
                await self.company.news.wait()
        raise Temporary(why=f"nobody has the first draft of {self.datum}")

    async def _object_of(self, session: Session, cid: Cid) -> bytes | None:
        try:
            with trio.move_on_after(OBJECT_PATIENCE):
                return await session.get_object(cid)
        except BadObject:
            self.company.shun(session.peer)
        return None

    async def _hear(self, growing: GrowingShelf, peer: PeerId) -> None:
        """Look at what `peer` told of, unless another one brings the same just now."""
        while peer in self._tellers:
            cid = self._tellers.pop(peer)
            while (other := self._looking.get(cid)) is not None:
                await other.wait()
            session = next((s for s in self.company.sessions() if s.peer == peer), None)
            if session is None or cid in self._seen:
                continue
            self._looking[cid] = trio.Event()
            try:
                await self._look(growing, session, cid)
            except GridError as wrong:
                self._give_up(wrong)
            finally:
                self._looking.pop(cid).set()
        self._hearing.discard(peer)

    async def _look(self, growing: GrowingShelf, session: Session, cid: Cid) -> None:
        """See what a draft adds; where something is amiss, others tell of theirs."""
        data = await self._object_of(session, cid)
        if data is None:
            return
        try:
            draft = going_on(growing.pack, growing.newest, data)
            if draft is None:
                self._seen.add(cid)
                return
            lists = await self._lists(session, growing.wanting(draft))
            if lists is None:
                return
            await trio.to_thread.run_sync(self._store.drafts.extend, growing.pack, data, lists)
        except BadObject:
            self.company.shun(session.peer)
            return
        self._seen.add(cid)
        self._last = trio.current_time()
        self._grow(growing)

    async def _lists(self, session: Session, wanted: tuple[Cid, ...]) -> dict[Cid, bytes] | None:
        """Those lists, or None where one did not come."""
        lists: dict[Cid, bytes] = {}
        limit = trio.CapacityLimiter(OBJECTS_AT_ONCE)

        async def bring(cid: Cid) -> None:
            async with limit:
                data = await self._object_of(session, cid)
            if data is not None:
                lists[cid] = data

        async with trio.open_nursery() as nursery:
            for cid in wanted:
                nursery.start_soon(bring, cid)
        return lists if len(lists) == len(set(wanted)) else None

    def _grow(self, growing: GrowingShelf) -> None:
        """Have the swarm know of what is new, hear again who has it, and tell our own followers."""
        known, fresh = self._known, growing.frames.lengths[self._known :]
        self._known += len(fresh)
        here = [index for index in range(known, self._known) if growing.holds(index)]
        self._feed([Extended(fresh), Held(here)])
        for session in self.company.sessions():
            if want := self.company.want(session.peer):
                want.tell()
        self._peering.grown(growing.pack)

    # --- what links report ----------------------------------------------------------------

    def grown(self, peer: PeerId, draft: Cid) -> None:
        self._token.run_sync_soon(self._note, peer, draft)

    def _note(self, peer: PeerId, draft: Cid) -> None:
        self._tellers[peer] = draft
        self._told.set()
