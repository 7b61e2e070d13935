"""Are two nodes that know nothing but a relay linked through it, and is everybody told why not?  Loopback."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

import attrs
import trio

from p2pgrid.hole_punch.bulk import Links, Way, open_links
from p2pgrid.hole_punch.link import Link
from p2pgrid.hole_punch.path import Circuit
from p2pgrid.hole_punch.relay.limits import Limits
from p2pgrid.hole_punch.relay.relaying import Relaying, open_relaying
from p2pgrid.ids import PeerId
from tests.memory_network import MemoryNetwork, MemoryWorld, open_world

LOOPBACK = (("127.0.0.1", 0),)


class Inbox:
    """Keeps what links bring."""

    def __init__(self) -> None:
        self.token = trio.lowlevel.current_trio_token()
        self.send, self.messages = trio.open_memory_channel[bytes](10_000)

    def __call__(self, link: Link) -> Inbox:
        return self

    def received(self, message: memoryview) -> None:
        self.token.run_sync_soon(self.send.send_nowait, bytes(message))

    def drained(self) -> None:
        return None

    def left(self, why: str) -> None:
        pass


@attrs.frozen
class Node:
    network: MemoryNetwork
    links: Links
    both: Relaying
    inbox: Inbox

    @property
    def me(self) -> PeerId:
        return self.network.me

    @property
    def circuit(self) -> Circuit:
        """How others are reached through this relay."""
        return Circuit(self.me, self.links.bound[0])

    def uses(self, *relays: Node) -> None:
        for relay in relays:
            self.network.learn(relay.me, relay.network.addresses)
        self.both.relays.learn({relay.me: relay.links.addresses for relay in relays})

    async def holds(self, *relays: Node) -> None:
        """Wait until it is reached through these, and no others."""
        while set(self.both.relays.held) != {relay.me for relay in relays}:
            await self.both.relays.changed()


@contextlib.asynccontextmanager
async def open_node(
    world: MemoryWorld,
    name: str,
    limits: Limits | None = None,
    allow: Callable[[PeerId], str] = lambda peer: "",
) -> AsyncIterator[Node]:
    network, inbox = world.join(name), Inbox()
    async with open_links(network, LOOPBACK, inbox) as links, open_relaying(links, network.me, allow) as both:
        if limits is not None:
            both.service.open(limits)
        yield Node(network, links, both, inbox)


@contextlib.asynccontextmanager
async def open_three(
    limits: Limits | None = None, **relay: Callable[[PeerId], str]
) -> AsyncIterator[tuple[Node, Node, Node]]:
    """A relay, a node that is reached through it, and one that wants to."""
    with trio.fail_after(20):
        async with (
            open_world() as world,
            open_node(world, "relay", limits or Limits(), **relay) as r,
            open_node(world, "a") as a,
            open_node(world, "b") as b,
        ):
            b.uses(r)
            await b.holds(r)
            a.network.learn(r.me, r.network.addresses)
            yield r, a, b


async def test_a_link_through_a_relay() -> None:
    async with open_three() as (r, a, b):
        a.links.learn(b.me, [x for x in b.links.addresses if "p2p-circuit" in x])  # it cannot be dialled
        assert a.links.addresses_of(b.me) == [
            f"/ip4/127.0.0.1/tcp/{r.links.bound[0][1]}/tls/p2p/{r.me}/p2p-circuit"
        ]
        link = await a.links.link(b.me)
        assert (link.way, link.path.via, link.near) == (Way.RELAYED, r.me, False)
        link.send(b"\x01hello")
        assert await b.inbox.messages.receive() == b"\x01hello"
        (back,) = [link for link in b.links.live() if link.peer == a.me]
        assert (back.way, back.path.via) == (Way.RELAYED, r.me)
        back.send(b"\x01" + bytes(100_000))
        assert len(await a.inbox.messages.receive()) == 100_001
        state = await r.both.service.look()
        assert state.reserved == (b.me,)
        assert state.circuits == ((a.me, b.me),)
        assert 100_000 < state.bytes_total < 120_000
