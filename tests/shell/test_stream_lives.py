"""Does an idle stream outlive its connections, and is one whose peer died reset?

Real sockets, and a real process to be killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable

import pytest
import trio

from p2pgrid.hole_punch import keeping
from p2pgrid.hole_punch.bulk import Links, open_links
from p2pgrid.hole_punch.greeting import bare
from p2pgrid.hole_punch.streams.service import Declined, Request, Streams, open_streams
from p2pgrid.ids import PeerId
from tests.memory_network import MemoryWorld, open_world
from tests.shell.test_link_session import Wire

LOOPBACK = (("127.0.0.1", 0),)
PEER = PeerId("b")
PATIENCE = 20.0
"""Seconds; what is waited for comes within two."""

pytestmark = pytest.mark.usefixtures("hasty")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dead are noticed as they are, but sooner; `tests/pure/test_keeping.py` says how soon."""
    hasty = {"LOOK": 0.05, "QUIET": 0.3, "QUIET_IDLE": 0.4, "ECHO": 0.3, "AGAIN": 0.5}
    for name, seconds in {**hasty, "GONE": 1.5, "COME_BACK": 0.5}.items():
        monkeypatch.setattr(keeping, name, seconds)


async def connection() -> tuple[socket.socket, trio.SocketStream]:
    """A TCP connection of a program with its node, which can be reset: the node's end, and the program's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = await trio.open_tcp_stream(*server.getsockname())
        nodes, _ = server.accept()
    return bare(trio.socket.from_stdlib_socket(nodes)), program


async def see_reset(program: trio.SocketStream) -> None:
    """An end would pass for a whole."""
    with pytest.raises(ConnectionResetError):
        await program.socket.recv(1)
    program.socket.close()


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  (of what other threads do)
        await trio.sleep(0.005)


async def echo(one: trio.SocketStream, other: trio.SocketStream, text: bytes) -> None:
    await one.send_all(text)
    assert await other.receive_some(100) == text


async def nothing(request: Request) -> tuple[socket.socket, bytes]:
    await trio.lowlevel.checkpoint()
    raise Declined(code=2, why=f"not for {request.peer}")


# --- idle ---------------------------------------------------------------------------------


class Pair:
    """A stream between two programs, over a link that was made through a wire."""

    def __init__(self, wire: Wire, links: Links, near: trio.SocketStream, far: trio.SocketStream) -> None:
        self.wire, self.links, self.near, self.far = wire, links, near, far
        [self.link] = links.live()
        self.port = 0
        """Where the peer takes links, without the wire."""

    async def speak(self, text: bytes) -> None:
        await echo(self.near, self.far, text)
        await echo(self.far, self.near, text + b", and back")

    async def moved(self, path: object) -> None:
        """The link goes on over another path."""
        await until(lambda: self.link.path is not path and self.link.connected)
        assert self.links.live() == [self.link]


@contextlib.asynccontextmanager
async def open_pair() -> AsyncIterator[Pair]:
    send, far = trio.open_memory_channel[trio.SocketStream](1)

    async def serve(_: Request) -> tuple[socket.socket, bytes]:
        ours, program = await connection()
        send.send_nowait(program)
        return ours, b""

    with trio.fail_after(PATIENCE):
        async with open_world() as world, trio.open_nursery() as nursery:
            a, b = world.join("a"), world.join(PEER)
            async with (
                open_links(a, ()) as links,
                open_links(b, LOOPBACK) as others,
                open_streams(links, nothing) as here,
                open_streams(others, serve),
            ):
                wire = Wire(others.bound[0][1])
                await nursery.start(wire.run)
                links.learn(PEER, [f"/ip4/127.0.0.1/tcp/{wire.port}/tls"])
                flow = await here.open(PEER, b"program")
                ours, near = await connection()
                flow.attach(ours)
                async with near, await far.receive() as program:
                    pair = Pair(wire, links, near, program)
                    pair.port = others.bound[0][1]
                    await pair.speak(b"before")
                    yield pair
            nursery.cancel_scope.cancel()


async def test_an_idle_stream_is_still_there_when_its_connection_was_cut() -> None:
    async with open_pair() as pair:
        for cut in range(3):
            path = pair.link.path
            await pair.wire.cut()
            await pair.moved(path)
            await pair.speak(b"after cut %d" % cut)


async def test_an_idle_stream_is_still_there_when_nothing_came_through_its_connection() -> None:
    async with open_pair() as pair:
        path, pair.wire.silent = pair.link.path, True
        pair.links.learn(PEER, [f"/ip4/127.0.0.1/tcp/{pair.port}/tls"])
        await pair.moved(path)
        await pair.speak(b"over another way")


async def test_a_stream_that_is_idle_longer_than_a_dead_peer_is_waited_for_is_still_there() -> None:
    async with open_pair() as pair:
        path, heard = pair.link.path, pair.link.heard
        await trio.sleep(2 * keeping.GONE)
        assert pair.link.path is path
        assert 0 < pair.link.heard - heard < 1000, "probes"
        await pair.speak(b"after a long time")


async def test_both_ends_of_a_stream_are_reset_when_nothing_comes_through_any_more() -> None:
    async with open_pair() as pair:
        pair.wire.silent = True
        await see_reset(pair.near)
        await see_reset(pair.far)
        assert "nothing came" in repr(pair.link)
        assert pair.links.live() == []


# --- dead ---------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def open_process(world: MemoryWorld) -> AsyncIterator[tuple[trio.Process, int]]:
    """A peer in a process of its own, and its port."""
    command = [sys.executable, "-m", "tests.shell.stream_process", PEER, world.secret.hex()]
    child = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            more = await child.stdout.receive_some()
            assert more, "it did not come up"
            line += more
        yield child, int(line)
    finally:
        child.kill()
        with trio.CancelScope(shield=True):
            await child.wait()
            assert child.stdin is not None
            assert child.stdout is not None
            await child.stdin.aclose()
            await child.stdout.aclose()


async def _stream(streams: Streams) -> trio.SocketStream:
    flow = await streams.open(PEER, b"echo")
    ours, program = await connection()
    flow.attach(ours)
    await echo(program, program, b"are you there?")
    return program


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("talks", [False, True])
async def test_streams_to_a_peer_that_died_are_reset(death: signal.Signals, talks: bool) -> None:
    """Killed, its kernel says so; stopped, its kernel takes all that is sent, and connections, for ever."""
    with trio.fail_after(PATIENCE):
        async with (
            open_world() as world,
            open_links(world.join("a"), ()) as links,
            open_streams(links, nothing) as streams,
            open_process(world) as (child, port),
        ):
            links.learn(PEER, [f"/ip4/127.0.0.1/tcp/{port}/tls"])
            programs = [await _stream(streams) for _ in range(3)]
            [link] = links.live()
            os.kill(child.pid, death)
            if talks:
                for program in programs:
                    await program.send_all(bytes(50_000))
            for program in programs:
                await see_reset(program)
            assert not link.live
            assert streams.flows() == []
