"""Build a small internet of network namespaces: a bridge as the wire, homes behind NATs on it.

    hub 203.0.113.9, .10 ──┐
                           ├── bridge (namespace "wire"), IPv6 router of the internet
    home: inside 10.N.0.2 ── router 203.0.113.(10+N), which does to packets what its `Nat` says

A router maps (which address a packet from inside gets, RFC 4787) and filters (who may answer).
TCP and UDP are treated alike.  A whole home costs some 50 ms: all its devices are made by one
`ip -batch`, and each namespace is set up by one shell.  Needs root, iproute2 and nftables; everything is
gone when the block is left, and what a killed process left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import attrs
import pytest

from tests.netns.delay import late
from tests.netns.nats import PORT, PORT_RESTRICTED, Filtering, Nat, filter_rules, nat_rules
from tests.netns.spaces import SPACES, inside

HUB, HUB_TOO = "203.0.113.10", "203.0.113.9"
HUB6, HUB6_TOO = "2001:db8::10", "2001:db8::9"
PREFIX = "p2pg"

numbers = itertools.count()
"""Of the labs of this process."""

T = TypeVar("T")

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("nft"),
    reason="network namespaces need root, iproute2 and nftables",
)


@attrs.frozen
class Host:
    """A computer of the lab."""

    space: str
    """The name of its namespace."""
    router: str
    """That of the router before it; empty: there is none."""
    nat: Nat
    ipv4: str
    """Its own address; empty: it has none."""
    ipv6: str
    outside: str
    """The IPv4 address that the internet sees."""

    def words(self, *command: object) -> list[str]:
        """`command` as it must be started to run in this host."""
        return ["ip", "netns", "exec", self.space, *map(str, command)]

    def call(self, make: Callable[[], T]) -> T:
        """Call `make` in this host: sockets that it makes stay there, whoever uses them later."""
        return inside(self.space, make)

    def listen(self, port: int = PORT, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket bound to `port`, which others may share, listening if it is TCP."""
        family = socket.AF_INET if self.ipv4 else socket.AF_INET6

        def make() -> socket.socket:
            sock = self.bound(family, port, kind)
            if kind == socket.SOCK_STREAM:
                sock.listen()
            return sock

        return self.call(make)

    def dial(self, address: tuple[str, int], port: int = PORT, timeout: float = 2.0) -> socket.socket:
        """A TCP connection from `port`.  Raises `OSError`."""
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        sock = self.call(lambda: self.bound(family, port, socket.SOCK_STREAM))
        try:
            sock.settimeout(timeout)
            sock.connect(address)
        except OSError:
            sock.close()
            raise
        return sock

    @staticmethod
    def bound(family: int, port: int, kind: int) -> socket.socket:
        """A socket at a port that others may share."""
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.settimeout(5.0)
        sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
        return sock


def run(words: list[str], script: str) -> None:
    done = subprocess.run(words, input=script, capture_output=True, text=True, timeout=30)
    if done.returncode or done.stderr:
        pytest.fail(f"{' '.join(words)}: {done.stderr}\n{script}")


class Lab:
    """Namespaces whose names begin with `prefix`."""

    def __init__(self, prefix: str, undo: contextlib.ExitStack) -> None:
        self.prefix = prefix
        self._undo = undo
        self._routers = 0
        self._spaces("wire", "hub")
        self.wire, self.hub = f"{prefix}wire", f"{prefix}hub"
        self._cables(("wan", self.hub, "hub", self.wire))
        self._set_up(
            self.wire,
            "link add name wire0 type bridge mcast_snooping 0",
            "link set wire0 up",
            "link set hub master wire0 up",
            "addr add 2001:db8::1/64 dev wire0",
            forward=True,
        )
        addresses = [f"{HUB}/24", f"{HUB_TOO}/24", f"{HUB6}/64", f"{HUB6_TOO}/64"]
        self._set_up(
            self.hub,
            *(f"addr add {a} dev wan" for a in addresses),
            "link set wan up",
            "-6 route add default via 2001:db8::1",
        )

    def call(self, make: Callable[[], T]) -> T:
        """Call `make` in the hub: sockets that it makes stay there."""
        return inside(self.hub, make)

    def home(self, nat: Nat = PORT_RESTRICTED, delay: float = 0.0) -> Host:
        """A host behind a router of its own, or, where there is nothing between, on the wire.

        `delay`: seconds that a packet takes between it and the wire.
        """
        if nat.filtering is Filtering.NOBODY_ASKED:
            return self._public(nat, delay)
        return self.homes(nat, 1, delay)[0]

    def homes(self, nat: Nat, count: int, delay: float = 0.0) -> list[Host]:
        """Hosts behind one router, each in a network of its own."""
        n = self._number()
        router, carrier = f"nat{n}", f"isp{n}"
        hosts = [f"home{n}-{k}" for k in range(count)]
        self._spaces(router, *hosts, *[carrier] * nat.carrier)
        edge = self.prefix + (carrier if nat.carrier else router)
        cables = [("wan", edge, f"w{n}", self.wire)]
        if nat.carrier:
            cables.append(("lan0", edge, "wan", self.prefix + router))
        cables += [(f"lan{k}", self.prefix + router, "eth0", self.prefix + h) for k, h in enumerate(hosts)]
        self._cables(*cables)
        outside = f"203.0.113.{10 + n}"
        self._plug(n, f"2001:db8:{n:x}::/48 via 2001:db8::{n:x}:1" if nat.ipv6 else "", delay)
        wan = f"{outside}/24"
        if nat.carrier:
            wan, gateway = f"100.64.{n}.2/24", f"100.64.{n}.1"
            self._route(carrier, attrs.evolve(nat, remaps=True), f"{outside}/24", "", [f"{gateway}/24"])
        lans = [f"10.{n}.{k}.1/24" for k in range(count)] if nat.ipv4 else [""] * count
        self._route(router, nat, wan if nat.ipv4 else "", f"100.64.{n}.1" * nat.carrier, lans, n)
        return [self._host(n, k, nat, outside) for k in range(count)]

    def _number(self) -> int:
        self._routers += 1
        assert self._routers < 240
        return self._routers

    def _public(self, nat: Nat, delay: float) -> Host:
        n = self._number()
        name, address, address6 = f"home{n}-0", f"203.0.113.{10 + n}", f"2001:db8::{n:x}:1"
        self._spaces(name)
        self._cables(("eth0", self.prefix + name, f"w{n}", self.wire))
        self._plug(n, "", delay)
        self._set_up(
            self.prefix + name,
            f"addr add {address}/24 dev eth0",
            f"addr add {address6}/64 dev eth0",
            "link set eth0 up",
            "-6 route add default via 2001:db8::1",
        )
        return Host(self.prefix + name, "", nat, address, address6, address)

    def _host(self, n: int, k: int, nat: Nat, outside: str) -> Host:
        own = f"10.{n}.{k}.2" if nat.ipv4 else ""
        own6 = str(ipaddress.ip_address(f"2001:db8:{n:x}:{k:x}::2")) if nat.ipv6 else ""
        commands = ["link set eth0 up"]
        if own:
            commands[:0] = [f"addr add {own}/24 dev eth0"]
            commands.append(f"route add default via 10.{n}.{k}.1")
        if own6:
            commands[:0] = [f"addr add {own6}/64 dev eth0"]
            commands.append(f"-6 route add default via 2001:db8:{n:x}:{k:x}::1")
        self._set_up(f"{self.prefix}home{n}-{k}", *commands)
        return Host(
            f"{self.prefix}home{n}-{k}", f"{self.prefix}nat{n}", nat, own, own6, outside if own else ""
        )

    def _route(self, name: str, nat: Nat, wan: str, gateway: str, lans: list[str], n: int = 0) -> None:
        """Make a router of a namespace: `n` where it routes IPv6, too."""
        commands = [f"addr add {wan} dev wan"] if wan else []
        if nat.ipv6 and n:
            commands.append(f"addr add 2001:db8::{n:x}:1/64 dev wan")
        commands.append("link set wan up")
        for k, lan in enumerate(lans):
            commands += [f"addr add {lan} dev lan{k}"] if lan else []
            commands += [f"addr add 2001:db8:{n:x}:{k:x}::1/64 dev lan{k}"] if nat.ipv6 and n else []
            commands.append(f"link set lan{k} up")
        if nat.ipv6 and n:
            commands.append("-6 route add default via 2001:db8::1")
        if gateway:
            commands.append(f"route add default via {gateway}")
        rules = nat_rules(nat, wan.split("/")[0]) * bool(wan) + filter_rules(nat)
        self._set_up(self.prefix + name, *commands, forward=True, rules=rules)

    def _plug(self, n: int, route: str, delay: float) -> None:
        """Put the cable of router `n` into the bridge, and route what is behind it."""
        commands = [f"-6 route add {route}"] * bool(route)
        if delay:
            longer = [
                f"link add name d{n} type veth peer name e{n}",
                f"link set d{n} up",
                f"link set w{n} up",
            ]
            self._set_up(self.wire, *longer, f"link set e{n} master wire0 up", *commands)
            self._undo.enter_context(late(self.wire, f"w{n}", f"d{n}", delay))
        else:
            self._set_up(self.wire, f"link set w{n} master wire0 up", *commands)

    # --- the few commands that all this is made by ----------------------------------------

    def _spaces(self, *names: str) -> None:
        for name in names:
            self._undo.callback(remove_space, self.prefix + name)
        run(["ip", "-batch", "-"], "".join(f"netns add {self.prefix}{name}\n" for name in names))

    def _cables(self, *cables: tuple[str, str, str, str]) -> None:
        run(
            ["ip", "-batch", "-"],
            "".join(
                f"link add name {a} netns {x} type veth peer name {b} netns {y}\n" for a, x, b, y in cables
            ),
        )

    def _set_up(self, space: str, *commands: str, forward: bool = False, rules: str = "") -> None:
        four = [c for c in commands if not c.startswith("-6 ")]
        six = [c.removeprefix("-6 ") for c in commands if c.startswith("-6 ")]
        script = "for dad in /proc/sys/net/ipv6/conf/*/accept_dad; do echo 0 > $dad; done\n"  # it takes 1 s
        if forward:
            script += "echo 1 > /proc/sys/net/ipv4/ip_forward\n"
            script += "echo 1 > /proc/sys/net/ipv6/conf/all/forwarding\n"
        script += _given("ip -batch -", "\n".join(["link set lo up", *four]))
        if six:
            script += _given("ip -6 -batch -", "\n".join(six))
        if rules:
            script += _given("nft -f -", rules)
        run(["ip", "netns", "exec", space, "sh", "-e", "-s"], script)


def _given(command: str, text: str) -> str:
    return f"{command} <<'END'\n{text}\nEND\n"


def remove_space(space: str) -> None:
    if (SPACES / space).exists():
        subprocess.run(["ip", "netns", "del", space], check=True, timeout=30)


def sweep() -> None:
    """Remove what labs of processes left that are no more."""
    for space in SPACES.glob(f"{PREFIX}[0-9]*-*") if SPACES.exists() else ():
        number = space.name.removeprefix(PREFIX).partition("-")[0]
        if number.isdigit() and not Path(f"/proc/{number}").exists():
            remove_space(space.name)


@contextlib.contextmanager
def lab() -> Iterator[Lab]:
    """A lab of this process."""
    sweep()
    with contextlib.ExitStack() as undo:
        yield Lab(f"{PREFIX}{os.getpid()}-{next(numbers)}-", undo)
