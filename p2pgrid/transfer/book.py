"""Remember who has what and who is asked for what, for the decisions that are made about it.

Pure.  All parts of a swarm (`swarm.py`, `feeding.py`, `endgame.py`, `errands.py`) write to one book, through
what keeps it consistent:

    ask, drop, withdraw: an index is *wanted* while it is missing and no answering peer is asked for it
    count, uncount:      rarity is over what answering peers have
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from p2pgrid.ids import PeerId
from p2pgrid.transfer.events import Ask, Effect, Withdraw
from p2pgrid.transfer.near import Near
from p2pgrid.transfer.pace import slack
from p2pgrid.transfer.partner import Alarms, Partner
from p2pgrid.transfer.rarity import BLOCK, Chance, Rarity

REST = 5.0
"""Seconds a peer rests after its first stall; doubled with each further one."""
USUAL = 1.0
"""Seconds that a chunk is thought to take while nobody has brought one."""
DUPLICATES = 0.02
"""Share of the bytes that may be asked of two peers at once."""


class Book:
    """What one swarm knows."""

    def __init__(self, lengths: Sequence[int], have: bytes, rng: Chance, me: PeerId, patience: float) -> None:
        self.lengths = lengths
        self.rng = rng
        self._patience = patience
        self.rarity = Rarity(len(lengths), have)
        self._me = me
        self.near = Near(me, len(lengths))
        self.peers: dict[PeerId, Partner] = {}
        self.asked: dict[int, list[Partner]] = {}
        self.tries: dict[int, Partner] = {}
        """By order: those to look for work for, in this step."""
        self.idle: dict[int, Partner] = {}
        """By order: those there was no work for."""
        self.released = 0
        """Blocks, as bits, where something became wanted again, in this step."""
        self.alarms = Alarms()
        self.extra: dict[int, int] = {}
        """How many idle peers are asked for it, too."""
        self.doubled = 0
        """Bytes of them, those that are here by now included."""
        self.doubled_max = _doubled_max(lengths)
        self._usual = _usual(lengths)
        """Bytes of a chunk."""
        self.typical = math.inf
        """Seconds from an ask to its chunk, over all peers."""
        self.effects: list[Effect] = []
        """Of this step."""
        self.now = -math.inf

    def extend(self, lengths: Sequence[int]) -> None:
        """There are more chunks, which nobody has as far as we know."""
        self.lengths = (*self.lengths, *lengths)
        self.doubled_max = _doubled_max(self.lengths)
        self._usual = _usual(self.lengths)
        for block, bits in enumerate(self.rarity.grow(len(self.lengths))):
            if bits:
                self.released |= 1 << block
        for peer in self.peers.values():
            peer.have += [0] * (-(-len(self.lengths) // BLOCK) - len(peer.have))
            peer.whole = False
        self.near = Near(self._me, len(self.lengths))

    def slacken(self) -> None:
        """Have asked of each peer what it may have now: less near the end."""
        rate = sum(peer.pace.rate for peer in self.peers.values() if not peer.stalls)
        now = slack(self.rarity.missing * self._usual, rate)
        for peer in self.peers.values():
            peer.pace.slack = now

    def count(self, peer: Partner) -> None:
        """Count what an answering peer has."""
        if not peer.stalls:
            self.rarity.add_all(peer.have)

    def uncount(self, peer: Partner) -> None:
        if not peer.stalls:
            self.rarity.remove_all(peer.have)

    def send(self, peer: Partner, indices: tuple[int, ...], *, urgent: bool = False) -> None:
        """Say that `peer`, which has just been asked for these, is to be told so."""
        self.effects.append(Ask(peer.id, indices, urgent))
        self.alarms.set(peer, self.silent_until(peer), self.now)

    def ask(self, peer: Partner, index: int, now: float) -> None:
        if not peer.asks:
            peer.since = now
            peer.pace.busy(now)
        peer.asks[index] = now
        peer.outstanding += self.lengths[index]
        self.asked.setdefault(index, []).append(peer)

    def drop(self, peer: Partner, index: int) -> None:
        """`peer` is no longer asked for `index`; if it is missing, somebody else has to be."""
        del peer.asks[index]
        peer.outstanding -= self.lengths[index]
        self.tries[peer.order] = peer
        askers = self.asked[index]
        askers.remove(peer)
        if not askers:
            del self.asked[index]
        if not self.rarity.holds(index):
            if self.extra.get(index):
                self.extra[index] -= 1
                self.doubled -= self.lengths[index]
            self.want(index)
        if not askers or not self.extra.get(index):
            self.extra.pop(index, None)

    def withdraw(self, peer: Partner, index: int) -> None:
        self.effects.append(Withdraw(peer.id, index))
        self.drop(peer, index)
        if not (peer.pace.rate or peer.stalls):  # it may come all the same: then we know more
            peer.rests_until = self.now + (USUAL if self.typical == math.inf else min(4 * self.typical, REST))
            self.alarms.set(peer, peer.rests_until, self.now)

    def want(self, index: int) -> None:
        """Make a missing index wanted, unless an answering peer is asked for it."""
        if all(peer.stalls for peer in self.asked.get(index, ())):
            self.rarity.want(index // BLOCK, 1 << index % BLOCK)
            self.released |= 1 << index // BLOCK

    def silent_until(self, peer: Partner) -> float:
        """When a peer that is asked for something counts as stalled."""
        size = self.lengths[next(iter(peer.asks))]
        return peer.since + peer.wait(size, self.typical, self._patience)

    def expected(self, peer: Partner, size: int) -> float:
        """Seconds until `size` bytes would be here from `peer`; what is usual, until it has shown."""
        if peer.pace.rate:
            return peer.pace.expected(size)
        return self.typical if self.typical < math.inf else USUAL


def _usual(lengths: Sequence[int]) -> int:
    return sum(lengths) // max(1, len(lengths))


def _doubled_max(lengths: Sequence[int]) -> int:
    """Bytes that may be asked of two peers at once."""
    return max(int(DUPLICATES * sum(lengths)), 4 * max(lengths, default=0))
