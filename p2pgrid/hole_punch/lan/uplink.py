"""Let a guest's TCP connections end in this node, and make some to the guest.

    guest ──frames──> switch ──> Uplink ──> Connection ──bytes──> socket pair ──> whoever serves it
          <─────────── port <──────┘   (tcp.py)   <─────────────┘

One uplink for each guest; it, and each of its connections, has turns in the reactor of the guest's port.  So
the guest needs no other network than its LAN, and of the node it sees only this.
"""

from __future__ import annotations

import collections
import contextlib
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable

from p2pgrid.hole_punch.lan import tcp
from p2pgrid.hole_punch.lan.segment import SERVER_IP, SERVER_MAC, ip_of, mac_of
from p2pgrid.hole_punch.lan.tcp import ACK, SYN, Connection, Ends, Segment
from p2pgrid.hole_punch.reactor import READ, WRITE, Next, Turned

CONNECTIONS_MAX = 1024
"""Of one guest at once."""
READ_MAX = 64 << 10
FRAMES_MAX = 1 << 20
"""Bytes of frames that wait for a turn; what comes then is lost, as at any host."""
PORTS = range(32768, 61000)
"""Ours, for connections to the guest."""
LENGTH = struct.Struct("!I")

Accepted = Callable[[socket.socket, bytes, int], bool]
"""In the reactor's thread: takes a connection of the guest to this address and port, if anybody serves it."""
Opened = Callable[[str], None]
"""In the reactor's thread, once: a connection to the guest is made, or why not."""


class Uplink:
    """This node, as a guest sees it.  `frames` and `dial` may be called by any thread."""

    def __init__(
        self, place: int, put: Callable[[bytes], bool], call: Callable[[Turned], None], accepted: Accepted
    ) -> None:
        self._mac, self._ip = mac_of(place), ip_of(place)
        self._put = put
        self._call = call
        self._accepted = accepted
        self._lock = threading.Lock()
        self._inbox: collections.deque[bytes] = collections.deque()
        self._waiting = 0
        self._dials: collections.deque[tuple[int, socket.socket, Opened]] = collections.deque()
        self._bridges: dict[Ends, Bridge] = {}
        self._closing = self._over = False

    def frames(self, rows: bytes) -> None:
        """Take frames of the guest's, each after its length."""
        with self._lock:
            if self._closing or self._waiting + len(rows) > FRAMES_MAX:
                return
            self._inbox.append(rows)
            self._waiting += len(rows)
        self._call(self)

    def dial(self, port: int, opened: Opened) -> socket.socket:
        """The near end of a connection to the guest's `port`; it is good once `opened` hears no reason."""
        near, far = socket.socketpair()
        with self._lock:
            closing = self._closing
            if not closing:
                self._dials.append((port, far, opened))
        if closing:
            far.close()
            opened("the guest is gone")
        else:
            self._call(self)
        return near

    def close(self) -> None:
        """Break all connections off."""
        self._closing = True
        self._call(self)

    # --- in the reactor's thread ----------------------------------------------------------

    @property
    def over(self) -> bool:
        return self._over

    def fileno(self) -> int:
        return -1

    def turn(self, readable: bool) -> Next | None:
        if self._closing:
            return None
        with self._lock:
            inbox, self._inbox, self._waiting = self._inbox, collections.deque(), 0
            dials, self._dials = self._dials, collections.deque()
        now = time.monotonic()
        touched: dict[Bridge, None] = {}
        for port, far, opened in dials:
            touched[self._open(port, far, opened, now)] = None
        for rows in inbox:
            at = 0
            while at + 4 <= len(rows):
                (length,) = LENGTH.unpack_from(rows, at)
                if (bridge := self._take(rows[at + 4 : at + 4 + length], now)) is not None:
                    touched[bridge] = None
                at += 4 + length
        for bridge in touched:
            bridge.go_on()
            self._call(bridge)
        return False, None, 0

    def end(self, why: str) -> None:
        self._closing = self._over = True
        with self._lock:
            dials, self._dials = self._dials, collections.deque()
            self._inbox.clear()
        for _, far, opened in dials:
            far.close()
            opened("the guest is gone")
        for bridge in list(self._bridges.values()):
            bridge.connection.abort("the guest is gone")
            self._call(bridge)

    def _open(self, port: int, far: socket.socket, opened: Opened, now: float) -> Bridge:
        while True:
            ours = PORTS[secrets.randbelow(len(PORTS))]
            ends = Ends(self._mac, SERVER_MAC, self._ip, port, SERVER_IP, ours)
            if ends not in self._bridges:
                break
        bridge = self._bridge(ends, far, opened)
        bridge.connection.connect(now)
        return bridge

    def _bridge(self, ends: Ends, sock: socket.socket, opened: Opened | None) -> Bridge:
        connection = Connection(ends, secrets.randbits(32))
        bridge = self._bridges[ends] = Bridge(connection, sock, self.send, opened, self._forget)
        return bridge

    def _forget(self, bridge: Bridge) -> None:
        self._bridges.pop(bridge.connection.ends, None)

    def _take(self, raw: bytes, now: float) -> Bridge | None:
        found = tcp.read(raw)
        if found is None or found[0].mac != self._mac or found[0].theirs != self._ip:
            return None
        ends, segment = found
        bridge = self._bridges.get(ends)
        if bridge is None and segment.flags & (SYN | ACK) == SYN:
            return self._asked(ends, segment, now)
        if bridge is None:
            self._refuse(ends, segment)
            return None
        bridge.connection.on(segment, now)
        return bridge

    def _asked(self, ends: Ends, segment: Segment, now: float) -> Bridge | None:
        if len(self._bridges) < CONNECTIONS_MAX:
            near, far = socket.socketpair()
            if self._accepted(near, ends.ours, ends.our_port):
                bridge = self._bridge(ends, far, None)
                bridge.connection.accept(segment, now)
                return bridge
            near.close()
            far.close()
        self._refuse(ends, segment)
        return None

    def _refuse(self, ends: Ends, segment: Segment) -> None:
        if (answer := tcp.refusal(ends, segment)) is not None:
            self.send([answer])

    def send(self, frames: list[bytes]) -> None:
        rows = [piece for frame in frames for piece in (LENGTH.pack(len(frame)), frame)]
        if rows:
            self._put(b"".join(rows))  # what is lost is sent again


class Bridge:
    """One connection, and the socket by which it is served here."""

    def __init__(
        self,
        connection: Connection,
        sock: socket.socket,
        send: Callable[[list[bytes]], None],
        opened: Opened | None,
        forget: Callable[[Bridge], None],
    ) -> None:
        sock.setblocking(False)
        self.connection = connection
        self._socket = sock
        self._send = send
        self._opened = opened
        self._forget = forget
        self._held = 0
        self._finished = self._shut = self._over = False

    @property
    def over(self) -> bool:
        return self._over

    def fileno(self) -> int:
        return self._socket.fileno()

    def turn(self, readable: bool) -> Next | None:
        now = time.monotonic()
        connection = self.connection
        if readable and connection.sendable and not self._finished:
            self._read(now)
        connection.tick(now)
        self.go_on()
        if connection.over and not self._held:
            return None
        wait = None if connection.deadline is None else max(0.0, connection.deadline - now)
        reads = connection.sendable and not self._finished
        return False, wait, (READ if reads else 0) | (WRITE if self._held else 0)

    def end(self, why: str) -> None:
        self._over = True
        self.connection.abort("it is not served any more")
        self.go_on()
        self._tell(self.connection.over)
        self._forget(self)
        if not self._shut:  # it did not end well
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def go_on(self) -> None:
        """Give what came to the socket, and send what is to be sent."""
        connection = self.connection
        if connection.open:
            self._tell("")
        self._write()
        connection.take(self._held, time.monotonic())
        if connection.ended and not self._held and not self._shut:
            self._shut = True
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
        if connection.out:
            frames, connection.out = connection.out, []
            self._send(frames)

    def _tell(self, why: str) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened(why)

    def _read(self, now: float) -> None:
        try:
            data = self._socket.recv(min(READ_MAX, self.connection.sendable))
        except BlockingIOError:
            return
        except OSError as broken:
            self.connection.abort(f"its socket broke: {broken.strerror}")
            return
        if data:
            self.connection.send(data, now)
        else:
            self._finished = True
            self.connection.finish(now)

    def _write(self) -> None:
        came = self.connection.came
        while came:
            try:
                count = self._socket.send(came[0])
            except BlockingIOError:
                break
            except OSError:
                came.clear()
                self.connection.abort("its socket broke")
                break
            if count < len(came[0]):
                came[0] = came[0][count:]
                break
            came.popleft()
        self._held = sum(map(len, came))
