"""Measure a relay: what it carries at what cost, what idle circuits take, and how soon a byte is there.

    python -m bench relay [--gib 2] [--rates 0 1000] [--circuits 1000] [--runs 3] [--only carry idle first]

Three hosts, near ── relay ── far.  JSON lines to stdout:

carry   bytes from near to far over one circuit, beside iperf3 over the same two hops, routed by the relay
        host's kernel; `--rates` in Mbit/s of every host, 0: as fast as it goes.  cpu is the relay
        process' own, user and system, in s per GiB; medians of `--runs`, in turn
idle    RSS of the relay, which imports all that a node does, before and with so many circuits, MiB
first   ms from wanting a link to the peer's first byte over the relay, every process on this machine: `cold`,
        where nothing but the relay's address is known, and `warm`, where there is a link to the relay
"""

from __future__ import annotations

import argparse
import json
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import trio

from bench import lab as labs
from bench.grid import report
from bench.lab import Host, Lab, open_lab, sh, stoppable
from p2pgrid.errors import Unreachable
from p2pgrid.hole_punch.bulk import Link, Way, open_links
from p2pgrid.hole_punch.path import circuit_from_multiaddr
from p2pgrid.hole_punch.relay.limits import Limits
from p2pgrid.hole_punch.relay.relaying import Relaying, open_relaying
from p2pgrid.ids import PeerId, digest

BLOCK = 1 << 20
PATIENCE = 60.0
"""Seconds for one answer of a node."""
IPERF_SECONDS = 4

Row = dict[str, Any]


# --- a node -------------------------------------------------------------------------------


class Network:
    """Processes that trust each other: the links' own cryptography is the real one."""

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
        raise Unreachable(who=peer, why="there is no control plane here")


class Echo:
    """Sends back what links bring; what comes back wakes who waits."""

    def __init__(self) -> None:
        self.token = trio.lowlevel.current_trio_token()
        self.came = trio.Event()

    def __call__(self, link: Link) -> Any:
        return _Receiver(self, link)


class _Receiver:
    def __init__(self, echo: Echo, link: Link) -> None:
        self.echo, self.link = echo, link

    def received(self, message: memoryview) -> None:
        if message[1]:
            self.link.send(bytes([1, 0]))
        else:
            self.echo.token.run_sync_soon(self.echo.came.set)

    def drained(self) -> None: ...

    def left(self, why: str) -> None: ...


class Raw:
    """Takes circuits as they are: what comes is thrown away, and its end is answered with the end."""

    def __init__(self) -> None:
        self.idle: list[socket.socket] = []

    async def bring(self, sock: socket.socket, peer: PeerId, way: Way, **rest: Any) -> None:
        sock.setblocking(True)
        threading.Thread(target=self._drain, args=(sock,), daemon=True).start()

    def _drain(self, sock: socket.socket) -> None:
        first = sock.recv(1)
        if first == b"i":  # nothing follows
            self.idle.append(sock)
            sock.send(b"i")
            return
        buffer = bytearray(BLOCK)
        while sock.recv_into(buffer):
            pass
        sock.close()


async def node(name: str, address: str) -> None:
    """Do what stdin says, a JSON line at a time, and answer each."""
    from p2pgrid.node import daemon

    daemon._stay_small()
    daemon._log_to_stderr()
    echo, raw, network = Echo(), Raw(), Network(PeerId(name))
    async with (
        open_links(network, [(address, 0)], echo) as links,
        open_relaying(links, network.me) as both,
    ):
        say(me=name, addresses=links.addresses)
        real = links.bring
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            match json.loads(line):
                case {"open": count}:
                    both.service.open(Limits(circuits=count, circuits_each=count))
                    say()
                case {"usage": _}:
                    used = resource.getrusage(resource.RUSAGE_SELF)
                    say(
                        cpu=used.ru_utime + used.ru_stime,
                        rss=_resident(),
                        circuits=len((await both.service.look()).circuits),
                    )
                case {"hold": relay, "at": addresses, "raw": is_raw}:
                    links.bring = raw.bring if is_raw else real  # type: ignore[method-assign, assignment]
                    both.relays.learn({relay: addresses})
                    while relay not in both.relays.held:
                        await both.relays.changed()
                    say(addresses=[a for a in links.addresses if "p2p-circuit" in a])
                case {"pump": size, "to": peer, "by": circuit}:
                    began = time.monotonic()
                    await _pump(both, circuit, PeerId(peer), size)
                    say(seconds=time.monotonic() - began)
                case {"idle": count, "to": peer, "by": circuit}:
                    for _ in range(count):
                        sock = await _dialled(both, circuit, PeerId(peer))
                        sock.send(b"i")
                        await trio.lowlevel.wait_readable(sock.fileno())
                        raw.idle.append(sock)
                    say()
                case {"first": peer, "at": addresses}:
                    links.learn(PeerId(peer), addresses)
                    began, echo.came = time.monotonic(), trio.Event()
                    link = await links.link(PeerId(peer))
                    link.send(bytes([1, 1]))
                    await echo.came.wait()
                    took = time.monotonic() - began
                    assert link.way is Way.RELAYED
                    link.close()
                    say(ms=1000 * took)


def _resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


async def _dialled(both: Relaying, circuit: str, peer: PeerId) -> socket.socket:
    way = circuit_from_multiaddr(circuit)
    assert way is not None
    return await both.relays.dial(way, peer)


async def _pump(both: Relaying, circuit: str, peer: PeerId, size: int) -> None:
    sock = await _dialled(both, circuit, peer)

    def send() -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 1 << 30)
        block, left = bytes(BLOCK), size
        while left:
            left -= sock.send(block[: min(left, BLOCK)])
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""  # it was all taken
        sock.close()

    await trio.to_thread.run_sync(send)


# --- what drives them ---------------------------------------------------------------------


class Party:
    """One node's process."""

    def __init__(self, host: Host) -> None:
        words = [sys.executable, "-m", "bench.relay", "--node", host.name, "--address", host.address]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.host = host
        self._process = host.start(words, cwd=Path(__file__).parents[1], **pipes)
        self.me = self._answer()

    def ask(self, **what: Any) -> Row:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Row:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.host.name} has ended: {self.host.ended()}")
        return json.loads(line)


def parties(lab: Lab, rate: float, circuits: int, *, raw: bool) -> tuple[Party, Party, Party, str]:
    """The relay, a, b, and the circuit by which b is reached."""
    caps = {"up": rate or None, "down": rate or None}
    hosts = [lab.host(name, **caps) for name in ("relay", "near", "far")]
    relay, a, b = map(Party, hosts)
    relay.ask(open=circuits)
    (circuit,) = b.ask(hold="relay", at=relay.me["addresses"], raw=raw)["addresses"]
    return relay, a, b, circuit


def carry(lab: Lab, given: argparse.Namespace) -> Iterator[Row]:
    for rate in given.rates:
        relay, a, b, circuit = parties(lab, rate, 16, raw=True)
        _route(a.host, relay.host, b.host)
        size = int(given.gib * (1 << 30)) if not rate else int(min(given.gib * (1 << 30), rate * 1e6 / 8 * 6))
        a.ask(pump=64 << 20, to="far", by=circuit)  # warm
        plain, ours, cpu = [], [], []
        for _ in range(given.runs):
            plain.append(_iperf(a.host, b.host))
            before = relay.ask(usage=1)["cpu"]
            ours.append(size * 8 / 1e6 / a.ask(pump=size, to="far", by=circuit)["seconds"])
            cpu.append((relay.ask(usage=1)["cpu"] - before) / (size / (1 << 30)))
        yield {
            "bench": "carry",
            "rate": rate or None,
            "iperf3_mbit": round(statistics.median(plain)),
            "relay_mbit": round(statistics.median(ours)),
            "share": round(statistics.median(ours) / statistics.median(plain), 3),
            "cpu_per_gib": round(statistics.median(cpu), 3),
        }
        lab.clear()


def _route(a: Host, relay: Host, b: Host) -> None:
    """Have what a and b send each other go through the relay's kernel."""
    for setting in (
        "net.ipv4.ip_forward=1",
        "net.ipv4.conf.all.send_redirects=0",
        "net.ipv4.conf.eth0.send_redirects=0",
    ):
        relay.run(["sysctl", "-q", "-w", setting])
    for here, there in ((a, b), (b, a)):
        sh(f"ip -n {here.space} route add {there.address}/32 via {relay.address} src {here.address}")


def _iperf(a: Host, b: Host) -> float:
    """Mbit/s of one stream."""
    server = b.start(["iperf3", "-s", "-1"], stdout=subprocess.DEVNULL)
    while ":5201 " not in sh(f"ip netns exec {b.space} ss -ltn"):
        time.sleep(0.05)
    said = json.loads(a.run(["iperf3", "-c", b.address, "-t", IPERF_SECONDS, "-O", 1, "-J"]))
    server.wait(PATIENCE)
    return float(said["end"]["sum_received"]["bits_per_second"]) / 1e6


def idle(lab: Lab, given: argparse.Namespace) -> Iterator[Row]:
    relay, a, _, circuit = parties(lab, 0, given.circuits, raw=True)
    a.ask(pump=256 << 20, to="far", by=circuit)  # it has worked before
    a.ask(idle=1, to="far", by=circuit)
    before = relay.ask(usage=1)
    a.ask(idle=given.circuits - 1, to="far", by=circuit)
    while (after := relay.ask(usage=1))["circuits"] < given.circuits:
        time.sleep(0.1)
    time.sleep(2)
    later = relay.ask(usage=1)
    yield {
        "bench": "idle",
        "circuits": given.circuits,
        "rss_before": round(before["rss"] / 2**20, 1),
        "rss": round(later["rss"] / 2**20, 1),
        "kib_each": round((later["rss"] - before["rss"]) / 1024 / (given.circuits - 1), 2),
        "idle_cpu": round((later["cpu"] - after["cpu"]) / 2, 4),
    }
    lab.clear()


def first(lab: Lab, given: argparse.Namespace) -> Iterator[Row]:
    relay, a, _, circuit = parties(lab, 0, 16, raw=False)
    cold = a.ask(first="far", at=[circuit])["ms"]
    warm = [a.ask(first="far", at=[circuit])["ms"] for _ in range(20)]
    yield {
        "bench": "first",
        "cold_ms": round(cold, 1),
        "warm_ms": round(statistics.median(warm), 1),
        "warm_ms_most": round(max(warm), 1),
    }
    assert relay.host.ended() == []
    lab.clear()


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    asked.add_argument("--gib", type=float, default=2.0)
    asked.add_argument("--rates", type=float, nargs="+", default=[0.0, 1000.0])
    asked.add_argument("--circuits", type=int, default=1000)
    asked.add_argument("--runs", type=int, default=3)
    asked.add_argument(
        "--only", nargs="+", choices=("carry", "idle", "first"), default=["carry", "idle", "first"]
    )
    asked.add_argument("--node", help=argparse.SUPPRESS)
    asked.add_argument("--address", help=argparse.SUPPRESS)
    given = asked.parse_args()
    if given.node:
        trio.run(node, given.node, given.address)
        return
    if why := labs.absent():
        sys.exit(f"bench: {why}")
    with stoppable(), open_lab(None) as lab:
        for name in given.only:
            for row in {"carry": carry, "idle": idle, "first": first}[name](lab, given):
                report(json.dumps(row))
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
