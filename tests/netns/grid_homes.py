"""Have nodes with links, relays and punching in hosts of the laboratory, a thread each, and two relays."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import attrs
import trio

from p2pgrid.errors import Unreachable
from p2pgrid.hole_punch.bulk import Link, Links, Way, open_links
from p2pgrid.hole_punch.path import Address, to_multiaddr
from p2pgrid.hole_punch.puncher import Puncher
from p2pgrid.hole_punch.punching import open_punching
from p2pgrid.hole_punch.relay.limits import Limits
from p2pgrid.hole_punch.relay.relaying import Relaying, open_relaying
from p2pgrid.ids import PeerId
from tests.memory_network import MemoryNetwork, MemoryWorld
from tests.netns.lab import HUB, HUB6, HUB6_TOO, HUB_TOO, Host, Lab
from tests.netns.punch_homes import in_thread

SECRET = bytes(32)
RELAYS = {PeerId("relay"): ((HUB, 443), (HUB6, 443)), PeerId("relay-too"): ((HUB_TOO, 443), (HUB6_TOO, 443))}
PING, PONG, NUMBER = b"\x01ping", b"\x02", b"\x03"


class OwnNetwork(MemoryNetwork):
    """Control streams lead nowhere: links are all that these nodes have."""

    hosts: Sequence[str] = ()

    @property
    def addresses(self) -> Sequence[str]:
        return [f"/ip{6 if ':' in host else 4}/{host}/tcp/1/p2p/{self.me}" for host in self.hosts]


class Echo:
    """Answers each ping, and hears answers; a `Receiver`."""

    def __init__(self, link: Link, heard: Callable[[PeerId], None]) -> None:
        self._link = link
        self._heard = heard
        self._count = 0
        self.heard_back = 0
        """The last number of ours that was heard there."""

    def received(self, message: memoryview) -> None:
        if message == PING:
            self._link.send(PONG)
        elif message[:1] == NUMBER:
            assert int.from_bytes(message[1:9], "big") == self._count, "lost, twice, or in another order"
            self._count += 1
            self._link.send(PONG, bytes(message[1:9]))
        elif len(message) > 1:
            self.heard_back = int.from_bytes(message[1:9], "big")
        else:
            self._heard(self._link.peer)

    def drained(self) -> None:
        return None

    def left(self, why: str) -> None:
        pass


@attrs.define
class Bond:
    """What came of linking a peer."""

    over: threading.Event = attrs.field(factory=threading.Event)
    ways: list[tuple[Way, float]] = attrs.field(factory=list)
    """Each, and after how many seconds."""
    first_byte: float | None = None
    why: str = ""
    """Why there is no link."""


@attrs.define(eq=False)
class GridNode:
    """A node; `bond` may be called from any thread."""

    me: PeerId
    space: str
    listen: Sequence[Address]
    hosts: Sequence[str]
    limits: Limits | None = None
    links: Links | None = None
    puncher: Puncher | None = None
    both: Relaying | None = None
    token: trio.lowlevel.TrioToken | None = None
    nursery: trio.Nursery | None = None
    answered: dict[PeerId, trio.Event] = attrs.field(factory=dict)
    echoes: dict[PeerId, Echo] = attrs.field(factory=dict)
    """What hears on the newest link of each peer."""

    async def run(self, ready: Callable[[], None]) -> None:
        self.token = token = trio.lowlevel.current_trio_token()

        def heard(peer: PeerId) -> None:
            token.run_sync_soon(lambda: self.answered.setdefault(peer, trio.Event()).set())

        def receive(link: Link) -> Echo:
            self.echoes[link.peer] = Echo(link, heard)
            return self.echoes[link.peer]

        async with trio.open_nursery() as self.nursery:
            world = MemoryWorld(self.nursery)
            world.secret = SECRET
            network = OwnNetwork(world, self.me)
            network.hosts = self.hosts
            async with (
                open_links(network, self.listen, receive) as self.links,
                open_relaying(self.links, self.me) as self.both,
                open_punching(self.links, self.me) as self.puncher,
            ):
                if self.limits is not None:
                    self.both.service.open(self.limits)
                else:
                    self.links.observers.update(RELAYS)
                    self.both.relays.learn({r: [*map(to_multiaddr, where)] for r, where in RELAYS.items()})
                    while set(self.both.relays.held) != set(RELAYS):
                        await self.both.relays.changed()
                ready()
                await trio.sleep_forever()

    def bond(self, other: GridNode, patience: float) -> Bond:
        """Link `other`, and wait until that is direct, or for so many seconds."""
        bond = Bond()
        assert self.token is not None
        self.token.run_sync_soon(
            lambda: self.nursery and self.nursery.start_soon(self._bond, other, bond, patience)
        )
        return bond

    def change(self) -> None:
        """Its network may be another one."""
        assert self.token is not None
        self.token.run_sync_soon(lambda: self.puncher and self.puncher.look(anew=True))

    def way(self, other: GridNode) -> Way | None:
        return link.way if (link := self._link(other)) is not None else None

    def _link(self, other: GridNode) -> Link | None:
        assert self.links is not None
        return next((link for link in self.links.live() if link.peer == other.me), None)

    @contextlib.contextmanager
    def stream(self, other: GridNode) -> Iterator[Callable[[], int]]:
        """Send numbered messages to the other while inside; the function tells how many were heard there."""
        link, stop = self._link(other), threading.Event()
        assert link is not None

        def send() -> None:
            number = 0
            while not stop.is_set():
                if number - echo.heard_back < 50:
                    link.send(NUMBER, number.to_bytes(8, "big"), bytes(10_000))
                    number += 1
                else:
                    stop.wait(0.001)

        echo = self.echoes[other.me]
        thread = threading.Thread(target=send)
        thread.start()
        try:
            yield lambda: echo.heard_back
            assert link.live
        finally:
            stop.set()
            thread.join()

    async def _bond(self, other: GridNode, bond: Bond, patience: float) -> None:
        assert self.links is not None
        assert other.links is not None
        begun, moved = trio.current_time(), trio.Event()

        def notice(link: Link) -> None:
            if link.peer == other.me:
                bond.ways.append((link.way, trio.current_time() - begun))
                if link.way is not Way.RELAYED:
                    moved.set()

        self.links.learn(other.me, other.links.addresses)
        self.links.paths.append(notice)
        try:
            link = await self.links.link(other.me)
            link.send(PING)
            with trio.move_on_after(patience):
                await self.answered.setdefault(other.me, trio.Event()).wait()
                bond.first_byte = trio.current_time() - begun
                await moved.wait()
        except Unreachable as away:
            bond.why = away.why
        finally:
            self.links.paths.remove(notice)
            bond.over.set()


@contextlib.contextmanager
def grid(world: Lab, hosts: dict[str, tuple[Host, int]]) -> Iterator[dict[str, GridNode]]:
    """Nodes by name, each at a host and a port, that hold a reservation at each of two relays."""
    with contextlib.ExitStack() as stack:
        for relay, where in RELAYS.items():
            node = GridNode(relay, world.hub, where, [host for host, _ in where], Limits())
            stack.enter_context(in_thread(world.hub, node.run))
        made: dict[str, GridNode] = {}
        for name, (host, port) in hosts.items():
            own = [h for h in (host.ipv4, host.ipv6) if h]
            listen = [("::" if ":" in h else "0.0.0.0", port) for h in own]
            made[name] = GridNode(PeerId(name), host.space, listen, own)
            stack.enter_context(in_thread(host.space, made[name].run))
        yield made
