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

A peer with nothing left to do is asked for what is overdue at others: the *end-game*,
bounded by `DUPLICATES` of the bytes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Iterator, Sequence

import attrs

from p2pgrid.ids import PeerId
from p2pgrid.machine import Tick
from p2pgrid.transfer.near import Near
from p2pgrid.transfer.pace import CHUNKS_MAX, LIGHT
from p2pgrid.transfer.partner import Alarms, Partner
from p2pgrid.transfer.rarity import BLOCK, Chance, IndexSet, Rarity, blocks_of, indices, nth_bit

RUN = 8
"""Neighbours asked one after the other; few, or peers would wait for one another's runs."""
STALLS_MAX = 4
REST = 5.0
"""Seconds a peer rests after its first stall; doubled with each further one."""
REST_MAX = 60.0
PAUSE, PAUSE_MAX = 0.1, 1.0
"""Seconds between two looks at what is overdue, more where chunks take long: a seeder holds back for half
a second what we can have from a neighbour (`turns.py`), and by then it has to be asked there."""
LOOK_MAX = 64
"""Overdue chunks looked at in one go."""
GAIN_MIN = 1.0
"""Seconds that asking a second peer has to win."""
USUAL = 1.0
"""Seconds that a chunk is thought to take while nobody has brought one."""
NOBODY = PeerId("")
DUPLICATES = 0.02
"""Share of the bytes that may be asked of two peers at once."""


# --- events ----------------------------------------------------------------------------


@attrs.frozen
class Joined:
    """`peer` is here and has the indices in `have` (bitmap, LSB first).  Again: it has these now."""

    peer: PeerId
    have: bytes
    near: bool = False
    """Whether it is reached without passing the line that this node shares with its neighbours."""


@attrs.frozen
class Told:
    """`peer` has these indices, too."""

    peer: PeerId
    indices: Sequence[int]


@attrs.frozen
class Left:
    """The link to `peer` ended."""

    peer: PeerId


@attrs.frozen
class Arrived:
    """`peer` brought chunk `index`, `size` bytes; it is verified and stored."""

    peer: PeerId
    index: int
    size: int


@attrs.frozen
class Rejected:
    """`peer` brought bytes for `index` that did not verify."""

    peer: PeerId
    index: int


@attrs.frozen
class Refused:
    """`peer` does not have `index` after all."""

    peer: PeerId
    index: int


@attrs.frozen
class Held:
    """These indices came in another way."""

    indices: Sequence[int]


@attrs.frozen
class Urgent:
    """These are needed before all others.  Again: these, too."""

    indices: Sequence[int]


Event = Joined | Told | Left | Arrived | Rejected | Refused | Held | Urgent | Tick


# --- effects ---------------------------------------------------------------------------


@attrs.frozen
class Ask:
    """Ask `peer` for these chunks, in this order; urgent ones first, whether it was asked for them or not."""

    peer: PeerId
    indices: tuple[int, ...]
    urgent: bool = False


@attrs.frozen
class Withdraw:
    """Tell `peer` that `index` need not be sent any more; it may come all the same."""

    peer: PeerId
    index: int


@attrs.frozen
class Shun:
    """`peer` is asked for nothing any more in this swarm."""

    peer: PeerId
    why: str


@attrs.frozen
class Completed:
    """Every chunk is held."""


Effect = Ask | Withdraw | Shun | Completed


@attrs.define(eq=False)
class Errand:
    """An urgent chunk."""

    runners: set[PeerId] = attrs.Factory(set)
    """Who was asked for it urgently."""
    until: float = math.inf
    """When somebody else is asked, too."""


# --- the machine -----------------------------------------------------------------------


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
        self._lengths = lengths
        self._rng = rng
        self._patience = patience
        self._rarity = Rarity(len(lengths), have)
        self._near = Near(me, len(lengths))
        self._peers: dict[PeerId, Partner] = {}
        self._shunned: set[PeerId] = set()
        self._asked: dict[int, list[Partner]] = {}
        self._tries: dict[int, Partner] = {}  # by order: those to look for work for, in this step
        self._idle: dict[int, Partner] = {}  # by order: those there was no work for
        self._released = 0  # blocks where something became wanted again, in this step
        self._alarms = Alarms()
        self._look_at = math.inf
        self._extra: dict[int, int] = {}  # how many idle peers are asked for it, too
        self._doubled = 0  # bytes of them, those that are here by now included
        self._doubled_max = max(int(DUPLICATES * sum(lengths)), 4 * max(lengths, default=0))
        self._urgent: dict[int, Errand] = {}
        self._typical = math.inf  # seconds from an ask to its chunk, over all peers
        self._helped = -1
        self._joins = 0
        self._announced = False
        self._effects: list[Effect] = []
        self._now = -math.inf

    @property
    def missing(self) -> int:
        """How many chunks are not held yet."""
        return self._rarity.missing

    @property
    def complete(self) -> bool:
        return self.missing == 0

    @property
    def deadline(self) -> float:
        """When a `Tick` is due; `inf` if nothing is outstanding and nobody rests."""
        if self.complete:
            return math.inf if self._announced else -math.inf
        errands = min((errand.until for errand in self._urgent.values()), default=math.inf)
        return min(self._alarms.first, self._look_at, errands)

    def unavailable(self) -> Collection[int]:
        """The missing indices that no answering peer has."""
        return IndexSet(self._rarity.lost())

    @property
    def silent(self) -> int:
        """How many peers have something we miss and do not answer."""
        return sum(peer.stalls > 0 for peer in self._peers.values())

    def step(self, event: Event, now: float) -> list[Effect]:
        """Take one event and say what to do."""
        return self.steps((event,), now)

    def steps(self, events: Iterable[Event], now: float) -> list[Effect]:
        """Take what happened at about the same time, and say what to do after all of it."""
        self._effects, self._now = [], now
        for event in events:
            self._take_in(event, now)
        if not self.complete:
            for waiting in self._alarms.due(now):
                self._examine(waiting, now)
            self._rush(now)
            if self._near.look(self._peers.values(), now):
                self._look_around()
            self._feed(now)
            self._look(now)
        elif not self._announced:
            self._announced = True
            self._effects.append(Completed())
        return self._effects

    def _take_in(self, event: Event, now: float) -> None:
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
            case Urgent(needed):
                for index in needed:
                    if 0 <= index < len(self._lengths) and not self._rarity.holds(index):
                        self._urgent.setdefault(index, Errand())
            case Tick():
                pass

    # --- what events do ---

    def _joined(self, id_: PeerId, bitmap: bytes, near: bool) -> None:
        if id_ in self._shunned:
            return
        have = blocks_of(bitmap, len(self._lengths))
        peer = self._peers.get(id_)
        if peer is None:
            self._joins += 1
            peer = self._peers[id_] = Partner(id_, self._joins, have)
        else:
            self._uncount(peer)
            for index in peer.refusals:
                if peer.hopeless(index):
                    have[index // BLOCK] &= ~(1 << index % BLOCK)
            peer.have = have
            for index in [i for i in peer.asks if not peer.has(i)]:
                self._withdraw(peer, index)
        peer.whole = sum(bits.bit_count() for bits in have) == len(self._lengths)
        peer.near, peer.news = near, self._now
        self._near.changed()
        self._count(peer)
        peer.useful = (1 << len(have)) - 1
        self._tries[peer.order] = peer

    def _told(self, id_: PeerId, told: Iterable[int]) -> None:
        peer = self._peers.get(id_)
        if peer is None:
            return
        news: dict[int, int] = {}
        fresh = [i for i in told if 0 <= i < len(self._lengths) and not (peer.has(i) or peer.hopeless(i))]
        for index in fresh:
            news[index // BLOCK] = news.get(index // BLOCK, 0) | 1 << index % BLOCK
        if fresh and peer.near:
            peer.news = self._now
        for block, bits in news.items():
            self._near.told(peer, block, bits)
            peer.have[block] |= bits
            peer.useful |= 1 << block
            if not peer.stalls:
                self._rarity.add(block, bits)
        if not peer.stalls:
            for index in fresh:
                if index in self._asked:
                    self._prefer(peer, index)
        if peer.order in self._idle:
            self._tries[peer.order] = peer

    def _prefer(self, peer: Partner, index: int) -> None:
        """`peer` has what a seeder is asked for, who holds it back now, or is near: have it from here."""
        if peer.room and self._expected(peer, peer.outstanding + self._lengths[index]) < GAIN_MIN:
            for other in [p for p in self._asked.get(index, ()) if not p.near if peer.near] or [
                p for p in self._asked.get(index, ()) if p.whole
            ]:
                self._withdraw(other, index)

    def _left(self, id_: PeerId) -> None:
        peer = self._peers.pop(id_, None)
        if peer is None:
            return
        for index in list(peer.asks):
            self._drop(peer, index)
        self._uncount(peer)
        self._near.changed()
        self._tries.pop(peer.order, None)
        self._idle.pop(peer.order, None)
        peer.alarm = math.inf

    def _shun(self, id_: PeerId, why: str) -> None:
        if id_ in self._shunned:
            return
        self._shunned.add(id_)
        peer = self._peers.get(id_)
        if peer is not None:
            for index in list(peer.asks):
                self._withdraw(peer, index)
        self._left(id_)
        self._effects.append(Shun(id_, why))

    def _refused(self, id_: PeerId, index: int) -> None:
        peer = self._peers.get(id_)
        if peer is None or not 0 <= index < len(self._lengths):
            return
        if index in peer.asks:
            self._drop(peer, index)
        peer.refusals[index] = peer.refusals.get(index, 0) + 1
        if peer.hopeless(index) and peer.has(index):
            block, bit = index // BLOCK, 1 << index % BLOCK
            peer.have[block] ^= bit
            if not peer.stalls:
                self._rarity.remove(block, bit)
        self._tries[peer.order] = peer

    def _arrived(self, id_: PeerId, index: int, size: int, now: float) -> None:
        assert 0 <= index < len(self._lengths)
        peer = self._peers.get(id_)
        if peer is not None:
            asked_at = peer.asks.get(index)
            if asked_at is not None:
                waited = now - asked_at
                peer.pace.arrived(size, waited, now)
                self._typical = waited if self._typical == math.inf else 0.9 * self._typical + 0.1 * waited
            peer.since = now
            if peer.stalls:
                self._revive(peer)
            peer.rests_until = -math.inf
            self._tries[peer.order] = peer
        self._hold(index, peer)

    def _hold(self, index: int, by: Partner | None = None) -> None:
        """`index` is held; whoever was asked for it, but `by`, need not send it."""
        self._rarity.hold(index)
        self._urgent.pop(index, None)
        for peer in list(self._asked.get(index, ())):
            if peer is by:
                self._drop(peer, index)
            else:
                self._withdraw(peer, index)

    # --- who is asked, and who counts ---

    def _count(self, peer: Partner) -> None:
        """Count what an answering peer has."""
        if not peer.stalls:
            self._rarity.add_all(peer.have)

    def _uncount(self, peer: Partner) -> None:
        if not peer.stalls:
            self._rarity.remove_all(peer.have)

    def _ask(self, peer: Partner, index: int, now: float) -> None:
        if not peer.asks:
            peer.since = now
            peer.pace.busy(now)
        peer.asks[index] = now
        peer.outstanding += self._lengths[index]
        self._asked.setdefault(index, []).append(peer)

    def _drop(self, peer: Partner, index: int) -> None:
        """`peer` is no longer asked for `index`; if it is missing, somebody else has to be."""
        del peer.asks[index]
        peer.outstanding -= self._lengths[index]
        self._tries[peer.order] = peer
        askers = self._asked[index]
        askers.remove(peer)
        if not askers:
            del self._asked[index]
        if not self._rarity.holds(index):
            if self._extra.get(index):
                self._extra[index] -= 1
                self._doubled -= self._lengths[index]
            self._want(index)
        if not askers or not self._extra.get(index):
            self._extra.pop(index, None)

    def _withdraw(self, peer: Partner, index: int) -> None:
        self._effects.append(Withdraw(peer.id, index))
        self._drop(peer, index)
        if not (peer.pace.rate or peer.stalls):  # it may come all the same: then we know more
            peer.rests_until = self._now + (
                USUAL if self._typical == math.inf else min(4 * self._typical, REST)
            )
            self._alarms.set(peer, peer.rests_until, self._now)

    def _want(self, index: int) -> None:
        """Make a missing index wanted, unless an answering peer is asked for it."""
        if all(peer.stalls for peer in self._asked.get(index, ())):
            self._rarity.want(index // BLOCK, 1 << index % BLOCK)
            self._released |= 1 << index // BLOCK

    # --- silence ---

    def _silent_until(self, peer: Partner) -> float:
        """When a peer that is asked for something counts as stalled."""
        size = self._lengths[next(iter(peer.asks))]
        return peer.since + peer.wait(size, self._typical, self._patience)

    def _examine(self, peer: Partner, now: float) -> None:
        """See whether a peer is silent for too long, or has rested."""
        if peer.asks:
            due = max(self._silent_until(peer), peer.rests_until)
            if due <= now:
                self._stall(peer, now)
            else:
                self._alarms.set(peer, due, now)
        elif peer.rests_until > now:
            self._alarms.set(peer, peer.rests_until, now)
        else:
            self._tries[peer.order] = peer

    def _stall(self, peer: Partner, now: float) -> None:
        self._uncount(peer)
        self._near.changed()
        peer.stalls += 1
        if peer.stalls > STALLS_MAX and not self._alone(peer):
            self._shun(peer.id, "answered nothing, again and again")
            return
        for index in list(peer.asks):
            if self._rarity.count(index):
                self._withdraw(peer, index)
            else:
                self._want(index)  # and it may still come from here
        peer.rests_until = now + min(REST * 2 ** (peer.stalls - 1), REST_MAX)
        self._alarms.set(peer, peer.rests_until, now)

    def _revive(self, peer: Partner) -> None:
        peer.stalls = 0
        self._near.changed()
        peer.rests_until = -math.inf
        self._count(peer)
        for index in peer.asks:
            self._rarity.unwant(index // BLOCK, 1 << index % BLOCK)

    def _alone(self, peer: Partner) -> bool:
        """Whether something missing is claimed by no answering peer, but by this one."""
        return any(bits & lost for bits, lost in zip(peer.have, self._rarity.lost(), strict=True))

    # --- what to ask ---

    def _feed(self, now: float) -> None:
        """Ask every peer that got room, or for which something may have turned up."""
        if self._released:
            for peer in self._peers.values():
                peer.useful |= self._released
            self._released = 0
            self._tries.update(self._idle)
        tries, self._tries = self._tries, {}
        for peer in sorted(
            tries.values(), key=lambda p: (p.stalls, not p.near, p.whole, -p.pace.rate, p.order)
        ):
            asked = self._fill(peer, now)
            if asked:
                self._effects.append(Ask(peer.id, tuple(asked)))
                self._alarms.set(peer, self._silent_until(peer), now)

    def _fill(self, peer: Partner, now: float) -> list[int]:
        """Fill the room at `peer` with the rarest it has; remember it as idle if there is not enough."""
        self._idle.pop(peer.order, None)
        asked: list[int] = []
        if now < peer.rests_until:
            return asked
        while peer.room:
            block, bits, peer.useful = self._rarity.rarest(
                peer.have, peer.useful, self._rng, None if peer.near else self._near.share
            )
            if not bits:
                self._idle[peer.order] = peer
                break
            asked += self._take(peer, block, bits, now)
        return asked

    def _take(self, peer: Partner, block: int, bits: int, now: float) -> list[int]:
        """Ask for a run within `bits`: where the last one goes on, or from anywhere."""
        at = peer.next - block * BLOCK
        if not (peer.run and 0 <= at < BLOCK and bits >> at & 1):
            at = nth_bit(bits, self._rng.randrange(bits.bit_count()))
            peer.run = RUN
        taken: list[int] = []
        while peer.run and bits >> at & 1 and peer.room:
            taken.append(block * BLOCK + at)
            self._ask(peer, taken[-1], now)
            at += 1
            peer.run -= 1
        peer.next = block * BLOCK + at
        if not peer.stalls:
            self._rarity.unwant(block, ((1 << len(taken)) - 1) << at - len(taken))
        return taken

    def _look_around(self) -> None:
        """Somebody near came, went or is slow: who is not near may be asked for something else."""
        for peer in self._peers.values():
            if not peer.near:
                peer.useful = (1 << len(peer.have)) - 1
                if peer.order in self._idle:
                    self._tries[peer.order] = peer

    def _help(self, idle: list[Partner], now: float) -> None:
        """Where nothing of our share is to be had, ask for one chunk of the others'."""
        if self._near.share is None or any(peer.asks for peer in self._peers.values() if not peer.near):
            return
        for peer in sorted((p for p in idle if not p.near and p.room), key=lambda p: (-p.pace.rate, p.order)):
            useful = (1 << len(peer.have)) - 1
            block, bits, _ = self._rarity.rarest(peer.have, useful, self._rng, self._near.lacking)
            if bits:
                at = nth_bit(bits, self._rng.randrange(bits.bit_count()))
                self._helped = block * BLOCK + at
                self._ask(peer, self._helped, now)
                self._rarity.unwant(block, 1 << at)
                self._effects.append(Ask(peer.id, (self._helped,)))
                self._alarms.set(peer, self._silent_until(peer), now)
                return

    # --- what is urgent ---

    def _rush(self, now: float) -> None:
        """Ask the fastest for what is urgent; where it does not come soon, the next one, too."""
        for index, errand in self._urgent.items():
            askers = self._asked.get(index, [])
            if now < errand.until and any(peer.id in errand.runners for peer in askers):
                continue
            able = [
                p for p in self._peers.values() if p.id not in errand.runners and self._may_rush(p, index)
            ]
            if not able:
                errand.runners.intersection_update([peer.id for peer in askers])
                errand.until = math.inf if not errand.runners else now + USUAL
                continue
            size = self._lengths[index]
            best = min(able, key=lambda p: (not p.pace.rate, self._expected(p, size), p.order))
            for peer in [p for p in askers if p is not best and p.id not in errand.runners]:
                self._withdraw(peer, index)
            if index not in best.asks:
                self._ask(best, index, now)
                self._rarity.unwant(index // BLOCK, 1 << index % BLOCK)
            self._effects.append(Ask(best.id, (index,), urgent=True))
            self._alarms.set(best, self._silent_until(best), now)
            errand.runners.add(best.id)
            errand.until = now + max(2 * self._expected(best, size), USUAL / 2)

    def _may_rush(self, peer: Partner, index: int) -> bool:
        """Whether `peer` can be asked for `index` at once; until it was good, for one chunk in all."""
        return (
            peer.has(index)
            and not peer.stalls
            and peer.rests_until <= self._now
            and bool(index in peer.asks or not peer.asks or peer.pace.rate)
        )

    # --- the end-game ---

    def _look(self, now: float) -> None:
        """Every now and then let idle peers bring what is overdue at others."""
        if not self._idle or not (self._asked or self._near.share is not None):
            self._look_at = math.inf
        elif self._look_at == math.inf or self._look_at <= now:
            due = self._look_at <= now
            self._look_at = now + self._pause
            if due and (idle := [p for p in self._idle.values() if p.room and not p.stalls]):
                self._hurry(idle, now)
                self._help(idle, now)
                self._feed(now)

    @property
    def _pause(self) -> float:
        return PAUSE if self._typical == math.inf else min(max(PAUSE, self._typical / 4), PAUSE_MAX)

    def _hurry(self, idle: list[Partner], now: float) -> None:
        least = min(self._expected(peer, peer.outstanding) for peer in idle)
        last = self._rarity.nothing_wanted or self._near.asked_all(self._rarity.wanted)
        for remaining, _, slow, index in heapq.nlargest(LOOK_MAX, self._remaining(now)):
            if not self._pays(remaining, least):
                break
            able = [
                peer
                for peer in idle
                if peer.has(index) and index not in peer.asks and peer.room and self._near.may(peer, index)
            ]
            if not able:
                continue
            cost, peer = min(
                ((self._expected(p, p.outstanding + self._lengths[index]), p) for p in able),
                key=lambda pair: (not pair[1].pace.rate, pair[0], pair[1].order),
            )
            if not self._pays(remaining, cost):
                continue
            if peer.pace.rate and index != next(iter(slow.asks)) and index not in self._extra:
                self._withdraw(slow, index)
                self._rarity.unwant(index // BLOCK, 1 << index % BLOCK)
            elif not last or (peer.pace.rate and remaining - cost < max(GAIN_MIN, 2 * self._typical)):
                continue
            elif self._doubled + self._lengths[index] <= self._doubled_max >> (
                slow.quiet(index, now) < 2 * USUAL
            ):
                self._extra[index] = self._extra.get(index, 0) + 1
                self._doubled += self._lengths[index]
            else:
                continue
            self._ask(peer, index, now)
            self._effects.append(Ask(peer.id, (index,)))
            self._alarms.set(peer, self._silent_until(peer), now)

    def _pays(self, remaining: float, cost: float) -> bool:
        """Whether to have in `cost` seconds what would be here in `remaining`: it may have left already."""
        return remaining > 2 * cost and not remaining - cost < 2 * self._typical < math.inf

    def _expected(self, peer: Partner, size: int) -> float:
        """Seconds until `size` bytes would be here from `peer`; what is usual, until it has shown."""
        if peer.pace.rate:
            return peer.pace.expected(size)
        return self._typical if self._typical < math.inf else USUAL

    def _remaining(self, now: float) -> Iterator[tuple[float, int, Partner, int]]:
        """(seconds until it is likely to be here, order, who was asked last, index) of what is asked."""
        order = 0
        for peer in self._peers.values():
            if peer.stalls:
                continue
            before = 0
            for index in peer.asks:
                before += self._lengths[index]
                expected = self._expected(peer, before)
                since = peer.since
                if index in self._extra:
                    if peer is not self._asked[index][-1]:
                        continue
                    since = max(since, peer.asks[index])
                silence = max(0.0, now - since - expected)
                order += 1
                yield expected + silence, order, peer, index

    # --- invariants ---

    def check(self) -> None:
        """Assert every invariant; as slow as it is thorough."""
        self._rarity.check()
        missing = {i for i in range(len(self._lengths)) if not self._rarity.holds(i)}
        wanted = set(indices(self._rarity.wanted))
        assert self.missing == len(missing)
        busy = {i for i, askers in self._asked.items() if any(not p.stalls for p in askers)}
        assert wanted == missing - busy, "wanted is what is missing and asked of no answering peer"
        assert missing >= set(self._asked), "nothing held is asked"
        assert missing >= set(self._urgent)
        assert all(self._asked.values())
        assert not self._shunned & set(self._peers), "nobody shunned is here"
        asks = sum(len(peer.asks) for peer in self._peers.values())
        assert asks == sum(len(askers) for askers in self._asked.values())
        for index in missing:
            count = sum(p.has(index) for p in self._peers.values() if not p.stalls)
            assert self._rarity.count(index) == count, "availability is what a recount says"
        for peer in self._peers.values():
            assert peer.outstanding == sum(self._lengths[i] for i in peer.asks)
            assert all(peer.has(i) and peer in self._asked[i] for i in peer.asks)
            before = peer.outstanding - max((self._lengths[i] for i in peer.asks), default=0)
            assert len(peer.asks) <= CHUNKS_MAX + len(self._urgent) or before < LIGHT
            assert not peer.asks or peer.alarm < math.inf, "silence is noticed"
            for block, bits in enumerate(peer.have):
                if self._near.share is not None and not peer.near:
                    bits &= self._near.share[block]
                assert not bits & self._rarity.wanted[block] or peer.useful >> block & 1
        assert 0 <= self._doubled <= self._doubled_max
        resting = any(not peer.asks and peer.alarm < math.inf for peer in self._peers.values())
        if not self.complete:
            left_to_others = self._idle and self._near.share is not None
            reason = bool(asks or resting or left_to_others)
            assert (self.deadline < math.inf) == reason, "a tick is due iff there is a reason"
