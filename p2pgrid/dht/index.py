"""Find who has what: hints in libp2p's Kademlia, never the authority for what a disk is.

One record per key says "this peer holds it, at these addresses".  A key is a CID; the record lies
under its multihash, as everywhere in libp2p, with the 20 servers nearest to it.  Servers are
nodes that anybody can reach; all others are clients, who ask and announce but keep nothing.

    provide ──> fresh ──announced──> kept ──10 min, or a bootstrap peer came back──> due ...

One announcement is under way at a time: the newest fresh key first, then what has been due longest.
With many keys each is kept longer, so that announcing again never takes more than a bounded part.

Records are held in memory, so what a server forgets by dying is announced again.  Lookup:
Kademlia (Maymounkov and Mazières, 2002); what libp2p 0.8.1 does otherwise than one would
wish is in `docs/decisions/0005-control-plane.md`.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import structlog
import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.utils import sort_peer_ids_by_distance
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError

from p2pgrid.errors import Unreachable
from p2pgrid.hole_punch.channel import plain
from p2pgrid.hole_punch.host import Host
from p2pgrid.ids import Cid, PeerId

log = structlog.get_logger(__name__)

BEAT = 5.0
"""Seconds between looks at who is there and what is due."""

KEPT = 600.0
"""Seconds an announcement is relied on; libp2p would forget it after 48 hours."""

SPACING = 1.0
"""Seconds between two announcements of what is known already, at least: 3600 keys are kept an hour."""

REFRESHED = 600.0
"""Seconds the routing table is relied on."""

PACE = 0.1
"""Seconds between two announcements of ours: half of what a server of ours takes from one peer."""

ADDED_MAX = 200
"""Announcements a server takes from one peer in 10 s; libp2p's 10 would drop the rest without a word."""

ASKED_MAX = 64
"""Requests a server works on at once; libp2p resets all beyond 12."""

NEAREST = 20
"""Servers that keep a record, and are asked for it."""

ASKED_AT_ONCE = 4
"""Servers asked at once in a lookup."""

STAGGER = 0.5
"""Seconds that one alone has to answer before another is asked beside it, where the first answer will do."""

LOOKUP_PATIENCE = 20.0
"""Seconds for one lookup, dead peers and all."""


class _Kademlia(KadDHT):  # type: ignore[misc]
    """libp2p's Kademlia with limits for a grid of our own nodes, and servers only in its table."""

    def __init__(self, host: Any, mode: DHTMode) -> None:
        super().__init__(host, mode, strict_validation=True, max_peers_per_subnet=0)
        self._provider_rate_max = ADDED_MAX
        self._inbound_limiter = trio.CapacityLimiter(ASKED_MAX)

    async def add_peer(self, peer_id: Any, *, skip_server_mode_check: bool = False) -> bool:
        """A peer that asks is no server for that; libp2p would put every client in the table."""
        try:
            spoken = self.host.get_peerstore().get_protocols(peer_id)
        except PeerStoreError:
            spoken = []  # not identified yet; the next beat will tell
        return str(PROTOCOL_ID) in spoken and bool(await super().add_peer(peer_id))


class KademliaIndex:
    """An `Index` over libp2p's Kademlia.  Made by `open_index`."""

    def __init__(self, network: Host, mode: DHTMode, bootstrap: Sequence[PeerId]) -> None:
        self._network = network
        self._bootstrap = [peer for peer in bootstrap if peer != network.me]
        self._kademlia = _Kademlia(network.libp2p, mode)
        self._due: dict[bytes, float] = {}
        """When each key of ours is to be announced next, by record name."""
        self._fresh: dict[bytes, trio.Event] = {}
        """Of these keys, those never announced yet; set when they have been, or could not be."""
        self._rung = trio.Event()
        self._sessions: dict[PeerId, object | None] = {}
        self._refresh_due = -1.0

    async def provide(self, key: bytes) -> None:
        """Announce now, and again while the index is open; with nobody to tell it waits for somebody."""
        name = _name(key)
        self._due[name] = -1.0
        done = self._fresh.pop(name, None) or trio.Event()
        self._fresh[name] = done  # the newest is the last
        self._rung.set()
        await done.wait()

    async def withdraw(self, key: bytes) -> None:
        """Announce `key` no more; what others remember of it fades."""
        name = _name(key)
        await trio.lowlevel.checkpoint()
        self._due.pop(name, None)
        self._fresh.pop(name, trio.Event()).set()
        self._forget(name)

    async def find(self, key: bytes, most: int = 20, *, soon: bool = False) -> list[PeerId]:
        """Others that announced `key`, in no order; asks the network each time, for hints age.

        Each server that is asked also tells of servers nearer to the key, which are asked next.  `soon`: the
        first answer that names somebody will do, and those we are connected to are asked first.
        """
        name = _name(key)
        await self._join()
        found: dict[PeerId, None] = {}
        self._note(self._kademlia.provider_store.get_providers(name), found)
        near = set(self._network.connected) if soon else set()
        known = self._kademlia.routing_table.find_local_closest_peers(name, NEAREST)
        asked: set[Any] = {self._network.libp2p.get_id()}
        wanted = 1 if soon else most

        def unasked() -> Any | None:
            nearest = [s for s in sort_peer_ids_by_distance(name, known)[:NEAREST] if s not in asked]
            return min(nearest, key=lambda server: server.to_base58() not in near, default=None)

        async def ask(delay: float) -> None:
            await trio.sleep(delay)
            while len(found) < wanted and (server := unasked()) is not None:
                asked.add(server)
                store = self._kademlia.provider_store
                about, nearer = await store._get_providers_from_peer_with_closers(server, name)
                self._note(about, found)
                known.extend(peer for peer in nearer if peer not in known)
            if len(found) >= wanted:
                asking.cancel_scope.cancel()

        with trio.move_on_after(LOOKUP_PATIENCE):
            while (
                len(found) < wanted and unasked() is not None
            ):  # again: one that found none may have been early
                async with trio.open_nursery() as asking:
                    for place in range(ASKED_AT_ONCE):
                        asking.start_soon(ask, place * STAGGER if soon else 0)
        return list(found)[:most]

    def _note(self, providers: Sequence[Any], found: dict[PeerId, None]) -> None:
        for provider in providers:
            peer = PeerId(provider.peer_id.to_base58())
            if peer != self._network.me:
                self._network.learn(peer, [str(address) for address in provider.addrs])
                found[peer] = None

    async def refresh(self) -> None:
        """Get to know the servers there are; done by itself every now and then."""
        await self._meet()
        with trio.move_on_after(LOOKUP_PATIENCE):
            await self._kademlia.refresh_routing_table()

    @property
    def servers(self) -> list[PeerId]:
        """The servers in the routing table."""
        return [PeerId(peer.to_base58()) for peer in self._kademlia.routing_table.get_peer_ids()]

    async def keep(self) -> None:
        """Meet and refresh for ever."""
        while True:
            await self._meet()
            if trio.current_time() >= self._refresh_due:
                self._refresh_due = trio.current_time() + REFRESHED
                await self.refresh()
                self._kademlia.provider_store.cleanup_expired()
                self._kademlia.value_store.cleanup_expired()
            await trio.sleep(BEAT)

    async def tell(self) -> None:
        """Announce for ever, one key after the other."""
        while True:
            name = self._next()
            if name is None:
                self._rung = trio.Event()
                with trio.move_on_at(min(self._due.values(), default=math.inf)):
                    await self._rung.wait()
                continue
            await self._join()
            await self._announce(name)
            self._fresh.pop(name, trio.Event()).set()
            await trio.sleep(PACE)

    def _next(self) -> bytes | None:
        """The newest of the fresh keys, or what has been due longest."""
        if self._fresh:
            return next(reversed(self._fresh))
        name = min(self._due, key=self._due.__getitem__, default=None)
        return name if name is not None and self._due[name] <= trio.current_time() else None

    async def _join(self) -> None:
        """Know somebody; a bootstrap peer that is away holds nobody up who knows others."""
        if not self._network.connected:
            await self._meet()

    async def _meet(self) -> None:
        """Reach the bootstrap peers, and take all servers that we are connected to into the table."""
        async with trio.open_nursery() as nursery:
            for peer in self._bootstrap:
                nursery.start_soon(self._reach, peer)
        for peer in self._network.connected:
            await self._kademlia.add_peer(ID.from_base58(peer))

    async def _reach(self, peer: PeerId) -> None:
        """One that is new or was away has heard nothing of us: all is due again."""
        try:
            await self._network.reach(peer)
        except Unreachable as unreachable:
            log.debug("bootstrap peer is away", peer=peer, why=unreachable.why)
        session = self._network.session(peer)
        if session is not None and session is not self._sessions.get(peer):
            self._sessions[peer] = session
            self._refresh_due = -1.0
            self._due = dict.fromkeys(self._due, -1.0)
            self._rung.set()

    async def _announce(self, name: bytes) -> None:
        """Tell the nearest servers; due again soon when none of them took it."""
        told = False
        try:
            with trio.move_on_after(LOOKUP_PATIENCE):
                told = await self._kademlia.provider_store.provide(name)
        except BaseLibp2pError as trouble:
            log.warning("could not announce", why=str(trouble))
        if name in self._due:
            kept = max(KEPT, SPACING * len(self._due))
            self._due[name] = trio.current_time() + (kept if told else BEAT)
        else:
            self._forget(name)  # withdrawn meanwhile

    def _forget(self, name: bytes) -> None:
        store = self._kademlia.provider_store
        store.providing_keys.discard(name)
        store.providers.get(name, {}).pop(self._network.me, None)


@asynccontextmanager
async def open_index(
    network: Host, mode: Literal["server", "client"], bootstrap: Sequence[PeerId] = ()
) -> AsyncIterator[KademliaIndex]:
    """Take part in the index until the block is left; `network` knows the addresses of `bootstrap`."""
    index = KademliaIndex(network, DHTMode.SERVER if mode == "server" else DHTMode.CLIENT, bootstrap)
    with plain():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(index.keep)
            nursery.start_soon(index.tell)
            yield index
            nursery.cancel_scope.cancel()


def _name(key: bytes) -> bytes:
    """The multihash of CID bytes `key`: what libp2p files a record under."""
    Cid.from_bytes(key)
    return bytes(key[2:])
