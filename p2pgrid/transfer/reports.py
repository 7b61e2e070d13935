"""Gather what links report of a fetch, so that its swarm decides a moment's worth at a time.

    threads of links ──put──> reports ──taken, once there are enough or it is time──> Swarm.steps
    what it says to do ──gathered──> each peer is asked once, for all that it is asked for

A step, a message and a wake-up for each chunk would cost as much as its bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import trio

from p2pgrid.dht.shelf import Shelf
from p2pgrid.ids import PeerId
from p2pgrid.transfer.swarm import Ask, Effect, Event, Withdraw


class Reports:
    """What was reported and not taken yet, in order.  `put` may be called by any thread."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._lock = threading.Lock()
        self._reports: list[tuple[Shelf | None, Event]] = []
        self._enough = 0
        """How many ring; 0: nobody waits."""
        self._rung = trio.Event()

    def put(self, shelf: Shelf, event: Event) -> None:
        """`event` is about the pack of `shelf`."""
        with self._lock:
            self._reports.append((shelf, event))
            enough = len(self._reports) == self._enough
        if enough:
            self._token.run_sync_soon(self._ring)

    def put_at_once(self, shelf: Shelf | None, events: Iterable[Event]) -> None:
        """The same from trio, and nobody waits for more of them."""
        with self._lock:
            self._reports += [(shelf, event) for event in events]
        self._ring()

    def take(self) -> list[tuple[Shelf | None, Event]]:
        with self._lock:
            taken, self._reports = self._reports, []
        return taken

    async def wait(self, enough: int, until: float) -> None:
        """Until there are so many, or something was put at once, or it is that time."""
        with self._lock:
            self._enough = enough
            if len(self._reports) >= enough:
                self._rung.set()
        with trio.move_on_at(until):
            await self._rung.wait()
        self._rung = trio.Event()
        self._enough = 0

    def _ring(self) -> None:
        self._rung.set()


def gathered(effects: Iterable[Effect]) -> list[Effect]:
    """The same in effect: each peer is asked once, and for nothing that is withdrawn at once."""
    asks: dict[PeerId, dict[int, None]] = {}
    rest: list[Effect] = []
    for effect in effects:
        match effect:
            case Ask(peer, indices, urgent=True):
                for index in indices:
                    asks.get(peer, {}).pop(index, None)
                rest.append(effect)
            case Ask(peer, indices):
                asks.setdefault(peer, {}).update(dict.fromkeys(indices))
            case Withdraw(peer, index) if index in asks.get(peer, {}):
                del asks[peer][index]
            case _:
                rest.append(effect)
    return rest + [Ask(peer, tuple(indices)) for peer, indices in asks.items() if indices]
