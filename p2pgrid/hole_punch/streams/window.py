"""Decide how much the other end of a stream may send before what it sent was taken.

Pure.  Each stream has a window: the bytes that may be under way or held here at once.  Every one begins
with `INITIAL`; beyond that all streams of a node share one `Pool`, so that what may ever be held is
known before anything comes:

    granted ──Data──> held ──taken by the program here──> owed ──Credit──> granted
       └──────────────────────────── window ─────────────────────────────────┘

How fast bytes may come is the link's concern; a window only bounds what may have to be held.  So it
doubles whenever half of it came and all of that was taken at once, and a reader that lets it fill up
gives back half of what it has from a pool that is scarce.  None may have more of the pool than it leaves
there (the dynamic thresholds of Choudhury and Hahne, 1998): there is always something for one more.
"""

from __future__ import annotations

import attrs

from p2pgrid.errors import BadFrame

INITIAL = 48 << 10
"""Bytes each stream may be sent, whatever others do."""
WINDOW_MAX = 4 << 20
"""Bytes: 80 ms at 400 Mbit/s."""
POOL = 16 << 20
"""Bytes that the windows of all streams of a node have beyond `INITIAL`."""


@attrs.define
class Pool:
    """What windows share."""

    free: int = POOL

    def more(self, window: int) -> int:
        """What a `window` may grow by: as much as it is, if there is that much to be had."""
        return max(0, min(window, WINDOW_MAX - window, (self.free - (window - INITIAL)) // 2))

    @property
    def scarce(self) -> bool:
        return self.free < POOL // 2


@attrs.define(eq=False)
class Window:
    """What one end of one stream lets the other send."""

    _pool: Pool
    size: int = INITIAL
    granted: int = INITIAL
    """Bytes that may still come."""
    held: int = 0
    """Bytes that came, and were not taken yet."""
    owed: int = 0
    """Bytes that were taken, and not granted anew yet."""
    _slow: bool = False
    """Whether it was full since something was granted."""

    def arrive(self, count: int) -> None:
        """Raises `BadFrame` where more comes than was granted."""
        if count > self.granted:
            raise BadFrame(why=f"a stream brings {count - self.granted} bytes more than it may")
        self._slow |= count == self.granted and self.held > 0
        self.granted -= count
        self.held += count

    def take(self, count: int) -> int:
        """The program here has taken `count` bytes: how many the other end is granted now."""
        assert 0 <= count <= self.held
        self.held -= count
        self.owed += count
        if self.owed < self.size // 2:
            return 0
        if self._slow and self._pool.scarce:
            self._grow(-min(self.owed, (self.size - INITIAL + 1) // 2))
        elif not self._slow and not self.held:
            self._grow(self._pool.more(self.size))
        self._slow = False
        count, self.owed = self.owed, 0
        self.granted += count
        return count

    def _grow(self, count: int) -> None:
        self.size += count
        self.owed += count
        self._pool.free -= count

    def end(self) -> None:
        """Nothing comes any more: what it had of the pool is free when the rest was taken."""
        extra = max(0, self.size - max(INITIAL, self.held))
        self.size -= extra
        self._pool.free += extra
        self.granted = self.owed = 0

    def close(self) -> None:
        self._pool.free += self.size - INITIAL
        self.size, self.granted, self.held, self.owed = INITIAL, 0, 0, 0

    def check(self) -> None:
        assert min(self.granted, self.held, self.owed) >= 0
        assert INITIAL <= self.size <= WINDOW_MAX
        assert self.granted + self.held + self.owed <= self.size
