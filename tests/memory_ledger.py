"""Be a ledger in memory: what a save brought is there after any restart, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from p2pgrid.scheduler.facts import DatumRow, Member, Past, Row, TokenRevoked, TokenUse
from p2pgrid.scheduler.job import Job, Task


class MemoryLedger:
    """Rows by kind and key, in the order in which they were first kept (data: last put)."""

    def __init__(self) -> None:
        self.rows: dict[type, dict[Any, Any]] = {
            kind: {} for kind in (Member, DatumRow, TokenUse, TokenRevoked, Job, Task)
        }
        self.saves = 0

    async def load(self) -> Past:
        return self.past()

    def past(self) -> Past:
        """Copies: what the machine changes later is not saved by that."""
        kinds = (Member, DatumRow, TokenUse, TokenRevoked, Job, Task)
        return Past(*([attrs.evolve(row) for row in self.rows[kind].values()] for kind in kinds))

    async def save(self, rows: Sequence[Row]) -> None:
        self.keep(rows)

    def keep(self, rows: Sequence[Row]) -> None:
        self.saves += 1
        for row in rows:
            table = self.rows[type(row)]
            match row:
                case Member(peer=key) | TokenRevoked(token=key) | Job(id=key) | Task(id=key):
                    table[key] = attrs.evolve(row)
                case TokenUse():
                    table[row.token, row.peer] = row
                case DatumRow():
                    table.pop(row.record.datum, None)
                    table[row.record.datum] = row
