"""Measure streams over a link: two node processes on loopback, programs at both sides of them.

    python -m bench proxy [--mib 1024] [--connections 200] [--each 4] [--requests 500]

Four figures: what the bare link carries; one connection through it; many connections both ways at once,
every byte compared; and a small request, each over a connection of its own, beside the same without a grid.
CPU is that of both nodes together, in seconds per GiB; memory is each node's growth at its peak.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import selectors
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import trio

from p2pgrid.errors import Unreachable
from p2pgrid.hole_punch.bulk import Link, open_links
from p2pgrid.hole_punch.streams.messages import DATA_MAX
from p2pgrid.hole_punch.streams.service import Declined, Request, Streams, open_streams
from p2pgrid.ids import PeerId, digest

LOOPBACK = "127.0.0.1"
PEERS = PeerId("near"), PeerId("far")
BARE = range(1, 2)
BLOCK = b"".join(digest(n.to_bytes(4, "big")) for n in range(1 << 14))
"""What is sent, over and over: 512 KiB of noise."""
PIECE = 64 << 10


# --- a node -------------------------------------------------------------------------------


class Network:
    """Two processes that trust each other: the links' own cryptography is the real one."""

    addresses: Sequence[str] = ()

    def __init__(self, me: PeerId) -> None:
        self.me = me

    def sign(self, statement: bytes) -> bytes:
        return digest(self.me.encode() + b"\0" + statement)

    def verify(self, peer: PeerId, statement: bytes, signature: bytes) -> bool:
        return signature == digest(peer.encode() + b"\0" + statement)

    def serve(self, protocol: str, serve: Any) -> None: ...

    def learn(self, peer: PeerId, addresses: Sequence[str]) -> None: ...

    def addresses_of(self, peer: PeerId) -> Sequence[str]:
        return ()

    async def open(self, peer: PeerId, protocol: str) -> Any:
        raise Unreachable(who=peer, why="there is no control channel in a bench")


class Bare:
    """Sends, or counts, whole messages and nothing else."""

    def __init__(self) -> None:
        self.todo = self.got = 0
        self.link: Link | None = None

    def __call__(self, link: Link) -> Bare:
        self.link = link
        return self

    def received(self, message: memoryview) -> None:
        self.got += len(message)

    def drained(self) -> None:
        while self.todo > 0 and self.link is not None and self.link.queued < 2 * DATA_MAX:
            self.link.send(b"\x01", BLOCK[:DATA_MAX])
            self.todo -= DATA_MAX

    def left(self, why: str) -> None: ...


async def node(place: int) -> None:
    """Say where it listens, hear where the other does, then do as each line of input says."""
    bare = Bare()

    async def dial(request: Request) -> tuple[socket.socket, bytes]:
        sock = trio.socket.socket()
        await sock.connect((LOOPBACK, int(request.target)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return socket.socket(fileno=sock.detach()), b""

    async with (
        open_links(Network(PEERS[place]), [(LOOPBACK, 0)]) as links,
        open_streams(links, dial) as streams,
        trio.open_nursery() as nursery,
    ):
        links.serve(BARE, bare)
        say(port=links.bound[0][1])
        links.learn(PEERS[1 - place], [f"/ip4/{LOOPBACK}/tcp/{(await hear())['port']}/tls"])
        before = time.process_time()
        while told := await hear():
            match told["do"]:
                case "forward":
                    say(port=await nursery.start(forward, streams, PEERS[1 - place], told["to"]))
                case "bare":
                    link = await links.link(PEERS[1 - place])
                    bare.todo = told["count"]
                    link.wake()
                case "wait":
                    while bare.got < told["count"]:  # noqa: ASYNC110  (told by a thread that has no time)
                        await trio.sleep(0.005)
                    say()
                case "cpu":
                    now, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                    say(cpu=now - before, peak=peak // 1024, rss=_resident())
                    before = now
        nursery.cancel_scope.cancel()


def _resident() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / (1 << 20)


async def hear() -> Any:
    line = await trio.to_thread.run_sync(sys.stdin.readline)
    return json.loads(line) if line else None


async def forward(
    streams: Streams, peer: PeerId, to: int, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        try:
            flow = await streams.open(peer, str(to).encode())
        except (Declined, Unreachable):
            return stream.socket.close()
        flow.attach(socket.socket(fileno=stream.socket.detach()))
        return None

    [listener] = await trio.open_tcp_listeners(0, host=LOOPBACK)
    task_status.started(listener.socket.getsockname()[1])
    await trio.serve_listeners(serve, [listener])


# --- programs -----------------------------------------------------------------------------


def swap(socks: Sequence[socket.socket], each: int) -> None:
    """Send `each` bytes over every one of `socks`, and compare as many that come.  Half-close is used."""
    block = memoryview(BLOCK + BLOCK[:PIECE])
    with selectors.DefaultSelector() as selector:
        state = {sock: [0, 0] for sock in socks}
        for sock in socks:
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)
        while selector.get_map():
            for key, events in selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                counts, watched = state[sock], key.events
                if events & selectors.EVENT_WRITE:
                    at = counts[0] % len(BLOCK)
                    counts[0] += sock.send(block[at : at + min(PIECE, each - counts[0])])
                    if counts[0] == each:
                        sock.shutdown(socket.SHUT_WR)
                        watched &= ~selectors.EVENT_WRITE
                if events & selectors.EVENT_READ:
                    data = sock.recv(PIECE)
                    at = counts[1] % len(BLOCK)
                    assert data == block[at : at + len(data)], "other bytes came than were sent"
                    counts[1] += len(data)
                    if not data:
                        assert counts[1] == each, f"{counts[1]} of {each} bytes came"
                        watched &= ~selectors.EVENT_READ
                if not watched:
                    selector.unregister(sock)
                elif watched != key.events:
                    selector.modify(sock, watched)


def program(connections: int, each: int) -> None:
    """Accept so many connections, and swap bytes with all of them at once."""
    with socket.create_server((LOOPBACK, 0), backlog=connections) as server:
        say(port=server.getsockname()[1])
        socks = [server.accept()[0] for _ in range(connections)]
    swap(socks, each)


@contextlib.contextmanager
def sink(answer: bytes = b"") -> Iterator[int]:
    """A server that reads each connection to its end, and answers what it reads with `answer`."""

    def serve(sock: socket.socket) -> None:
        buffer = bytearray(1 << 20)
        with sock, contextlib.suppress(OSError):
            while sock.recv_into(buffer):
                if answer:
                    sock.sendall(answer)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server((LOOPBACK, 0), backlog=128) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


# --- the driver ---------------------------------------------------------------------------


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


class Child:
    """A process of this file that talks lines of JSON."""

    def __init__(self, *words: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.proxy", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"a process of the bench has ended: {self._process.wait()}"
        return json.loads(line)

    def tell(self, **facts: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(facts) + "\n")
        self._process.stdin.flush()

    def ask(self, **facts: object) -> dict[str, Any]:
        self.tell(**facts)
        return self.hear()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def cpu(nodes: Sequence[Child]) -> float:
    return sum(one.ask(do="cpu")["cpu"] for one in nodes)


def measure_bare(near: Child, far: Child, count: int) -> dict[str, Any]:
    cpu((near, far))
    began = time.monotonic()
    near.tell(do="bare", count=count)
    far.ask(do="wait", count=count)
    return row("link", count, time.monotonic() - began, cpu((near, far)))


def measure_one(near: Child, far: Child, count: int) -> dict[str, Any]:
    with sink() as to:
        port = near.ask(do="forward", to=to)["port"]
        cpu((near, far))
        began = time.monotonic()
        with socket.create_connection((LOOPBACK, port)) as sock:
            for _ in range(count // len(BLOCK)):
                sock.sendall(BLOCK)
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
        return row("one connection", count, time.monotonic() - began, cpu((near, far)))


def measure_many(near: Child, far: Child, connections: int, each: int) -> dict[str, Any]:
    server = Child("--program", str(connections), "--each", str(each))
    port = near.ask(do="forward", to=server.hear()["port"])["port"]
    before = [one.ask(do="cpu")["rss"] for one in (near, far)]
    began = time.monotonic()
    swap([socket.create_connection((LOOPBACK, port)) for _ in range(connections)], each)
    found = row(f"{connections} connections", 2 * each * connections, time.monotonic() - began, 0.0)
    server.end()
    after = [one.ask(do="cpu") for one in (near, far)]
    found["cpu_s_per_gib"] = round(sum(one["cpu"] for one in after) * (1 << 30) / (2 * each * connections), 2)
    found["grown_mib"] = [round(one["peak"] - rss, 1) for one, rss in zip(after, before, strict=True)]
    found["allowed_mib"] = round(32 + connections / 16, 1)
    return found


def measure_requests(near: Child, count: int) -> dict[str, Any]:
    with sink(b"HTTP/1.1 200 OK\r\n\r\n") as to:
        port = near.ask(do="forward", to=to)["port"]
        plain, through = ([_request(at) for _ in range(count)] for at in (to, port))
    ms = {"plain_ms": statistics.median(plain) * 1e3, "through_ms": statistics.median(through) * 1e3}
    return {"what": "requests", "count": count, **{key: round(value, 3) for key, value in ms.items()}}


def _request(port: int) -> float:
    began = time.perf_counter()
    with socket.create_connection((LOOPBACK, port)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert sock.recv(1024)
        return time.perf_counter() - began


def row(what: str, count: int, wall: float, spent: float) -> dict[str, Any]:
    rate = count / wall / 1e6
    return {
        "what": what,
        "mb_per_s": round(rate, 1),
        "wall": round(wall, 2),
        "cpu_s_per_gib": round(spent * (1 << 30) / count, 2),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--mib", type=int, default=1024)
    arguments.add_argument("--connections", type=int, default=200)
    arguments.add_argument("--each", type=int, default=4, help="MiB each way, of each connection")
    arguments.add_argument("--requests", type=int, default=500)
    arguments.add_argument("--node", type=int, help=argparse.SUPPRESS)
    arguments.add_argument("--program", type=int, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.node is not None:
        return trio.run(node, given.node)
    if given.program is not None:
        return program(given.program, given.each)
    near, far = nodes = Child("--node", "0"), Child("--node", "1")
    ports = [one.hear() for one in nodes]
    for one, other in zip(nodes, reversed(ports), strict=True):
        one.tell(**other)
    count = given.mib << 20
    say(**measure_bare(near, far, count))
    say(**measure_one(near, far, count))
    say(**measure_requests(near, given.requests))
    if given.connections:
        say(**measure_many(near, far, given.connections, given.each << 20))
    for one in nodes:
        one.end()
    return None


if __name__ == "__main__":
    main()
