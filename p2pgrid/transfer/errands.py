"""Decide who brings what is urgent: whoever is expected to be soonest, and then the next one, too.

Pure.
"""

from __future__ import annotations

import math

import attrs

from p2pgrid.ids import PeerId
from p2pgrid.transfer.book import USUAL, Book
from p2pgrid.transfer.partner import Partner
from p2pgrid.transfer.rarity import BLOCK


@attrs.define(eq=False)
class Errand:
    """An urgent chunk."""

    runners: set[PeerId] = attrs.Factory(set)
    """Who was asked for it urgently."""
    until: float = math.inf
    """When somebody else is asked, too."""


class Errands:
    """What of one swarm is urgent."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._urgent: dict[int, Errand] = {}

    @property
    def indices(self) -> set[int]:
        return set(self._urgent)

    @property
    def deadline(self) -> float:
        if not self._urgent:
            return math.inf
        return min(errand.until for errand in self._urgent.values())

    def add(self, index: int) -> None:
        self._urgent.setdefault(index, Errand())

    def hold(self, index: int) -> None:
        """It is here."""
        self._urgent.pop(index, None)

    def rush(self, now: float) -> None:
        """Ask the fastest for what is urgent; where it does not come soon, the next one, too."""
        book = self._book
        for index, errand in self._urgent.items():
            askers = book.asked.get(index, [])
            if now < errand.until and any(peer.id in errand.runners for peer in askers):
                continue
            able = [p for p in book.peers.values() if p.id not in errand.runners and self._may_rush(p, index)]
            if not able:
                errand.runners.intersection_update([peer.id for peer in askers])
                errand.until = math.inf if not errand.runners else now + USUAL
                continue
            size = book.lengths[index]
            best = min(able, key=lambda p: (not p.pace.rate, book.expected(p, size), p.order))
            for peer in [p for p in askers if p is not best and p.id not in errand.runners]:
                book.withdraw(peer, index)
            if index not in best.asks:
                book.ask(best, index, now)
                book.rarity.unwant(index // BLOCK, 1 << index % BLOCK)
            book.send(best, (index,), urgent=True)
            errand.runners.add(best.id)
            errand.until = now + max(2 * book.expected(best, size), USUAL / 2)

    def _may_rush(self, peer: Partner, index: int) -> bool:
        """Whether `peer` can be asked for `index` at once; until it was good, for one chunk in all."""
        return (
            peer.has(index)
            and not peer.stalls
            and peer.rests_until <= self._book.now
            and bool(index in peer.asks or not peer.asks or peer.pace.rate)
        )
