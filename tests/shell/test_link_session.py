"""Does a link go on, byte for byte, when its connections break, go silent, or are left for better ones?"""

from __future__ import annotations

import contextlib
import functools
import socket
import struct
from collections.abc import AsyncIterator

import pytest
import trio

from p2pgrid.hole_punch import keeping
from p2pgrid.hole_punch.bulk import Link, Links, Way, open_links
from p2pgrid.hole_punch.greeting import bare
from tests.memory_network import MemoryNetwork, open_world

LOOPBACK = (("127.0.0.1", 0),)
NUMBERS = range(64, 80)


class Wire:
    """A port whose connections go on to another one, until they are cut or nothing comes through any more."""

    def __init__(self, port: int) -> None:
        self._to = port
        self.port = 0
        self.silent = False
        self._pairs: list[tuple[trio.SocketStream, trio.SocketStream]] = []

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        await trio.serve_listeners(self._serve, listeners, task_status=task_status)

    async def _serve(self, near: trio.SocketStream) -> None:
        try:
            connected = await trio.open_tcp_stream("127.0.0.1", self._to)
        except OSError:  # nobody is there any more
            await near.aclose()
            return
        async with connected as far:
            self._pairs.append((near, far))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._move, near, far)
                nursery.start_soon(self._move, far, near)

    async def _move(self, one: trio.SocketStream, other: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in one:
                if self.silent:
                    await trio.sleep_forever()
                await other.send_all(data)
            await other.send_eof()

    async def cut(self) -> None:
        """Reset all connections, with whatever is under way on them."""
        for pair in self._pairs:
            for stream in pair:
                with contextlib.suppress(OSError):
                    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                await stream.aclose()
        self._pairs.clear()


class Counting:
    """Sends numbers when there is room, and checks those that come; a receiver at one end of one link."""

    def __init__(self, most: int, token: trio.lowlevel.TrioToken) -> None:
        self.most, self.sent, self.taken = most, 0, 0
        self.links: list[Link] = []
        self.why = ""
        self.wrong = ""
        self._token = token
        self.ended = trio.Event()
        self._marks: dict[int, trio.Event] = {}

    def __call__(self, link: Link) -> Counting:
        self.links.append(link)
        return self

    @staticmethod
    def body(number: int) -> tuple[bytes, bytes]:
        return bytes([64]) + number.to_bytes(4, "big"), bytes([number & 255]) * (1 + number * 7919 % 70_000)

    def received(self, message: memoryview) -> None:
        number = int.from_bytes(message[1:5], "big")
        if number != self.taken or bytes(message) != b"".join(self.body(number)):
            self.wrong = self.wrong or f"{number} came, {self.taken} is next"
        self.taken += 1
        if self.taken in self._marks:
            self._token.run_sync_soon(self._marks[self.taken].set)

    def drained(self) -> None:
        link = self.links[0]
        while self.sent < self.most and link.queued < link.low:
            number = self.sent
            self.sent += 1
            again = functools.partial(self.body, number) if number % 3 else None
            link.send(*self.body(number), bulk=True, again=again)

    def left(self, why: str) -> None:
        self.why = why
        self._token.run_sync_soon(self.ended.set)

    async def reached(self, count: int) -> None:
        mark = self._marks.setdefault(count, trio.Event())
        if self.taken < count:
            await mark.wait()


class Pair:
    """Two nodes; *a* reaches *b* through a wire, and nobody reaches *a*."""

    def __init__(self, a: MemoryNetwork, b: MemoryNetwork, links: Links, others: Links, wire: Wire) -> None:
        self.a, self.b, self.links, self.others, self.wire = a, b, links, others, wire


@contextlib.asynccontextmanager
async def open_pair() -> AsyncIterator[Pair]:
    with trio.fail_after(60):
        async with open_world() as world, trio.open_nursery() as nursery:
            a, b = world.join("a"), world.join("b")
            async with open_links(a, ()) as links, open_links(b, LOOPBACK) as others:
                wire = Wire(others.bound[0][1])
                await nursery.start(wire.run)
                links.learn(b.me, [f"/ip4/127.0.0.1/tcp/{wire.port}/tls"])
                yield Pair(a, b, links, others, wire)
            nursery.cancel_scope.cancel()


async def two_connected_sockets() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = await trio.open_tcp_stream(*server.getsockname())
        other, _ = server.accept()
    return bare(one.socket), bare(trio.socket.from_stdlib_socket(other))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Black holes are noticed as they are, but sooner."""
    for name, seconds in (("LOOK", 0.05), ("QUIET", 0.3), ("ECHO", 0.3), ("AGAIN", 1.0), ("COME_BACK", 1.0)):
        monkeypatch.setattr(keeping, name, seconds)


async def linked(pair: Pair, most: int) -> tuple[Counting, Counting]:
    token = trio.lowlevel.current_trio_token()
    here, there = Counting(most, token), Counting(most, token)
    pair.links.serve(NUMBERS, here)
    pair.others.serve(NUMBERS, there)
    await pair.links.link(pair.b.me)
    return here, there


def check(*ends: Counting) -> None:
    for end in ends:
        assert not end.wrong
        assert (end.taken, end.why) == (end.most, "")
        assert len(end.links) == 1


async def test_nothing_is_lost_or_comes_twice_when_connections_break() -> None:
    async with open_pair() as pair:
        here, there = await linked(pair, 1500)
        for cut in range(1, 11):
            await here.reached(100 * cut)
            await pair.wire.cut()
        await here.reached(here.most)
        await there.reached(there.most)
        check(here, there)
        assert (await pair.links.link(pair.b.me)) is here.links[0]


@pytest.mark.usefixtures("hasty")
async def test_a_path_that_nothing_comes_through_is_left_for_another() -> None:
    async with open_pair() as pair:
        here, there = await linked(pair, 1000)
        await here.reached(100)
        pair.wire.silent = True
        path = here.links[0].path
        pair.links.learn(pair.b.me, [f"/ip4/127.0.0.1/tcp/{pair.others.bound[0][1]}/tls"])
        await here.reached(here.most)
        await there.reached(there.most)
        check(here, there)
        assert here.links[0].path is not path


async def test_after_a_change_of_the_network_paths_are_doubted_at_once(
    monkeypatch: pytest.MonkeyPatch, hasty: None
) -> None:
    monkeypatch.setattr(keeping, "QUIET", 1e9)
    async with open_pair() as pair:
        here, there = await linked(pair, 1000)
        await here.reached(100)
        path, pair.wire.silent = here.links[0].path, True
        pair.links.learn(pair.b.me, [f"/ip4/127.0.0.1/tcp/{pair.others.bound[0][1]}/tls"])
        await trio.sleep(2 * keeping.LOOK)  # what was under way has come
        pair.links.doubt()
        await here.reached(here.most)
        await there.reached(there.most)
        check(here, there)
        assert here.links[0].path is not path


@pytest.mark.parametrize("accepts", [True, False])
async def test_a_better_path_is_taken_in_the_middle_of_it(accepts: bool) -> None:
    async with open_pair() as pair:
        here, there = await linked(pair, 2000)
        for way in (Way.RELAYED, Way.PUNCHED):
            await here.reached(here.taken + 100)
            one, other = await two_connected_sockets()

            async def bring(links: Links, sock: socket.socket, peer: str, accepts: bool, way: Way) -> None:
                await links.bring(sock, peer, way, accepts=accepts)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(bring, pair.links, one, pair.b.me, accepts, way)
                nursery.start_soon(bring, pair.others, other, pair.a.me, not accepts, way)
            await here.reached(here.taken + 100)
            assert here.links[0].way is there.links[0].way is way
        await here.reached(here.most)
        await there.reached(there.most)
        check(here, there)


async def test_who_has_begun_anew_gets_a_new_link() -> None:
    """It does not know the session any more: what was under way is told to be lost."""
    async with open_pair() as pair:
        here, there = await linked(pair, 100)
        await here.reached(here.most)
        await there.reached(there.most)
        pair.others._links.clear()
        await pair.wire.cut()
        await here.ended.wait()
        assert "a newer link took its place" in here.why
        assert len(here.links) == 2


async def test_a_node_closes_while_its_links_have_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "COME_BACK", 1e9)
    async with open_pair() as pair:
        here, there = await linked(pair, 10)
        await here.reached(here.most)
        await there.reached(there.most)
        pair.wire.silent = True  # whoever comes is not answered
        await pair.wire.cut()
        for end in (here, there):
            while end.links[0].connected:
                await trio.lowlevel.checkpoint()
    assert here.why == there.why == "closed here"


@pytest.mark.usefixtures("hasty")
async def test_a_peer_that_is_gone_is_given_up() -> None:
    async with open_pair() as pair:
        here, _ = await linked(pair, 10)
        await here.reached(here.most)
        pair.wire.silent = True  # whoever comes is not answered
        await pair.wire.cut()
        await here.ended.wait()
        assert pair.links.live() == []
