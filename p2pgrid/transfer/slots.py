"""Decide which links may take one more chunk, so that little is committed that has not left yet.

Pure, and thread-safe.  Bytes that wait in a link can be neither taken back nor given to somebody else: where
twenty links of a slow uplink take some chunks each, every chunk arrives seconds late, and so does what is
passed on of it.  So all links of a node together commit what the uplink sends in `AHEAD` seconds:

    may? ── room ───────────────────────────────────> one more chunk ──> queued ──> gone
      └──── none: stands in line until it is first and there is room  <──────────────┘

In line they are served round robin, a chunk each; nobody stands there while less than half is
committed.  A link that has not moved for much longer than all that is committed takes does not count:
its peer is slow, the uplink is not, and the others go on meanwhile.  On a fast uplink there is always
room, and each link's own bound is all there is.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

AHEAD = 0.25
"""Seconds of the uplink that may be committed: what is decided is that old when it leaves."""
LEAST = 256 << 10
"""Bytes that may be committed in any case: some chunks, so that a pause of one link is not felt."""
STUCK = 1.0
"""Seconds beyond twice what all takes that is committed: who has not moved by then has a slow peer."""
SMOOTHING = 1.0
SAMPLE = 0.1
"""Seconds that make a measurement of the uplink."""

Who = TypeVar("Who")


class Slots(Generic[Who]):
    """What the links of one node have committed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queued: dict[Who, int] = {}
        self._moved: dict[Who, float] = {}
        self._line: OrderedDict[Who, None] = OrderedDict()
        self._total = 0
        self.rate = 0.0
        """Bytes a second that leave, lately, while there is anything to send."""
        self._since = 0.0
        self._gone = 0

    def update(self, who: Who, queued: int, now: float) -> None:
        """`queued` bytes wait at `who`, more or less than before."""
        with self._lock:
            before = self._queued.get(who, 0)
            if queued == before:
                return
            if not self._total:
                self._since, self._gone = now, 0
            self._total += queued - before
            if queued < before:
                self._account(before - queued, now)
                self._moved[who] = now
            if queued:
                self._queued[who] = queued
                self._moved.setdefault(who, now)
            else:
                del self._queued[who], self._moved[who]

    def may(self, who: Who, now: float) -> bool:
        """Whether `who` may commit one more chunk.  If not, it stands in line."""
        with self._lock:
            if self._plenty or (self._room(now) and next(iter(self._line), who) == who):
                self._line.pop(who, None)
                return True
            self._line.setdefault(who)
            return False

    def pause(self, who: Who) -> None:
        """`who` has nothing to send now: it does not stand in line."""
        with self._lock:
            self._line.pop(who, None)

    def first(self, now: float) -> Who | None:
        """Who may go on: it stands first in line, and there is room."""
        with self._lock:
            return next(iter(self._line)) if self._line and self._room(now) else None

    def leave(self, who: Who) -> None:
        """`who` is gone."""
        with self._lock:
            self._line.pop(who, None)
            self._total -= self._queued.pop(who, 0)
            self._moved.pop(who, None)

    # --- with the lock held ---

    @property
    def _plenty(self) -> bool:
        """Whether there is so much room that nobody need stand in line: each turn would be one chunk long."""
        return 2 * self._total < self.rate * AHEAD

    def _room(self, now: float) -> bool:
        most = max(LEAST, self.rate * AHEAD)
        if self._total < most:
            return True
        since = now - STUCK - 2 * self._total / max(self.rate, 1.0)
        stuck = sum(self._queued[who] for who, at in self._moved.items() if at < since)
        return self._total - stuck < most

    def _account(self, gone: int, now: float) -> None:
        self._gone += gone
        elapsed = now - self._since
        if elapsed >= SAMPLE:
            share = elapsed / (elapsed + SMOOTHING) if self.rate else 1.0
            self.rate += (self._gone / elapsed - self.rate) * share
            self._since, self._gone = now, 0
