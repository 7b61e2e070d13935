"""Decide what to ask of a peer that has room: the rarest it has, in short runs.

Pure.  Near peers first, then those that are no seeders, fast ones before slow ones: what only a seeder has
is asked of it, and all else as far as there is room at others.
"""

from __future__ import annotations

from p2pgrid.transfer.book import Book
from p2pgrid.transfer.endgame import GAIN_MIN
from p2pgrid.transfer.partner import Partner
from p2pgrid.transfer.rarity import BLOCK, indices_of, nth_bit

RUN = 8
"""Neighbours asked one after the other; few, or peers would wait for one another's runs."""


class Feeding:
    """Who is asked for what, in one swarm."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self.dry = False
        """Whether somebody was asked, in this step, who had nothing to do before."""

    def feed(self, now: float) -> None:
        """Ask every peer that got room, or for which something may have turned up."""
        book = self._book
        if book.released:
            for peer in book.peers.values():
                peer.useful |= book.released
            book.released = 0
            book.tries.update(book.idle)
        book.slacken()
        tries, book.tries = book.tries, {}
        for peer in sorted(
            tries.values(), key=lambda p: (p.stalls, not p.near, p.whole, -p.pace.rate, p.order)
        ):
            busy = bool(peer.asks)
            asked = self._fill(peer, now)
            if asked:
                self.dry |= not busy
                book.send(peer, tuple(asked))

    def _fill(self, peer: Partner, now: float) -> list[int]:
        """Fill the room at `peer` with the rarest it has; remember it as idle if there is not enough."""
        book = self._book
        book.idle.pop(peer.order, None)
        asked: list[int] = []
        if now < peer.rests_until:
            return asked
        while peer.room:
            block, bits, peer.useful = book.rarity.rarest(
                peer.have, peer.useful, book.rng, None if peer.near else book.near.share
            )
            if not bits:
                book.idle[peer.order] = peer
                break
            asked += self._take(peer, block, bits, now)
        return asked

    def _take(self, peer: Partner, block: int, bits: int, now: float) -> list[int]:
        """Ask for a run within `bits`: where the last one goes on, or from anywhere."""
        book = self._book
        at = peer.next - block * BLOCK
        if not (peer.run and 0 <= at < BLOCK and bits >> at & 1):
            at = nth_bit(bits, book.rng.randrange(bits.bit_count()))
            peer.run = RUN
        taken: list[int] = []
        while peer.run and bits >> at & 1 and peer.room:
            taken.append(block * BLOCK + at)
            book.ask(peer, taken[-1], now)
            at += 1
            peer.run -= 1
        peer.next = block * BLOCK + at
        if not peer.stalls:
            book.rarity.unwant(block, ((1 << len(taken)) - 1) << at - len(taken))
        return taken

    def look_around(self) -> None:
        """Somebody near came, went or is slow: who is not near may be asked for something else."""
        book = self._book
        for peer in book.peers.values():
            if not peer.near:
                peer.useful = (1 << len(peer.have)) - 1
                if peer.order in book.idle:
                    book.tries[peer.order] = peer

    def prefer(self, peer: Partner, block: int, bits: int) -> None:
        """`peer` has these, too.  What of them a seeder is asked for, who holds it back now, or somebody
        across the line while this one is near: have it from here."""
        book = self._book
        if not peer.room:
            return
        for index in indices_of(block, book.rarity.asked(block, bits)):
            askers = book.asked.get(index, ())
            across = [p for p in askers if peer.near and not p.near]
            others = across or [p for p in askers if p.whole]
            if others and book.expected(peer, peer.outstanding + book.lengths[index]) < GAIN_MIN:
                for other in others:
                    book.withdraw(other, index)
