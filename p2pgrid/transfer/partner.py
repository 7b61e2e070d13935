"""Remember of one peer what it has, what it is asked for, and when its silence is too long.

Pure.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

import attrs

from p2pgrid.ids import PeerId
from p2pgrid.transfer.pace import CHUNKS_MAX, LIGHT, WAIT_MIN, Pace
from p2pgrid.transfer.rarity import BLOCK, Blocks

REFUSALS_MAX = 3


@attrs.define(eq=False)
class Partner:
    """A peer of the swarm, as far as one node knows."""

    id: PeerId
    order: int
    have: Blocks
    whole: bool = False
    """Whether it had everything when it said what it has: it holds back what it has sent to others."""
    near: bool = False
    """Whether it is reached without passing the line that our neighbours use, too."""
    news: float = -math.inf
    """When it joined, or told of something that we miss."""
    useful: int = 0
    """The blocks, as bits, where it may have something wanted."""
    pace: Pace = attrs.Factory(Pace)
    asks: dict[int, float] = attrs.Factory(dict)
    """Index to when it was asked; in the order they were."""
    outstanding: int = 0
    """Bytes asked and not here."""
    since: float = 0.0
    """When it last brought something, or was asked while it had nothing to do."""
    stalls: int = 0
    """Silences in a row; it is stalled while there are any."""
    rests_until: float = -math.inf
    alarm: float = math.inf
    refusals: dict[int, int] = attrs.Factory(dict)
    next: int = -1
    """The neighbour of what was asked last."""
    run: int = 0
    """How many more neighbours may follow."""

    def has(self, index: int) -> bool:
        return bool(self.have[index // BLOCK] >> index % BLOCK & 1)

    def hopeless(self, index: int) -> bool:
        """Whether it refused `index` so often that it is not asked for it again."""
        return self.refusals.get(index, 0) >= REFUSALS_MAX

    @property
    def room(self) -> bool:
        """Whether it may be asked for one more chunk; unproven or stalled, for one in all."""
        chunks = len(self.asks)
        if self.stalls or not self.pace.rate:
            return not chunks
        few = chunks < CHUNKS_MAX or self.outstanding < LIGHT
        return not chunks or (few and self.outstanding < self.pace.window)

    def quiet(self, index: int, now: float) -> float:
        """Seconds since it was asked for `index`, or has brought something."""
        return now - max(self.since, self.asks[index])

    def wait(self, size: int, typical: float, patience: float) -> float:
        """Seconds of silence at which it counts as stalled; `typical` is what others take."""
        if self.pace.rate:
            return self.pace.wait(size, patience)
        return min(max(4 * typical, WAIT_MIN), max(patience, WAIT_MIN))


class Alarms:
    """When to look at which peer: one live entry each, never later than it has to be."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Partner]] = []

    @property
    def first(self) -> float:
        return self._heap[0][0] if self._heap else math.inf

    def set(self, peer: Partner, at: float, now: float) -> None:
        """Look at `peer` at this time or earlier; an alarm set for earlier stays.

        Never much later than now, for what is too long a silence changes with what is known.
        """
        at = min(at, now + WAIT_MIN)
        if at < peer.alarm:
            peer.alarm = at
            heapq.heappush(self._heap, (at, peer.order, peer))

    def due(self, now: float) -> Iterator[Partner]:
        """Take out those to look at now, and all entries before the first that has a reason."""
        while self._heap:
            at, _, peer = self._heap[0]
            live = at == peer.alarm
            if live and at > now and (peer.asks or peer.rests_until > now):
                return
            heapq.heappop(self._heap)
            if live:
                peer.alarm = math.inf
                yield peer
