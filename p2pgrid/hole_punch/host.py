"""Keep the contract of `net.py` with libp2p: control streams to authenticated peers.

TCP + Noise + Yamux and nothing else: no stream is ever plain text, and a peer id cannot be
claimed without its key.  Small messages only; chunks travel over `bulk.py`.

    open ──live connection?──> stream ──> Channel
      │          ^                │ no answer: the connection is stale,
      └──dial────┘ <──────────────┘ it is closed and dialled once more

py-libp2p 0.8.1 is entered by few doors and mistrusted at each: what is switched off or put
right here, and what was measured, is in `docs/decisions/0005-control-plane.md`.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs
import structlog
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_noise_key
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.rcmgr import new_resource_manager
from libp2p.rcmgr.connection_limits import ConnectionLimits
from libp2p.rcmgr.manager import ResourceLimits
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.transport.exceptions import MuxerUpgradeFailure
from libp2p.transport.tcp.tcp import TCP
from libp2p.utils.address_validation import get_available_interfaces
from multiaddr import Multiaddr
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from p2pgrid.errors import Misconfigured, Unreachable
from p2pgrid.hole_punch import circuit
from p2pgrid.hole_punch.addresses import bare, is_loopback, listening, relay_of
from p2pgrid.hole_punch.channel import TROUBLE, ControlChannel, answer, plain, reason
from p2pgrid.hole_punch.muxer import PROTOCOL_ID, Muxer
from p2pgrid.ids import PeerId
from p2pgrid.net import Channel, Serve

log = structlog.get_logger(__name__)

CONNECTIONS_MAX = 1024
"""A coordinator of some hundred nodes, with room; 65 KB each."""

DIAL_PATIENCE = 10.0
"""Seconds for all addresses of a peer together: TCP, Noise and Yamux."""

DIAL_STAGGER = 0.25
"""Seconds before the next address is tried beside the first (RFC 8305)."""

STREAM_PATIENCE = 10.0
"""Seconds for a stream's protocol to be agreed on; a connection that takes longer is stale."""

ADDRESSES_MAX = 16
"""Addresses remembered of one peer; more is noise or an attempt to have us scan a network."""


@attrs.define
class _Dial:
    """One attempt to reach a peer, shared by all who want it."""

    done: trio.Event = attrs.field(factory=trio.Event)
    failure: str = ""


class Host:
    """A `Network` over libp2p.  Made by `open_host`."""

    def __init__(self, libp2p: Any, key: SigningKey, nursery: trio.Nursery) -> None:
        self.libp2p = libp2p
        """For `dht/index.py` only."""
        self._swarm = libp2p.get_network()
        self._key = key
        self._nursery = nursery
        self._learned: dict[PeerId, tuple[str, ...]] = {}
        self._dials: dict[PeerId, _Dial] = {}
        self.circuits: dict[PeerId, tuple[str, ...]] = {}
        """Where we are reached through others, by relay; `circuit_relay.py` keeps it."""
        self._put_right()

    @property
    def me(self) -> PeerId:
        return PeerId(self.libp2p.get_id().to_base58())

    @property
    def addresses(self) -> Sequence[str]:
        return tuple(str(address) for address in self.libp2p.get_addrs())

    @property
    def listening(self) -> Sequence[str]:
        """Those of `addresses` at which we listen ourselves, without our name."""
        return [plain for address in self.addresses if (plain := bare(address)) and not relay_of(plain)]

    @property
    def connected(self) -> Sequence[PeerId]:
        """Peers with a live connection, whoever dialled."""
        return [PeerId(peer.to_base58()) for peer in list(self._swarm.connections) if self._live(peer)]

    def sign(self, statement: bytes) -> bytes:
        return self._key.sign(statement).signature

    def verify(self, peer: PeerId, statement: bytes, signature: bytes) -> bool:
        """A peer id is its public key, after six bytes that say so."""
        try:
            VerifyKey(_parsed(peer).to_bytes()[6:]).verify(statement, signature)
        except (Unreachable, BadSignatureError, ValueError):
            return False
        return True

    def learn(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Newest first; what is not an address for TCP is passed over."""
        fresh = [dialled for address in addresses if (dialled := bare(address))]
        known = self._learned.get(peer, ())
        self._learned[peer] = tuple(dict.fromkeys((*fresh, *known)))[:ADDRESSES_MAX]

    def addresses_of(self, peer: PeerId) -> Sequence[str]:
        try:
            stored = [bare(str(a)) for a in self.libp2p.get_peerstore().addrs(ID.from_base58(peer))]
        except (PeerStoreError, ValueError):
            stored = []
        known = dict.fromkeys((*self._learned.get(peer, ()), *filter(None, stored)))
        return tuple(f"{address}/p2p/{peer}" for address in known)

    def serve(self, protocol: str, serve: Serve) -> None:
        self.libp2p.set_stream_handler(protocol, functools.partial(answer, self._nursery, serve))

    async def open(self, peer: PeerId, protocol: str) -> Channel:
        """Connections found stale are closed, then one is dialled; that one is not doubted again."""
        name = _parsed(peer)
        while True:
            live = self._live(name)
            dialled = live is None
            if dialled:
                await self._reach(peer)
                live = self._live(name)
            if live is None:
                raise Unreachable(who=peer, why="the connection ended as soon as it was there")
            try:
                return ControlChannel(peer, await self.stream_on(live, protocol), self._nursery)
            except TROUBLE as trouble:
                if _speaks_not(trouble):
                    raise Unreachable(who=peer, why=f"it does not speak {protocol}") from None
                await _close(live)
                if dialled:
                    raise Unreachable(who=peer, why=f"no stream: {reason(trouble)}") from None

    async def stream_on(self, connection: Any, protocol: str) -> Any:
        """A stream on this very connection; libp2p would choose among several, stale ones too."""
        with trio.fail_after(STREAM_PATIENCE):
            stream = await connection.new_stream()
            try:
                talk = MultiselectCommunicator(stream)
                await self.libp2p.multiselect_client.select_one_of([protocol], talk, math.inf)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await stream.reset()
                raise
        stream.set_protocol(protocol)
        return stream

    async def reach(self, peer: PeerId) -> None:
        """Have a connection to `peer`; raises `Unreachable`."""
        if self._live(_parsed(peer)) is None:
            await self._reach(peer)

    def session(self, peer: PeerId) -> Any | None:
        """The live connection, as a thing to compare: another one means that it was lost meanwhile."""
        return self._live(_parsed(peer))

    def _live(self, name: Any) -> Any | None:
        """A circuit only where there is nothing else."""
        return min(
            (
                connection
                for connection in self._swarm.get_connections(name)
                if not connection.is_closed and not connection.muxed_conn.event_shutting_down.is_set()
            ),
            key=circuit.relayed,
            default=None,
        )

    # --- dialling ---------------------------------------------------------------------

    async def _reach(self, peer: PeerId) -> None:
        """Join the dial under way or start one; it outlives a caller that gives up."""
        dial = self._dials.get(peer)
        if dial is None:
            dial = self._dials[peer] = _Dial()
            self._nursery.start_soon(self._dial, peer, dial)
        await dial.done.wait()
        if dial.failure:
            raise Unreachable(who=peer, why=dial.failure)

    async def _dial(self, peer: PeerId, dial: _Dial) -> None:
        """Addresses side by side, each a moment after the one before; the first that answers wins."""
        name, found, failures = ID.from_base58(peer), trio.Event(), []
        addresses = sorted(self.addresses_of(peer), key=_last)[:ADDRESSES_MAX]

        async def attempt(address: str, failed: trio.Event) -> None:
            try:
                await self._dial_one(address, name)
                found.set()
                nursery.cancel_scope.cancel()
            except TROUBLE as trouble:
                failures.append(f"{bare(address)}: {reason(trouble)}")
                failed.set()

        try:
            with trio.move_on_after(DIAL_PATIENCE) as patience:
                async with trio.open_nursery() as nursery:
                    for address in addresses:
                        failed = trio.Event()
                        nursery.start_soon(attempt, address, failed)
                        with trio.move_on_after(DIAL_STAGGER):
                            await failed.wait()
            if not found.is_set():
                if patience.cancelled_caught:
                    failures.append(f"no answer in {DIAL_PATIENCE:.0f} s")
                dial.failure = "; ".join(failures) or "none of its addresses is known"
        finally:
            del self._dials[peer]
            dial.done.set()

    async def _dial_one(self, address: str, name: Any) -> None:
        """By TCP, or over a stream to a relay that is connected, or dialled by TCP."""
        around = relay_of(bare(address))
        if around is None:
            await self._swarm.dial_addr(Multiaddr(address), name)
            return
        where, relay = around
        live = self._live(_parsed(relay))
        if live is None or circuit.relayed(live):
            live = await self._swarm.dial_addr(Multiaddr(where), _parsed(relay))
        stream = await self.stream_on(live, circuit.HOP)
        try:
            await circuit.connect(stream, name)
            await self._swarm.upgrade_outbound_raw_conn(circuit.connection(stream, True, address), name)
        except BaseException:
            with trio.CancelScope(shield=True):
                await stream.reset()
            raise

    # --- libp2p, put right ------------------------------------------------------------

    def _put_right(self) -> None:
        """Replace what would fail us; each line is argued for in decision 0005."""
        self._swarm.retry_config = RetryConfig(max_retries=0)
        self._swarm.auto_connector.maybe_connect = trio.lowlevel.checkpoint
        self._swarm.dial_peer = self._dial_peer
        self._swarm.upgrader.upgrade_connection = self._multiplex
        self._swarm._handle_inbound_connection = self._accept
        self._swarm.set_stream_handler(self._door)
        own = self.libp2p.get_addrs
        self.libp2p.get_addrs = lambda: [*own(), *self._around()]

    async def _dial_peer(self, name: Any) -> list[Any]:
        """libp2p's own dials (the DHT's) take our way, too."""
        try:
            await self._reach(PeerId(name.to_base58()))
        except Unreachable as unreachable:
            raise BaseLibp2pError(str(unreachable)) from None
        live = self._live(name)
        return [live] if live is not None else []

    async def _multiplex(self, secured: Any, name: Any) -> Any:
        """Agree on Yamux, our Yamux: libp2p would make its own whatever class it was given."""
        try:
            muxer = await self._swarm.upgrader.muxer_multistream.select_transport(secured)
        except BaseLibp2pError as refused:
            raise MuxerUpgradeFailure("no stream multiplexer in common") from refused
        return muxer(secured, name, is_initiator=secured.is_initiator)

    def _around(self) -> list[Multiaddr]:
        """`circuits`, for libp2p to tell others; it would take their relays' names off them."""
        return [Multiaddr(f"{a}/p2p/{self.me}") for addresses in self.circuits.values() for a in addresses]

    async def _accept(self, stream: Any, listener: Any) -> None:
        await self.adopt(RawConnection(stream, False), listener)

    async def adopt(self, raw: Any, listener: Any = None) -> None:
        """Hold an inbound connection just as long as it lives (libp2p holds it for ever)."""
        try:
            muxed = await self._swarm.upgrade_inbound_raw_conn(raw, listener)
        except TROUBLE as trouble:
            log.debug("inbound connection refused", why=reason(trouble))
            return
        await muxed.event_closed.wait()

    async def _door(self, stream: Any) -> None:
        """One peer's stream: whatever goes wrong there resets it and nothing else."""
        try:
            await self.libp2p._swarm_stream_handler(stream)
        except* BaseLibp2pError:
            await stream.reset()  # it broke before anybody served it
        except* Exception as trouble:
            log.error("stream failed", peer=str(stream.muxed_conn.peer_id), exc_info=trouble)
            await stream.reset()


@asynccontextmanager
async def open_host(seed: bytes, listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",)) -> AsyncIterator[Host]:
    """Listen, and be the peer of `seed` (32 bytes, Ed25519), until the block is left.

    Raises `Misconfigured` when an address of `listen` cannot be had.
    """
    assert len(seed) == 32
    _silence()
    addresses = [listening(address) for address in listen]
    libp2p = _new_host(seed)
    with plain():
        async with trio.open_nursery() as nursery:
            host = Host(libp2p, SigningKey(seed), nursery)
            try:
                async with libp2p.run(addresses):
                    try:
                        if len(libp2p.get_network().listeners) != len(set(addresses)):
                            raise Misconfigured(why=f"cannot listen on {', '.join(map(str, addresses))}")
                        yield host
                    finally:
                        with trio.CancelScope(shield=True), trio.move_on_after(DIAL_PATIENCE):
                            await _close_all(libp2p)
            finally:
                nursery.cancel_scope.cancel()  # not sooner: libp2p's way out would lose the error under way


def _new_host(seed: bytes) -> Any:
    keys = create_new_key_pair(seed)
    return new_host(
        key_pair=keys,
        sec_opt={NOISE: NoiseTransport(keys, noise_privkey=create_new_noise_key().private_key)},
        muxer_opt={PROTOCOL_ID: Muxer},
        transports=[TCP()],
        resource_manager=new_resource_manager(
            limits=ResourceLimits(max_connections=2 * CONNECTIONS_MAX, max_streams=64 * CONNECTIONS_MAX),
            connection_limits=ConnectionLimits(max_established_total=CONNECTIONS_MAX),
            enable_circuit_breaker=False,
            enable_graceful_degradation=False,
            enable_memory_limits=False,
            enable_metrics=False,
        ),
        connection_config=ConnectionConfig(
            max_connections=CONNECTIONS_MAX,
            high_watermark=CONNECTIONS_MAX,
            low_watermark=0,
            min_connections=0,  # inbound connections may take every place
        ),
        addrs_factory=_expand,
        disable_identify_address_discovery=True,
    )


# --- connections ------------------------------------------------------------------------


async def _close(connection: Any) -> None:
    with trio.CancelScope(shield=True), trio.move_on_after(STREAM_PATIENCE):
        try:
            await connection.close()
        except TROUBLE as trouble:
            log.debug("connection was gone already", why=reason(trouble))


async def _close_all(host: Any) -> None:
    """Side by side: libp2p closes one after the other, a fifth of a second each."""
    async with trio.open_nursery() as nursery:
        for connection in host.get_network().get_connections():
            nursery.start_soon(_close, connection)
    await host.close()


def _speaks_not(trouble: BaseException | None) -> bool:
    """Whether the peer answered that it does not know the protocol, on a sound connection."""
    while trouble is not None:
        if "not supported" in str(trouble):
            return True
        trouble = trouble.__cause__
    return False


# --- addresses --------------------------------------------------------------------------


def _last(address: str) -> tuple[bool, bool]:
    """Circuits are dialled after all others, and other programs on this machine after other machines."""
    return relay_of(bare(address)) is not None, is_loopback(address)


def _parsed(peer: PeerId) -> Any:
    """libp2p's form of `peer`, of an Ed25519 key as all of ours."""
    try:
        name = ID.from_base58(peer)
    except ValueError:
        name = ID(b"")
    if len(name.to_bytes()) != 38 or not peer.startswith("12D3KooW"):
        raise Unreachable(who=peer, why="that is not a peer id")
    return name


def _expand(addresses: list[Multiaddr]) -> list[Multiaddr]:
    """Interface addresses in the place of 0.0.0.0 and ::, which nobody can dial."""
    expanded: list[Multiaddr] = []
    for address in addresses:
        if str(address).startswith(("/ip4/0.0.0.0/", "/ip6/::/")):
            family = str(address)[:5]
            port = int(address.value_for_protocol("tcp"))
            expanded += [a for a in get_available_interfaces(port) if str(a).startswith(family)]
        else:
            expanded.append(address)
    return [a for a in expanded if not str(a).startswith("/ip6/fe80:")]


def _silence() -> None:
    """Keep libp2p's remarks off the user's terminal, where logging prints what nobody handles."""
    if not os.environ.get("LIBP2P_DEBUG"):
        logging.getLogger("libp2p").setLevel(logging.CRITICAL + 1)
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.NullHandler())  # it also logs as nobody in particular
