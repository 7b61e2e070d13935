"""Keep the calls that wait for something to come, and the times when something is due.

Pure.  A peer has at most one pull and one beat parked; a newer one takes its place.
Timers are never taken back: one that rings too early is set again by whom it concerns.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import attrs

from p2pgrid.errors import Temporary
from p2pgrid.ids import PeerId

WATCHES_MAX = 64
"""Watches of one peer at a time."""

Due: TypeAlias = Literal["lease", "node", "call", "avoid", "place", "retire", "draft"]


@attrs.define(eq=False)
class Parked:
    """A call that waits until something comes, or `until`."""

    call: int
    until: float
    peer: PeerId
    request: Any


class Timers:
    """What is due when."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, Due, str]] = []

    def set(self, when: float, due: Due, key: str) -> None:
        heapq.heappush(self._heap, (when, due, key))

    @property
    def next(self) -> float:
        return self._heap[0][0] if self._heap else math.inf

    def ring(self, now: float) -> Iterator[tuple[Due, str]]:
        """What is due at `now`."""
        while self._heap and self._heap[0][0] <= now:
            _, due, key = heapq.heappop(self._heap)
            yield due, key


class Parking:
    """Parked calls: pulls and beats by peer, watches by job."""

    def __init__(self) -> None:
        self.pulls: dict[PeerId, Parked] = {}
        self.beats: dict[PeerId, Parked] = {}
        self._watches: dict[str, dict[int, Parked]] = {}
        self._watching: dict[PeerId, int] = {}
        self._calls: dict[int, tuple[Parked, dict[Any, Parked], Any]] = {}

    def pull(self, parked: Parked) -> None:
        self._add(parked, self.pulls, parked.peer)

    def beat(self, parked: Parked) -> None:
        self._add(parked, self.beats, parked.peer)

    def watch(self, parked: Parked, job: str) -> None:
        """Raises `Temporary` where a peer watches too much."""
        if self._watching.get(parked.peer, 0) >= WATCHES_MAX:
            raise Temporary(why=f"{WATCHES_MAX} watches are open already")
        self._watching[parked.peer] = self._watching.get(parked.peer, 0) + 1
        self._add(parked, self._watches.setdefault(job, {}), parked.call)

    def watches(self, job: str) -> list[Parked]:
        return list(self._watches.get(job, {}).values())

    def get(self, call: int) -> Parked | None:
        """The parked call, if it still waits."""
        return self._calls[call][0] if call in self._calls else None

    def remove(self, call: int) -> Parked | None:
        """It waits no more; None if it did not."""
        if call not in self._calls:
            return None
        parked, place, key = self._calls.pop(call)
        del place[key]
        if place is not self.pulls and place is not self.beats:
            self._watching[parked.peer] -= 1
            self._watching = {p: n for p, n in self._watching.items() if n}
            self._watches = {job: calls for job, calls in self._watches.items() if calls}
        return parked

    def _add(self, parked: Parked, place: dict[Any, Parked], key: Any) -> None:
        assert key not in place, "the older call was not answered first"
        place[key] = parked
        self._calls[parked.call] = (parked, place, key)

    def check(self) -> None:
        watches = sum(len(calls) for calls in self._watches.values())
        assert len(self._calls) == len(self.pulls) + len(self.beats) + watches
        assert sum(self._watching.values()) == watches
