"""Measure what two NATs take from a link: the same bytes between two public hosts, and between two homes.

    python -m bench nat [--rates 200 1000 0] [--seconds 1.5] [--runs 3]

public   a ──────────────────────── bridge ──────────────────────── b    a link dialled
nat      a ── port-restricted NAT ── bridge ── port-restricted NAT ── b    a link punched

Lines are shaped where they leave the host or router, and where they leave the bridge, `--rates` in
Mbit/s both ways; 0: as fast as two cores go, which swings with all else that they do.  Beside each run
of a link is one of iperf3 over the same way, let in by a forwarded port: what the kernel alone
loses there.  Runs alternate between the cases, medians are taken.  CPU is of both nodes together,
s per GiB, without what routers take, which is the kernel's.

A last row tells how soon a link is there where a packet takes 40 ms from home to home: seconds from
wanting it to the first byte, which came over a relay, and to the punched path.
JSON lines go to stdout, a table to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import attrs
import structlog
import trio

from bench import lab as labs
from bench.grid import report
from bench.lab import sh, shape, stoppable
from bench.relay import Network, say
from p2pgrid.hole_punch.bulk import Link, open_links
from p2pgrid.hole_punch.path import Way, to_multiaddr
from p2pgrid.hole_punch.punching import open_punching
from p2pgrid.hole_punch.relay.limits import Limits
from p2pgrid.hole_punch.relay.relaying import open_relaying
from p2pgrid.ids import PeerId
from tests.netns.lab import HUB, HUB_TOO, Host, Lab, lab, run
from tests.netns.nats import PORT, PORT_RESTRICTED, PUBLIC, Nat

RELAYS = {PeerId("relay"): (HUB, 443), PeerId("relay-too"): (HUB_TOO, 443)}
"""Two, because one observer cannot tell whether a NAT maps alike for all."""
BULK, PING, PONG = b"\x01", b"\x02", b"\x03"
PIECE = bytes(256 << 10)
QUEUED = 2 * len(PIECE)
IPERF = 5201
UNSHAPED = {"links": 1 << 30, "iperf3": 4 << 30}
"""Bytes of one run where nothing is shaped."""
DELAY = 0.040
"""Seconds that a packet takes from home to home in the last row."""
PATIENCE = 30.0
"""Seconds for anything."""

Row = dict[str, Any]


# --- a node -------------------------------------------------------------------------------


class Bulk:
    """Sends, or counts, pieces, and answers pings; a `Receiver` of the one link that there is."""

    def __init__(self) -> None:
        self.token = trio.lowlevel.current_trio_token()
        self.link: Link | None = None
        self.to_send = self.to_come = 0
        self.arrived, self.answered = trio.Event(), trio.Event()

    def __call__(self, link: Link) -> Bulk:
        if link.peer not in RELAYS:
            self.link = link
        return self

    def received(self, message: memoryview) -> None:
        kind = message[:1]
        if kind == PING and self.link is not None:
            self.link.send(PONG)
        elif kind == PONG:
            self.token.run_sync_soon(self.answered.set)
        else:
            self.to_come -= 1
            if self.to_come == 0:
                self.token.run_sync_soon(self.arrived.set)

    def drained(self) -> None:
        while self.to_send > 0 and self.link is not None and self.link.queued < QUEUED:
            self.link.send(BULK, PIECE, bulk=True, again=lambda: (BULK, PIECE))
            self.to_send -= 1

    def left(self, why: str) -> None: ...


async def node(name: str, host: str, port: int) -> None:
    """Do what stdin says, a JSON line at a time, and answer each."""
    from p2pgrid.node import daemon

    daemon._stay_small()
    daemon._log_to_stderr()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    bulk, network = Bulk(), Network(PeerId(name))
    async with (
        open_links(network, [(host, port)]) as links,
        open_relaying(links, network.me) as both,
        open_punching(links, network.me),
    ):
        links.serve(range(BULK[0], PONG[0] + 1), bulk)
        if network.me in RELAYS:
            both.service.open(Limits())
        else:
            links.observers.update(RELAYS)
            both.relays.learn({relay: [to_multiaddr(where)] for relay, where in RELAYS.items()})
            while set(both.relays.held) != set(RELAYS):
                await both.relays.changed()
        say(addresses=list(links.addresses))
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            match json.loads(line):
                case {"link": peer, "at": addresses}:
                    links.learn(PeerId(peer), addresses)
                    say(**await _link(links, bulk, PeerId(peer)))
                case {"send": count}:
                    assert bulk.link is not None
                    bulk.to_send = count
                    bulk.link.wake()
                    say()
                case {"expect": count}:
                    bulk.arrived, bulk.to_come = trio.Event(), count
                    say()
                case {"arrived": _}:
                    await bulk.arrived.wait()
                    say()
                case {"cpu": _}:
                    assert bulk.link is not None
                    say(cpu=time.process_time(), way=bulk.link.way.name)


async def _link(links: Any, bulk: Bulk, peer: PeerId) -> Row:
    """Link `peer`, directly in the end: how, and after how many seconds."""
    began, direct = trio.current_time(), trio.Event()

    def notice(link: Link) -> None:
        if link.way is not Way.RELAYED:
            direct.set()

    links.paths.append(notice)
    with trio.fail_after(PATIENCE):
        link = await links.link(peer)
        first_way = link.way
        link.send(PING)
        await bulk.answered.wait()
        first = trio.current_time() - began
        await direct.wait()
    took = trio.current_time() - began
    return {"first_way": first_way.name, "first": first, "way": link.way.name, "direct": took}


# --- what drives them ---------------------------------------------------------------------


class Party:
    """One node's process; ended when the block is left."""

    def __init__(self, name: str, space: str, host: str, port: int) -> None:
        self.name = name
        words = [sys.executable, "-m", "bench.nat", "--node", name, "--at", host, str(port)]
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", space, *words],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, **what: Any) -> Row:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Row:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"{self.name} has ended: {self._process.wait()}")
        return json.loads(line)


@attrs.frozen
class Pair:
    """Two hosts of one kind, and a node in each."""

    hosts: tuple[Host, Host]
    nodes: tuple[Party, Party]
    came: Row
    """How their link came about."""

    def links(self, size: int) -> tuple[float, float]:
        """Mbit/s from the first to the second, and the CPU s per GiB of both."""
        a, b = self.nodes
        count = size // len(PIECE)
        b.ask(expect=count)
        before, began = self.cpu(), time.monotonic()
        a.ask(send=count)
        b.ask(arrived=1)
        seconds = time.monotonic() - began
        moved = count * len(PIECE)
        return moved * 8 / 1e6 / seconds, (self.cpu() - before) / (moved / (1 << 30))

    def cpu(self) -> float:
        """Seconds so far, of both."""
        said = [node.ask(cpu=1) for node in self.nodes]
        assert {each["way"] for each in said} == {self.came["way"]}, "the link has moved"
        return sum(each["cpu"] for each in said)

    def iperf3(self, size: int) -> float:
        """Mbit/s from the first to the second, of one stream."""
        a, b = self.hosts
        with subprocess.Popen(b.words("iperf3", "-s", "-1"), stdout=subprocess.DEVNULL) as server:
            try:
                while f":{IPERF} " not in sh(f"ip netns exec {b.space} ss -ltn"):
                    time.sleep(0.02)
                said = json.loads(sh(" ".join(a.words("iperf3", "-c", b.outside, "-n", size, "-J"))))
                server.wait(PATIENCE)
            finally:
                server.kill()
        return float(said["end"]["sum_received"]["bits_per_second"]) / 1e6


@contextlib.contextmanager
def open_pair(world: Lab, name: str, nat: Nat, delay: float = 0.0) -> Iterator[Pair]:
    a, b = hosts = world.home(nat, delay), world.home(nat, delay)
    if b.router:
        forward = (
            f'chain in {{ type nat hook prerouting priority dstnat - 1; iifname "wan" tcp dport {IPERF} '
        )
        forward += f"dnat to {b.ipv4}\n}}"
        run(["ip", "netns", "exec", b.router, "nft", "-f", "-"], f"table ip forwarded {{\n{forward}\n}}\n")
    with (
        Party(f"{name}-a", a.space, a.ipv4, PORT) as near,
        Party(f"{name}-b", b.space, b.ipv4, PORT + 1) as far,
    ):
        near.answer()
        came = near.ask(link=far.name, at=far.answer()["addresses"])
        assert came["way"] == ("PUNCHED" if b.router else "DIRECT"), came
        yield Pair(hosts, (near, far), came)


@contextlib.contextmanager
def open_relays(world: Lab) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        relays = [stack.enter_context(Party(name, world.hub, *where)) for name, where in RELAYS.items()]
        for relay in relays:
            relay.answer()
        yield


def reshape(world: Lab, host: Host, rate: float | None) -> None:
    """Let the line of `host` carry `rate` Mbit/s both ways."""
    number = int(host.outside.rpartition(".")[2]) - int(HUB.rpartition(".")[2])
    up = (host.router, "wan") if host.router else (host.space, "eth0")
    for space, device in (up, (world.wire, f"w{number}")):
        with contextlib.suppress(subprocess.CalledProcessError):  # there is none before the first
            sh(f"tc -n {space} qdisc del dev {device} root")
        shape(space, device, rate)


def bulk(given: argparse.Namespace) -> Iterator[Row]:
    """A row for each rate."""
    with (
        lab() as world,
        open_relays(world),
        open_pair(world, "public", PUBLIC) as public,
        open_pair(world, "nat", PORT_RESTRICTED) as nat,
    ):
        pairs = {"public": public, "nat": nat}
        for pair in pairs.values():
            pair.links(64 << 20)  # warm
        for rate in given.rates:
            for pair in pairs.values():
                for host in pair.hosts:
                    reshape(world, host, rate or None)
            sizes = dict.fromkeys(UNSHAPED, round(rate * 1e6 / 8 * given.seconds)) if rate else UNSHAPED
            yield _compare(rate, pairs, sizes, given.runs)


def _compare(rate: float, pairs: dict[str, Pair], sizes: dict[str, int], runs: int) -> Row:
    seen: dict[str, list[float]] = {}
    for n in range(runs):
        for name in sorted(pairs, reverse=n % 2 == 0):
            mbit, cpu = pairs[name].links(sizes["links"])
            seen.setdefault(f"{name}_mbit", []).append(mbit)
            seen.setdefault(f"{name}_cpu", []).append(cpu)
            seen.setdefault(f"{name}_iperf3", []).append(pairs[name].iperf3(sizes["iperf3"]))
    row: Row = {"bench": "nat", "rate": rate or None, "runs": runs}
    row |= {key: round(statistics.median(values), 3) for key, values in seen.items()}
    row["all"] = {key: [round(value, 2) for value in values] for key, values in seen.items()}
    row["ratio"] = round(row["nat_mbit"] / row["public_mbit"], 3)
    row["ratio_cpu"] = round(row["nat_cpu"] / row["public_cpu"], 3)
    row["ratio_iperf3"] = round(row["nat_iperf3"] / row["public_iperf3"], 3)
    return row


def late() -> Row:
    """How soon a link is there over a long way."""
    with lab() as world, open_relays(world), open_pair(world, "nat", PORT_RESTRICTED, DELAY / 2) as pair:
        return {"bench": "nat-late", "delay": DELAY, **pair.came}


COLUMNS = (
    "public_mbit", "nat_mbit", "ratio", "public_iperf3", "nat_iperf3", "ratio_iperf3",
    "public_cpu", "nat_cpu", "ratio_cpu",
)  # fmt: skip


def main() -> None:
    asked = argparse.ArgumentParser(
        prog="python -m bench nat", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    asked.add_argument("--rates", type=float, nargs="+", default=[200.0, 1000.0, 0.0])
    asked.add_argument("--seconds", type=float, default=1.5, help="of each run over a shaped line")
    asked.add_argument("--runs", type=int, default=3)
    asked.add_argument("--node", help=argparse.SUPPRESS)
    asked.add_argument("--at", nargs=2, help=argparse.SUPPRESS)
    given = asked.parse_args()
    if given.node:
        trio.run(node, given.node, given.at[0], int(given.at[1]))
        return
    if why := labs.absent():
        sys.exit(f"bench: {why}")
    if missing := [tool for tool in ("nft", "iperf3") if not shutil.which(tool)]:
        sys.exit(f"bench: {', '.join(missing)} not installed")
    with stoppable():
        report(f"{'Mbit/s':<12}" + "".join(f"{column:>15}" for column in COLUMNS))
        for row in bulk(given):
            print(json.dumps(row), flush=True)
            name = f"{row['rate']:g}" if row["rate"] else "0 (noisy)"
            report(f"{name:<12}" + "".join(f"{row[column]:>15.2f}" for column in COLUMNS))
        row = late()
        print(json.dumps(row), flush=True)
        report(f"40 ms from home to home: first byte {row['first']:.2f} s, punched {row['direct']:.2f} s")


if __name__ == "__main__":
    main()
