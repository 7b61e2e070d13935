"""Know how this node stands in the network: what its router does for it, and what other members see of it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import attrs
import structlog
import trio

from p2pgrid.errors import Unreachable
from p2pgrid.hole_punch.bulk import Links
from p2pgrid.hole_punch.calling import Calling, open_calling
from p2pgrid.hole_punch.link import Link
from p2pgrid.hole_punch.nat import Mapping
from p2pgrid.hole_punch.netwatch import Change, open_netwatch, read_net
from p2pgrid.hole_punch.path import Address, parse_address
from p2pgrid.ids import PeerId
from p2pgrid.node.gateway import Door, keep_door
from p2pgrid.node.netcheck import ROUTER_PATIENCE, here, report
from p2pgrid.node.prefs import Prefs
from p2pgrid.node.verdict import Facts, Observer

log = structlog.get_logger(__name__)

OBSERVER_PATIENCE = 8.0
"""Seconds for a link to an observer, and for what it is asked."""
OBSERVERS_MAX = 8


@attrs.define
class Outlook:
    """How one node stands in the network."""

    me: PeerId
    grid: PeerId
    """The coordinator."""
    links: Links
    calling: Calling
    door: Door
    prefs: Callable[[], Prefs]
    changed: list[Callable[[Change], None]] = attrs.field(factory=list)
    """Called when the network is another one, or this computer has slept."""

    async def follow_network(self) -> None:
        """Have paths that do not work any more left soon, for ever."""
        async with open_netwatch() as changes:
            async for change in changes:
                log.info("the network changed", gateway=_gateway(change), slept=round(change.slept))
                if change.before.v4 != change.after.v4:
                    self.links.observed.clear()  # that was seen of another network
                self.links.doubt()
                for tell in self.changed:
                    tell(change)

    async def check(self) -> dict[str, Any]:
        """Ask everybody who can tell; the answer of `netcheck`."""
        facts = attrs.evolve(
            here(read_net()), bound=tuple(self.links.bound), mapping_wanted=self.prefs().port_mapping == "on"
        )
        observers: dict[PeerId, Observer] = {}
        with trio.move_on_after(ROUTER_PATIENCE):
            await self.door.settled.wait()
        async with trio.open_nursery() as nursery:
            for peer in self._observers():
                nursery.start_soon(self._ask, peer, observers)
        mapping = self.door.mapping
        facts = attrs.evolve(
            facts,
            mapped=mapping.address if mapping is not None else None,
            how=mapping.how if mapping is not None else "",
            unmapped=self.door.why,
            observers=tuple(observers[peer] for peer in sorted(observers, key=lambda p: (p != self.grid, p))),
        )
        return report(attrs.evolve(facts, hairpin=await self._hairpin(facts)))

    def _observers(self) -> list[PeerId]:
        relays = {circuit.relay for circuit in self.links.circuits} | self.links.observers
        return sorted({self.grid} | relays, key=lambda p: (p != self.grid, p))[:OBSERVERS_MAX]

    async def _ask(self, peer: PeerId, observers: dict[PeerId, Observer]) -> None:
        if peer == self.me:
            return
        role = "coordinator" if peer == self.grid else "relay"
        relays = any(circuit.relay == peer for circuit in self.links.circuits)
        asked = Observer(peer, role, relays, why="no answer")
        known = next(iter(self.links.addresses_of(peer)), "")
        observers[peer] = attrs.evolve(asked, address=_address(known))
        # A link that was there before the peer became an observer was made from another port.
        watched = peer in self.links.observers or all(link.peer != peer for link in self.links.live())
        self.links.observers.add(peer)
        with trio.move_on_after(OBSERVER_PATIENCE):
            try:
                seconds, link = await self.links.ping(peer)
            except Unreachable as away:
                observers[peer] = attrs.evolve(observers[peer], why=away.why)
                return
            seen = self.links.observed.get(peer) if watched else None
            found = attrs.evolve(
                asked, address=_far(link), delay=seconds, way=link.way.value, seen=seen, why=""
            )
            observers[peer] = found
            mapped = next(iter(self.links.mapped), None)
            if (where := mapped or seen) is not None:
                observers[peer] = attrs.evolve(found, called=await self.calling.call(link, where[1]))

    async def _hairpin(self, facts: Facts) -> bool | None:
        where = facts.mapped or (facts.seen[0] if facts.mapping is Mapping.INDEPENDENT else None)
        if where is None or facts.unmediated:
            return None
        return await self.calling.reach_self(where)


def _gateway(change: Change) -> str:
    return change.after.v4.gateway if change.after.v4 is not None else "none"


def _address(multiaddr: str) -> Address | None:
    match multiaddr.split("/"):
        case ["", "ip4" | "ip6", host, "tcp", port, *_]:
            return parse_address(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    return None


def _far(link: Link) -> Address | None:
    try:
        host, port = link.path.tls.socket.getpeername()[:2]
    except OSError:
        return None
    return str(host).partition("%")[0], int(port)


@contextlib.asynccontextmanager
async def open_outlook(
    links: Links,
    me: PeerId,
    grid: PeerId,
    prefs: Callable[[], Prefs],
    moved: Callable[[], None] = lambda: None,
) -> AsyncIterator[Outlook]:
    """Have the router let others in, and be ready to be asked, while inside.

    `moved` is called when others are to be told of another address.
    """
    links.observers.update({grid} - {me})
    async with open_calling(links) as calling, trio.open_nursery() as nursery:
        outlook = Outlook(me, grid, links, calling, Door(), prefs)
        nursery.start_soon(keep_door, links, outlook.door, prefs, moved)
        nursery.start_soon(outlook.follow_network)
        yield outlook
        nursery.cancel_scope.cancel()
