"""Move messages over one TLS socket, in one thread, both ways at once.

An OpenSSL session must not be used by two threads, and a blocking read would keep writes
waiting: so the thread that owns the socket never blocks in it.  It polls the socket and a
waker, reads into the buffer of `Framing`, and writes from a queue:

    any thread --send--> queue ---> |        |
                                    | thread | <--TLS--> peer
    receiver <--received, drained-- |        |

Backpressure: nothing that is long is queued before `drained` asks for it, so a slow peer holds
about `LOW` bytes here, and TCP does the rest.  A peer that has us queue more than `QUEUE_MAX`
without reading is not coming back.
"""

from __future__ import annotations

import collections
import contextlib
import math
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from typing import Protocol

from p2pgrid.errors import BadFrame, PeerError
from p2pgrid.hole_punch.framing import Framing, header
from p2pgrid.hole_punch.path import Way
from p2pgrid.hole_punch.rates import RECORD, LinkRates, Rates
from p2pgrid.ids import PeerId

LOW = 256 << 10
"""Bytes queued below which the receiver is asked for more: a few chunks, so that it chooses late."""
LOW_SECONDS = 0.25
"""Seconds that what is queued may take to be sent, where a rate is capped."""
QUEUE_MAX = 32 << 20
"""Bytes queued beyond which the peer has stopped reading what it asked for."""
BURST = 1 << 20
"""Bytes moved one way before the other way gets its turn."""
TCP_INFO_SIZE, RTT_AT, MIN_RTT_AT = 152, 68, 148
"""Bytes of Linux' `tcp_info` that are looked at, and where the delay (µs) lies in it."""
JOINT = 4096
"""Bytes below which buffers are copied together: a TLS record of its own costs more."""


class Receiver(Protocol):
    """Takes what one link brings.  Every call comes in the link's own thread."""

    def received(self, message: memoryview) -> None:
        """`message` is good until this returns.  Raising `PeerError` ends the link."""
        ...

    def drained(self) -> float | None:
        """Less than `LOW` bytes wait to be sent: the time to send something long.

        Returns the seconds after which it wants to be called again even if nothing happens.
        """
        ...

    def left(self, why: str) -> None:
        """After the last message; nothing sent from now on arrives."""
        ...


Receive = Callable[["Link"], Receiver]
"""Makes the receiver of a new link; called by whoever makes the link, before its thread starts."""


class Link:
    """A live connection to one peer.  Thread-safe."""

    def __init__(
        self, peer: PeerId, way: Way, sock: ssl.SSLSocket, receive: Receive, rates: LinkRates | None = None
    ) -> None:
        self.peer = peer
        self.way = way
        self._socket = sock
        self._rates = rates or Rates().link(private=True)
        self._framing = Framing()
        self._queue: collections.deque[bytes] = collections.deque()
        self._queued = 0
        self._unsent = memoryview(b"")
        self._offered = 0
        self._lock = threading.Lock()
        self._closing = ""
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._rung = False
        self._thread = 0
        self.receiver = receive(self)

    def __repr__(self) -> str:
        return f"<Link {self.peer} {self.way.value}{' closing: ' + self._closing if self._closing else ''}>"

    @property
    def live(self) -> bool:
        return not self._closing

    @property
    def queued(self) -> int:
        """Bytes that wait to be sent."""
        return self._queued

    @property
    def low(self) -> int:
        """Bytes queued below which the receiver is asked for more: less where a cap makes them wait long."""
        return int(min(LOW, max(RECORD, LOW_SECONDS * self._rates.up_rate)))

    def send(self, *buffers: bytes) -> None:
        """Queue one whole message; never blocks.  On a link that has ended it is lost."""
        length = sum(map(len, buffers))
        head = header(length)
        pieces = [head + b"".join(buffers)] if length < JOINT else [head + buffers[0], *buffers[1:]]
        with self._lock:
            if self._closing:
                return
            self._queue.extend(pieces)
            self._queued += sum(map(len, pieces))
            if self._queued > QUEUE_MAX:
                self._closing = "the peer does not read"
            self._ring()

    def close(self, why: str = "closed here") -> None:
        """End the link soon; `left` is called in its thread."""
        with self._lock:
            self._closing = self._closing or why
            self._ring()

    def _ring(self) -> None:
        """Wake the thread; the lock is held, so that the waker is not closed meanwhile."""
        if not self._rung and threading.get_ident() != self._thread:
            self._rung = True
            with contextlib.suppress(OSError):  # closed: the thread has ended
                self._waker.send(b"\0")

    def run(self) -> None:
        """Be the link's thread: returns when the link has ended and its socket is closed."""
        self._thread = threading.get_ident()
        why = "our own mistake"
        try:
            why = self._pump()
        except PeerError as wrong:
            why = str(wrong)
        except OSError as broken:
            why = f"the connection broke: {broken}"
        finally:
            with self._lock:
                self._closing = self._closing or why
                self._queue.clear()
                self._queued = 0
                self._waker.close()
            self._woken.close()
            self._socket.close()
            self.receiver.left(self._closing)

    def _pump(self) -> str:
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        poll.register(self._socket, select.POLLIN)
        interest = select.POLLIN
        while not self._closing:
            reading, writing = self._waits()
            pulled = 0 if reading else self._pull()
            if pulled is None:
                return "the peer closed the link"
            again = self.receiver.drained() if self._queued < self.low else None
            pushed, sent = (0, 0) if writing else self._push()
            if pulled == select.POLLPRI or (sent and self._queued < self.low):
                continue  # more may be there to read, or to be asked for
            wanted = (pushed | pulled) & ~(select.POLLIN if reading else 0)
            if wanted != interest:
                interest = wanted
                poll.modify(self._socket, interest)
            waits = [wait for wait in (again, reading or None, writing or None) if wait is not None]
            for fd, _ in poll.poll(math.ceil(1000 * min(waits)) if waits else None):
                if fd == self._woken.fileno():
                    with self._lock:
                        self._woken.recv(1)
                        self._rung = False
        return self._closing

    def _waits(self) -> tuple[float, float]:
        """Seconds until something may be read, and until something may be written."""
        if not self._rates.capped:
            return 0.0, 0.0
        now = time.monotonic()
        if self._rates.due(now):
            about = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
            if len(about) == TCP_INFO_SIZE:
                delay, base = (struct.unpack_from("I", about, at)[0] / 1e6 for at in (RTT_AT, MIN_RTT_AT))
                self._rates.observe(delay, base, now)
        return self._rates.may_read(now), self._rates.may_send(now) if self._queued else 0.0

    def _push(self) -> tuple[int, int]:
        """Write from the queue; what to poll for then, and how many bytes went."""
        sent = 0
        most = RECORD if self._rates.capped else BURST
        try:
            while sent < most:
                if not self._unsent:
                    with self._lock:
                        if not self._queue:
                            return select.POLLIN, sent
                        self._unsent = memoryview(self._queue.popleft())
                # After a would-block TLS wants to see the same bytes again, no less of them: `_offered`.
                self._offered = max(self._offered, min(most, len(self._unsent)))
                count = self._socket.send(self._unsent[: self._offered])
                self._offered = 0
                self._unsent = self._unsent[count:]
                sent += count
                with self._lock:
                    self._queued -= count
                if most == RECORD:
                    self._rates.sent(count, time.monotonic())
        except ssl.SSLWantReadError:
            return select.POLLIN, sent
        except ssl.SSLWantWriteError:
            pass
        return select.POLLIN | select.POLLOUT, sent

    def _pull(self) -> int | None:
        """Read and hand over messages; what to poll for then, or None at the end of the stream.

        `POLLPRI`: do not poll, there may be more.
        """
        got = 0
        most = RECORD if self._rates.capped else BURST
        try:
            while got < most:
                count = self._socket.recv_into(self._framing.space())
                if count == 0:
                    return None
                got += count
                if most == RECORD:
                    self._rates.read(count, time.monotonic())
                for body in self._framing.filled(count):
                    if not body:
                        raise BadFrame(why="a welcome in the middle of a link")
                    self.receiver.received(body)
                if self._closing:
                    break
        except ssl.SSLWantReadError:
            return select.POLLIN
        except ssl.SSLWantWriteError:
            return select.POLLIN | select.POLLOUT
        return select.POLLPRI
