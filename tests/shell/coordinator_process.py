"""Be a coordinator that can be killed: a process with a ledger, calls as lines on its pipes.

In come lines of base64 frames `CALL PEER REQUEST`, out go `CALL REPLY`.  Tickets say what
they grant.  Run as `python -m tests.shell.coordinator_process LEDGER`.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import attrs
import trio

from p2pgrid import wire
from p2pgrid.ids import PeerId, digest
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.coordinator import Desk, serve_coordinator
from p2pgrid.scheduler.events import Rules
from p2pgrid.scheduler.ledger import SqliteLedger

OWNER = PeerId("owner")


@attrs.frozen
class Pass:
    """Any ticket is good for a worker."""

    role: str = "worker"
    token_id: str = "token"
    uses: int | None = None
    expires: float = 1e12


class NoNetwork:
    """Calls come by the pipes only."""

    def serve(self, protocol: str, serve: object) -> None:
        """Nobody comes this way."""

    def sign(self, statement: bytes) -> bytes:
        """Nobody checks it."""
        return digest(statement)


async def _answer(desk: Desk, call: str, peer: str, body: str) -> None:
    reply = await desk.answer(PeerId(peer), wire.decode(base64.b64decode(body), m.Request))
    line = f"{call} {base64.b64encode(wire.encode(reply)[wire.HEADER :]).decode()}\n"
    sys.stdout.write(line)
    sys.stdout.flush()


async def main() -> None:
    ledger = SqliteLedger(Path(sys.argv[1]))
    async with trio.open_nursery() as nursery:

        async def serve(task_status=trio.TASK_STATUS_IGNORED) -> None:
            await serve_coordinator(
                NoNetwork(), ledger, lambda *_: Pass(), owner=OWNER, check=True,
                rules=Rules(lease_ttl=5, lost_after=5), task_status=task_status,
            )  # fmt: skip

        desk = await nursery.start(serve)
        async for line in trio.wrap_file(sys.stdin):
            nursery.start_soon(_answer, desk, *line.split())
        nursery.cancel_scope.cancel()
    ledger.close()


if __name__ == "__main__":
    trio.run(main)
