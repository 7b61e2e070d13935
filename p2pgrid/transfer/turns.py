"""Decide which of the chunks a peer asked for it is sent next, and which wait a moment.

Pure, and thread-safe.  One `Turns` for each pack, one `Asks` in it for each peer; every peer has a
link of its own, so the question is never whose turn it is, only what *this* peer is sent:

    asked ──> fresh: sent to nobody yet ──────────────────────────────────────> sent, at once
                └─> sent to somebody ──> waits: while others ask for what is fresh,
                                      │  then until `HOLD` after it was sent ─> sent
                                      └─ withdrawn: its asker has it from somebody else

Askers cannot know of one another's asks, so without this everybody gets everything from the
seeder of a new disk.  While an ask waits, its asker hears who was sent the chunk, takes it from
there and withdraws.  BitTorrent's super-seeding wants the same and leaves the uplink idle for it;
here both waits are bounded for each peer, not for each chunk, and a lone one never waits.
"""

from __future__ import annotations

import heapq
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable

from p2pgrid.ids import PeerId

HOLD = 0.5
"""Seconds after which somebody who was sent a chunk has long had it, been linked to, told of it
and been asked for it; and no more than people notice, if nothing of that happens."""
PASSED_MAX = 2.0
"""Seconds that a peer waits while others are sent what nobody has; anew with all that it withdraws,
for then its neighbours bring it what it waits for."""
LOOK = 0.1
"""Seconds between two looks whether anything fresh is still asked."""
FRESH_MAX = 64
"""Fresh chunks sent to a peer in a row while another ask of it is due: about what is asked at once."""


class Turns:
    """What was sent of one pack of `count` chunks: what at all, and to whom lately."""

    def __init__(self, count: int, whole: bool = True) -> None:
        self._count = count
        self.whole = whole
        """Whether all was here from the beginning: only who has what nobody else has holds anything back."""
        self._lock = threading.Lock()
        self._copies = bytearray(count)
        self.fresh: Counter[int] = Counter()
        """How many ask for what was sent to nobody."""
        self._lately: OrderedDict[int, tuple[float, PeerId]] = OrderedDict()  # in the order of sending

    def join(self, peer: PeerId) -> Asks:
        """The asks of `peer`, none yet."""
        return Asks(self, peer, self._count, self._lock)

    def quiet(self, now: float) -> bool:
        """Whether nothing was sent for so long that nobody has to wait for it."""
        with self._lock:
            self._forget(now)
            return not self._lately

    # --- with the lock held ---

    def copies(self, index: int) -> int:
        """How often `index` was sent."""
        return self._copies[index]

    def sent_to_others(self, index: int, peer: PeerId) -> float:
        """When `index` was sent last; long ago, if that was to `peer`, who lost it then."""
        at, to = self._lately.get(index, (-math.inf, peer))
        return at if to != peer else -math.inf

    def send(self, index: int, peer: PeerId, now: float) -> None:
        self._copies[index] = min(255, self._copies[index] + 1)
        self.fresh.pop(index, None)
        self._lately[index] = now, peer
        self._lately.move_to_end(index)
        self._forget(now)

    def want(self, index: int) -> None:
        if not self._copies[index]:
            self.fresh[index] += 1

    def unwant(self, index: int) -> None:
        if not self._copies[index]:
            self.fresh[index] -= 1
            if not self.fresh[index]:
                del self.fresh[index]

    def _forget(self, now: float) -> None:
        while self._lately:
            index, (at, _) = next(iter(self._lately.items()))
            if at > now - HOLD:
                return
            del self._lately[index]


class Asks:
    """What one peer asks for, and was not sent yet."""

    def __init__(self, turns: Turns, peer: PeerId, count: int, lock: threading.Lock) -> None:
        self._turns = turns
        self._peer = peer
        self._count = count
        self._lock = lock
        self._fresh: OrderedDict[int, None] = OrderedDict()  # sent to nobody, when it was looked at
        self._waiting: set[int] = set()
        self._held: list[tuple[float, int]] = []  # heap: when each was sent, or earlier; and stale ones
        self._due: list[tuple[int, int]] = []  # heap: those held for long enough, by copies; and stale ones
        self._in_a_row = 0
        self._since = math.inf
        """When it began to wait, since it was last looked at."""
        self._passed_over = False
        self._passed = 0.0
        """Seconds it waited while others were sent what is fresh, since it last withdrew something."""
        self._idle = 0.0
        """Seconds it waited for nothing but `HOLD`, in all."""
        self._again = -math.inf

    def __len__(self) -> int:
        return len(self._fresh) + len(self._waiting)

    def ask(self, indices: Iterable[int]) -> None:
        """The peer asks for these, in this order."""
        with self._lock:
            for index in indices:
                assert 0 <= index < self._count
                if index not in self._waiting and index not in self._fresh:
                    self._fresh[index] = None
                    self._turns.want(index)

    def urge(self, indices: Iterable[int], now: float) -> None:
        """The peer is sent these right now, whether it asked for them before or not."""
        with self._lock:
            for index in indices:
                self._drop(index)
                self._turns.send(index, self._peer, now)

    def withdraw(self, index: int) -> None:
        """The peer need not be sent `index` any more: it has neighbours worth waiting for."""
        with self._lock:
            if self._drop(index):
                self._passed = self._idle = 0.0
                if len(self._held) + len(self._due) > 2 * len(self._waiting) + 64:
                    self._held = [(self._turns.sent_to_others(i, self._peer), i) for i in self._waiting]
                    heapq.heapify(self._held)
                    self._due.clear()

    def _drop(self, index: int) -> bool:
        """Ask for `index` no more; whether it had to wait."""
        if index in self._fresh:
            del self._fresh[index]
            self._turns.unwant(index)
        elif index in self._waiting:
            self._waiting.remove(index)
            return True
        return False

    def leave(self) -> None:
        """The peer asks for nothing any more."""
        with self._lock:
            for index in self._fresh:
                self._turns.unwant(index)
            self._fresh.clear()
            self._waiting.clear()
            self._held.clear()
            self._due.clear()

    def next(self, now: float) -> int | None:
        """Take out the ask to serve now; None if there is none before `due`."""
        with self._lock:
            self._account(now)
            index, self._again = self._choose(now)
            if index is not None:
                self._turns.send(index, self._peer, now)
            elif self._waiting:
                self._since, self._passed_over = now, bool(self._turns.fresh)
            return index

    @property
    def due(self) -> float:
        """When to ask for the next one: long ago, if something was asked meanwhile; `inf` if nothing is."""
        with self._lock:
            if self._fresh:
                return -math.inf
            return self._again if self._waiting else math.inf

    def _account(self, now: float) -> None:
        if self._since < math.inf:
            if self._passed_over:
                self._passed += now - self._since
            else:
                self._idle += now - self._since
            self._since = math.inf

    def _choose(self, now: float) -> tuple[int | None, float]:
        """The one to send now, or when to look again."""
        again = self._may(now)
        if self._in_a_row < FRESH_MAX or again > now:
            while self._fresh:
                index, _ = self._fresh.popitem(last=False)
                if not self._turns.copies(index):
                    self._in_a_row += 1
                    return index, now
                self._waiting.add(index)
                heapq.heappush(self._held, (self._turns.sent_to_others(index, self._peer), index))
            again = self._may(now)
        if again > now:
            return None, again
        self._in_a_row = 0
        index = heapq.heappop(self._due)[1] if self._due else heapq.heappop(self._held)[1]
        self._waiting.remove(index)
        return index, now

    def _may(self, now: float) -> float:
        """When one of those that wait may be sent, as it looks now; it is on top of its heap."""
        while self._held:
            at, index = self._held[0]
            sent = self._turns.sent_to_others(index, self._peer)
            if index not in self._waiting:
                heapq.heappop(self._held)
            elif sent > at:
                heapq.heapreplace(self._held, (sent, index))
            elif at + HOLD <= now or not self._turns.whole:
                heapq.heappop(self._held)
                heapq.heappush(self._due, (self._turns.copies(index), index))
            else:
                break
        while self._due:
            copies, index = self._due[0]
            if index not in self._waiting:
                heapq.heappop(self._due)
            elif self._turns.copies(index) > copies:
                heapq.heapreplace(self._due, (self._turns.copies(index), index))
            else:
                break
        if not self._due and not self._held:
            return math.inf
        if not self._turns.whole:
            return now
        if self._turns.fresh and not self._fresh and self._passed < PASSED_MAX:
            return now + min(LOOK, PASSED_MAX - self._passed)
        return now if self._due else min(self._held[0][0] + HOLD, now + HOLD - self._idle)
