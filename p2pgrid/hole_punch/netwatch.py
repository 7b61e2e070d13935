"""Notice that this computer's network is another one, or that it has slept.

The kernel tells of every change (rtnetlink); that starts a wait until it has been quiet for a moment,
and then the present network is compared with the last one.  So a renewed lease, a container that
comes and goes, or a second router advertisement are no change; a new address or gateway is.

A suspended computer's monotonic clock stands still and its boot clock goes on: when they part,
it slept, and connections that look alive may be dead, mappings forgotten.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import attrs
import structlog
import trio

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch import netlink
from p2pgrid.hole_punch.netlink import Route

log = structlog.get_logger(__name__)

QUIET = 0.5
"""Seconds without news after which the network counts as settled."""
UNREST_MAX = 3.0
"""Seconds after which it is looked at, settled or not."""
LOOK = 5.0
"""Seconds between two looks at the clocks."""
SLEEP_MIN = 2.0
"""Seconds by which the clocks must part: less is how they are read one after the other."""
RECEIVE = 64 << 10

Clocks = Callable[[], tuple[float, float]]


@attrs.frozen
class Net:
    """What matters of a computer's network."""

    addresses: frozenset[str] = frozenset()
    """Of all interfaces, but for loopback and link-local ones."""
    v4: Route | None = None
    """The way to the internet; None: there is none."""
    v6: Route | None = None


@attrs.frozen
class Change:
    """The network is another one, or the computer slept for `slept` seconds, or both."""

    before: Net
    after: Net
    slept: float = 0.0


@attrs.define
class Watch:
    """Tell whether what is seen differs from what was seen before.  Pure."""

    net: Net
    clocks: tuple[float, float]
    """The monotonic clock, and the one that goes on while the computer sleeps."""

    def look(self, net: Net, clocks: tuple[float, float]) -> Change | None:
        slept = (clocks[1] - clocks[0]) - (self.clocks[1] - self.clocks[0])
        before, self.net, self.clocks = self.net, net, clocks
        if slept < SLEEP_MIN:
            slept = 0.0
        return Change(before, net, slept) if slept or net != before else None


def read_clocks() -> tuple[float, float]:
    return time.clock_gettime(time.CLOCK_MONOTONIC), time.clock_gettime(time.CLOCK_BOOTTIME)


def read_net() -> Net:
    """The network now; empty where the kernel does not tell.  It answers without waiting for anybody."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as line:
            line.settimeout(1.0)
            return Net(_addresses(line), _route(line, netlink.V4), _route(line, netlink.V6))
    except (OSError, BadFrame) as refused:
        log.debug("the kernel does not tell of its network", why=str(refused))
        return Net()


def _addresses(line: socket.socket) -> frozenset[str]:
    line.send(netlink.ask_addresses())
    found: set[str] = set()
    while True:
        for kind, body in netlink.messages(line.recv(RECEIVE)):
            if kind in (netlink.DONE, netlink.ERROR):
                return frozenset(found)
            if kind == netlink.NEW_ADDRESS:
                host = netlink.read_address(body)
                if host is not None and not ipaddress.ip_address(host).is_loopback:
                    found.add(host)


def _route(line: socket.socket, family: int) -> Route | None:
    line.send(netlink.ask_route(family))
    for kind, body in netlink.messages(line.recv(RECEIVE)):
        if kind == netlink.NEW_ROUTE:
            return netlink.read_route(body)
    return None  # an error: no way leads there


@contextlib.asynccontextmanager
async def open_netwatch(
    clocks: Clocks = read_clocks, look: Callable[[], Net] = read_net
) -> AsyncIterator[trio.MemoryReceiveChannel[Change]]:
    """Each change from now on; several that nobody has taken yet are told as one."""
    send, changes = trio.open_memory_channel[Change](1)
    watch = Watch(look(), clocks())

    def tell() -> None:
        change = watch.look(look(), clocks())
        if change is None:
            return
        with contextlib.suppress(trio.WouldBlock):
            missed = changes.receive_nowait()
            change = attrs.evolve(change, before=missed.before, slept=change.slept + missed.slept)
        log.debug("the network changed", slept=round(change.slept), gateway=_gateway(change.after))
        send.send_nowait(change)

    async def look_at_clocks() -> None:
        while True:
            await trio.sleep(LOOK)
            tell()

    async with send, changes, trio.open_nursery() as nursery:
        nursery.start_soon(look_at_clocks)
        await nursery.start(_listen, tell)
        yield changes
        nursery.cancel_scope.cancel()


async def _listen(tell: Callable[[], None], task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
    """Have the network looked at whenever the kernel has told of something and is quiet again."""
    try:
        line = trio.socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    except OSError as refused:  # a sandbox: what remains is the look every `LOOK` seconds
        log.info("changes of the network are noticed late here", why=str(refused))
        task_status.started()
        return
    with line:
        await line.bind((0, netlink.GROUPS))
        task_status.started()
        while True:
            await _heard(line, math.inf)
            until = trio.current_time() + UNREST_MAX
            while await _heard(line, min(trio.current_time() + QUIET, until)):
                pass
            tell()


async def _heard(line: trio.socket.SocketType, deadline: float) -> bool:
    """Whether the kernel told of something before the deadline; what it was is not looked at."""
    with trio.move_on_at(deadline):
        try:
            await line.recv(RECEIVE)
        except OSError as lost:  # ENOBUFS: more was told than we took; something has changed at any rate
            log.debug("news of the network was lost", why=str(lost))
        return True
    return False


def _gateway(net: Net) -> str:
    route = net.v4 or net.v6
    return route.gateway if route is not None else ""
