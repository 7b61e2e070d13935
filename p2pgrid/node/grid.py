"""Run the coordinator of a grid within its daemon: ledger, tickets, service.

The key that signs tickets is not the node's own: it lies in `root.key`, and never leaves
this machine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from time import time
from typing import Any

import trio

from p2pgrid.ids import PeerId
from p2pgrid.net import Network
from p2pgrid.node.config import Config
from p2pgrid.node.identity import load_or_create_root
from p2pgrid.node.ticket import create_ticket, public_key, read_ticket, token_id
from p2pgrid.node.ticket import verify as verify_ticket
from p2pgrid.scheduler.client import Calls
from p2pgrid.scheduler.coordinator import Desk, serve_coordinator
from p2pgrid.scheduler.events import Rules
from p2pgrid.scheduler.ledger import SqliteLedger
from p2pgrid.scheduler.members import Admission

LEDGER = "grid.db"


@asynccontextmanager
async def open_grid(home: Path, config: Config, network: Network) -> AsyncIterator[Calls]:
    """Coordinate until the block is left; gives the calls of this daemon to its own coordinator."""
    root = public_key(load_or_create_root(home))

    def verify(token: str, peer: PeerId, now: float) -> Admission:
        return verify_ticket(token, root, network.me, now)

    ledger = await trio.to_thread.run_sync(SqliteLedger, Path(config.ledger or home / LEDGER))
    try:
        async with trio.open_nursery() as nursery:
            serve = partial(
                serve_coordinator,
                network,
                ledger,
                verify,
                owner=network.me,
                rules=rules(config.lease, config.membership),
            )
            desk: Desk = await nursery.start(serve)
            yield desk.local(network.me)
            nursery.cancel_scope.cancel()
    finally:
        ledger.close()


def rules(lease: float, membership: float = Rules.membership) -> Rules:
    """The times of a grid whose leases last `lease` seconds: six beats, four of which may be lost."""
    return Rules(
        lease_ttl=lease, beat_interval=lease / 6, lost_after=lease * 2 / 3, membership=membership
    )  # fmt: skip


def make_ticket(home: Path, network: Network, role: str, uses: int | None, expires: float) -> dict[str, Any]:
    """A ticket of this grid; `expires` in seconds from now.  Raises `Misused`."""
    now = time()
    addresses = list(network.addresses)
    text = create_ticket(load_or_create_root(home), network.me, addresses, role, uses, expires, now)
    return {"ticket": text, "role": role, "uses": uses, "expires": now + expires}


def ticket_id(home: Path, text: str) -> str:
    """By which a ticket of this grid is revoked.  Raises `Misused`, `NotAuthorised`."""
    return token_id(read_ticket(text).token, public_key(load_or_create_root(home)))
