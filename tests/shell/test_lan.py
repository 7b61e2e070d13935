"""Do guests of several nodes share a segment?  Sockets stand for guests; links, TLS and threads are real."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable

import attrs
import pytest
import trio

from p2pgrid.errors import Conflict, Unreachable
from p2pgrid.hole_punch.bulk import Links, open_links
from p2pgrid.hole_punch.lan import packets as p
from p2pgrid.hole_punch.lan.lan import DIALS_MAX, PENDING_MAX, Lan, open_lan
from p2pgrid.hole_punch.lan.port import WAITING_MAX
from p2pgrid.hole_punch.lan.segment import FRAME_MAX, Segment, mac_of
from p2pgrid.hole_punch.link import Link, Receive
from p2pgrid.hole_punch.reactor import Reactor
from p2pgrid.ids import PeerId
from tests.memory_network import MemoryWorld, open_world

SEGMENT = Segment("job1", (0, 1, 2, 3))
LOOPBACK = (("127.0.0.1", 0),)


def whole(frame: bytes) -> bytes:
    return struct.pack("!I", len(frame)) + frame


def frame(to: int | bytes, source: int, payload: bytes = b"hello") -> bytes:
    return p.ethernet(to if isinstance(to, bytes) else mac_of(to), mac_of(source), p.IPV4, payload)


@attrs.define
class Guest:
    """The hypervisor's end of a cable."""

    socket: trio.socket.SocketType
    place: int
    _rest: bytes = b""

    async def send(self, *frames: bytes) -> None:
        data = memoryview(b"".join(map(whole, frames)))
        while data:
            data = data[await self.socket.send(data) :]

    async def receive(self) -> bytes:
        while len(self._rest) < 4 or len(self._rest) < 4 + int.from_bytes(self._rest[:4], "big"):
            got = await self.socket.recv(1 << 16)
            assert got
            self._rest += got
        end = 4 + int.from_bytes(self._rest[:4], "big")
        one, self._rest = self._rest[4:end], self._rest[end:]
        return one


@attrs.define
class Home:
    """A node, as far as its LAN goes."""

    me: PeerId
    links: Links
    lan: Lan
    strangers: trio.MemoryReceiveChannel[str]

    @contextlib.asynccontextmanager
    async def guest(self, place: int, segment: Segment = SEGMENT) -> AsyncIterator[Guest]:
        async with self.lan.plug(segment, place) as far:
            with trio.socket.from_stdlib_socket(far.dup()) as sock:
                yield Guest(sock, place)


@contextlib.asynccontextmanager
async def open_home(world: MemoryWorld, name: str) -> AsyncIterator[Home]:
    network = world.join(name)
    for other in world.nodes.values():
        network.learn(other.me, other.addresses)
        other.learn(network.me, network.addresses)
    tell, strangers = trio.open_memory_channel[str](100)
    async with open_links(network, LOOPBACK) as links, open_lan(links, tell.send_nowait) as lan:
        yield Home(network.me, links, lan, strangers)


@contextlib.asynccontextmanager
async def open_homes() -> AsyncIterator[tuple[Home, Home]]:
    with trio.fail_after(20):  # a link's thread that did not end would be waited for
        async with open_world() as world, open_home(world, "a") as a, open_home(world, "b") as b:
            yield a, b


@contextlib.asynccontextmanager
async def open_pair() -> AsyncIterator[tuple[Home, Guest, Home, Guest]]:
    """Task 0 at a, task 1 at b, and both have been told so."""
    async with open_homes() as (a, b), a.guest(0) as one, b.guest(1) as two:
        a.lan.set_members("job1", {b.me: [1]})
        b.lan.set_members("job1", {a.me: [0]})
        yield a, one, b, two


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what a reactor's thread does and tells nobody."""
    while not holds():  # noqa: ASYNC110
        await trio.sleep(0.005)


async def test_frames_cross_between_nodes_both_ways():
    async with open_pair() as (_, one, _, two):
        await one.send(frame(1, 0, b"over there?"))
        assert await two.receive() == frame(1, 0, b"over there?")
        await two.send(frame(0, 1, b"here"))
        assert await one.receive() == frame(0, 1, b"here")


async def test_two_guests_of_one_node_need_no_link():
    async with open_homes() as (a, _), a.guest(0) as one, a.guest(3) as other:
        await one.send(frame(3, 0), frame(p.BROADCAST, 0))
        assert [await other.receive(), await other.receive()] == [frame(3, 0), frame(p.BROADCAST, 0)]
        assert not a.links.live()


async def test_much_crosses_in_order():
    async with open_pair() as (a, one, _, two), trio.open_nursery() as nursery:
        frames = [frame(1, 0, struct.pack("!I", n) * 370) for n in range(600)]
        await one.send(frames[0])
        assert await two.receive() == frames[0]  # now there is a link, whose queue takes all the rest
        nursery.start_soon(one.send, *frames[1:])
        for expected in frames[1:]:
            assert await two.receive() == expected
        assert not a.lan.counts("job1").keys() & {"the link is full", "the guest does not read"}


async def test_who_is_new_is_asked_about_and_then_heard():
    async with open_homes() as (a, b), a.guest(0) as one, b.guest(1) as two:
        b.lan.set_members("job1", {a.me: [0]})
        assert await a.strangers.receive() == "job1", "b knocks at a"
        await two.send(frame(0, 1, b"too early"))
        await until(lambda: a.lan.counts("job1")["from a stranger"] == 1)
        a.lan.set_members("job1", {b.me: [1]})
        await two.send(frame(0, 1, b"now"))
        assert await one.receive() == frame(0, 1, b"now")
        with pytest.raises(trio.WouldBlock):
            a.strangers.receive_nowait()


async def test_a_node_of_another_group_is_not_heard():
    async with open_pair() as (a, _, b, _), b.guest(0, Segment("other", (0, 1))) as eve:
        b.lan.set_members("other", {a.me: [1]})
        await eve.send(frame(p.BROADCAST, 0), frame(1, 0))
        async with a.guest(1, Segment("other", (0, 1))):
            await eve.send(frame(1, 0))
            await until(lambda: a.lan.counts("other")["from a stranger"] == 1)
        assert a.lan.counts("job1")["from a stranger"] == 0


async def test_a_guest_that_does_not_read_loses_frames_and_harms_nobody():
    async with open_homes() as (a, _), a.guest(0) as one, a.guest(1), a.guest(2) as third:
        big = frame(1, 0, bytes(FRAME_MAX - 14))
        with trio.fail_after(10):
            for _ in range(4 * WAITING_MAX // len(big)):
                await one.send(big)
            await one.send(frame(2, 0))
            assert await third.receive() == frame(2, 0)
        assert a.lan.counts("job1")["the guest does not read"] > 0


async def test_while_a_peer_is_not_reached_frames_are_few_and_then_lost():
    async with open_homes() as (a, _), a.guest(0) as one:
        a.lan.set_members("job1", {PeerId("nobody"): [1]})
        for _ in range(200):
            await one.send(frame(1, 0, bytes(1000)))
        await until(lambda: a.lan.counts("job1")["the link is full"] >= 200 - PENDING_MAX // 1000)


async def test_a_hypervisor_that_ends_or_writes_noise_ends_its_port_only():
    async with open_homes() as (a, _), a.guest(0) as one, a.guest(1) as two:
        async with a.guest(2) as gone, a.guest(3) as mad:
            gone.socket.shutdown(socket.SHUT_RDWR)
            await mad.socket.send(b"\xff" * 100)
            assert await mad.socket.recv(1) == b""
        await one.send(frame(1, 0))
        assert await two.receive() == frame(1, 0)


async def test_one_place_is_one_guest():
    async with open_homes() as (a, _), a.guest(0):
        with pytest.raises(Conflict):
            async with a.guest(0):
                pass
        with pytest.raises(Conflict):
            async with a.guest(1, Segment("job1", (0, 7))):
                pass
    async with open_homes() as (a, _):
        for _ in range(3):
            async with a.guest(0):
                assert a.lan.groups == ("job1",)
            assert a.lan.groups == ()


async def test_noise_from_a_peer_costs_it_the_link():
    async with open_pair() as (a, one, b, two):
        await one.send(frame(1, 0))
        await two.receive()
        (link,) = b.links.live()
        link.send(bytes([80]) + SEGMENT.number + struct.pack("!I", 400) + b"cut")
        await until(lambda: not link.live)
        await one.send(frame(1, 0, b"again"))
        while await two.receive() != frame(1, 0, b"again"):
            pass
        assert a.links.live()


async def test_links_to_many_are_made_a_few_at_a_time(autojump_clock):
    dialled: list[PeerId] = []

    class Slow:
        """Links that are never made; only who asks for them counts."""

        def __init__(self) -> None:
            self._reactor = Reactor()

        def serve(self, kinds: range, receive: Receive) -> None:
            pass

        async def link(self, peer: PeerId) -> Link:
            dialled.append(peer)
            await trio.sleep(10)
            raise Unreachable(who=peer, why="it is slow")

        def reactor(self) -> Reactor:
            return self._reactor

    links, many = Slow(), Segment("job1", tuple(range(101)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, links.reactor().run)
        async with open_lan(links, lambda group: None) as lan, lan.plug(many, 100):
            lan.set_members("job1", {PeerId(f"p{n}"): [n] for n in range(100)})
            await trio.sleep(1)
            assert len(dialled) == DIALS_MAX
            await trio.sleep(100)
            assert len(dialled) == len(set(dialled)) == 100
        links.reactor().stop()
