"""Move bytes between one local socket and one stream, in the thread of the link that carries it.

A flow has turns beside its link (`reactor.py`), so a byte's way through a node is two system calls and no
change of threads:

    program ──socket──> recv ──Data──> link ··· link ──Data──> send ──socket──> program
                         ^ only with credit, and while the link's queue is short

What the socket does not take at once waits here, within the stream's window; what the stream may not
send stays in the socket, so that the program itself has to wait.  A stream's end is the socket's
half-close, both ways; a reset is a reset.
"""

from __future__ import annotations

import collections
import contextlib
import socket
import struct
import time
from typing import TYPE_CHECKING

from p2pgrid.hole_punch.reactor import READ, WRITE, Next
from p2pgrid.hole_punch.streams import messages as m
from p2pgrid.hole_punch.streams.fair import QUANTUM
from p2pgrid.hole_punch.streams.mux import State, Stream

if TYPE_CHECKING:
    from p2pgrid.hole_punch.streams.carrier import Carrier

PIECE_MIN = 16 << 10
"""Bytes taken from a socket at once, at first: a record of TLS."""
OVERTAKE = 1 << 20
"""Bytes in a link's queue up to which a stream that has just begun to send does not wait."""
DATAGRAMS_IDLE = 120.0
"""Seconds after which a flow of datagrams is over: longer than any answer to one takes."""
DATAGRAMS_AT_ONCE = 32


class Flow:
    """One end of a stream and its socket.  In the reactor's thread, but for what says otherwise."""

    def __init__(self, carrier: Carrier, stream: Stream, target: bytes, *, ours: bool) -> None:
        self.carrier = carrier
        self.stream = stream
        self.target = target
        self.ours = ours
        """Whether it was opened here."""
        self.who = ""
        """For people: who uses it."""
        self.since = time.monotonic()
        self.sent = self.got = 0
        """Bytes of the stream."""
        self.why = ""
        """Why it is over, if it did not end by itself."""
        self.dropped = False
        """Whether nothing more is to be moved."""
        self.over = False
        """Whether it had its last turn."""
        self.sock: socket.socket | None = None
        self.waiting = False
        """Whether it waits for its turn to send."""
        self._held: collections.deque[bytes | memoryview] = collections.deque()
        self._shut = False
        self._burst = 0
        """Bytes sent since its socket was empty."""
        self._piece = PIECE_MIN
        """Bytes taken from the socket at once: few where the link is slow, so that nobody waits long."""

    def fileno(self) -> int:
        return -1 if self.sock is None else self.sock.fileno()

    # --- by any thread --------------------------------------------------------------------

    def attach(self, sock: socket.socket) -> None:
        """Have what `sock` brings moved, and what comes given to it; it is the flow's to close."""
        sock.setblocking(False)
        self.sock = sock
        self.carrier.call(self)

    # --- turns ----------------------------------------------------------------------------

    def turn(self, readable: bool) -> Next | None:
        if not self.dropped and self._held:
            self._flush()
        if not self.dropped and readable and self.stream.sendable:
            self._read()
        if self.dropped or self._done():
            return None
        reads = self.stream.sendable and not self.waiting
        return False, None, (READ if reads else 0) | (WRITE if self._held else 0)

    def end(self, why: str) -> None:
        self.dropped = self.over = True
        self.carrier.fair.drop(self)
        self.carrier.forget(self)
        self._held.clear()
        if self.sock is not None:
            if self.why or why:  # the program is to see that it did not end well
                with contextlib.suppress(OSError):
                    self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.sock.close()

    def _done(self) -> bool:
        """Whether both ways have ended; the program is told of the other side's end."""
        if self.stream.ended and not self._held and not self._shut:
            self._shut = True
            assert self.sock is not None
            with contextlib.suppress(OSError):  # it is gone, which reading tells
                self.sock.shutdown(socket.SHUT_WR)
        return self._shut and self.stream.finished

    # --- what the program sends -----------------------------------------------------------

    def may_send(self) -> bool:
        queued = self.carrier.link.queued
        return queued < 2 * self._piece or (self._burst < QUANTUM and queued < OVERTAKE)

    def _read(self) -> None:
        if self.may_send():
            self.pump(self.carrier.link.queued)
        else:
            self.waiting = True
            self.carrier.fair.ready(self)

    def pump(self, queued: int) -> tuple[int, bool]:
        """Send what the socket has, a piece at most: how much that was, and whether there is no more.

        `queued` is what was still waiting for the link when it asked for more.
        """
        if self.dropped or self.sock is None:
            return 0, True
        most = min(self._piece, self.stream.sendable)
        if not most:
            return 0, True
        try:
            data = self.sock.recv(most)
        except BlockingIOError:
            self._burst = 0
            return 0, True
        except OSError as broken:
            self.carrier.reset(self, f"the program's connection broke: {broken.strerror}")
            return 0, True
        if not data:
            self.carrier.finish(self)
            return 0, True
        self.sent += len(data)
        self.carrier.send(self, data)
        dry = len(data) < most
        if dry:
            self._burst = 0
        else:
            self._burst += len(data)
            self._adapt(queued)
        return len(data), dry or not self.stream.sendable

    def _adapt(self, queued: int) -> None:
        """There is more where this came from: take more at once where the link keeps up."""
        if queued > self._piece:
            self._piece = max(PIECE_MIN, self._piece // 2)
        elif not queued:
            self._piece = min(2 * self._piece, m.DATA_MAX, max(PIECE_MIN, self.carrier.link.low))

    # --- what comes -----------------------------------------------------------------------

    def arrived(self, body: bytes | memoryview) -> None:
        """Give the program what came; what it does not take now is held."""
        if self.dropped:
            return
        self.got += len(body)
        count = 0
        if self.sock is not None and not self._held:
            count = self._write(body)
            if self.dropped:
                return
            if count:
                self.carrier.taken(self, count)
        if count < len(body):
            self._held.append(bytes(body[count:]))
            if self.sock is not None:
                self.carrier.call(self)

    def _write(self, body: bytes | memoryview) -> int:
        assert self.sock is not None
        try:
            return self.sock.send(body)
        except BlockingIOError:
            return 0
        except OSError as broken:
            self.carrier.reset(self, f"the program's connection broke: {broken.strerror}")
            return 0

    def _flush(self) -> None:
        total = 0
        while self._held and not self.dropped:
            body = self._held[0]
            count = self._write(body)
            total += count
            if count < len(body):
                self._held[0] = memoryview(body)[count:]
                break
            self._held.popleft()
        if total and not self.dropped:
            self.carrier.taken(self, total)

    def came(self, body: bytes | memoryview) -> None:
        """A datagram for a stream of bytes: nobody sends that, and it may be lost."""


class DatagramFlow(Flow):
    """One end of a stream of datagrams, which may be lost; it is over when none has come for long."""

    def __init__(self, carrier: Carrier, stream: Stream, target: bytes, *, ours: bool) -> None:
        super().__init__(carrier, stream, target, ours=ours)
        self._last = self.since

    def turn(self, readable: bool) -> Next | None:
        if readable and not self.dropped:
            self._pump_datagrams()
        wait = self._last + DATAGRAMS_IDLE - time.monotonic()
        if not self.dropped and wait <= 0:
            self.carrier.reset(self, "")
        return None if self.dropped or self.stream.state is State.OVER else (False, wait, READ)

    def _pump_datagrams(self) -> None:
        assert self.sock is not None
        for _ in range(DATAGRAMS_AT_ONCE):
            try:
                data = self.sock.recv(m.DATAGRAM_MAX)
            except BlockingIOError:
                return
            except ConnectionRefusedError:  # nobody there: as lost as any
                continue
            except OSError as broken:
                self.carrier.reset(self, f"datagrams: {broken.strerror}")
                return
            self._last = time.monotonic()
            if self.carrier.link.queued < OVERTAKE:
                self.sent += len(data)
                self.carrier.link.send(m.head(m.DATAGRAM, self.stream.wire), data)

    def came(self, body: bytes | memoryview) -> None:
        self.got += len(body)
        self._last = time.monotonic()
        if self.sock is not None:
            with contextlib.suppress(OSError):  # as lost as any
                self.sock.send(body)
