"""Have nodes punch in the laboratory's hosts: each in a thread of its own whose namespace is the host's.

What a relay does in the grid a switchboard does here: it listens at two of the hub's addresses, and in both
kinds of IP, tells whoever comes from where it sees them, and passes messages on.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator

import attrs
import msgspec
import trio

from p2pgrid.hole_punch.doors import open_listeners
from p2pgrid.hole_punch.greeting import bare, share_port
from p2pgrid.hole_punch.path import Address
from p2pgrid.hole_punch.punch_messages import MAGIC, decode
from p2pgrid.hole_punch.puncher import Puncher, open_puncher
from p2pgrid.ids import PeerId
from tests.netns.lab import HUB, HUB6, HUB6_TOO, HUB_TOO, Host, Lab
from tests.netns.spaces import enter_space

OBSERVERS = 443
HELLO = b"hello"


class Said(msgspec.Struct):
    """To the switchboard: for whom; from it: of whom."""

    peer: str
    message: bytes


@contextlib.contextmanager
def in_thread(space: str, main: Callable[..., Awaitable[None]]) -> Iterator[None]:
    """Run an async function in a thread in a namespace until the block is left; ready when it begins."""
    ready = threading.Event()
    ends: list[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = []
    wrong: list[BaseException] = []

    async def run() -> None:
        with trio.CancelScope() as scope:
            ends.append((trio.lowlevel.current_trio_token(), scope))
            await main(ready.set)

    def thread() -> None:
        try:
            enter_space(space)
            trio.run(run)
        except BaseException as error:
            wrong.append(error)
        finally:
            ready.set()

    running = threading.Thread(target=thread)
    running.start()
    try:
        assert ready.wait(30)
        if not wrong:
            yield
    finally:
        with contextlib.suppress(trio.RunFinishedError):
            token, scope = ends[0]
            token.run_sync_soon(scope.cancel)
        running.join(30)
        if wrong:
            raise wrong[0]


# --- the switchboard ----------------------------------------------------------------------


async def switchboard(ready: Callable[[], None]) -> None:
    lines: dict[str, tuple[trio.SocketStream, trio.Lock]] = {}

    async def serve(stream: trio.SocketStream) -> None:
        reader = Lines(stream)
        first = await reader.read()
        if first is None:
            return
        host, port = stream.socket.getpeername()[:2]
        await stream.send_all(line(Said(host, str(port).encode())))
        if first.message == b"signal":
            lines[first.peer] = stream, trio.Lock()
        while (said := await reader.read()) is not None:
            to, lock = lines[said.peer]
            async with lock:
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # it has left
                    await to.send_all(line(Said(first.peer, said.message)))

    async with trio.open_nursery() as nursery:
        for host in (HUB, HUB_TOO, HUB6, HUB6_TOO):
            listeners = await trio.open_tcp_listeners(OBSERVERS, host=host, backlog=256)
            nursery.start_soon(trio.serve_listeners, serve, listeners)
        ready()
        await trio.sleep_forever()


def line(said: Said) -> bytes:
    return msgspec.json.encode(said) + b"\n"


@attrs.define
class Lines:
    stream: trio.SocketStream
    rest: bytes = b""

    async def read(self) -> Said | None:
        while b"\n" not in self.rest:
            try:
                more = await self.stream.receive_some(65536)
            except trio.BrokenResourceError:
                return None
            if not more:
                return None
            self.rest += more
        first, _, self.rest = self.rest.partition(b"\n")
        return msgspec.json.decode(first, type=Said)


# --- a node -------------------------------------------------------------------------------


@attrs.define
class Meeting:
    """What one pair's punching came to, as one of them sees it."""

    over: threading.Event = attrs.field(factory=threading.Event)
    begun: float = 0.0
    seconds: float | None = None
    """Until there was a connection; None: there is none."""
    address: Address | None = None
    """Where the other was met."""
    attempts: int = 0
    """Rounds that came to dialling."""


@attrs.define(eq=False)
class Node:
    """A `Ground` that keeps what was punched; `meet` may be called from any thread."""

    me: PeerId
    host: Host
    port: int
    bound: list[Address] = attrs.field(factory=list)
    seen: list[Address] = attrs.field(factory=list)
    meetings: dict[PeerId, Meeting] = attrs.field(factory=dict)
    kept: dict[PeerId, socket.socket] = attrs.field(factory=dict)
    claims: list[Address] = attrs.field(factory=list)
    """Addresses that it has from nobody."""
    puncher: Puncher | None = None
    line: trio.SocketStream | None = None
    token: trio.lowlevel.TrioToken | None = None
    outbox: trio.MemorySendChannel[bytes] | None = None

    def observed(self) -> list[Address]:
        return self.seen

    def mapped(self) -> list[Address]:
        return self.claims

    def tell(self, peer: PeerId, message: bytes) -> None:
        assert self.outbox is not None
        self.outbox.send_nowait(line(Said(peer, message)))

    async def bring(self, sock: socket.socket, peer: PeerId, *, accepts: bool) -> bool:
        """Greet each other, as TLS does: who accepts speaks second."""
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        try:
            for turn in (0, 1):
                if accepts == bool(turn):
                    await stream.send_all(HELLO)
                elif await stream.receive_some(len(HELLO)) != HELLO:
                    return False
        except trio.BrokenResourceError:
            return False
        meeting = self.meetings[peer]
        meeting.seconds = trio.current_time() - meeting.begun
        meeting.address = stream.socket.getpeername()[:2]
        self.kept[peer] = bare(stream.socket)
        assert self.puncher is not None
        self.puncher.settled(peer)
        return True

    def meet(self, peer: PeerId) -> Meeting:
        """Have it punched; the meeting is over when there is a connection or an attempt has failed."""
        meeting = self.meetings[peer] = Meeting()

        def begin() -> None:
            meeting.begun = trio.current_time()
            assert self.puncher is not None
            self.puncher.relayed(peer)

        assert self.token is not None
        self.token.run_sync_soon(begin)
        return meeting

    def part(self, peer: PeerId) -> None:
        def end() -> None:
            assert self.puncher is not None
            self.puncher.gone(peer)
            if (sock := self.kept.pop(peer, None)) is not None:
                sock.close()

        assert self.token is not None
        self.token.run_sync_soon(end)

    def change(self) -> None:
        """It may be in another network."""
        assert self.token is not None
        assert self.puncher is not None
        self.token.run_sync_soon(lambda: self.puncher and self.puncher.look(anew=True))

    async def watch(self) -> None:
        """Tell how attempts go."""
        assert self.puncher is not None
        while True:
            for peer, meeting in self.meetings.items():
                if peer in self.puncher.machines:
                    meeting.attempts = self.puncher.machines[peer].attempts
                    if meeting.seconds is not None or self.puncher.outlook(peer).startswith("failed"):
                        meeting.over.set()
            await trio.sleep(0.01)

    async def run(self, ready: Callable[[], None]) -> None:
        """Listen, be observed from there, and punch."""
        self.token = trio.lowlevel.current_trio_token()
        async with contextlib.AsyncExitStack() as stack:
            nursery = await stack.enter_async_context(trio.open_nursery())
            stack.callback(nursery.cancel_scope.cancel)
            for family, any_host in ((4, "0.0.0.0"), (6, "::")):
                if self.host.ipv4 if family == 4 else self.host.ipv6:
                    listeners = await open_listeners(any_host, self.port)
                    self.bound.append((any_host, self.port))
                    nursery.start_soon(trio.serve_listeners, self.accept, listeners)
            six = not self.host.ipv4
            lines = [await self.dial(hub) for hub in ((HUB6, HUB6_TOO) if six else (HUB, HUB_TOO))]
            for stream, what in zip(lines, (b"signal", b"observe"), strict=True):
                stack.push_async_callback(trio.aclose_forcefully, stream)
                await stream.send_all(line(Said(self.me, what)))
            readers = [Lines(stream) for stream in lines]
            for reader in readers:
                said = await reader.read()
                assert said is not None
                self.seen.append((said.peer, int(said.message)))
            self.outbox, outgoing = trio.open_memory_channel[bytes](10000)
            self.puncher = await stack.enter_async_context(open_puncher(self))
            nursery.start_soon(self.say, lines[0], outgoing)
            nursery.start_soon(self.hear, readers[0])
            nursery.start_soon(self.watch)
            stack.callback(self.close)
            ready()
            await trio.sleep_forever()

    async def dial(self, hub: str) -> trio.SocketStream:
        sock = trio.socket.socket(socket.AF_INET6 if ":" in hub else socket.AF_INET)
        share_port(sock)
        await sock.bind(("::" if ":" in hub else "0.0.0.0", self.port))
        await sock.connect((hub, OBSERVERS))
        return trio.SocketStream(sock)

    async def accept(self, stream: trio.SocketStream) -> None:
        sock = bare(stream.socket)
        await trio.lowlevel.wait_readable(sock.fileno())
        if sock.recv(len(MAGIC), socket.MSG_PEEK) != MAGIC:
            sock.close()
            return
        assert self.puncher is not None
        await self.puncher.admit(sock)

    async def say(self, stream: trio.SocketStream, outgoing: trio.MemoryReceiveChannel[bytes]) -> None:
        async for text in outgoing:
            await stream.send_all(text)

    async def hear(self, reader: Lines) -> None:
        assert self.puncher is not None
        while (said := await reader.read()) is not None:
            self.puncher.heard(PeerId(said.peer), decode(said.message))

    def close(self) -> None:
        for sock in self.kept.values():
            sock.close()


@contextlib.contextmanager
def nodes(world: Lab, hosts: dict[str, tuple[Host, int]]) -> Iterator[dict[str, Node]]:
    """Nodes by name, each at a host and a port."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(in_thread(world.hub, switchboard))
        made = {name: Node(PeerId(name), host, port) for name, (host, port) in hosts.items()}
        for node in made.values():
            stack.enter_context(in_thread(node.host.space, node.run))
        yield made
