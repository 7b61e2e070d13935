"""Name what happens to the schedule, and what it has done about it.

Pure.  Events are past, effects imperative; `Rules` are the times by which it goes.
"""

from __future__ import annotations

import attrs

from p2pgrid.ids import PeerId
from p2pgrid.machine import Tick
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.facts import Row
from p2pgrid.scheduler.members import Admission


@attrs.frozen
class Rules:
    """Times in seconds."""

    lease_ttl: float = 30.0
    beat_interval: float = 5.0
    lost_after: float = 20.0
    """Silence after which a node is offline."""
    backoff_max: float = 60.0
    """Longest time for which a node does not get a task again that it could not start."""
    fairness: float = 60.0
    """Age at which a task is no longer passed over for one whose disk is at hand."""


@attrs.frozen
class Called:
    """`peer` asks; `call` names the answer, `chance` (7 bytes) a new job."""

    call: int
    peer: PeerId
    request: m.Request
    chance: bytes = b""
    admission: Admission | None = None


@attrs.frozen
class Hung:
    """The caller does not wait any more."""

    call: int


@attrs.frozen
class Undelivered:
    """A grant could not be told to its worker."""

    task: str
    epoch: int


@attrs.frozen
class Save:
    """Keep `row` in the ledger."""

    row: Row


@attrs.frozen
class Answer:
    """Tell the caller of `call`, after all rows of the step are saved."""

    call: int
    reply: m.Reply


Event = Called | Hung | Undelivered | Tick
Effect = Save | Answer
