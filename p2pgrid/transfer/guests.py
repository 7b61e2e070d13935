"""Decide which of the peers that want something here are served now, and which wait outside.

Pure, and thread-safe.  Every guest gets a share of one uplink; with hundreds of them each share is too
small to be worth its link, and everybody has everything late.  So there are at most `GUESTS_MAX`:

    knocks ──> room? ──yes──────────────────────────> guest ──> leaves
      ^          │ no                                   │
      └─ waits, hears of others ─ for PATIENCE? ──> in the place of the guest that stayed longest

Who waits is shown nothing, but is told of the others that want the same, and has it from them.  It knocks
again every few seconds, as with a peer that has nothing yet.  Somebody who cannot reach the others
would wait for ever; so whoever has waited longest, and for long, takes the place of the guest that has been
in for longest, which by then has neighbours, and may knock again.
"""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

GUESTS_MAX = 60
PATIENCE = 30.0
"""Seconds after which who waits takes somebody's place."""
STAY = 60.0
"""Seconds that a guest has in any case."""
GONE = 15.0
"""Seconds without a knock after which somebody waits no more."""

Who = TypeVar("Who")


class Guests(Generic[Who]):
    """Who is in at one node, and who waits."""

    def __init__(self, most: int = GUESTS_MAX) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._in: dict[Who, float] = {}  # since when; in the order they came
        self._waiting: dict[
            Who, tuple[float, float]
        ] = {}  # since when, and when it knocked last; by the latter

    def __contains__(self, who: object) -> bool:
        return who in self._in

    def knock(self, who: Who, now: float) -> tuple[bool, Who | None]:
        """Whether `who` is in, from now on or already, and the guest that has to go for that."""
        with self._lock:
            if who in self._in:
                return True, None
            since, _ = self._waiting.pop(who, (now, now))
            while self._waiting:
                other, (_, at) = next(iter(self._waiting.items()))
                if at > now - GONE:
                    break
                del self._waiting[other]
            gone: Who | None = None
            if len(self._in) >= self._most:
                longest, entered = next(iter(self._in.items()))
                first = min((s for s, _ in self._waiting.values()), default=since)
                if since > min(first, now - PATIENCE) or now - entered < STAY:
                    self._waiting[who] = since, now
                    return False, None
                gone = longest
                del self._in[longest]
            self._in[who] = now
            return True, gone

    def leave(self, who: Who) -> None:
        """`who` wants nothing any more, or is gone."""
        with self._lock:
            self._in.pop(who, None)
            self._waiting.pop(who, None)
