"""Measure how fast a peer brings chunks, and say how much to have outstanding at it.

Pure.  A peer is *busy* while something is outstanding; its rate is bytes over busy time,
smoothed over about `SMOOTHING` seconds.  The window is what it brings in one round trip and
`SLACK` seconds more, so that it is never idle while our next ask travels, and no slow peer
sits on many chunks.  While the window is what bounds the rate, every round trip makes it
larger by the slack: it grows by itself until the peer's own speed bounds it.

Near the end the slack is `ENDING` of the time that all peers together need for the rest, so that
whoever turns out to be faster finds something left (as loops are shared out among processors:
guided self-scheduling, Polychronopoulos and Kuck, 1987).
"""

from __future__ import annotations

import math

import attrs

SLACK = 0.5
SLACK_MIN = 0.1
"""Seconds, two of the moments in which reports are gathered: no peer runs dry between two asks."""
ENDING = 0.5
SMOOTHING = 1.0
SAMPLE = 0.05
"""Seconds of busy time that make a measurement; arrivals come in bursts."""
CHUNKS_MAX = 64
"""Chunks outstanding at one peer."""
LIGHT = 512 << 10
"""Bytes outstanding at one peer up to which it may be any number of chunks: those of an update have a
kilobyte each, and 64 of them would be one round trip after another."""
BYTES_MAX = 16 << 20
"""Bytes outstanding at one peer: what a fast link delivers in a few tenths of a second."""
WAIT_MIN = 5.0
"""Seconds of silence that nobody is blamed for: TCP needs them to get over a lossy moment."""


@attrs.define(eq=False)
class Pace:
    """One peer's speed."""

    rate: float = 0.0
    """Bytes per second; 0 while nothing was measured."""
    latency: float = math.inf
    """The least seconds there were from an ask to its chunk."""
    slack: float = SLACK
    measured_from: float = 0.0
    measured_bytes: int = 0

    def busy(self, now: float) -> None:
        """Something is outstanding again; the time before does not count."""
        self.measured_from = now
        self.measured_bytes = 0

    def arrived(self, size: int, waited: float, now: float) -> None:
        """A chunk of `size` bytes came, `waited` seconds after it was asked."""
        self.latency = min(self.latency, waited)
        self.measured_bytes += size
        elapsed = now - self.measured_from
        if elapsed < SAMPLE and self.rate:
            return
        sample = self.measured_bytes / max(elapsed, 0.001)
        self.rate += (sample - self.rate) * (elapsed / (elapsed + SMOOTHING) if self.rate else 1)
        self.busy(now)

    @property
    def window(self) -> int:
        """Bytes to have outstanding."""
        return min(BYTES_MAX, int(self.rate * (self.latency + self.slack))) if self.rate else 0

    def expected(self, size: int) -> float:
        """Seconds until the last of `size` outstanding bytes is here; `inf` while not measured."""
        return min(self.latency, SLACK) + size / self.rate if self.rate else math.inf

    def wait(self, size: int, patience: float) -> float:
        """Seconds to wait for a chunk of `size` bytes before the peer counts as stalled."""
        return min(max(4 * self.expected(size), WAIT_MIN), max(patience, WAIT_MIN))


def slack(missing: int, rate: float) -> float:
    """The slack while so many bytes are missing, which all peers together bring at `rate`."""
    return max(SLACK_MIN, min(SLACK, ENDING * missing / rate)) if rate else SLACK
