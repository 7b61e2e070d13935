"""Measure the LAN of a job: two nodes on loopback, one guest at each, the real stack but for the guests.

    python -m bench lan [--mib 512] [--frame 1514] [--pings 2000]

A guest is a process at the far end of a cable that writes one frame at a time, as QEMU does, and never
has more than a window of them under way, as TCP does; the other one acknowledges every eighth.  Prints
Mbit/s between the guests, the CPU seconds that each *node* takes for a GiB of frames, what was dropped,
and how long a frame takes there and back.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import struct
import subprocess
import sys
import time
from typing import Any

import trio

from p2pgrid.hole_punch.lan import packets as p
from p2pgrid.hole_punch.lan.segment import FRAME_MIN, MTU, Segment, mac_of

SEGMENT = Segment("bench", (0, 1))
WINDOW = 256 * 1024
"""Bytes under way: what TCP has after a moment."""
EACH = 8
"""Frames for one that acknowledges them."""
ACK = 66


def frame(to: int, size: int) -> bytes:
    """With its length before it."""
    body = p.ethernet(mac_of(to), mac_of(1 - to), p.IPV4, bytes(size - FRAME_MIN))
    return struct.pack("!I", len(body)) + body


class Wire:
    """A guest's end of the cable."""

    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(fileno=fd)
        self.rest = b""

    def frames(self) -> int:
        """Wait for frames; how many came, of any length."""
        data = self.rest + self.socket.recv(1 << 18)
        at = count = 0
        while at + 4 <= len(data):
            after = at + 4 + int.from_bytes(data[at : at + 4], "big")
            if after > len(data):
                break
            at, count = after, count + 1
        self.rest = data[at:]
        return count

    def await_frames(self, count: int) -> None:
        while count > 0:
            count -= self.frames()


def send(wire: Wire, count: int, size: int, pings: int) -> None:
    """Be the guest that sends, and then pings."""
    one, window = frame(1, size), max(2 * EACH, WINDOW // size)
    wire.socket.sendall(frame(1, ACK))
    wire.await_frames(1)  # now there is a link
    began, under_way = time.monotonic(), 0
    for _ in range(count):
        while under_way >= window:
            under_way -= EACH * wire.frames()
        wire.socket.sendall(one)
        under_way += 1
    while under_way > 0:
        under_way -= EACH * wire.frames()
    wall = time.monotonic() - began
    print(json.dumps({"wall": wall}), flush=True)
    sys.stdin.readline()
    times = []
    for _ in range(pings):
        began = time.perf_counter()
        wire.socket.sendall(frame(1, 98))
        wire.await_frames(1)
        times.append(time.perf_counter() - began)
    print(json.dumps({"ping": statistics.median(times), "ping95": sorted(times)[len(times) * 95 // 100]}))


def receive(wire: Wire, count: int, size: int, pings: int) -> None:
    """Be the guest that receives, acknowledges, and answers pings."""
    ack = frame(0, ACK)
    wire.await_frames(1)
    wire.socket.sendall(ack)
    done = 0
    while done < count:
        before, done = done, done + wire.frames()
        wire.socket.sendall(ack * (done // EACH - before // EACH))
    for _ in range(pings):
        wire.await_frames(1)
        wire.socket.sendall(frame(0, 98))


async def node(place: int, words: list[str]) -> None:
    """Be one node with its guest; a line on stdin for each step."""
    from p2pgrid.hole_punch.bulk import open_links
    from p2pgrid.hole_punch.host import open_host
    from p2pgrid.hole_punch.lan.lan import open_lan
    from p2pgrid.ids import digest

    async with (
        open_host(digest(b"bench" + bytes([place]))) as network,
        open_links(network, [("127.0.0.1", 0)]) as links,
        open_lan(links, lambda group: None) as lan,
        lan.plug(SEGMENT, place) as cable,
    ):
        say(me=network.me, addresses=list(network.addresses))
        told = json.loads(await line())
        network.learn(told["me"], told["addresses"])
        lan.set_members("bench", {told["me"]: [1 - place]})
        before = time.process_time()
        guest = start(place, cable.fileno(), words)
        if place == 0:
            say(**json.loads(await trio.to_thread.run_sync(guest.stdout.readline)))
        await line()
        say(cpu=time.process_time() - before, counts=dict(lan.counts("bench")))
        await line()
        said, _ = await trio.to_thread.run_sync(guest.communicate, "\n")
        if place == 0:
            say(**json.loads(said))


def start(place: int, fd: int, words: list[str]) -> subprocess.Popen[str]:
    """The node's guest, in QEMU's stead."""
    program = [sys.executable, "-m", "bench.lan", "--guest", str(fd), "--place", str(place), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(program, pass_fds=[fd], stdin=pipe, stdout=pipe, text=True)


async def line() -> str:
    return await trio.to_thread.run_sync(sys.stdin.readline)


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def run(mib: int, size: int, pings: int) -> None:
    count = (mib << 20) // size // EACH * EACH
    words = ["--count", str(count), "--frame", str(size), "--pings", str(pings)]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.lan", "--place", str(place), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for place in range(2)
    ]

    def hear(process: subprocess.Popen[str]) -> dict[str, Any]:
        return json.loads(process.stdout.readline())

    def tell(*told: object) -> None:
        for process, what in zip(nodes, told, strict=True):
            process.stdin.write(json.dumps(what) + "\n")
            process.stdin.flush()

    first, second = map(hear, nodes)
    tell(second, first)
    wall = hear(nodes[0])["wall"]
    tell("", "")
    sent, received = map(hear, nodes)
    tell("", "")
    delay = hear(nodes[0])
    for process in nodes:
        process.communicate()
    gib = count * size / (1 << 30)
    row = {
        "bench": "lan",
        "frame": size,
        "mib": mib,
        "mbit/s": round(count * size * 8 / wall / 1e6),
        "cpu_sender": round(sent["cpu"] / gib, 2),
        "cpu_receiver": round(received["cpu"] / gib, 2),
        "ping_ms": round(1000 * delay["ping"], 3),
        "ping95_ms": round(1000 * delay["ping95"], 3),
        "dropped": {k: n for side in (sent, received) for k, n in side["counts"].items() if k != "forwarded"},
    }
    print(json.dumps(row), flush=True)


def main() -> None:
    top = argparse.ArgumentParser(prog="python -m bench lan", description=__doc__.split("\n")[0])
    top.add_argument("--mib", type=int, default=512, help="of frames to send")
    top.add_argument("--frame", type=int, default=MTU + FRAME_MIN, help="bytes of each")
    top.add_argument("--pings", type=int, default=2000)
    top.add_argument("--place", type=int, help=argparse.SUPPRESS)
    top.add_argument("--guest", type=int, help=argparse.SUPPRESS)
    top.add_argument("--count", type=int, help=argparse.SUPPRESS)
    given = top.parse_args()
    if given.guest is not None:
        (receive if given.place else send)(Wire(given.guest), given.count, given.frame, given.pings)
    elif given.place is not None:
        words = [f"--count={given.count}", f"--frame={given.frame}", f"--pings={given.pings}"]
        trio.run(node, given.place, words)
    else:
        run(given.mib, given.frame, given.pings)


if __name__ == "__main__":
    main()
