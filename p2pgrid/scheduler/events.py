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
    fault_pause: float = 15.0
    """For which a worker gets no task after it failed one; twice that after the next, and so on."""
    fault_pause_max: float = 600.0
    return_patience: float = 3600.0
    """In which a submitter's node that is online must have come nearer to a result."""
    inputs_grace: float = 300.0
    """After the put of a job's inputs, in which they are kept for a job that is about to be submitted."""
    membership: float = 7 * 86400.0
    """For which a membership that is issued holds."""
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
