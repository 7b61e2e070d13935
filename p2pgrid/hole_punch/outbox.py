"""Keep what a link is to send in its order, and what was sent until the peer has it.

Pure but for a lock.  A link outlives its connections (`link.py`): messages are counted at both ends, the peer
acknowledges how many it has taken, and on another connection what it has not taken is sent again.

    put ──> queue, bulk ──next──> sent ──acknowledge──> gone
                 ^                 │
                 └──── resume ─────┘   (first of all, in the old order)

What is long is not kept: whoever sends it says how to make it `again`, or that it need not come again.  It is
made when its turn comes, so a peer that never acknowledges does not have all of it made at once.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable

import attrs

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.framing import HEADER, header

Pieces = tuple[bytes, ...]
Again = Callable[[], Pieces | None]
"""Makes a message's pieces anew; None: it is not worth sending any more."""

KEPT_MAX = 32 << 20
"""Bytes kept of what the peer has not acknowledged; more, and it is not going to."""
SENT_MAX = 1 << 18
"""Messages that wait to be acknowledged."""
OWN_MAX = 1 << 14
"""The link's own messages that wait: an acknowledgement for each MiB, and some echoes."""


@attrs.define
class Message:
    """One message, its length told before it."""

    pieces: Pieces
    size: int
    again: Again | None = None
    """Where it is long; then it has no pieces from when it was sent until it is to be sent again."""


class Outbox:
    """What one link sends.  `put` and `queued` may be used by any thread, the rest by the reactor's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own: collections.deque[Message] = collections.deque()
        """The link's own messages: neither counted nor kept."""
        self._replay: collections.deque[Message] = collections.deque()
        self._queue: collections.deque[Message] = collections.deque()
        self._bulk: collections.deque[Message] = collections.deque()
        """Messages that every other overtakes."""
        self._sent: collections.deque[Message] = collections.deque()
        self._acknowledged = 0
        self._put = self._gone = self._kept = 0
        """Bytes that were queued; of them those that are under way; bytes of messages in `_sent`."""
        self._over = False

    @property
    def queued(self) -> int:
        """Bytes that wait to be sent."""
        return self._put - self._gone

    @property
    def count(self) -> int:
        """Messages that were sent, or begun."""
        return self._acknowledged + len(self._sent)

    @property
    def waiting(self) -> int:
        """Messages that were sent and not acknowledged."""
        return len(self._sent)

    def put(self, first: bytes, rest: Pieces, *, bulk: bool, again: Again | None) -> bool:
        """Queue one message; False where it is lost, as the link is over."""
        length = len(first) + sum(map(len, rest))
        message = Message((header(length) + first, *rest), HEADER + length, again)
        with self._lock:
            if self._over:
                return False
            (self._bulk if bulk else self._queue).append(message)
            self._put += message.size
            return True

    def say(self, body: bytes) -> None:
        """Queue one of the link's own messages, before all others."""
        message = Message((header(len(body)) + body,), HEADER + len(body))
        with self._lock:
            self._own.append(message)
            self._put += message.size

    def next(self) -> Pieces | None:
        """The message to send now."""
        if self._own:
            return self._own.popleft().pieces
        while queue := self._replay or self._queue or self._bulk:
            message = queue.popleft()
            if not message.pieces and not self._renew(message):
                continue
            self._sent.append(message)
            pieces = message.pieces
            if message.again is None:
                self._kept += message.size
            else:
                message.pieces = ()
            return pieces
        return None

    def _renew(self, message: Message) -> bool:
        """Make anew what is to be sent again; False: it is not worth it any more."""
        assert message.again is not None
        pieces, before, message.size = message.again(), message.size, 0
        if pieces is not None:
            length = sum(map(len, pieces))
            message.pieces, message.size = (header(length) + pieces[0], *pieces[1:]), HEADER + length
        with self._lock:
            self._put += message.size - before
        return pieces is not None

    def went(self, size: int) -> None:
        """`size` bytes of what `next` gave are under way."""
        self._gone += size

    def acknowledge(self, count: int) -> None:
        """The peer has taken `count` messages since the session began.  Raises `BadFrame`."""
        if not self._acknowledged <= count <= self.count:
            raise BadFrame(why=f"{count} messages are acknowledged, {self.count} were sent")
        while self._acknowledged < count:
            message = self._sent.popleft()
            if message.again is None:
                self._kept -= message.size
            self._acknowledged += 1

    @property
    def overdue(self) -> bool:
        """Whether more waits to be acknowledged than an honest peer leaves waiting."""
        return self._kept > KEPT_MAX or len(self._sent) > SENT_MAX

    @property
    def flooded(self) -> bool:
        """Whether the peer asks for more answers of the link itself than it reads."""
        return len(self._own) > OWN_MAX

    def interrupt(self) -> None:
        """The connection is gone: what was begun is not under way, what the link itself said is void."""
        with self._lock:
            self._own.clear()
            self._gone = self._put - sum(m.size for q in (self._replay, self._queue, self._bulk) for m in q)

    def resume(self, count: int) -> None:
        """On another connection the peer goes on after `count` messages: the rest is sent again."""
        self.acknowledge(count)
        with self._lock:
            self._put += sum(message.size for message in self._sent)
            self._kept = 0
            self._sent.extend(self._replay)  # what the connection before had not come to
            self._replay, self._sent = self._sent, collections.deque()

    def end(self) -> None:
        """Nothing is sent any more."""
        with self._lock:
            self._over = True
            for queue in (self._own, self._replay, self._queue, self._bulk, self._sent):
                queue.clear()
            self._put = self._gone = self._kept = 0
