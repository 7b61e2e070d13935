"""Carry bytes between the two connections of each circuit, without looking at them.

    one end ──splice──> pipe ──splice──> other end      and the same the other way round

The bytes stay in the kernel.  A pipe belongs to a direction only while it holds bytes, so an idle circuit
is two sockets and a few objects here.  A direction goes on while its source is readable and its sink
writable (epoll, edge-triggered): a reader that is slow fills its own pipe, and then its sender's
window, and nobody else's.  What can go on waits in one line and moves at most `TURN` bytes before the
next; where rates are capped, all that are capped together draw on one bucket in that order.

Not thread-safe: everything here is called in the relay's thread.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import heapq
import math
import os
import select
import socket
import struct
from collections.abc import Iterable
from typing import Protocol

from p2pgrid.hole_punch.rates import ON_THE_WIRE, Bucket

TURN = 1 << 20
"""Bytes that a direction moves before the next one has its turn, and the room of a pipe."""
CAPPED_TURN = 32 << 10
"""The same where a rate is capped: a bucket may go into debt by so much."""
UNSENT = 1 << 20
"""Bytes that the kernel takes beyond those under way: a turn's."""
POOL = 16
"""Empty pipes that are kept: making one costs three system calls."""
AGAIN = 0.1
"""Seconds until a direction that got no pipe tries again: something else has closed a file then."""
F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", 1031)  # known to Linux' Python only
FLAGS = getattr(os, "SPLICE_F_NONBLOCK", 2) | getattr(os, "SPLICE_F_MOVE", 1)
EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET


class Meter(Protocol):
    """Counts what circuits carry."""

    def room(self, circuit: int) -> int:
        """Bytes that it may carry now; asked when some wait."""
        ...

    def moved(self, circuit: int, count: int) -> None:
        """It carried these."""
        ...

    def spent(self, circuit: int) -> None:
        """There was no room: it may be cut at once."""
        ...

    def over(self, circuit: int, broken: str) -> None:
        """Both its ends are closed; `broken`: why, unless both had finished."""
        ...


class _Pipe:
    """A pipe of the kernel's; always empty while it is in the pool."""

    __slots__ = ("read", "write")

    def __init__(self) -> None:
        self.read, self.write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # a user may have so many large ones only; a small one works, too
            fcntl.fcntl(self.write, F_SETPIPE_SZ, TURN)

    def close(self) -> None:
        os.close(self.read)
        os.close(self.write)


class _End:
    """One connection, and the direction that begins at it."""

    __slots__ = (
        "circuit",
        "fd",
        "finished",
        "held",
        "other",
        "pipe",
        "readable",
        "sock",
        "waiting",
        "writable",
    )

    other: _End

    def __init__(self, circuit: _Circuit, sock: socket.socket) -> None:
        self.circuit = circuit
        self.sock = sock
        self.fd = sock.fileno()
        self.readable = self.writable = self.finished = self.waiting = False
        self.pipe: _Pipe | None = None
        self.held = 0
        """Bytes in the pipe."""

    @property
    def able(self) -> bool:
        """Whether its direction may be able to go on."""
        return self.other.writable if self.held else self.readable and not self.finished


class _Circuit:
    __slots__ = ("bucket", "ends", "number", "open")

    def __init__(self, number: int, one: socket.socket, other: socket.socket, bucket: Bucket) -> None:
        self.number = number
        self.bucket = bucket
        self.open = True
        self.ends = (_End(self, one), _End(self, other))
        for end, its_other in zip(self.ends, reversed(self.ends), strict=True):
            end.other = its_other


class Splicer:
    """Circuits that are carried, and one epoll for them and for whatever rings at `waker`."""

    def __init__(self, meter: Meter, waker: socket.socket, buckets: Iterable[Bucket]) -> None:
        self._meter = meter
        self._waker = waker
        self._buckets = tuple(buckets)
        """All that is carried together draws on each of them."""
        self.rate_each = math.inf
        """Bytes a second of a circuit."""
        self._epoll = select.epoll()
        self._epoll.register(waker.fileno(), select.EPOLLIN)
        self._ends: dict[int, _End] = {}
        self._circuits: dict[int, _Circuit] = {}
        self._ready: collections.deque[_End] = collections.deque()
        self._later: list[tuple[float, int, _End]] = []
        self._order = 0
        self._again = 0.0
        """Seconds until the common buckets allow more."""
        self._pool: list[_Pipe] = []

    def __len__(self) -> int:
        return len(self._circuits)

    @property
    def ready(self) -> bool:
        """Whether something can go on without waiting for more, as soon as rates allow."""
        return bool(self._ready)

    def join(self, number: int, one: socket.socket, other: socket.socket) -> None:
        """Carry between these, and close them in the end."""
        circuit = self._circuits[number] = _Circuit(number, one, other, Bucket(self.rate_each))
        try:
            for end in circuit.ends:
                tune(end.sock)
                self._epoll.register(end.fd, EVENTS)
                self._ends[end.fd] = end
        except OSError as gone:
            self._close(circuit)
            self._meter.over(number, _told(gone))

    def cut(self, number: int) -> None:
        """Close both ends of a circuit."""
        if (circuit := self._circuits.get(number)) is not None:
            self._close(circuit)

    def cap(self, rate_each: float) -> None:
        """Have each circuit carry no more than that in a second."""
        self.rate_each = rate_each
        for circuit in self._circuits.values():
            circuit.bucket.rate = rate_each

    def close(self) -> None:
        for circuit in list(self._circuits.values()):
            self._close(circuit)
        for pipe in self._pool:
            pipe.close()
        self._epoll.close()

    # --- waiting ----------------------------------------------------------------------------

    def wait(self, patience: float | None, now: float) -> None:
        """Wait until something can go on, or somebody rings, at most `patience` seconds."""
        for fd, events in self._epoll.poll(self._bounded(patience, now)):
            end = self._ends.get(fd)
            if end is None:
                with contextlib.suppress(BlockingIOError):
                    self._waker.recv(4096)
                continue
            if events & select.EPOLLERR:
                why = end.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                self._break(end.circuit, OSError(why, os.strerror(why)))
                continue
            if events & (select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP):
                end.readable = True
                self._line_up(end)
            if events & (select.EPOLLOUT | select.EPOLLHUP):
                end.writable = True
                self._line_up(end.other)

    def _bounded(self, patience: float | None, now: float) -> float | None:
        waits = [] if patience is None else [patience]
        if self._ready:
            waits.append(self._again)
        if self._later:
            waits.append(max(0.0, self._later[0][0] - now))
        return min(waits, default=None)

    def _line_up(self, end: _End) -> None:
        if not end.waiting and end.able:
            end.waiting = True
            self._ready.append(end)

    def _put_off(self, end: _End, until: float) -> None:
        end.waiting = True
        self._order += 1
        heapq.heappush(self._later, (until, self._order, end))

    # --- moving -----------------------------------------------------------------------------

    def turn(self, now: float) -> int:
        """Let every direction that can go on do so once, as far as rates allow: how many bytes came in."""
        while self._later and self._later[0][0] <= now:
            self._ready.append(heapq.heappop(self._later)[2])
        capped = any(bucket.rate < math.inf for bucket in self._buckets)
        self._again, total = 0.0, 0
        for _ in range(len(self._ready)):
            if capped and (wait := max(bucket.wait(now) for bucket in self._buckets)):
                self._again = wait
                return total
            end = self._ready.popleft()
            end.waiting = False
            if not end.circuit.open:
                continue
            if wait := end.circuit.bucket.wait(now):
                self._put_off(end, now + wait)
                continue
            is_capped = capped or end.circuit.bucket.rate < math.inf
            moved = self._move(end, CAPPED_TURN if is_capped else TURN, now)
            total += moved
            if moved and is_capped:
                for bucket in (*self._buckets, end.circuit.bucket):
                    bucket.spend(int(ON_THE_WIRE * moved), now)
        return total

    def _move(self, end: _End, most: int, now: float) -> int:
        """Carry about `most` bytes on from `end`: how many came in."""
        moved = 0
        try:
            while end.able and moved < most:
                if not end.held:
                    moved += (came := self._fill(end, most - moved, now))
                    if not came:
                        break
                self._drain(end)
        except OSError as broken:
            self._break(end.circuit, broken)
            return moved
        if end.circuit.open:
            if not end.held and end.pipe is not None:
                self._give_back(end.pipe)
                end.pipe = None
            self._line_up(end)
        return moved

    def _fill(self, end: _End, most: int, now: float) -> int:
        """Take from the connection into an empty pipe; 0: nothing for now, or no more ever."""
        number = end.circuit.number
        if end.pipe is None:
            try:
                end.pipe = self._pool.pop() if self._pool else _Pipe()
            except OSError as full:
                if full.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                self._put_off(end, now + AGAIN)
                return 0
        room = self._meter.room(number)
        try:
            # Where there is no room one byte is looked for: a circuit that has ended is not cut for it.
            if not room and not end.sock.recv(1, socket.MSG_PEEK):
                room = 1
            if not room:
                self._meter.spent(number)
                return 0
            count = os.splice(end.fd, end.pipe.write, min(most, room), flags=FLAGS)
        except BlockingIOError:
            end.readable = False
            return 0
        if not count:
            self._finish(end)
            return 0
        end.held = count
        self._meter.moved(number, count)
        return count

    def _drain(self, end: _End) -> None:
        """Give what the pipe holds to the other connection, as far as it takes it."""
        assert end.pipe is not None
        try:
            while end.held:
                end.held -= os.splice(end.pipe.read, end.other.fd, end.held, flags=FLAGS)
        except BlockingIOError:
            end.other.writable = False

    def _finish(self, end: _End) -> None:
        """`end` sends no more: pass that on."""
        end.finished = True
        if end.other.finished:
            self._close(end.circuit)
            self._meter.over(end.circuit.number, "")
        else:
            end.other.sock.shutdown(socket.SHUT_WR)

    # --- the end of it ----------------------------------------------------------------------

    def _break(self, circuit: _Circuit, why: OSError) -> None:
        """One of the connections broke: so does the other, as if there were none between them."""
        if not circuit.open:
            return
        for end in circuit.ends:
            with contextlib.suppress(OSError):
                end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._close(circuit)
        self._meter.over(circuit.number, _told(why))

    def _close(self, circuit: _Circuit) -> None:
        circuit.open = False
        self._circuits.pop(circuit.number, None)
        for end in circuit.ends:
            if self._ends.pop(end.fd, None) is not None:
                self._epoll.unregister(end.fd)
            end.sock.close()
            if end.pipe is not None:
                if end.held:
                    end.pipe.close()  # what is in it is nobody's any more
                else:
                    self._give_back(end.pipe)
                end.pipe = None

    def _give_back(self, pipe: _Pipe) -> None:
        if len(self._pool) < POOL:
            self._pool.append(pipe)
        else:
            pipe.close()


def tune(sock: socket.socket) -> None:
    """A connection that is spliced: what it may hold unsent is more than what a link's may."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)


def _told(why: OSError) -> str:
    return f"the connection to one of its ends broke: {why.strerror or why}"
