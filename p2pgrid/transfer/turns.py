"""Decide which of the asked chunks to send next, and to whom.

Pure.  Peers are served in turn, but a chunk that was sent before waits `WAIT` sends for every
time it was, up to `COPIES_MAX`.  So the seeder of a new disk sends every chunk once before it
sends any twice, although its askers cannot know of one another's asks; and while an ask waits,
its asker hears who has the chunk by now, takes it from there and withdraws.  The uplink is
never idle while anything is asked (BitTorrent's super-seeding idles), and nobody starves.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable

from p2pgrid.ids import PeerId

WAIT = 64
COPIES_MAX = 4


class Turns:
    """What is asked of us for one pack, and not sent yet."""

    def __init__(self) -> None:
        self._asked: dict[PeerId, dict[int, int]] = {}  # by peer: index to the ask's number
        self._copies: defaultdict[int, int] = defaultdict(int)
        self._last: dict[PeerId, int] = {}  # the turn in which the peer was served last
        self._turn = 0
        self._numbers = 0
        self._heap: list[tuple[int, int, PeerId, int]] = []  # its turn, number, peer, index

    def __len__(self) -> int:
        return sum(map(len, self._asked.values()))

    def ask(self, peer: PeerId, indices: Iterable[int]) -> None:
        """`peer` asks for these, in this order."""
        asked = self._asked.setdefault(peer, {})
        self._last.setdefault(peer, self._turn)
        for index in indices:
            if index not in asked:
                self._numbers += 1
                asked[index] = self._numbers
                heapq.heappush(self._heap, (self._due(peer, index), self._numbers, peer, index))

    def withdraw(self, peer: PeerId, index: int) -> None:
        """`peer` need not be sent `index` any more."""
        self._asked.get(peer, {}).pop(index, None)

    def leave(self, peer: PeerId) -> None:
        """The link to `peer` ended."""
        self._asked.pop(peer, None)
        self._last.pop(peer, None)

    def next(self) -> tuple[PeerId, int] | None:
        """Take out the ask whose turn it is; None if there is none."""
        while self._heap:
            turn, number, peer, index = self._heap[0]
            if self._asked.get(peer, {}).get(index) != number:
                heapq.heappop(self._heap)
                continue
            due = self._due(peer, index)
            if due > turn:  # it was served or sent meanwhile; turns only ever move back
                heapq.heapreplace(self._heap, (due, number, peer, index))
                continue
            heapq.heappop(self._heap)
            del self._asked[peer][index]
            self._copies[index] += 1
            self._turn += 1
            self._last[peer] = self._turn
            return peer, index
        return None

    def _due(self, peer: PeerId, index: int) -> int:
        return self._last[peer] + WAIT * min(self._copies[index], COPIES_MAX)
