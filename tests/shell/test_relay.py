"""Are two nodes that know nothing but a relay linked through it, and is everybody told why not?  Loopback."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable

import attrs
import pytest
import trio
import trio.lowlevel

from p2pgrid.errors import Unreachable
from p2pgrid.hole_punch.bulk import Links, Way, open_links
from p2pgrid.hole_punch.link import Link
from p2pgrid.hole_punch.path import Circuit, circuit_to_multiaddr
from p2pgrid.hole_punch.relay import choice
from p2pgrid.hole_punch.relay.limits import Limits
from p2pgrid.hole_punch.relay.messages import TOKEN, Connected, Ended, Incoming, Reason, Reserve, encode
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


async def test_of_two_relays_one_may_die() -> None:
    with trio.fail_after(30):
        async with (
            open_world() as world,
            open_node(world, "a") as a,
            open_node(world, "b") as b,
            open_node(world, "r1", Limits()) as r1,
            contextlib.AsyncExitStack() as mortal,
        ):
            r2 = await mortal.enter_async_context(open_node(world, "r2", Limits()))
            for node in (a, b):
                node.links.bound.clear()  # nobody is told where to dial them
            b.uses(r1, r2)
            await b.holds(r1, r2)
            a.links.learn(b.me, [circuit_to_multiaddr(r2.circuit), circuit_to_multiaddr(r1.circuit)])
            for relay in (r1, r2):
                a.network.learn(relay.me, relay.network.addresses)
            link = await a.links.link(b.me)
            assert link.path.via == r2.me
            link.send(b"\x01before")
            assert await b.inbox.messages.receive() == b"\x01before"
            moved = trio.Event()
            a.links.paths.append(lambda link: moved.set() if link.peer == b.me else None)
            await mortal.aclose()
            link.send(b"\x01after")
            await moved.wait()
            assert link.live
            assert link.path.via == r1.me
            assert await b.inbox.messages.receive() == b"\x01after"
            await b.holds(r1)


async def test_a_relay_that_comes_back_is_held_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "REST_MIN", 0.01)
    async with open_three() as (r, _, b):
        r.both.service.close("paused: it is within a window")
        await b.holds()
        assert b.links.circuits == []
        assert [lost.why for lost in b.both.relays.lately][:1] == ["paused: it is within a window"]
        r.both.service.open(Limits())
        await b.holds(r)
        assert b.links.circuits == [r.circuit]


async def test_who_needs_no_relay_any_more_says_so() -> None:
    async with open_three() as (r, _, b):
        b.both.relays.want(0)
        await b.holds()
        while (await r.both.service.look()).reserved:
            await trio.lowlevel.checkpoint()
        b.both.relays.want(1)
        await b.holds(r)


async def test_who_has_no_reservation_is_not_reached_and_the_caller_hears_it() -> None:
    async with open_three() as (r, a, b):
        with pytest.raises(Unreachable, match="c has no reservation here"):
            await a.both.relays.dial(r.circuit, PeerId("c"))
        with pytest.raises(Unreachable, match="this node is no relay"):
            await a.both.relays.dial(b.circuit, PeerId("c"))
        assert [lost.relay for lost in a.both.relays.lately] == [r.me, b.me]


async def test_no_member_is_relayed() -> None:
    barred: dict[str, str] = {}
    async with open_three(allow=lambda peer: barred.get(peer, "")) as (r, a, b):
        barred[b.me] = "its membership was revoked"
        with pytest.raises(Unreachable, match="its membership was revoked"):
            await a.both.relays.dial(r.circuit, b.me)
        r.both.service.bar(b.me, barred[b.me])
        await b.holds()
        assert b.both.relays.lately[-1].why == "its membership was revoked"


async def test_a_quota_ends_the_path_and_both_sides_know_why() -> None:
    async with open_three(Limits(quota=100_000)) as (r, a, b):
        link = await a.links.bring(
            await a.both.relays.dial(r.circuit, b.me), b.me, Way.RELAYED, accepts=False, via=r.me
        )
        link.send(b"\x01" + bytes(200_000))
        for node, other in ((a, b), (b, a)):
            while not node.both.relays.lately:
                await node.both.relays.lost()
            lost = node.both.relays.lately[0]
            assert (lost.relay, lost.peer) == (r.me, other.me)
            assert lost.why.startswith("the 100000 bytes that the relay may have here in 24 h are used up")


async def test_a_peer_that_is_paused_declines() -> None:
    async with open_three() as (r, a, b):
        b.links._paused = "it is within a window"
        with contextlib.suppress(Unreachable):  # where the refusal is there before the connection
            sock = await a.both.relays.dial(r.circuit, b.me)
            with sock:
                await trio.lowlevel.wait_readable(sock.fileno())
        while not a.both.relays.lately:
            await a.both.relays.lost()
        assert a.both.relays.lately[0].why == "b does not want it: paused: it is within a window"


async def test_a_relay_that_lies_costs_its_link_or_a_moment() -> None:
    """A made up circuit, a token that leads nowhere, an answer that none asked for, and noise."""
    async with open_three() as (r, _, b):
        (link,) = [link for link in r.links.live() if link.peer == b.me]
        link.send(encode(Incoming(bytes(TOKEN), PeerId("nobody"))))
        link.send(encode(Connected(77, bytes(TOKEN))))
        link.send(encode(Ended(bytes(TOKEN), Reason.QUOTA, "lies")))
        link.send(b"\x3f a message of a later version")
        link.send(encode(Reserve()))  # a question to who is no relay
        link.send(b"\x01still there")
        assert await b.inbox.messages.receive() == b"\x01still there"
        assert set(b.both.relays.held) == {r.me}
        link.send(b"\x34 noise")
        await b.holds()
        assert "52" in b.both.relays.lately[-1].why


async def test_where_a_relay_is_not_what_was_told_nobody_is_reached() -> None:
    async with open_three() as (r, a, b):
        nowhere = socket.create_server(("127.0.0.1", 0))
        where = nowhere.getsockname()
        nowhere.close()
        stranger = Circuit(PeerId("stranger"), where)
        a.network.learn(PeerId("stranger"), [])
        with pytest.raises(Unreachable):
            await a.both.relays.dial(stranger, b.me)
        seconds, address = await a.both.relays.delay(r.me)
        assert 0 <= seconds < 3
        assert address == r.links.bound[0]
