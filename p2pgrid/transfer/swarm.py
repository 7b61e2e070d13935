"""Decide which chunk to ask of whom, to complete one pack.

Pure: no clock, no sockets, no disk.  Bytes are verified before they are reported here, so
the swarm reasons about chunk *indices* only.

    wanted --Ask--> asked --Arrived--> held
       ^              |
       +---Rejected, Refused, Left, patience ran out

An index is *wanted* while it is missing and no answering peer is asked for it.  Rarest first,
ties broken by `rng` so that peers take different chunks from the seeder, and from there on in
short runs of neighbours, which its disk reads in one go (BitTorrent: Cohen, 2003).  How much
is outstanding at a peer follows its pace.

A peer is *answering* until it is silent for longer than its pace allows; then it is *stalled*:
its chunks are wanted again, it no longer counts for rarity, and it rests.  After that it is
tried with a single chunk which others may bring as well, so no chunk ever waits for it; one
that comes makes it answering again.  Silent `STALLS_MAX` times in a row it is shunned, unless
it alone claims something we miss.  Whoever sends bytes that do not verify is shunned at once.

Here is what events change, and who is silent.  The rest is decided on the same `Book` (`book.py`): what to
ask of a peer with room (`feeding.py`), what of it across a site's line (`near.py`), what goes to idle
peers in the end (`endgame.py`), and who brings what is urgent (`errands.py`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from p2pgrid.ids import PeerId
from p2pgrid.machine import Tick
from p2pgrid.transfer.book import REST, Book
from p2pgrid.transfer.endgame import Endgame
from p2pgrid.transfer.errands import Errands
from p2pgrid.transfer.events import (
    Arrived,
    Ask,
    Completed,
    Effect,
    Event,
    Extended,
    Held,
    Joined,
    Left,
    Refused,
    Rejected,
    Shun,
    Told,
    Urgent,
    Withdraw,
)
from p2pgrid.transfer.feeding import Feeding
from p2pgrid.transfer.pace import CHUNKS_MAX, LIGHT
from p2pgrid.transfer.partner import Partner
from p2pgrid.transfer.rarity import BLOCK, Blocks, Chance, IndexSet, blocks_of, indices

__all__ = [
    "Arrived",
    "Ask",
    "Completed",
    "Effect",
    "Event",
    "Extended",
    "Held",
    "Joined",
    "Left",
    "Refused",
    "Rejected",
    "Shun",
    "Swarm",
    "Told",
    "Urgent",
    "Withdraw",
]

STALLS_MAX = 4
REST_MAX = 60.0
NOBODY = PeerId("")


class Swarm:
    """The machine that completes one pack."""

    def __init__(
        self,
        lengths: Sequence[int],
        have: bytes,
        rng: Chance,
        *,
        me: PeerId = NOBODY,
        patience: float = 30.0,
    ) -> None:
        """`lengths`: bytes of each frame by index; `have`: what is held (bitmap, LSB first).

        `me` is what near peers know this node by.
        """
        self._book = Book(lengths, have, rng, me, patience)
        self._feeding = Feeding(self._book)
        self._endgame = Endgame(self._book)
        self._errands = Errands(self._book)
        self._shunned: set[PeerId] = set()
        self._joins = 0
        self._announced = False

    @property
    def missing(self) -> int:
        """How many chunks are not held yet."""
        return self._book.rarity.missing

    @property
    def complete(self) -> bool:
        return self.missing == 0

    @property
    def deadline(self) -> float:
        """When a `Tick` is due; `inf` if nothing is outstanding and nobody rests."""
        if self.complete:
            return math.inf if self._announced else -math.inf
        return min(self._book.alarms.first, self._endgame.look_at, self._errands.deadline)

    def unavailable(self) -> Collection[int]:
        """The missing indices that no answering peer has."""
        return IndexSet(self._book.rarity.lost())

    @property
    def dry(self) -> bool:
        """Whether somebody who had nothing to do was asked in the last step: what it brings should be
        reported soon, or it has nothing to do again."""
        return self._feeding.dry

    @property
    def silent(self) -> int:
        """How many peers have something we miss and do not answer."""
        return sum(peer.stalls > 0 for peer in self._book.peers.values())

    def step(self, event: Event, now: float) -> list[Effect]:
        """Take one event and say what to do."""
        return self.steps((event,), now)

    def steps(self, events: Iterable[Event], now: float) -> list[Effect]:
        """Take what happened at about the same time, and say what to do after all of it."""
        book = self._book
        book.effects, book.now = [], now
        self._feeding.dry = False
        for event in events:
            self._take_in(event, now)
        if not self.complete:
            for waiting in book.alarms.due(now):
                self._examine(waiting, now)
            self._errands.rush(now)
            if book.near.look(book.peers.values(), now):
                self._feeding.look_around()
            self._feeding.feed(now)
            if self._endgame.look(now):
                self._feeding.feed(now)
        elif not self._announced:
            self._announced = True
            book.effects.append(Completed())
        return book.effects

    def _take_in(self, event: Event, now: float) -> None:
        book = self._book
        match event:
            case Arrived(peer, index, size):
                self._arrived(peer, index, size, now)
            case Told(peer, told):
                self._told(peer, told)
            case Joined(peer, have, near):
                self._joined(peer, have, near)
            case Left(peer):
                self._left(peer)
            case Rejected(peer, _):
                self._shun(peer, "sent bytes that are not the chunk's")
            case Refused(peer, index):
                self._refused(peer, index)
            case Held(held):
                for index in held:
                    self._hold(index)
            case Extended(lengths):
                book.extend(lengths)
                self._announced = self._announced and self.complete
            case Urgent(needed):
                for index in needed:
                    if 0 <= index < len(book.lengths) and not book.rarity.holds(index):
                        self._errands.add(index)
            case Tick():
                pass

    # --- what events do ---

    def _joined(self, id_: PeerId, bitmap: bytes, near: bool) -> None:
        book = self._book
        if id_ in self._shunned:
            return
        have = blocks_of(bitmap, len(book.lengths))
        before: Blocks = []
        peer = book.peers.get(id_)
        if peer is None:
            self._joins += 1
            peer = book.peers[id_] = Partner(id_, self._joins, have)
        else:
            book.uncount(peer)
            for index in peer.refusals:
                if peer.hopeless(index):
                    have[index // BLOCK] &= ~(1 << index % BLOCK)
            before, peer.have = peer.have, have
            for index in [i for i in peer.asks if not peer.has(i)]:
                book.withdraw(peer, index)
        peer.whole = sum(bits.bit_count() for bits in have) == len(book.lengths)
        peer.near = near
        if have != before:
            peer.news = book.now
        book.near.changed()
        book.count(peer)
        peer.useful = (1 << len(have)) - 1
        book.tries[peer.order] = peer

    def _told(self, id_: PeerId, told: Iterable[int]) -> None:
        book = self._book
        peer = book.peers.get(id_)
        if peer is None:
            return
        news: dict[int, int] = {}
        count = len(book.lengths)
        for index in told:
            if 0 <= index < count:
                news[index // BLOCK] = news.get(index // BLOCK, 0) | 1 << index % BLOCK
        hopeless = [index for index in peer.refusals if peer.hopeless(index)]
        for block, bits in news.items():
            bits &= ~peer.have[block]
            for index in hopeless:
                if index // BLOCK == block:
                    bits &= ~(1 << index % BLOCK)
            if not bits:
                continue
            if peer.near:
                peer.news = book.now
            book.near.told(peer, block, bits)
            peer.have[block] |= bits
            peer.useful |= 1 << block
            if not peer.stalls:
                book.rarity.add(block, bits)
                self._feeding.prefer(peer, block, bits)
        if peer.order in book.idle:
            book.tries[peer.order] = peer

    def _left(self, id_: PeerId) -> None:
        book = self._book
        peer = book.peers.pop(id_, None)
        if peer is None:
            return
        for index in list(peer.asks):
            book.drop(peer, index)
        book.uncount(peer)
        book.near.changed()
        book.tries.pop(peer.order, None)
        book.idle.pop(peer.order, None)
        peer.alarm = math.inf

    def _shun(self, id_: PeerId, why: str) -> None:
        book = self._book
        if id_ in self._shunned:
            return
        self._shunned.add(id_)
        peer = book.peers.get(id_)
        if peer is not None:
            for index in list(peer.asks):
                book.withdraw(peer, index)
        self._left(id_)
        book.effects.append(Shun(id_, why))

    def _refused(self, id_: PeerId, index: int) -> None:
        book = self._book
        peer = book.peers.get(id_)
        if peer is None or not 0 <= index < len(book.lengths):
            return
        if index in peer.asks:
            book.drop(peer, index)
        peer.refusals[index] = peer.refusals.get(index, 0) + 1
        if peer.hopeless(index) and peer.has(index):
            block, bit = index // BLOCK, 1 << index % BLOCK
            peer.have[block] ^= bit
            if not peer.stalls:
                book.rarity.remove(block, bit)
        book.tries[peer.order] = peer

    def _arrived(self, id_: PeerId, index: int, size: int, now: float) -> None:
        book = self._book
        if index >= len(book.lengths):
            return  # nobody asked for it, and it will be told when there is more
        peer = book.peers.get(id_)
        if peer is not None:
            asked_at = peer.asks.get(index)
            if asked_at is not None:
                waited = now - asked_at
                peer.pace.arrived(size, waited, now)
                book.typical = waited if book.typical == math.inf else 0.9 * book.typical + 0.1 * waited
            peer.since = now
            if peer.stalls:
                self._revive(peer)
            peer.rests_until = -math.inf
            book.tries[peer.order] = peer
        self._hold(index, peer)

    def _hold(self, index: int, by: Partner | None = None) -> None:
        """`index` is held; whoever was asked for it, but `by`, need not send it."""
        book = self._book
        book.rarity.hold(index)
        self._errands.hold(index)
        for peer in list(book.asked.get(index, ())):
            if peer is by:
                book.drop(peer, index)
            else:
                book.withdraw(peer, index)

    # --- silence ---

    def _examine(self, peer: Partner, now: float) -> None:
        """See whether a peer is silent for too long, or has rested."""
        book = self._book
        if peer.asks:
            due = max(book.silent_until(peer), peer.rests_until)
            if due <= now:
                self._stall(peer, now)
            else:
                book.alarms.set(peer, due, now)
        elif peer.rests_until > now:
            book.alarms.set(peer, peer.rests_until, now)
        else:
            book.tries[peer.order] = peer

    def _stall(self, peer: Partner, now: float) -> None:
        book = self._book
        book.uncount(peer)
        book.near.changed()
        peer.stalls += 1
        if peer.stalls > STALLS_MAX and not self._alone(peer):
            self._shun(peer.id, "answered nothing, again and again")
            return
        for index in list(peer.asks):
            if book.rarity.count(index):
                book.withdraw(peer, index)
            else:
                book.want(index)  # and it may still come from here
        peer.rests_until = now + min(REST * 2 ** (peer.stalls - 1), REST_MAX)
        book.alarms.set(peer, peer.rests_until, now)

    def _revive(self, peer: Partner) -> None:
        book = self._book
        peer.stalls = 0
        book.near.changed()
        peer.rests_until = -math.inf
        book.count(peer)
        for index in peer.asks:
            book.rarity.unwant(index // BLOCK, 1 << index % BLOCK)

    def _alone(self, peer: Partner) -> bool:
        """Whether something missing is claimed by no answering peer, but by this one."""
        return any(bits & lost for bits, lost in zip(peer.have, self._book.rarity.lost(), strict=True))

    # --- invariants ---

    def check(self) -> None:
        """Assert every invariant; as slow as it is thorough."""
        book = self._book
        book.rarity.check()
        missing = {i for i in range(len(book.lengths)) if not book.rarity.holds(i)}
        wanted = set(indices(book.rarity.wanted))
        assert self.missing == len(missing)
        busy = {i for i, askers in book.asked.items() if any(not p.stalls for p in askers)}
        assert wanted == missing - busy, "wanted is what is missing and asked of no answering peer"
        assert missing >= set(book.asked), "nothing held is asked"
        assert missing >= self._errands.indices
        assert all(book.asked.values())
        assert not self._shunned & set(book.peers), "nobody shunned is here"
        asks = sum(len(peer.asks) for peer in book.peers.values())
        assert asks == sum(len(askers) for askers in book.asked.values())
        for index in missing:
            count = sum(p.has(index) for p in book.peers.values() if not p.stalls)
            assert book.rarity.count(index) == count, "availability is what a recount says"
        for peer in book.peers.values():
            assert peer.outstanding == sum(book.lengths[i] for i in peer.asks)
            assert all(peer.has(i) and peer in book.asked[i] for i in peer.asks)
            before = peer.outstanding - max((book.lengths[i] for i in peer.asks), default=0)
            assert len(peer.asks) <= CHUNKS_MAX + len(self._errands.indices) or before < LIGHT
            assert not peer.asks or peer.alarm < math.inf, "silence is noticed"
            for block, bits in enumerate(peer.have):
                if book.near.share is not None and not peer.near:
                    bits &= book.near.share[block]
                assert not bits & book.rarity.wanted[block] or peer.useful >> block & 1
        assert 0 <= book.doubled <= book.doubled_max
        resting = any(not peer.asks and peer.alarm < math.inf for peer in book.peers.values())
        if not self.complete:
            left_to_others = book.idle and book.near.share is not None
            reason = bool(asks or resting or left_to_others)
            assert (self.deadline < math.inf) == reason, "a tick is due iff there is a reason"
