"""Say what the ledger keeps: rows that outlive the coordinator, and the port that keeps them.

Pure.  What is not here (leases' ends, who holds what, who is online) is told again by the
nodes within a heartbeat, and so is never written: a renewal or a beat costs no fsync.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import attrs

from p2pgrid.errors import WorldError
from p2pgrid.ids import PeerId
from p2pgrid.scheduler.job import Job, Task
from p2pgrid.scheduler.messages import DatumRecord


@attrs.frozen
class Member:
    """A peer of the grid and the tickets that gave it its roles; none left: it is out."""

    peer: PeerId
    name: str
    roles: dict[str, str]
    """Role to the id of the ticket."""
    shares: tuple[str, ...]
    joined: float
    revoked: float = 0.0
    """When a role was last taken from it: memberships issued until then are void."""


@attrs.frozen
class DatumRow:
    """A datum that somebody put; `forgotten` is kept so that nodes away now drop it later."""

    record: DatumRecord
    submitter: PeerId
    created: float
    forgotten: bool = False


@attrs.frozen
class TokenUse:
    """A ticket was used by a peer: counted once however often that peer joins."""

    token: str
    peer: PeerId


@attrs.frozen
class TokenRevoked:
    """A ticket counts no longer."""

    token: str


Row = Member | DatumRow | TokenUse | TokenRevoked | Job | Task


@attrs.frozen
class Past:
    """All rows, data and jobs oldest first."""

    members: Sequence[Member] = ()
    data: Sequence[DatumRow] = ()
    uses: Sequence[TokenUse] = ()
    revoked: Sequence[TokenRevoked] = ()
    jobs: Sequence[Job] = ()
    tasks: Sequence[Task] = ()


@attrs.frozen(kw_only=True, slots=False)
class LedgerStuck(WorldError):
    """The coordinator's ledger cannot be written at the moment."""

    exit_code: ClassVar[int] = 8
    why: str


class Ledger(Protocol):
    """Keeps rows.  SQLite today; what a second coordinator would share tomorrow."""

    async def load(self) -> Past:
        """Everything that was ever saved and acknowledged."""
        ...

    async def save(self, rows: Sequence[Row]) -> None:
        """Keep `rows`, a later one for the same key replacing an earlier: all of them or none.

        Durable when it returns.  Raises `LedgerStuck` where it may work later: nothing was kept then.
        """
        ...
