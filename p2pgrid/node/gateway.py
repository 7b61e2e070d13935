"""Have the router let other members reach this node's link port, while its owner allows that."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import trio

from p2pgrid.hole_punch.bulk import Links
from p2pgrid.hole_punch.path import Address
from p2pgrid.hole_punch.portmap import Mapping, open_mapping
from p2pgrid.node.netcheck import UNWANTED
from p2pgrid.node.prefs import Prefs

LOOK = 10.0
"""Seconds between two looks at whether it is allowed."""


@attrs.define
class Door:
    """What the router does for this node."""

    mapping: Mapping | None = None
    """None: it is not asked."""
    unasked: str = ""
    """Why it is not."""
    settled: trio.Event = attrs.field(factory=trio.Event)
    """Set when it was known for the first time what comes of it."""

    @property
    def why(self) -> str:
        """Why nobody gets in by it; empty: somebody does, or it is being tried."""
        return self.mapping.why if self.mapping is not None else self.unasked


def port_to_map(bound: Sequence[Address]) -> Address | None:
    """Of the addresses that we listen at, the one that a router can send others to: NATs are for IPv4."""
    return next((a for a in bound if ":" not in a[0] and not a[0].startswith("127.")), None)


async def keep_door(links: Links, door: Door, prefs: Callable[[], Prefs], moved: Callable[[], None]) -> None:
    """Keep `links.mapped` up to date, for ever; `moved` is called when it has changed."""
    listening, scope = port_to_map(links.bound), trio.CancelScope()
    scope.cancel()
    async with trio.open_nursery() as nursery:
        while listening is not None:
            if prefs().port_mapping != "on":
                scope.cancel()
                door.unasked = UNWANTED
                door.settled.set()
            elif scope.cancel_called:
                scope = trio.CancelScope()
                nursery.start_soon(_keep_mapped, links, door, listening, scope, moved)
            await trio.sleep(LOOK)
        door.unasked = "there is no port that IPv4 hosts could be sent to"
        door.settled.set()


async def _keep_mapped(
    links: Links, door: Door, listening: Address, scope: trio.CancelScope, moved: Callable[[], None]
) -> None:
    host, port = listening
    with scope:
        try:
            async with open_mapping(port, host) as mapping:
                door.mapping = mapping
                while True:
                    now = [mapping.address] if mapping.address is not None else []
                    if now != links.mapped:
                        links.mapped[:] = now
                        moved()
                    if mapping.tried:
                        door.settled.set()
                    await mapping.changed.wait()
        finally:
            door.mapping = None
            links.mapped.clear()
