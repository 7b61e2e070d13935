"""Say what a job is, and the states through which each of its tasks goes.

Pure.  A job is one virtual machine run once for each index of its array; each run is a
task, named `JOB.INDEX`.

    pending --granted--> running --reported--> returning --collected--> completed | failed | error
       ^                    |                      |
       |                    +-- grid's fault, retries left, or lease lost
       +--------------------+----------------------+-- holder of the result lost, or it cannot travel
    pending | running | returning --cancel--> cancelled        running --retries gone--> error
    returning --cannot travel, for the third time--> error

*returning*: the guest has ended; its result tree lies on the worker and is on its way to the
submitter's node.  Only what the submitter has collected is final.  *failed* is the guest's
own doing (exit status not 0, or its time was up), *error* the grid's.

A lease is (task, epoch).  The epoch grows with each grant, so that whoever lost a lease is
told `Gone` however late it reports (fencing tokens: Gray & Cheriton 1989 for leases, Kleppmann 2016
for the fence).  Executed at least once, recorded exactly once.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import attrs
import msgspec
from msgspec import Meta

from p2pgrid.errors import WorldError
from p2pgrid.ids import PeerId

ARRAY_MAX = 10_000
"""Tasks of one job: its rows are one transaction, and a person can still read the list."""

CidText = Annotated[str, Meta(pattern="^b[a-z2-7]{58}$", min_length=59, max_length=59)]
"""A CID in its base32 text form."""
Name = Annotated[str, Meta(max_length=128)]
Word = Annotated[str, Meta(pattern="^[ -~]+$", min_length=1, max_length=64)]
"""ASCII, so that its length is its size."""
Rule = Annotated[str, Meta(pattern="^[0-9]{1,5}(:[a-z0-9]{1,64})?$", max_length=70)]
Note = Annotated[str, Meta(max_length=200)]
"""A sentence for people."""
Bytes = Annotated[int, Meta(ge=0, le=1 << 50)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]

State = Literal["pending", "running", "returning", "completed", "failed", "error", "cancelled"]
FINAL = frozenset({"completed", "failed", "error", "cancelled"})


class JobSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a submitter asks for.  Sizes in bytes, times in seconds."""

    disk: CidText
    inputs: CidText | None = None
    """A tree with `context.sh` and the input files."""
    name: Name = ""
    array: Annotated[tuple[Annotated[int, Meta(ge=0, le=1 << 31)], ...],
                     Meta(min_length=1, max_length=ARRAY_MAX)] = (0,)  # fmt: skip
    memory: Bytes = 512 << 20
    cpus: Annotated[int, Meta(ge=1, le=1024)] = 1
    time_limit: Seconds = 3600.0
    scratch: Bytes = 8 << 30
    net: Literal["none"] = "none"
    lan: bool = False
    """The guests of its tasks share a network of their own."""
    accept: Annotated[tuple[Rule, ...], Meta(max_length=32)] = ()
    """Who may reach its guests, beside each other in their LAN: PORT is for its submitter, PORT:job for its
    guests, too, PORT:JOB for those of another job.  Nobody else."""
    needs: Annotated[tuple[Word, ...], Meta(max_length=32)] = ()
    """Sharings that a worker must declare, as "root" or "virtualbox"."""
    retries: Annotated[int, Meta(ge=0, le=100)] = 3
    """Further attempts after failures of the grid, by different workers; lost workers are not counted."""


class ResultTree(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tree datum that a worker made of a task's `/scratch` and console."""

    datum: CidText
    content: CidText | None = None
    size: Bytes = 0
    wire_bytes: Bytes = 0


class Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of a lease, as its worker reports it.

    `retry` says that the grid is at fault (disk not to be had, no boot): the task is tried
    again while it has retries left.  `result` may still bring the console home.
    """

    exit: Annotated[int, Meta(ge=-(1 << 31), le=1 << 31)] | None = None
    """The guest's exit status; None where it never told one."""
    why: Note = ""
    """How it ended: "off", "time", "boot", or a sentence."""
    result: ResultTree | None = None
    retry: bool = False
    seconds: Seconds = 0.0
    """From boot to end."""
    timings: Annotated[dict[Word, Seconds], Meta(max_length=16)] = {}
    """Seconds by phase, as "fetch", "boot", "run"."""
    sources: Annotated[dict[Word, Bytes], Meta(max_length=64)] = {}
    """Payload bytes fetched for this task, by peer."""


@attrs.define(eq=False)
class Task:
    """One run of a job's virtual machine: what the ledger keeps of it."""

    id: str
    job: str
    index: int
    state: State = "pending"
    epoch: int = 0
    node: PeerId | None = None
    """Who runs it or ran it last."""
    attempts: int = 0
    """Failures of the grid that count against `retries`: those of different workers."""
    lost: int = 0
    """Leases and results that vanished with their node."""
    outcome: Outcome | None = None
    """Of the epoch that is returning or final."""
    started: float = 0.0
    reported: float = 0.0
    ended: float = 0.0
    reason: str = ""
    """Why it is pending again, or an error."""

    @property
    def tree(self) -> ResultTree:
        """The result that is on its way."""
        assert self.outcome is not None
        assert self.outcome.result is not None
        return self.outcome.result


@attrs.define(eq=False)
class Job:
    """What the ledger keeps of a job; its tasks are rows of their own."""

    id: str
    spec: JobSpec
    submitter: PeerId
    key: str
    """The submitter's idempotency key."""
    created: float
    cancelled: bool = False


def task_id(job: str, index: int) -> str:
    """The name of a task."""
    return f"{job}.{index}"


def verdict(outcome: Outcome) -> State:
    """The final state that `outcome` leads to once its result is collected."""
    if outcome.retry:
        return "error"
    return "completed" if outcome.exit == 0 else "failed"


@attrs.frozen(kw_only=True, slots=False)
class Gone(WorldError):
    """The lease is no longer yours: the task was given to another worker, or it is done."""

    exit_code: ClassVar[int] = 10
    what: str


@attrs.frozen(kw_only=True, slots=False)
class Revoked(WorldError):
    """The lease was taken back: the job was cancelled."""

    exit_code: ClassVar[int] = 10
    what: str
