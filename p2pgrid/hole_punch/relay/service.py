"""Be a relay: tell nodes what `Circuits` decides, and have the bytes carried.

One thread owns circuits and splicer.  Links bring messages in the reactors' threads and connections
come in from trio; both are put into an inbox, and the thread is rung for.

    links ──messages──> inbox ──> Circuits ──Tell──> links
    the link port ──connections──> │     │ Join, Cut, Drop
                                   └─> Splicer: bytes, the same thread
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import resource
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import attrs
import structlog
import trio

from p2pgrid.errors import Misconfigured
from p2pgrid.hole_punch.rates import Bucket
from p2pgrid.hole_punch.relay.circuits import Circuits
from p2pgrid.hole_punch.relay.events import (
    Barred,
    Closed,
    Cut,
    Dialled,
    Drop,
    Effect,
    Event,
    Gone,
    Join,
    Left,
    Opened,
    Said,
    Spent,
    Tell,
    Tick,
)
from p2pgrid.hole_punch.relay.limits import Limits
from p2pgrid.hole_punch.relay.messages import MAGIC, TOKEN, Asked, Connect, Ended, Refused, encode
from p2pgrid.hole_punch.relay.splice import Splicer
from p2pgrid.ids import PeerId

log = structlog.get_logger(__name__)

SHOW = 5.0
"""Seconds that a connection may take to show its token."""
FILES_SPARE = 256
"""Open files that the rest of a node needs."""
FILES_EACH = 6
"""Open files of a circuit at most: two connections, and a pipe each way."""


BUSY = 1e6
"""Bytes a second from which on more is let come between turns: nobody types as much."""
SMALL = 256 << 10
"""Bytes of a turn that is worth what it costs: a turn takes the same time for one packet."""
PAUSE = 0.008
"""Seconds at most to let as many come, as network cards moderate interrupts."""
LOOK = 0.01
"""Seconds over which the rate is taken."""


class Carrier(Protocol):
    """What a relay needs of a link."""

    peer: PeerId

    def send(self, first: bytes, *rest: bytes, bulk: bool = False) -> None: ...


@attrs.frozen
class Relayed:
    """What a relay does now, for people."""

    closed: str
    """Why it relays nothing; empty: it does."""
    limits: Limits
    reserved: tuple[PeerId, ...]
    circuits: tuple[tuple[PeerId, PeerId], ...]
    bytes: int
    """Carried in the present window."""
    bytes_total: int
    """Carried since the start."""
    refused: dict[str, int]
    """How often it said no, by reason."""


class RelayService:
    """The relay of one node; relays nothing until it is opened.  All methods may be called by any thread."""

    def __init__(
        self, allow: Callable[[PeerId], str] = lambda peer: "", buckets: tuple[Bucket, ...] = ()
    ) -> None:
        """`allow` says why a peer is no member (empty: it is one), in the relay's thread.

        What is relayed draws on `buckets`, too.
        """
        self._allow = allow
        self._buckets = buckets
        self._inbox: collections.deque[Callable[[], None]] = collections.deque()
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._rate = Bucket()
        self._board = Circuits()
        self._splicer = Splicer(self, self._woken, (self._rate, *buckets))
        self._links: dict[PeerId, Carrier] = {}
        self._lines: dict[int, socket.socket] = {}
        self._line = 0
        self._stopped = self._over = False
        self._last = threading.Lock()
        """Held by who clears up: the thread itself, or who comes after it."""
        self._bytes = self._lately = 0
        self._looked = self._rate_now = 0.0
        self._refused: Counter[str] = Counter()

    # --- from any thread --------------------------------------------------------------------

    def open(self, limits: Limits) -> None:
        """Relay within `limits` from now on; or within other ones.  Raises `Misconfigured`."""
        if not hasattr(os, "splice"):
            raise Misconfigured(why="only Linux can relay")
        able = _files() // FILES_EACH
        if limits.circuits > able:
            log.info(
                "fewer circuits than allowed: open files are limited", allowed=limits.circuits, able=able
            )
            limits = attrs.evolve(limits, circuits=able)
        self._post(lambda: self._open(limits))

    def close(self, why: str) -> None:
        """Relay nothing: circuits end, whoever has a reservation is told why."""
        self._post(lambda: self._step(Closed(why)))

    def bar(self, peer: PeerId, why: str) -> None:
        """`peer` is no member any more."""
        self._post(lambda: self._step(Barred(peer, why)))

    def said(self, link: Carrier, message: Asked) -> None:
        """A link brought this."""
        self._post(lambda: self._hear(link, message))

    def left(self, link: Carrier) -> None:
        """A link is gone."""
        self._post(lambda: self._lose(link))

    async def look(self) -> Relayed:
        """What it does now."""
        send, seen = trio.open_memory_channel[Relayed](1)
        token = trio.lowlevel.current_trio_token()

        def tell() -> None:
            state = self._look()
            token.run_sync_soon(send.send_nowait, state)

        self._post(tell)
        return await seen.receive()

    async def admit(self, sock: socket.socket) -> None:
        """Take a connection that begins with `MAGIC` and a token; owns `sock`."""
        token = b""
        try:
            with trio.move_on_after(SHOW):
                token = await _shown(sock)
        except OSError as gone:
            log.debug("a connection ended before it showed its token", why=str(gone))
        finally:
            if token:
                self._post(lambda: self._take(sock, token))
            else:
                sock.close()

    def _post(self, call: Callable[[], None]) -> None:
        self._inbox.append(call)
        with contextlib.suppress(OSError):  # full of the like already, or over
            self._waker.send(b"\0")
        if self._over:
            self._clear()

    # --- the thread -------------------------------------------------------------------------

    def stop(self) -> None:
        """Let `run` return; from any thread."""
        self._stopped = True
        self._post(lambda: None)

    def run(self) -> None:
        """Be the thread, until `stop`; every connection is closed at its end."""
        try:
            while not self._stopped:
                now = time.monotonic()
                until = self._board.deadline
                self._splicer.wait(None if until == math.inf else max(0.0, until - now), now)
                while self._inbox:
                    self._inbox.popleft()()
                if pause := self._moderation(self._splicer.turn(time.monotonic())):
                    time.sleep(pause)
                if self._board.deadline <= time.monotonic():
                    self._step(Tick())
        finally:
            self._step(Closed("the node stops"))
            self._splicer.close()
            self._over = True
            self._clear()
            self._woken.close()
            self._waker.close()

    def _moderation(self, moved: int) -> float:
        """Seconds to let more come, where much is carried but little was in this turn."""
        now = time.monotonic()
        self._lately += moved
        if now >= self._looked + LOOK:
            self._rate_now = self._lately / (now - self._looked)
            self._lately, self._looked = 0, now
        trickles = 0 < moved < SMALL and self._rate_now > BUSY and not self._splicer.ready
        return min(PAUSE, 2 * SMALL / self._rate_now) if trickles else 0.0

    def _clear(self) -> None:
        """Nothing is relayed any more: hang up on connections that come all the same."""
        with self._last, contextlib.suppress(IndexError):
            while True:
                self._inbox.popleft()()

    def _open(self, limits: Limits) -> None:
        if self._over:
            return
        self._rate.rate = limits.rate
        self._splicer.cap(limits.rate_each)
        self._step(Opened(limits))

    def _hear(self, link: Carrier, message: Asked) -> None:
        self._links[link.peer] = link
        chance, barred = b"", self._allow(link.peer)
        if isinstance(message, Connect):
            chance = secrets.token_bytes(2 * TOKEN)
            barred = barred or self._allow(message.peer)
        self._step(Said(link.peer, message, chance, barred))

    def _lose(self, link: Carrier) -> None:
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
            self._step(Left(link.peer))

    def _take(self, sock: socket.socket, token: bytes) -> None:
        self._line += 1
        self._lines[self._line] = sock
        self._step(Dialled(self._line, token))

    def _step(self, event: Event) -> None:
        for effect in self._board.step(event, time.monotonic()):
            self._perform(effect)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Tell(peer, message):
                if isinstance(message, Refused | Ended):
                    self._refused[message.reason.name.lower()] += 1
                    log.info("no circuit", to=peer, reason=message.reason.name, why=message.why)
                if (link := self._links.get(peer)) is not None:
                    link.send(encode(message))
            case Join(number, (one, other)):
                self._splicer.join(number, self._lines.pop(one), self._lines.pop(other))
            case Cut(number):
                self._splicer.cut(number)
            case Drop(line):
                self._lines.pop(line).close()

    def _look(self) -> Relayed:
        board = self._board
        return Relayed(
            board.closed,
            board.limits,
            tuple(board.reserved),
            tuple(board.circuits),
            board.total(time.monotonic()),
            self._bytes,
            dict(self._refused),
        )

    # --- what the splicer asks --------------------------------------------------------------

    def room(self, circuit: int) -> int:
        return self._board.room(circuit, time.monotonic())

    def moved(self, circuit: int, count: int) -> None:
        self._bytes += count
        self._board.moved(circuit, count, time.monotonic())

    def spent(self, circuit: int) -> None:
        self._step(Spent(circuit))

    def over(self, circuit: int, broken: str) -> None:
        self._step(Gone(circuit, broken))


async def _shown(sock: socket.socket) -> bytes:
    """The token that a connection begins with; nothing where it ends before that.  Reads no more."""
    shown = b""
    while len(shown) < len(MAGIC) + TOKEN:
        try:
            more = sock.recv(len(MAGIC) + TOKEN - len(shown))
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock.fileno())
            continue
        if not more:
            return b""
        shown += more
    return shown[len(MAGIC) :]


def _files() -> int:
    """Files that circuits may have open: the system's limit for this process is raised as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return (1 << 20 if soft == resource.RLIM_INFINITY else soft) - FILES_SPARE
