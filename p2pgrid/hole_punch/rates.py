"""Decide how many bytes a link may move now: caps of the node, caps of the link, and courtesy.

Pure and thread-safe: every link has a thread of its own, and all of them draw on the node's buckets.

    Rates ── up, down: buckets of the whole node ──┐
      └─ link() ─> LinkRates ── up, down: its own ─┴─> wait() seconds, then spend(bytes)
                       └─ Courtesy: a rate that gives way while the path's delay grows

A bucket may go into debt by one record: who may move anything moves a whole one and waits longer
afterwards, so rates hold over time whatever the records' sizes are.

Courtesy is LEDBAT's idea (RFC 6817) on what the kernel measures: queues that grow beyond `TARGET`
seconds, ours or those of the owner's own traffic, make us slower, so that a video call at the same
uplink wins; a path whose buffers are shorter than that is used in full.
"""

from __future__ import annotations

import math
import threading

import attrs

FILL = 0.05
"""Seconds of a rate that may be saved up: threads wake up a little late."""
RECORD = 16 << 10
"""Bytes that are moved in one go: a TLS record."""
ON_THE_WIRE = 1.05
"""What a byte costs with the headers of TLS, TCP, IP and Ethernet at 1500 bytes a packet: a cap is of what
a router counts."""
TARGET = 0.03
"""Seconds of queue in a path that nobody minds; LEDBAT allows 0.1."""
SAMPLE = 0.1
"""Seconds between two looks at a path's delay."""
GROWTH, CUT = 0.01, 0.3
"""Shares by which a courteous rate grows, and is cut at most, at each look: slower than TCP does, or
others would never get what was left to them."""
EMPTY, REGROWTH = 0.25, 0.05
"""With less than this share of `TARGET` queued nobody else is there: then it grows by more."""
RATE_MIN = 16_000.0
"""Bytes a second that courtesy leaves, so that the path is still measured and nothing times out."""
FREE = 4.0
"""A courteous rate this many times above what is sent bounds nothing, and is forgotten."""
LOOK_MAX = 1.0
"""Seconds after which who waits looks again: the caps may have changed meanwhile."""


@attrs.frozen
class Limits:
    """Caps in bytes a second; `inf` is none."""

    up: float = math.inf
    down: float = math.inf
    up_link: float = math.inf
    down_link: float = math.inf
    courteous: str = "wan"
    """To whom links give way to other traffic: "wan" (not within private networks), "always", "never"."""


class Bucket:
    """Bytes that may be moved at a rate."""

    def __init__(self, rate: float = math.inf) -> None:
        assert rate > 0
        self.rate = rate
        self._level = 0.0
        self._at = -math.inf
        self._lock = threading.Lock()

    def wait(self, now: float) -> float:
        """Seconds until a record may be moved; 0 is now."""
        with self._lock:
            self._fill(now)
            return -self._level / self.rate if self._level <= -1 else 0.0  # less than a byte is none

    def spend(self, size: int, now: float) -> None:
        """`size` bytes were moved."""
        if self.rate < math.inf:
            with self._lock:
                self._fill(now)
                self._level -= size

    def _fill(self, now: float) -> None:
        if self.rate == math.inf or self._at == -math.inf:
            self._level = 0.0
        else:
            self._level = min(FILL * self.rate, self._level + self.rate * (now - self._at))
        self._at = now


class Courtesy:
    """A rate that gives way to others on the same path."""

    def __init__(self) -> None:
        self.rate = math.inf

    def observe(self, delay: float, base: float, speed: float, elapsed: float = SAMPLE) -> None:
        """The path takes `delay` s, at best `base` s; `speed` bytes/s were sent in the last `elapsed` s."""
        excess = (delay - base) / TARGET - 1
        if excess > 0:
            self.rate = max(RATE_MIN, min(self.rate, speed) * (1 - min(CUT, CUT * excess)))
        elif self.rate > FREE * max(speed, RATE_MIN):
            self.rate = math.inf
        else:
            growth = REGROWTH if excess < EMPTY - 1 else GROWTH * -excess
            self.rate *= min((1 + growth) ** (elapsed / SAMPLE), 2.0)


class Rates:
    """What the links of one node may move, together and each."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.up = Bucket(self.limits.up)
        self.down = Bucket(self.limits.down)

    def set(self, limits: Limits) -> None:
        """These caps are in force from now on; waiting links see it within `LOOK_MAX`."""
        self.limits = limits
        self.up.rate, self.down.rate = limits.up, limits.down

    def link(self, *, private: bool) -> LinkRates:
        """What a new link may move; `private`: its other end is in the same house."""
        return LinkRates(self, private=private)


class LinkRates:
    """What one link may move, with all that its node allows."""

    def __init__(self, rates: Rates, *, private: bool) -> None:
        self._rates = rates
        self.private = private
        self._up = Bucket()
        self._down = Bucket()
        self._courtesy = Courtesy()
        self._yielding = Bucket()
        self._sent = 0
        self._look_at = -math.inf
        self._looked_at = -math.inf

    @property
    def capped(self) -> bool:
        """Whether anything bounds this link at all; where not, the rest need not be asked."""
        limits = self._rates.limits
        return self.courteous or min(limits.up, limits.down, limits.up_link, limits.down_link) < math.inf

    @property
    def courteous(self) -> bool:
        wish = self._rates.limits.courteous
        return wish == "always" or (wish == "wan" and not self.private)

    @property
    def up_rate(self) -> float:
        """Bytes a second that may be sent, as it looks now."""
        yielding = self._courtesy.rate if self.courteous else math.inf
        return min(self._rates.limits.up, self._rates.limits.up_link, yielding)

    def may_send(self, now: float) -> float:
        """Seconds until a record may be sent; look again after them."""
        self._up.rate = self._rates.limits.up_link
        self._yielding.rate = self._courtesy.rate if self.courteous else math.inf
        waits = (self._rates.up.wait(now), self._up.wait(now), self._yielding.wait(now))
        return min(max(waits), LOOK_MAX)

    def sent(self, size: int, now: float) -> None:
        """`size` bytes went into the link."""
        self._sent += size
        size = int(ON_THE_WIRE * size)
        self._rates.up.spend(size, now)
        self._up.spend(size, now)
        self._yielding.spend(size, now)

    def may_read(self, now: float) -> float:
        """Seconds until a record may be read; look again after them."""
        self._down.rate = self._rates.limits.down_link
        return min(max(self._rates.down.wait(now), self._down.wait(now)), LOOK_MAX)

    def read(self, size: int, now: float) -> None:
        """`size` bytes came out of the link."""
        size = int(ON_THE_WIRE * size)
        self._rates.down.spend(size, now)
        self._down.spend(size, now)

    def due(self, now: float) -> bool:
        """Whether to measure the path's delay and call `observe`."""
        return self.courteous and self._sent > 0 and now >= self._look_at

    def observe(self, delay: float, base: float, now: float) -> None:
        """The path takes `delay` s now, and took `base` s at best."""
        elapsed = now - self._looked_at
        if elapsed < math.inf:
            self._courtesy.observe(delay, base, self._sent / elapsed, elapsed)
        self._sent = 0
        self._looked_at = now
        self._look_at = now + SAMPLE
