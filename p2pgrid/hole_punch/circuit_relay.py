"""Be a circuit relay of libp2p's for others, and be reachable through one.

    serve_circuits(network, limits)      others reserve here, and are called through us
    keep_reserved(network, relay)        we reserve there, and are called through it: `network.circuits`
    open_circuits(network, …)            both, as a daemon is set up

This is for libp2p nodes of other kinds and costs nothing while none comes.  Between our own nodes links are
relayed instead (`relay/`), which know members, carry gigabytes and are upgraded in place.
"""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Never

import attrs
import structlog
import trio
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Limit, Reservation, Status, StopMessage
from multiaddr import Multiaddr

from p2pgrid.errors import Unreachable
from p2pgrid.hole_punch import circuit
from p2pgrid.hole_punch.addresses import bare, relay_at, relay_of
from p2pgrid.hole_punch.channel import TROUBLE, reason
from p2pgrid.hole_punch.circuit import HOP, STOP
from p2pgrid.hole_punch.host import ADDRESSES_MAX, Host
from p2pgrid.hole_punch.reservations import Limits, Reservations
from p2pgrid.ids import PeerId

log = structlog.get_logger(__name__)

PATIENCE = 15.0
"""Seconds for what is asked of a relay, and for what it asks of the one behind it."""

BEAT = 5.0
"""Seconds between looks at whether the connection to a relay of ours is still there."""

REST = 60.0
"""Seconds before a relay that refused is asked again."""

RENEWED = 0.5
"""The part of a reservation's life after which it is renewed."""

LIFE_MIN, LIFE_MAX = 60.0, 7200.0
"""Seconds; what a relay tells, and what our clock makes of it, is not believed beyond."""


@asynccontextmanager
async def open_circuits(network: Host, places: int, relays: Sequence[str]) -> AsyncIterator[None]:
    """Until the block is left, offer others `places`, and have one at each of `relays` (…/tcp/PORT/p2p/ID).

    Raises `Misconfigured` when that is none.
    """
    named = {address: relay_at(address) for address in relays}
    if places:
        serve_circuits(network, Limits(reservations=places))
    async with trio.open_nursery() as nursery:
        for address, relay in named.items():
            network.learn(relay, [address])
            nursery.start_soon(keep_reserved, network, relay)
        yield
        nursery.cancel_scope.cancel()


# --- a relay for others -----------------------------------------------------------------


def serve_circuits(network: Host, limits: Limits | None = None) -> Reservations:
    """Be a relay for whoever asks, within `limits`, as long as `network` is open."""
    book = Reservations(limits or Limits())
    network.libp2p.set_stream_handler(HOP, _Relay(network, book).serve)
    return book


@attrs.define
class _Relay:
    network: Host
    book: Reservations
    connections: dict[PeerId, Any] = attrs.field(factory=dict)
    """Over which each peer reserved: it is called over this one, and its place ends with it."""

    async def serve(self, stream: Any) -> None:
        """One request.  It leaves nothing open."""
        source = PeerId(stream.muxed_conn.peer_id.to_base58())
        try:
            with trio.fail_after(PATIENCE):
                request = await circuit.hear(stream, HopMessage)
            if circuit.relayed(stream.swarm_conn):
                await _refuse(stream, Status.PERMISSION_DENIED)
            elif request.type == HopMessage.RESERVE:
                await self._reserve(stream, source)
            elif request.type == HopMessage.CONNECT:
                await self._connect(stream, source, request.peer.id)
            else:
                await _refuse(stream, Status.UNEXPECTED_MESSAGE)
        except TROUBLE as trouble:
            log.debug("a request for a circuit came to nothing", peer=source, why=reason(trouble))
            with trio.CancelScope(shield=True):
                await stream.reset()

    async def _reserve(self, stream: Any, peer: PeerId) -> None:
        for other in [other for other in self.connections if not self._there(other)]:
            del self.connections[other]
            self.book.forget(other)
        where = stream.get_remote_address()
        if not self.book.reserve(peer, where[0] if where else "", trio.current_time()):
            await _refuse(stream, Status.RESERVATION_REFUSED)
            return
        self.connections[peer] = stream.swarm_conn
        limits = self.book.limits
        ours = [Multiaddr(f"{address}/p2p/{self.network.me}") for address in self.network.listening]
        place = Reservation(
            expire=int(time.time() + limits.life), addrs=[address.to_bytes() for address in ours]
        )
        await circuit.tell(stream, _status(Status.OK, reservation=place, limit=_told(limits)))
        await stream.close()

    async def _connect(self, stream: Any, source: PeerId, named: bytes) -> None:
        target = PeerId(ID(named).to_base58())
        if not (self.book.reserved(target, trio.current_time()) and self._there(target)):
            await _refuse(stream, Status.NO_RESERVATION)
        elif not self.book.begin(source, target):
            await _refuse(stream, Status.RESOURCE_LIMIT_EXCEEDED)
        else:
            try:
                await self._carry(stream, source, target)
            finally:
                self.book.end(source, target)

    async def _carry(self, stream: Any, source: PeerId, target: PeerId) -> None:
        limits = self.book.limits
        request = StopMessage(type=StopMessage.CONNECT, limit=_told(limits))
        request.peer.id = stream.muxed_conn.peer_id.to_bytes()
        try:
            far, _ = await _asked(self.network, self.connections[target], STOP, request)
        except TROUBLE as trouble:
            log.debug("no circuit", source=source, target=target, why=reason(trouble))
            await _refuse(stream, Status.CONNECTION_FAILED)
            return
        try:
            await circuit.tell(stream, _status(Status.OK, limit=_told(limits)))
        except BaseException:
            with trio.CancelScope(shield=True):
                await far.reset()
            raise
        await circuit.splice(stream, far, limits.data, limits.duration)

    def _there(self, peer: PeerId) -> bool:
        connection = self.connections.get(peer)
        return connection is not None and not connection.muxed_conn.event_shutting_down.is_set()


def _told(limits: Limits) -> Any:
    return Limit(duration=int(limits.duration), data=limits.data)


def _status(status: Any, **more: Any) -> Any:
    return HopMessage(type=HopMessage.STATUS, status=status, **more)


async def _refuse(stream: Any, status: Any) -> None:
    await circuit.tell(stream, _status(status))
    await stream.close()


async def _asked(network: Host, connection: Any, protocol: str, request: Any) -> tuple[Any, Any]:
    """A stream on which `request` was granted, with the answer."""
    with trio.fail_after(PATIENCE):
        stream = await network.stream_on(connection, protocol)
        try:
            return stream, await circuit.ask(stream, request)
        except BaseException:
            with trio.CancelScope(shield=True):
                await stream.reset()
            raise


# --- reachable through one --------------------------------------------------------------


async def keep_reserved(network: Host, relay: PeerId) -> Never:
    """Have a place at `relay`, whose addresses `network` knows, for as long as this runs."""
    network.libp2p.set_stream_handler(STOP, functools.partial(_called, network))
    try:
        while True:
            try:
                session, renew = await _reserve(network, relay)
            except Unreachable as unreachable:
                network.circuits.pop(relay, None)
                log.info("no place at a circuit relay", relay=relay, why=unreachable.why)
                await trio.sleep(REST)
                continue
            while network.session(relay) is session and trio.current_time() < renew:  # noqa: ASYNC110
                await trio.sleep(BEAT)
    finally:
        network.circuits.pop(relay, None)


async def _reserve(network: Host, relay: PeerId) -> tuple[object, float]:
    """Get a place, or keep it: over which connection, and when to do so again.  Raises `Unreachable`."""
    await network.reach(relay)
    connection = network.session(relay)
    if connection is None or circuit.relayed(connection):
        raise Unreachable(who=relay, why="there is no direct connection to it")
    try:
        stream, answer = await _asked(network, connection, HOP, HopMessage(type=HopMessage.RESERVE))
        await stream.close()
        told = [str(Multiaddr(address)) for address in answer.reservation.addrs[:ADDRESSES_MAX]]
    except TROUBLE as trouble:
        raise Unreachable(who=relay, why=f"no reservation: {reason(trouble)}") from None
    direct = _direct(told) or _direct(network.addresses_of(relay))  # some tell those of the internet only
    network.circuits[relay] = tuple(f"{address}/p2p/{relay}/p2p-circuit" for address in direct)
    life: float = min(
        max(answer.reservation.expire - time.time(), LIFE_MIN), LIFE_MAX
    )  # clocks need not agree
    return connection, trio.current_time() + RENEWED * life


def _direct(addresses: Iterable[str]) -> list[str]:
    return [plain for address in addresses if (plain := bare(address)) and not relay_of(plain)]


async def _called(network: Host, stream: Any) -> None:
    """A relay has somebody for us: welcome, if we have a place there."""
    relay = PeerId(stream.muxed_conn.peer_id.to_base58())
    try:
        with trio.fail_after(PATIENCE):
            accepted = await circuit.accept(stream, relay in network.circuits)
        if accepted:
            await network.adopt(circuit.connection(stream, False, f"/p2p/{relay}/p2p-circuit"))
        else:
            await stream.close()
    except TROUBLE as trouble:
        log.debug("a call through a relay came to nothing", relay=relay, why=reason(trouble))
        with trio.CancelScope(shield=True):
            await stream.reset()
