"""Move messages over one TLS socket, both ways at once, a turn at a time.

A turn (`reactor.py`) never blocks: it reads into the buffer of `Framing` what has come, asks the
receiver for more to send, and writes from a queue as much as the socket takes:

    any thread --send--> queue ---> |  turns in the  | <--TLS--> peer
    receiver <--received, drained-- |  reactor's     |
                                    |  thread        |

Backpressure: nothing that is long is queued before `drained` asks for it, so a slow peer holds
about `LOW` bytes here, and TCP does the rest.  A peer that has us queue more than `QUEUE_MAX`
without reading is not coming back.
"""

from __future__ import annotations

import collections
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Protocol

from p2pgrid.errors import BadFrame, PeerError
from p2pgrid.hole_punch.framing import HEADER, Framing, header
from p2pgrid.hole_punch.path import Way
from p2pgrid.hole_punch.rates import LinkRates
from p2pgrid.hole_punch.reactor import READ, WRITE, Next
from p2pgrid.hole_punch.tls import READ as AT_ONCE
from p2pgrid.hole_punch.tls import RECORD, Tls
from p2pgrid.ids import PeerId

LOW = 256 << 10
"""Bytes queued below which the receiver is asked for more: a few chunks, so that it chooses late."""
LOW_SECONDS = 0.25
"""Seconds that what is queued may take to be sent, where a rate is capped."""
QUEUE_MAX = 32 << 20
"""Bytes queued beyond which the peer has stopped reading what it asked for."""
BURST = 512 << 10
"""Bytes sent in one turn."""
TCP_INFO_SIZE, RTT_AT, MIN_RTT_AT = 152, 68, 148
"""Bytes of Linux' `tcp_info` that are looked at, and where the delay (µs) lies in it."""
SEAL = 128 << 10
"""Bytes sealed before they are sent: few system calls, and little that can no longer be overtaken."""


class Receiver(Protocol):
    """Takes what one link brings.  Every call comes in the reactor's thread: other links wait meanwhile."""

    def received(self, message: memoryview) -> None:
        """`message` is good until this returns.  Raising `PeerError` ends the link."""
        ...

    def drained(self) -> float | None:
        """Less than `LOW` bytes wait to be sent: the time to send something long.

        Returns the seconds after which it wants to be called again even if nothing happens.
        """
        ...

    def left(self, why: str) -> None:
        """After the last message; nothing sent from now on arrives.  The last call."""
        ...


Receive = Callable[["Link"], Receiver]
"""Makes the receiver of a new link; called by whoever makes the link, before its first turn."""


class Link:
    """A live connection to one peer.  Thread-safe."""

    def __init__(
        self,
        peer: PeerId,
        way: Way,
        tls: Tls,
        receive: Receive,
        rates: LinkRates,
        call: Callable[[Link], None],
        ended: Callable[[Link], None],
    ) -> None:
        """`call` has the link called for a turn, `ended` hears when it has had its last."""
        self.peer = peer
        self.way = way
        self._tls = tls
        self._rates = rates
        self._call = call
        self._ended = ended
        self._framing = Framing()
        self._queue: collections.deque[tuple[bytes, ...]] = collections.deque()
        self._bulk: collections.deque[tuple[bytes, ...]] = collections.deque()
        """Messages that every other overtakes."""
        self._put = self._gone = 0
        """Bytes that were queued, and of them those that were sent."""
        self._pieces: collections.deque[bytes] = collections.deque()
        self._begun = memoryview(b"")
        """What is left of the message that was taken from a queue last: whole pieces, and of one piece."""
        self._sealed = 0
        self._unread = True
        """Whether something may have come that was not read: it was too much, or not allowed yet."""
        self._lock = threading.Lock()
        self._closing = ""
        self.receiver = receive(self)

    def __repr__(self) -> str:
        return f"<Link {self.peer} {self.way.value}{' closing: ' + self._closing if self._closing else ''}>"

    @property
    def live(self) -> bool:
        return not self._closing

    @property
    def near(self) -> bool:
        """Whether its other end is in the same house."""
        return self._rates.private

    @property
    def queued(self) -> int:
        """Bytes that wait to be sent."""
        return self._put - self._gone

    @property
    def low(self) -> int:
        """Bytes queued below which the receiver is asked for more: less where a cap makes them wait long."""
        return int(min(LOW, max(RECORD, LOW_SECONDS * self._rates.up_rate)))

    def fileno(self) -> int:
        return self._tls.fileno()

    def send(self, first: bytes, *rest: bytes, bulk: bool = False) -> None:
        """Queue one whole message; never blocks.  On a link that has ended it is lost.

        What is `bulk` is overtaken by all that is not, so that what peers tell each other is not as late
        as what they send.
        """
        length = len(first) + sum(map(len, rest))
        message = (header(length) + first, *rest)
        with self._lock:
            if self._closing:
                return
            (self._bulk if bulk else self._queue).append(message)
            self._put += HEADER + length
            if self.queued > QUEUE_MAX:
                self._closing = "the peer does not read"
        if not bulk:  # what is long was asked for in a turn, which goes on
            self._call(self)

    def close(self, why: str = "closed here") -> None:
        """End the link soon; `left` is called in the reactor's thread."""
        self._closing = self._closing or why
        self._call(self)

    def wake(self) -> None:
        """Have the receiver asked for more, though nothing happened here."""
        self._call(self)

    # --- in the reactor's thread ----------------------------------------------------------

    def turn(self, readable: bool) -> Next | None:
        try:
            then = None if self._closing else self._go_on(readable)
            return None if self._closing else then
        except EOFError:
            self._closing = "the peer closed the link"
        except PeerError as wrong:
            self._closing = str(wrong)
        except OSError as broken:
            self._closing = f"the connection broke: {broken}"
        return None

    def end(self, why: str) -> None:
        with self._lock:
            self._closing = self._closing or why
            self._queue.clear()
            self._bulk.clear()
            self._put = self._gone = 0
        self._tls.close()
        self._ended(self)
        self.receiver.left(self._closing)

    def _go_on(self, readable: bool) -> Next:
        reading, writing = self._waits()
        self._unread |= readable
        if self._unread and not reading:
            self._unread = self._pull()
        more = self._unread and not reading
        again = self.receiver.drained() if self.queued < self.low else None
        sent, blocked = (0, False) if writing else self._push()
        goes_on = not blocked and not writing and (sent > 0 or self.queued > 0)
        waits = [wait for wait in (again, reading or None, writing or None) if wait is not None]
        wanted = (0 if reading else READ) | (WRITE if blocked else 0)
        return more or goes_on, min(waits, default=None), wanted

    def _waits(self) -> tuple[float, float]:
        """Seconds until something may be read, and until something may be written."""
        if not self._rates.capped:
            return 0.0, 0.0
        now = time.monotonic()
        if self._rates.due(now):
            about = self._tls.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
            if len(about) == TCP_INFO_SIZE:
                delay, base = (struct.unpack_from("I", about, at)[0] / 1e6 for at in (RTT_AT, MIN_RTT_AT))
                self._rates.observe(delay, base, now)
        return self._rates.may_read(now), self._rates.may_send(now) if self.queued else 0.0

    def _push(self) -> tuple[int, bool]:
        """Seal and send from the queue: how many bytes went, and whether the socket takes no more."""
        sent = 0
        most, batch = (RECORD, RECORD) if self._rates.capped else (BURST, SEAL)
        while self._tls.flush():
            if self._sealed:
                sent += self._sealed
                self._gone += self._sealed
                self._sealed = 0
            if sent >= most:
                return sent, False
            while self._sealed < batch and (record := self._record()):
                self._tls.seal(record)
                self._sealed += len(record)
            if not self._sealed:
                return sent, False
            if most == RECORD:
                self._rates.sent(self._sealed, time.monotonic())
        return sent, True

    def _record(self) -> bytes | memoryview:
        """The next bytes of the queue, a whole record of them if there are as many."""
        parts: list[bytes | memoryview] = []
        room = RECORD
        while room:
            if not self._begun:
                if not self._pieces:
                    if not (queue := self._queue or self._bulk):
                        break
                    self._pieces.extend(queue.popleft())
                self._begun = memoryview(self._pieces.popleft())
            part, self._begun = self._begun[:room], self._begun[room:]
            parts.append(part)
            room -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _pull(self) -> bool:
        """Read and hand over messages; whether there may be more without waiting for it."""
        most = RECORD if self._rates.capped else AT_ONCE
        space = self._framing.space()
        count = self._tls.read(space[:most] if most == RECORD else space, most)
        if count and most == RECORD:
            self._rates.read(count, time.monotonic())
        for body in self._framing.filled(count):
            if not body:
                raise BadFrame(why="an empty message")
            self.receiver.received(body)
            if self._closing:
                break
        return self._tls.more
