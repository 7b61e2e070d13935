"""Be the network of `net.py` in memory: authenticated peers, whole messages, nothing slept.

Messages are encoded and decoded as on a wire, so what would not travel does not travel here
either.  A peer is reached only by who knows an address of it: told by `learn`, found in the
index, or because it called before.  A channel holds `BUFFER` messages, then its sender waits.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import trio

from p2pgrid.errors import PeerError, Unreachable
from p2pgrid.ids import PeerId, digest
from p2pgrid.net import Serve
from p2pgrid.wire import HEADER, decode, encode

BUFFER = 4


class MemoryChannel:
    """One end of a control stream."""

    def __init__(
        self,
        peer: PeerId,
        outgoing: trio.MemorySendChannel[bytes],
        incoming: trio.MemoryReceiveChannel[bytes],
    ) -> None:
        self._peer = peer
        self._outgoing = outgoing
        self._incoming = incoming

    @property
    def peer(self) -> PeerId:
        return self._peer

    async def send(self, message: msgspec.Struct) -> None:
        try:
            await self._outgoing.send(encode(message))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise Unreachable(who=self._peer, why="the stream broke") from None

    async def receive(self, kind: Any) -> Any:
        try:
            return decode((await self._incoming.receive())[HEADER:], kind)
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise Unreachable(who=self._peer, why="the stream ended") from None

    async def aclose(self) -> None:
        self._outgoing.close()
        self._incoming.close()
        await trio.lowlevel.checkpoint()


class MemoryIndex:
    """One node's view of the records that all nodes of a world share."""

    def __init__(self, node: MemoryNetwork) -> None:
        self._node = node

    async def provide(self, key: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self._node.world.records.setdefault(key, {})[self._node.me] = None

    async def withdraw(self, key: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self._node.world.records.get(key, {}).pop(self._node.me, None)

    async def find(self, key: bytes, most: int = 20, *, soon: bool = False) -> list[PeerId]:
        await trio.lowlevel.checkpoint()
        found = [peer for peer in self._node.world.records.get(key, ()) if peer != self._node.me][:most]
        for peer in found:
            self._node.learn(peer, self._node.world.nodes[peer].addresses)
        return found


class MemoryNetwork:
    """One node; made by `MemoryWorld.join`."""

    def __init__(self, world: MemoryWorld, me: PeerId) -> None:
        self.world = world
        self.index = MemoryIndex(self)
        self._me = me
        self._known: dict[PeerId, list[str]] = {}
        self._serving: dict[str, Serve] = {}

    @property
    def me(self) -> PeerId:
        return self._me

    @property
    def addresses(self) -> Sequence[str]:
        return [f"/ip4/127.0.0.1/tcp/1/p2p/{self._me}"]

    def sign(self, statement: bytes) -> bytes:
        return digest(self.world.secret + self._me.encode() + b"\0" + statement)

    def verify(self, peer: PeerId, statement: bytes, signature: bytes) -> bool:
        return signature == digest(self.world.secret + peer.encode() + b"\0" + statement)

    def learn(self, peer: PeerId, addresses: Sequence[str]) -> None:
        known = self._known.setdefault(peer, [])
        known += [a for a in addresses if a not in known]

    def addresses_of(self, peer: PeerId) -> Sequence[str]:
        return list(self._known.get(peer, ()))

    def serve(self, protocol: str, serve: Serve) -> None:
        self._serving[protocol] = serve

    async def open(self, peer: PeerId, protocol: str) -> MemoryChannel:
        await trio.lowlevel.checkpoint()
        other = self.world.nodes.get(peer)
        if (
            other is None
            or not self._known.get(peer)
            or peer in self.world.down
            or self.me in self.world.down
        ):
            raise Unreachable(who=peer, why="no way there")
        if protocol not in other._serving:
            raise Unreachable(who=peer, why=f"it does not speak {protocol}")
        other.learn(self.me, self.addresses)
        there_send, there_receive = trio.open_memory_channel[bytes](BUFFER)
        here_send, here_receive = trio.open_memory_channel[bytes](BUFFER)
        far = MemoryChannel(self.me, here_send, there_receive)
        self.world.nursery.start_soon(_answer, other._serving[protocol], far)
        return MemoryChannel(peer, there_send, here_receive)


class MemoryWorld:
    """The nodes that can reach each other."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.nodes: dict[PeerId, MemoryNetwork] = {}
        self.records: dict[bytes, dict[PeerId, None]] = {}
        self.secret = secrets.token_bytes(32)
        self.down: set[PeerId] = set()
        """Nodes that nobody reaches."""

    def join(self, name: str) -> MemoryNetwork:
        me = PeerId(name)
        self.nodes[me] = MemoryNetwork(self, me)
        return self.nodes[me]


async def _answer(serve: Serve, channel: MemoryChannel) -> None:
    with contextlib.suppress(Unreachable, PeerError):
        await serve(channel)
    with trio.CancelScope(shield=True):
        await channel.aclose()


@contextlib.asynccontextmanager
async def open_world() -> AsyncIterator[MemoryWorld]:
    async with trio.open_nursery() as nursery:
        yield MemoryWorld(nursery)
        nursery.cancel_scope.cancel()
