"""Have a connection to a peer by the first way that works: its addresses, and a moment later its relays.

Connections are tried side by side; the greeting is one at a time, as whoever greets has the peer make a
link of it.  When both sides greet each other at once, the smaller peer id's connection is the one: it
answers the other's with `busy`.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import attrs
import structlog
import trio

from p2pgrid.errors import PeerError, Unreachable
from p2pgrid.hole_punch.addressbook import AddressBook, Known
from p2pgrid.hole_punch.greeting import Greeting, Met, Verdict, connect, discard
from p2pgrid.hole_punch.link import Link
from p2pgrid.hole_punch.path import Address, Circuit, Way
from p2pgrid.ids import PeerId

log = structlog.get_logger(__name__)

DIAL_PATIENCE = 3.0
"""Seconds to reach one of a peer's addresses; a host that is up answers in one round trip."""
GREETING_PATIENCE = 5.0
"""Seconds for the greeting: others that answered wait for their turn meanwhile."""
RELAY_DELAY = 0.15
"""Seconds that dialling a peer's own addresses is ahead of asking its relays."""
RELAYED_BEFORE = 2
"""Times in a row that a relay was what worked, after which it is asked at once."""
RELAY_STAGGER = 0.2
"""Seconds between two relays of one peer."""
STAGGER = 0.05
"""Seconds between the starts of dials to one peer, best address first."""

DialCircuit = Callable[[Circuit, PeerId], Awaitable[socket.socket]]
"""Has a relay connect us with a peer.  Raises `Unreachable`, `PeerError`, `OSError`."""


@attrs.define
class Attempt:
    """Connections to one peer that are tried side by side."""

    made: Link | Verdict | None = None
    """The link, or why the peer wants none."""
    settled: trio.Event = attrs.field(factory=trio.Event)
    turn: trio.Lock = attrs.field(factory=trio.Lock)

    def settle(self, made: Link | Verdict) -> None:
        self.made = made
        self.settled.set()

    @property
    def greets(self) -> bool:
        """Whether the peer is hearing of it just now."""
        return self.turn.locked()


class Ground(Protocol):
    """What dialling needs of the links."""

    book: AddressBook
    bound: list[Address]
    observers: set[PeerId]
    dial_circuit: DialCircuit | None

    def told(self) -> list[str]:
        """What to tell a peer of where we take links."""
        ...

    def session(self, peer: PeerId) -> tuple[bytes, int]:
        """Of the link with `peer` that is to go on, and how many connections it had; empty: there is none."""
        ...

    def adopt(self, met: Met, way: Way, via: PeerId | None) -> Link:
        """Have a link over the connection.  Raises `OSError`."""
        ...


class Dialling:
    """The attempts of one node."""

    def __init__(self, ground: Ground, greeting: Greeting) -> None:
        self._ground = ground
        self._greeting = greeting

    async def reach(self, peer: PeerId, attempt: Attempt) -> Link | Verdict | None:
        """The link that the attempt comes to, or why the peer wants none; None where it is not found."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._try_all, peer, self._ground.book.of(peer), attempt)
            await attempt.settled.wait()
            nursery.cancel_scope.cancel()
        return attempt.made

    async def _try_all(self, peer: PeerId, known: Known, attempt: Attempt) -> None:
        failed = trio.Event()
        async with trio.open_nursery() as nursery:
            for place, circuit in enumerate(known.circuits if self._ground.dial_circuit is not None else ()):
                ahead = RELAY_DELAY if known.relayed < RELAYED_BEFORE else 0.0
                nursery.start_soon(self._try_relay, peer, circuit, ahead, place, failed, attempt)
            if known.addresses:
                await self.dial(peer, known.addresses, Way.DIRECT, attempt)
            failed.set()
        attempt.settled.set()

    async def _try_relay(
        self, peer: PeerId, circuit: Circuit, ahead: float, place: int, failed: trio.Event, attempt: Attempt
    ) -> None:
        with trio.move_on_after(ahead):
            await failed.wait()
        await trio.sleep(place * RELAY_STAGGER)
        if (dial_circuit := self._ground.dial_circuit) is None:  # relays are used no more
            return
        try:
            sock = await dial_circuit(circuit, peer)
        except (PeerError, Unreachable, OSError) as wrong:
            log.debug("no circuit", peer=peer, relay=circuit.relay, why=str(wrong))
            return
        await self.greet(sock, peer, Way.RELAYED, attempt, circuit.relay)

    async def dial(self, peer: PeerId, addresses: Sequence[Address], way: Way, attempt: Attempt) -> None:
        """Dial all of a peer's addresses, greet those that answer, until one is it."""
        send, answered = trio.open_memory_channel[socket.socket](len(addresses))
        with trio.move_on_after(DIAL_PATIENCE):
            async with trio.open_nursery() as nursery:
                with send:
                    for place, address in enumerate(addresses):
                        bound = self._bound_for(peer, address)
                        nursery.start_soon(connect, address, place * STAGGER, send.clone(), bound)
                async for sock in answered:
                    reached = far_end(sock)
                    await self.greet(sock, peer, way, attempt)
                    if attempt.settled.is_set():
                        if isinstance(attempt.made, Link) and reached is not None:
                            self._ground.book.note(peer, [reached, *(a for a in addresses if a != reached)])
                        break
                nursery.cancel_scope.cancel()
        discard(answered)

    async def greet(
        self, sock: socket.socket, peer: PeerId, way: Way, attempt: Attempt, via: PeerId | None = None
    ) -> None:
        """Say who we are, unless another connection of the attempt has come to something."""
        try:
            await attempt.turn.acquire()
        except trio.Cancelled:
            sock.close()
            raise
        try:
            if attempt.settled.is_set():
                sock.close()
                return
            met = None
            session, moves = self._ground.session(peer)
            with trio.move_on_after(GREETING_PATIENCE):
                met = await self._greeting.dial(sock, peer, self._ground.told(), session, moves)
            if isinstance(met, Met):
                try:
                    attempt.settle(self._ground.adopt(met, way, via))
                    self._ground.book.won(peer, way)
                except OSError as full:  # or the peer is gone already
                    attempt.settle(Verdict(str(full)))
            elif met is not None and not attempt.settled.is_set():
                attempt.settle(met)
        finally:
            attempt.turn.release()

    def _bound_for(self, peer: PeerId, address: Address) -> Address | None:
        """The listening address to dial from, if the peer is to see it."""
        if peer not in self._ground.observers:
            return None
        return next((b for b in self._ground.bound if (":" in b[0]) == (":" in address[0])), None)


def far_end(sock: socket.socket) -> Address | None:
    """Where a connection's other end is; None where it has none any more."""
    try:
        host, port = sock.getpeername()[:2]
    except OSError:
        return None
    return host.partition("%")[0], port
