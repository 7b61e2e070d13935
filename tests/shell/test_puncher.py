"""Do two nodes that dial each other keep one connection, drop strangers, and leave nothing?  On loopback."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Iterator

import attrs
import pytest
import trio

from p2pgrid.hole_punch import nat
from p2pgrid.hole_punch.doors import open_listeners
from p2pgrid.hole_punch.greeting import bare
from p2pgrid.hole_punch.nat import Stance
from p2pgrid.hole_punch.path import Address
from p2pgrid.hole_punch.punch_messages import MAGIC, Decline, Go, Offer, decode, encode
from p2pgrid.hole_punch.puncher import Puncher, open_puncher
from p2pgrid.ids import PeerId


@pytest.fixture(autouse=True)
def loopback_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody punches within one computer but here."""
    monkeypatch.setattr(nat, "_useless", lambda host: False)


@attrs.define(eq=False)
class Node:
    """A `Ground`; what it says reaches `other` at once."""

    me: PeerId
    bound: list[Address] = attrs.field(factory=list)
    claims: list[Address] = attrs.field(factory=list)
    told: list[bytes] = attrs.field(factory=list)
    other: Node | None = None
    puncher: Puncher | None = None
    brought: list[socket.socket] = attrs.field(factory=list)
    refuse: int = 0
    """So many connections come to nothing."""
    came: trio.Event = attrs.field(factory=trio.Event)

    def observed(self) -> list[Address]:
        return []

    def mapped(self) -> list[Address]:
        return self.claims

    def tell(self, peer: PeerId, message: bytes) -> None:
        self.told.append(message)
        if self.other is not None:
            assert self.other.puncher is not None
            self.other.puncher.heard(self.me, decode(message))

    async def bring(self, sock: socket.socket, peer: PeerId, *, accepts: bool) -> bool:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        refused, self.refuse = self.refuse > 0, max(0, self.refuse - 1)
        whole = False
        try:
            if not refused and not accepts:
                await stream.send_all(b"hello")
            if refused or await stream.receive_some(5) != (b"hello" if accepts else b"well!"):
                return False
            if accepts:
                await stream.send_all(b"well!")
            whole = True
        except trio.BrokenResourceError:
            return False
        finally:
            if not whole:
                stream.socket.close()
        self.brought.append(bare(stream.socket))
        assert self.puncher is not None
        self.puncher.settled(peer)
        self.came.set()
        return True


@contextlib.asynccontextmanager
async def open_node(name: str) -> AsyncIterator[Node]:
    node = Node(PeerId(name))

    async def accept(stream: trio.SocketStream) -> None:
        sock = bare(stream.socket)
        await trio.lowlevel.wait_readable(sock.fileno())
        assert node.puncher is not None
        await node.puncher.admit(sock)

    async with trio.open_nursery() as nursery:
        listeners = await open_listeners("0.0.0.0", 0)
        node.bound.append(("0.0.0.0", listeners[0].socket.getsockname()[1]))
        nursery.start_soon(trio.serve_listeners, accept, listeners)
        async with open_puncher(node, lambda: ["127.0.0.1", "127.0.0.2"]) as node.puncher:
            yield node
        for sock in node.brought:
            sock.close()
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def open_two() -> AsyncIterator[tuple[Node, Node]]:
    with trio.fail_after(20):
        async with open_node("a") as a, open_node("b") as b:
            a.other, b.other = b, a
            for node in (a, b):
                node.claims.append(("127.0.0.3", node.bound[0][1]))
            yield a, b


def wanted(a: Node, b: Node) -> None:
    for one, other in ((a, b), (b, a)):
        assert one.puncher is not None
        one.puncher.look()
        one.puncher.relayed(other.me)


def ends(node: Node) -> Iterator[tuple[Address, Address]]:
    for sock in node.brought:
        yield sock.getsockname(), sock.getpeername()


async def test_both_keep_the_same_connection_and_no_other():
    async with open_two() as (a, b):
        wanted(a, b)
        await a.came.wait()
        await b.came.wait()
        ((own, far),) = ends(a)
        assert list(ends(b)) == [(far, own)]
        a.brought[0].send(b"x")
        await trio.lowlevel.wait_readable(b.brought[0])
        assert b.brought[0].recv(10) == b"x"
        assert [decode(m).__class__.__name__ for m in a.told] == ["Offer", "Go"]
        assert [decode(m).__class__.__name__ for m in b.told] == ["Answer"]


@pytest.mark.parametrize("refusing", ["a", "b"])
async def test_a_connection_that_comes_to_nothing_gives_way_to_another(refusing: str):
    async with open_two() as (a, b):
        for node in (a, b):
            node.refuse = node.me == refusing
        wanted(a, b)
        await a.came.wait()
        await b.came.wait()
        assert a.refuse == b.refuse == 0
        ((own, far),) = ends(a)
        assert list(ends(b)) == [(far, own)]
        assert len(a.told) == 2  # in the same round


async def test_a_connection_of_no_round_is_reset():
    async with open_two() as (a, _):
        stream = await trio.open_tcp_stream("127.0.0.1", a.bound[0][1])
        async with stream:
            await stream.send_all(MAGIC + bytes(16))
            with pytest.raises(trio.BrokenResourceError) as broken:
                await stream.receive_some()
            assert isinstance(broken.value.__cause__, OSError)
            assert broken.value.__cause__.errno == errno.ECONNRESET


async def test_an_offer_over_a_direct_link_is_declined():
    async with open_node("a") as a:
        assert a.puncher is not None
        a.puncher.heard(PeerId("b"), Offer(bytes(16), Stance()))
        a.puncher.heard(PeerId("b"), Go(bytes(16)))
        assert a.told == [encode(Decline(bytes(16), "there is a direct path"))]


async def test_a_link_that_ends_ends_what_is_tried():
    async with open_two() as (a, b):
        b.other = None  # what b says is lost
        wanted(a, b)
        await trio.testing.wait_all_tasks_blocked(0.01)
        for one, other in ((a, b), (b, a)):
            assert one.puncher is not None
            one.puncher.gone(other.me)
            one.puncher.gone(other.me)
            assert one.puncher.outlook(other.me) == ""
        a.told.clear()
        b.other = a
        wanted(a, b)  # and it can be wanted again
        await a.came.wait()
        await b.came.wait()
