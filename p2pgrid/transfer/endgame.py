"""Decide what idle peers bring in the end: what is overdue at others, and what neighbours left.

Pure.  A chunk that would come much sooner from somebody who has nothing to do *moves*; the first in a
peer's queue, which may be on its way, is asked of a second one, bounded by `DUPLICATES` of the bytes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

from p2pgrid.transfer.book import USUAL, Book
from p2pgrid.transfer.partner import Partner
from p2pgrid.transfer.rarity import BLOCK, nth_bit

PAUSE, PAUSE_MAX = 0.1, 1.0
"""Seconds between two looks at what is overdue, more where chunks take long: a seeder holds back for half
a second what we can have from a neighbour (`turns.py`), and by then it has to be asked there."""
LOOK_MAX = 64
"""Overdue chunks looked at in one go."""
GAIN_MIN = 1.0
"""Seconds that asking a second peer has to win."""


class Endgame:
    """The end of one swarm."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self.look_at = math.inf

    def look(self, now: float) -> bool:
        """Every now and then let idle peers bring what is overdue at others; whether this was the time."""
        book = self._book
        if not book.idle or not (book.asked or book.near.share is not None):
            self.look_at = math.inf
        elif self.look_at == math.inf or self.look_at <= now:
            due = self.look_at <= now
            self.look_at = now + self._pause
            if due and (idle := [p for p in book.idle.values() if p.room and not p.stalls]):
                self._hurry(idle, now)
                self._help(idle, now)
                return True
        return False

    @property
    def _pause(self) -> float:
        book = self._book
        return PAUSE if book.typical == math.inf else min(max(PAUSE, book.typical / 4), PAUSE_MAX)

    def _hurry(self, idle: list[Partner], now: float) -> None:
        book = self._book
        least = min(book.expected(peer, peer.outstanding) for peer in idle)
        last = book.rarity.nothing_wanted or book.near.asked_all(book.rarity.wanted)
        for remaining, _, slow, index in heapq.nlargest(LOOK_MAX, self._remaining(now)):
            if not self._pays(remaining, least):
                break
            able = [
                peer
                for peer in idle
                if peer.has(index) and index not in peer.asks and peer.room and book.near.may(peer, index)
            ]
            if not able:
                continue
            cost, peer = min(
                ((book.expected(p, p.outstanding + book.lengths[index]), p) for p in able),
                key=lambda pair: (not pair[1].pace.rate, pair[0], pair[1].order),
            )
            if not self._pays(remaining, cost):
                continue
            if peer.pace.rate and index != next(iter(slow.asks)) and index not in book.extra:
                book.withdraw(slow, index)
                book.rarity.unwant(index // BLOCK, 1 << index % BLOCK)
            elif not last or (peer.pace.rate and remaining - cost < max(GAIN_MIN, 2 * book.typical)):
                continue
            elif book.doubled + book.lengths[index] <= book.doubled_max >> (
                slow.quiet(index, now) < 2 * USUAL
            ):
                book.extra[index] = book.extra.get(index, 0) + 1
                book.doubled += book.lengths[index]
            else:
                continue
            book.ask(peer, index, now)
            book.send(peer, (index,))

    def _help(self, idle: list[Partner], now: float) -> None:
        """Where nothing of our share is to be had, ask for one chunk of the others'."""
        book = self._book
        if book.near.share is None or any(peer.asks for peer in book.peers.values() if not peer.near):
            return
        for peer in sorted((p for p in idle if not p.near and p.room), key=lambda p: (-p.pace.rate, p.order)):
            useful = (1 << len(peer.have)) - 1
            block, bits, _ = book.rarity.rarest(peer.have, useful, book.rng, book.near.lacking)
            if bits:
                at = nth_bit(bits, book.rng.randrange(bits.bit_count()))
                index = block * BLOCK + at
                book.ask(peer, index, now)
                book.rarity.unwant(block, 1 << at)
                book.send(peer, (index,))
                return

    def _pays(self, remaining: float, cost: float) -> bool:
        """Whether to have in `cost` seconds what would be here in `remaining`: it may have left already."""
        return remaining > 2 * cost and not remaining - cost < 2 * self._book.typical < math.inf

    def _remaining(self, now: float) -> Iterator[tuple[float, int, Partner, int]]:
        """(seconds until it is likely to be here, order, who was asked last, index) of what is asked."""
        book = self._book
        order = 0
        for peer in book.peers.values():
            if peer.stalls:
                continue
            before = 0
            for index in peer.asks:
                before += book.lengths[index]
                expected = book.expected(peer, before)
                since = peer.since
                if index in book.extra:
                    if peer is not book.asked[index][-1]:
                        continue
                    since = max(since, peer.asks[index])
                silence = max(0.0, now - since - expected)
                order += 1
                yield expected + silence, order, peer, index
