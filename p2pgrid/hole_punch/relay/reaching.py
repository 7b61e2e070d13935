"""Dial a relay where it may be, and keep the connection that is there first."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence

import trio

from p2pgrid.errors import Unreachable
from p2pgrid.hole_punch.greeting import bare
from p2pgrid.hole_punch.path import Address
from p2pgrid.ids import PeerId

PATIENCE = 3.0
"""Seconds for a connection."""
STAGGER = 0.05
"""Seconds between the starts of dials to one relay."""
ADDRESSES_MAX = 8
"""Addresses of one relay that are dialled."""


async def reach(relay: PeerId, addresses: Sequence[Address]) -> tuple[socket.socket, Address, float]:
    """A connection to the first of `addresses` that answers, and the seconds it took.

    Raises `Unreachable`.
    """
    addresses = addresses[:ADDRESSES_MAX]
    found: list[tuple[socket.socket, Address, float]] = []
    with trio.move_on_after(PATIENCE):
        async with trio.open_nursery() as nursery:

            async def dial(address: Address, delay: float) -> None:
                await trio.sleep(delay)
                began = trio.current_time()
                with (
                    contextlib.suppress(OSError),
                    trio.socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET) as sock,
                ):
                    await sock.connect(address)
                    if not found:
                        found.append((bare(sock), address, trio.current_time() - began))
                        nursery.cancel_scope.cancel()

            for place, address in enumerate(addresses):
                nursery.start_soon(dial, address, place * STAGGER)
    if not found:
        raise Unreachable(who=relay, why=f"the relay is at none of its {len(addresses)} addresses")
    return found[0]
