"""Count what is relayed against what a relay's owner allows.

Pure.  A quota is of bytes in a window of time; the window of a peer begins with its first byte in it.
"""

from __future__ import annotations

import math

import attrs

DAY = 86_400.0


@attrs.frozen
class Limits:
    """What a relay's owner allows."""

    circuits: int = 1024
    """At a time, all together."""
    circuits_each: int = 128
    """At a time, of one peer."""
    reservations: int = 4096
    """Peers that can be reached through it."""
    quota: int | None = None
    """Bytes in a window, all together."""
    quota_each: int | None = None
    """Bytes in a window that one peer's circuits carry."""
    rate: float = math.inf
    """Bytes a second, all together."""
    rate_each: float = math.inf
    """Bytes a second of one circuit."""
    window: float = DAY
    """Seconds."""


@attrs.define
class Account:
    """Bytes in the present window."""

    since: float = -math.inf
    used: int = 0

    def spent(self, window: float, now: float) -> int:
        if now >= self.since + window:
            self.used = 0
        return self.used

    def room(self, quota: int | None, window: float, now: float) -> int:
        """Bytes that may still be spent."""
        return NO_LIMIT if quota is None else max(0, quota - self.spent(window, now))

    def spend(self, count: int, window: float, now: float) -> None:
        if not self.spent(window, now):
            self.since = now
        self.used += count


NO_LIMIT = 1 << 62
"""Bytes: as many as there may ever be."""


def spell(seconds: float) -> str:
    """ "24 h", "90 min" or "10 s"."""
    if seconds >= 2 * 3600:
        return f"{math.ceil(seconds / 3600)} h"
    if seconds >= 120:
        return f"{math.ceil(seconds / 60)} min"
    return f"{math.ceil(max(seconds, 1))} s"
