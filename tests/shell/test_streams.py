"""Do programs' bytes cross a link as over one connection of their own?  Real loopback sockets."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import AsyncIterator, Callable

import attrs
import pytest
import trio

from p2pgrid.errors import Unreachable
from p2pgrid.hole_punch.bulk import Links, open_links
from p2pgrid.hole_punch.streams.messages import KINDS
from p2pgrid.hole_punch.streams.service import Declined, Request, Streams, open_streams
from p2pgrid.hole_punch.streams.window import INITIAL, POOL
from p2pgrid.ids import PeerId
from tests.memory_network import open_world

LOOPBACK = [("127.0.0.1", 0)]


@attrs.define
class Pair:
    """Two nodes; each stream that is opened here comes out of `far` at the other."""

    here: Streams
    there: Streams
    peer: PeerId
    far: trio.MemoryReceiveChannel[trio.SocketStream]
    links: tuple[Links, Links]
    closing: contextlib.ExitStack

    async def connect(self, target: bytes = b"program") -> tuple[trio.SocketStream, trio.SocketStream]:
        """Both ends of a connection through the grid."""
        flow = await self.here.open(self.peer, target)
        ours, programs = socket.socketpair()
        flow.attach(ours)
        return trio.SocketStream(self.keep(programs)), await self.far.receive()

    def keep(self, sock: socket.socket) -> trio.socket.SocketType:
        """Close it in the end."""
        sock.setblocking(False)
        kept = trio.socket.from_stdlib_socket(sock)
        self.closing.callback(kept.close)
        return kept


@contextlib.asynccontextmanager
async def open_pair() -> AsyncIterator[Pair]:
    send, far = trio.open_memory_channel[trio.SocketStream](1000)

    async def serve(request: Request) -> tuple[socket.socket, bytes]:
        await trio.lowlevel.checkpoint()
        if request.target == b"no":
            raise Declined(code=2, why="not you")
        if request.target == b"refused":
            raise ConnectionRefusedError(111, "Connection refused")
        kind = socket.SOCK_DGRAM if request.target == b"datagrams" else socket.SOCK_STREAM
        ours, programs = socket.socketpair(socket.AF_UNIX, kind)
        stream = pair.keep(programs)
        send.send_nowait(stream if kind == socket.SOCK_DGRAM else trio.SocketStream(stream))
        return ours, b"answer"

    def datagrams(target: bytes) -> bool:
        return target == b"datagrams"

    with trio.fail_after(30), contextlib.ExitStack() as closing:
        async with open_world() as world:
            a, b = world.join("a"), world.join("b")
            a.learn(b.me, b.addresses)
            async with (
                open_links(a, LOOPBACK) as links,
                open_links(b, LOOPBACK) as others,
                open_streams(links, serve, datagrams) as here,
                open_streams(others, serve, datagrams) as there,
            ):
                pair = Pair(here, there, b.me, far, (links, others), closing)
                yield pair


async def _read_all(stream: trio.SocketStream) -> bytes:
    return b"".join([data async for data in stream])


async def _until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  (of what other threads do)
        await trio.sleep(0.005)


async def test_bytes_and_ends_go_both_ways() -> None:
    async with open_pair() as pair:
        near, far = await pair.connect()
        await near.send_all(b"question")
        await near.send_eof()
        assert await _read_all(far) == b"question"
        await far.send_all(b"long after the other way has ended")
        await far.send_eof()
        assert await _read_all(near) == b"long after the other way has ended"
        await _until(lambda: not pair.here.flows() and not pair.there.flows())
        assert pair.here.pool.free == pair.there.pool.free == POOL


async def test_many_at_once_lose_nothing() -> None:
    async with open_pair() as pair:
        rng = random.Random(1)

        async def swap(near: trio.SocketStream, far: trio.SocketStream, size: int, back: int) -> None:
            there, here = rng.randbytes(size), rng.randbytes(back)

            async def send(stream: trio.SocketStream, data: bytes) -> None:
                await stream.send_all(data)
                await stream.send_eof()

            async with near, far, trio.open_nursery() as nursery:
                nursery.start_soon(send, near, there)
                nursery.start_soon(send, far, here)
                assert await _read_all(near) == here
                assert await _read_all(far) == there

        async with trio.open_nursery() as nursery:
            for number in range(40):
                near, far = await pair.connect()
                size, back = rng.choice([0, 1, 1000, 300_000]), 2_000_000 if number < 3 else 5000
                nursery.start_soon(swap, near, far, size, back)
        await _until(lambda: not pair.here.flows() and not pair.there.flows())
        assert pair.here.pool.free == pair.there.pool.free == POOL


async def test_one_slow_reader_holds_up_nobody_and_only_what_its_window_lets() -> None:
    async with open_pair() as pair:
        stuck, unread = await pair.connect()
        sent = 0
        with trio.move_on_after(0.5):
            while True:
                await stuck.send_all(bytes(100_000))
                sent += 100_000
        [flow] = pair.there.flows()
        assert flow.stream.window.held <= flow.stream.window.size
        assert INITIAL < sent < 20_000_000
        near, far = await pair.connect()
        await near.send_all(b"x" * 100_000)
        await near.send_eof()
        assert len(await _read_all(far)) == 100_000
        stuck.socket.close()
        assert len(await _read_all(unread)) >= sent  # what is read at last goes on to the end


async def test_a_refusal_says_why() -> None:
    async with open_pair() as pair:
        with pytest.raises(Declined, match="not you") as told:
            await pair.here.open(pair.peer, b"no")
        assert told.value.code == 2
        with pytest.raises(Declined, match="Connection refused") as told:
            await pair.here.open(pair.peer, b"refused")
        assert told.value.code == 5
        assert not pair.here.flows()
        await _until(lambda: not pair.there.flows())


async def test_a_program_that_breaks_off_breaks_the_other_off() -> None:
    async with open_pair() as pair:
        flow = await pair.here.open(pair.peer, b"program")
        with socket.create_server(("127.0.0.1", 0)) as server:
            ours = socket.create_connection(server.getsockname())
            programs = trio.SocketStream(pair.keep(server.accept()[0]))
        flow.attach(ours)
        far = await pair.far.receive()
        await far.send_all(b"x")
        assert await programs.receive_some() == b"x"
        pair.there.close(pair.there.flows()[0], "enough")
        with pytest.raises(trio.BrokenResourceError):  # a reset, and not an end that could pass for a whole
            await programs.receive_some()
        assert await _read_all(far) == b""
        await _until(lambda: not pair.here.flows() and not pair.there.flows())


async def test_a_link_that_ends_resets_its_streams() -> None:
    async with open_pair() as pair:
        near, far = await pair.connect()
        [link] = pair.links[0].live()
        link.close("the peer is gone")
        assert await _read_all(near) == b""
        assert await _read_all(far) == b""
        assert not pair.here.flows()
        near, _ = await pair.connect()  # over another link
        await near.aclose()


async def test_streams_go_on_when_the_connection_under_them_breaks() -> None:
    async with open_pair() as pair:
        near, far = await pair.connect()
        there, here = random.Random(1).randbytes(20_000_000), random.Random(2).randbytes(3_000_000)
        [link] = pair.links[0].live()
        breaks = 0

        async def send(stream: trio.SocketStream, data: bytes) -> None:
            await stream.send_all(data)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, near, there)
            nursery.start_soon(send, far, here)
            came = b""
            async for data in far:
                came += data
                if len(came) > 5_000_000 * (breaks + 1):
                    breaks += 1
                    link.path.tls.socket.shutdown(socket.SHUT_RDWR)
            assert came == there
            assert await _read_all(near) == here
        assert breaks >= 2
        assert pair.links[0].live() == [link]


async def test_an_open_that_is_not_waited_for_leaves_nothing() -> None:
    async with open_pair() as pair:
        scope = trio.CancelScope()
        scope.cancel()
        await pair.links[0].link(pair.peer)
        with scope:
            await pair.here.open(pair.peer, b"program")
        assert not pair.here.flows()
        await _until(lambda: not pair.there.flows())


async def test_a_peer_that_cannot_be_reached_is_told() -> None:
    async with open_pair() as pair:
        with pytest.raises(Unreachable):
            await pair.here.open(PeerId("nobody"), b"program")


async def test_datagrams_keep_their_bounds() -> None:
    async with open_pair() as pair:
        flow = await pair.here.open(pair.peer, b"datagrams")
        ours, programs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        near = pair.keep(programs)
        flow.attach(ours)
        far = await pair.far.receive()
        for text in (b"one", b"", b"three"):
            await near.send(text)
            assert await far.recv(100) == text
            await far.send(text + b"!")
            assert await near.recv(100) == text + b"!"
        pair.here.close(flow, "")
        await _until(lambda: not pair.there.flows())


async def test_noise_costs_the_link_and_nothing_else() -> None:
    async with open_pair() as pair:
        near, far = await pair.connect()
        [link] = pair.links[0].live()
        link.send(bytes((KINDS.start,)))
        assert await _read_all(near) == b""
        assert await _read_all(far) == b""
        await (await pair.connect())[0].aclose()
