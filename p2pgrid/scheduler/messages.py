"""Frame the calls to a coordinator: `/p2pgrid/coordinator/1`.

Pure.  The caller opens a channel, sends one request, gets one reply, and both close.  A
frame is that of `wire.py`; its body is a MessagePack map with the key "type" that says
which of the structs below it is (lower-case class name).  Every string, list and map is
bounded, unknown fields are refused: decoding is validating.

Who calls is the authenticated peer of the channel, never a field.  Participants: workers
(join, beat, pull, renew, report, leave), submitters (also submit, watch, collect, put, …),
the grid's owner (everything).  Every call may be repeated: it is idempotent by its key
(submit), by its fence (renew, report, collect), or because it only says how things are.

An error comes as `Failure(code, why)`; `code` is the name of a class of `errors.py` or
`job.py`.  Spec with vectors: `docs/protocols/coordinator.md`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import attrs
import msgspec
from msgspec import Meta

from p2pgrid import errors
from p2pgrid.errors import GridError
from p2pgrid.hole_punch.membership import MEMBERSHIP_MAX
from p2pgrid.scheduler.job import (
    Bytes,
    CidText,
    Gone,
    JobSpec,
    Name,
    Note,
    Outcome,
    Revoked,
    Seconds,
    State,
    Word,
)

PROTOCOL = "/p2pgrid/coordinator/1"
PATIENCE_MAX = 25.0
"""Seconds that a long poll may last: shorter than any NAT forgets, longer than most waits."""
PAGE = 96
"""Rows of one reply: well under `wire.BODY_MAX` even where every field is full."""

HOLDS_MAX = 8192
"""Data that one beat lists."""
HOLD_MAX = 64
"""Data that one answer tells a node to fetch; the others come with a later one."""
DROP_MAX = 1024
"""Data, and tasks, that one answer takes back."""
ADDRESSES_MAX = 8
"""Addresses that a node tells of itself."""
REVOCATIONS_MAX = 4096
"""Revocations that are told: the newest."""
INDICES_MAX = 512
"""Tasks of one job that are told of one node."""
RELAYS_MAX = 8
"""Relays that one answer tells of."""
PROVIDERS_MAX = 8
"""Peers named with a datum to fetch; `Providers` tells up to 64."""

Peer = Annotated[str, Meta(pattern="^[!-~]+$", min_length=1, max_length=128)]
Addresses = Annotated[
    tuple[Annotated[str, Meta(pattern="^[!-~]+$", max_length=192)], ...], Meta(max_length=ADDRESSES_MAX)
]
Shares = Annotated[tuple[Word, ...], Meta(max_length=32)]
Id = Annotated[str, Meta(pattern="^[!-~]+$", min_length=1, max_length=64)]
Epoch = Annotated[int, Meta(ge=1, le=1 << 62)]
Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Patience = Annotated[float, Meta(ge=0, le=PATIENCE_MAX)]
Time = Annotated[float, Meta(ge=0, lt=1e11)]
"""Seconds since 1970."""
Role = Literal["worker", "submitter", "coordinator"]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=str.lower):
    """One body of this protocol."""


# --- what a node says of itself ---------------------------------------------------------


class Holding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A datum that a node has in part."""

    datum: CidText
    missing: Bytes


class Capacity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a worker offers right now, leases under way already taken off.  Bytes."""

    slots: Annotated[int, Meta(ge=0, le=4096)] = 0
    memory: Bytes = 0
    cpus: Annotated[int, Meta(ge=0, le=4096)] = 0
    disk: Bytes = 0
    """Free for scratch disks."""
    store: Bytes = 1 << 50
    """Room left in the chunk store for data that are not here yet; as large as can be where it is unknown."""


class Join(Message, frozen=True):
    """Become a member with a ticket.  A member may join again without one, to tell its name."""

    ticket: Annotated[str, Meta(max_length=16384)] = ""
    name: Name = ""
    shares: Shares = ()
    addresses: Addresses = ()


class Beat(Message, frozen=True):
    """Say that I live, what I hold, and what is free; learn what to hold.

    With `patience` the answer may wait that long (seconds) while there is no news; a newer
    beat of the same peer ends the wait of the older one.
    """

    holds: Annotated[tuple[CidText, ...], Meta(max_length=HOLDS_MAX)] = ()
    """Data that are complete here; where they are too many: disks first, then the newest trees."""
    partial: Annotated[tuple[Holding, ...], Meta(max_length=1024)] = ()
    total: Capacity = Capacity()
    """Everything this worker would offer when idle."""
    free: Capacity = Capacity()
    shares: Shares = ()
    addresses: Addresses = ()
    status: Note = ""
    """One line for people, as "paused by its owner"."""
    patience: Patience = 0.0
    cut: bool = False
    """`holds` is not all: what is not listed is not taken as gone."""
    relay: Addresses = ()
    """Where this node relays for members; empty where it is no relay."""


class Pull(Message, frozen=True):
    """Ask for one task; the answer may wait `patience` seconds for one to come.

    `working` names every task that this worker still has a lease on (also reported ones
    that were not acknowledged).  A lease that it never learned of is granted once more;
    one that it knew and no longer names is lost.
    """

    free: Capacity
    working: Annotated[tuple[Id, ...], Meta(max_length=4096)] = ()
    patience: Patience = 20.0


class Renew(Message, frozen=True):
    """Keep a lease; `note` says how far it is."""

    task: Id
    epoch: Epoch
    note: Note = ""


class Report(Message, frozen=True):
    """Say what became of a lease.  The first report of an epoch counts, others are acknowledged."""

    task: Id
    epoch: Epoch
    outcome: Outcome


class Leave(Message, frozen=True):
    """Stop being a member; leases and results not yet collected go back."""


# --- what a submitter asks --------------------------------------------------------------


class Submit(Message, frozen=True):
    """Start a job; the same key by the same submitter is the same job."""

    spec: JobSpec
    key: Id


class Collect(Message, frozen=True):
    """The submitter's node has the whole result of this epoch: the task is final."""

    task: Id
    epoch: Epoch


class Watch(Message, frozen=True):
    """A job and its tasks that changed after `version`; may wait `patience` for a change."""

    job: Id
    version: Count = 0
    patience: Patience = 0.0


class Jobs(Message, frozen=True):
    """A page of my jobs, newest first, older than the job `after`."""

    after: Annotated[str, Meta(max_length=64)] = ""


class Cancel(Message, frozen=True):
    """End every task of a job that is not final."""

    job: Id


class DatumRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the grid knows of a datum besides its bytes."""

    datum: CidText
    kind: Literal["disk", "tree"]
    content: CidText | None = None
    name: Name = ""
    format: Annotated[str, Meta(max_length=16)] = ""
    size: Bytes = 0
    unique_bytes: Bytes = 0
    wire_bytes: Bytes = 0
    replica: Annotated[int, Meta(ge=-1, le=1 << 20)] = 0
    """How many nodes shall hold it; -1 for every worker; 0 for no wish."""


class Put(Message, frozen=True, omit_defaults=True):
    """Make a datum known; the caller holds it.  The latest put under a name has the name."""

    record: DatumRecord
    draft: CidText | None = None
    """The draft that was told of while the disk was pressed; who was to hold that, is to hold this."""


class Draft(Message, frozen=True):
    """A disk is being put: let workers fetch what there is of it.  To be told again within a minute.

    `draft` is the name of its first draft; with `over` it came to nothing.
    """

    draft: CidText
    size: Bytes = 0
    """Bytes that it may come to."""
    replica: Annotated[int, Meta(ge=-1, le=1 << 20)] = 0
    over: bool = False


class Forget(Message, frozen=True):
    """Let every node drop a datum."""

    datum: CidText


class Data(Message, frozen=True):
    """A page of my data, newest first, older than the datum `after`."""

    after: Annotated[str, Meta(max_length=64)] = ""


class Datum(Message, frozen=True):
    """One datum by CID or name; by "" the disk that I put last."""

    name: Name = ""


class Providers(Message, frozen=True):
    """Who has a datum, wholly or in part."""

    datum: CidText


class Nodes(Message, frozen=True):
    """A page of the grid's members by peer id, after the peer `after`."""

    after: Annotated[str, Meta(max_length=128)] = ""


class Revoke(Message, frozen=True):
    """Refuse a ticket from now on, and everyone who joined with it.  Owner only."""

    token: Id


class Neighbours(Message, frozen=True):
    """A page of who runs tasks of a job now, by peer id, after the peer `after`.

    Told to its submitter and, where the job has a LAN, to who runs one of its tasks; and to who runs a job
    whose guests it accepts, or that accepts its guests.
    """

    job: Id
    after: Annotated[str, Meta(max_length=128)] = ""


class Revocations(Message, frozen=True):
    """Whose memberships are void before they expire."""


Request = (
    Join | Beat | Pull | Renew | Report | Leave | Submit | Collect | Watch | Jobs | Cancel
    | Put | Draft | Forget | Data | Datum | Providers | Nodes | Revoke | Revocations
    | Neighbours
)  # fmt: skip


# --- replies ----------------------------------------------------------------------------


class Provider(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A peer that has a datum, and where it can be reached."""

    peer: Peer
    addresses: Addresses = ()
    complete: bool = True


Found = Annotated[tuple[Provider, ...], Meta(max_length=64)]


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A datum to have, why ("job", "result", "replica"), and who has it."""

    datum: CidText
    kind: Literal["disk", "tree", "draft"]
    """Of a disk that is still being put, a draft: to be followed while it is ordered."""
    content: CidText | None
    size: Bytes
    reason: Literal["job", "result", "replica"]
    peers: Found = ()
    task: str = ""
    """Of a result: collect this (task, epoch) when the tree is complete."""
    epoch: int = 0


class Welcome(Message, frozen=True):
    """You are a member."""

    roles: Annotated[tuple[Role, ...], Meta(max_length=3)]
    name: Name
    coordinator: Peer
    beat_interval: Seconds
    lease_ttl: Seconds
    now: Time = 0.0
    """By the coordinator's clock."""
    membership: Annotated[bytes, Meta(max_length=MEMBERSHIP_MAX)] = b""
    """To show others (`membership.md`)."""


class Relay(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node that relays for members (`relay.md`), and where it takes links."""

    peer: Peer
    addresses: Addresses


class Orders(Message, frozen=True):
    """What a node shall hold (fetch it), drop, and stop; beat again within `interval` seconds."""

    hold: Annotated[tuple[Wanted, ...], Meta(max_length=HOLD_MAX)] = ()
    drop: Annotated[tuple[CidText, ...], Meta(max_length=DROP_MAX)] = ()
    stop: Annotated[tuple[Id, ...], Meta(max_length=DROP_MAX)] = ()
    """Tasks whose lease was taken back."""
    interval: Seconds = 5.0
    now: Time = 0.0
    """By the coordinator's clock."""
    revocations: Annotated[str, Meta(max_length=64)] = ""
    """The revision of those that count now; empty: there are none."""
    relays: Annotated[tuple[Relay, ...], Meta(max_length=RELAYS_MAX)] = ()
    """Of the nodes online; of many not all, and to each node others."""


class Grant(Message, frozen=True):
    """A lease: run `spec` for `index`; renew it well within `ttl` seconds."""

    task: Id
    epoch: Epoch
    job: Id
    index: Count
    spec: JobSpec
    submitter: Peer
    ttl: Seconds
    disk: Wanted
    inputs: Wanted | None = None


class Nothing(Message, frozen=True):
    """No task for you in this time."""


class Lease(Message, frozen=True):
    """The lease is yours for another `ttl` seconds."""

    task: Id
    epoch: Epoch
    ttl: Seconds


class Done(Message, frozen=True):
    """It is done (or was already); `id` names what was made, if anything."""

    id: Annotated[str, Meta(max_length=64)] = ""


class TaskView(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A task as people see it.  Times are the coordinator's wall clock, 0 where not yet."""

    task: Id
    index: Count
    state: State
    epoch: Count = 0
    attempts: Count = 0
    lost: Count = 0
    node: str = ""
    node_name: Name = ""
    started: float = 0.0
    reported: float = 0.0
    ended: float = 0.0
    note: Note = ""
    """What the worker told last, or why it is pending again, or an error."""
    outcome: Outcome | None = None


class JobView(Message, frozen=True):
    """A job; `tasks` are those that changed after the version asked for, oldest change first.

    `more` says that there were more of them than fit: ask again with this `version`.
    """

    job: Id
    spec: JobSpec
    submitter: Peer
    created: float
    state: State
    """Of the whole: final when every task is."""
    version: Count
    counts: Annotated[dict[State, Count], Meta(max_length=7)]
    why: Annotated[str, Meta(max_length=500)] = ""
    """Why tasks are pending."""
    tasks: Annotated[tuple[TaskView, ...], Meta(max_length=PAGE)] = ()
    more: bool = False


class JobRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A job in a list."""

    job: Id
    name: Name
    disk: CidText
    submitter: Peer
    created: float
    state: State
    counts: Annotated[dict[State, Count], Meta(max_length=7)]


class JobList(Message, frozen=True):
    """A page of jobs; `more` where it goes on."""

    jobs: Annotated[tuple[JobRow, ...], Meta(max_length=PAGE)]
    more: bool = False


class DatumView(Message, frozen=True):
    """A datum, who put it and when, and who holds it now."""

    record: DatumRecord
    submitter: Peer
    created: float
    owners: Annotated[tuple[Peer, ...], Meta(max_length=64)] = ()
    """Peers that hold it completely (the first 64; none in a list)."""
    owners_count: Count = 0


class DataList(Message, frozen=True):
    """A page of data; `more` where it goes on."""

    data: Annotated[tuple[DatumView, ...], Meta(max_length=PAGE)]
    more: bool = False


class ProviderList(Message, frozen=True):
    """Who has a datum, complete holders first."""

    providers: Found


class Neighbour(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node that runs tasks of a job, and where it can be reached."""

    peer: Peer
    addresses: Addresses = ()
    indices: Annotated[tuple[Count, ...], Meta(max_length=INDICES_MAX)] = ()
    """Of those tasks."""


class NeighbourList(Message, frozen=True):
    """A page of the nodes that run a job; `more` where it goes on."""

    neighbours: Annotated[tuple[Neighbour, ...], Meta(max_length=PAGE)] = ()
    more: bool = False


class NodeView(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A member as people see it."""

    peer: Peer
    name: Name
    roles: Annotated[tuple[Role, ...], Meta(max_length=3)]
    online: bool
    age: Seconds | None
    """Seconds since it was last heard of; None where it never was."""
    shares: Shares = ()
    total: Capacity = Capacity()
    free: Capacity = Capacity()
    running: Annotated[tuple[Id, ...], Meta(max_length=4096)] = ()
    holds: Count = 0
    addresses: Addresses = ()
    status: Note = ""
    joined: float = 0.0


class NodeList(Message, frozen=True):
    """A page of nodes; `more` where it goes on."""

    nodes: Annotated[tuple[NodeView, ...], Meta(max_length=PAGE)]
    more: bool = False


class Revocation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What was issued to `peer` up to `at` is void."""

    peer: Peer
    at: Time


class RevocationList(Message, frozen=True):
    """Those that count at this revision."""

    revision: Annotated[str, Meta(max_length=64)]
    revocations: Annotated[tuple[Revocation, ...], Meta(max_length=REVOCATIONS_MAX)] = ()


class Failure(Message, frozen=True):
    """The call was refused: the class of the error, and its facts in a sentence."""

    code: Word
    why: Annotated[str, Meta(max_length=1000)]


Reply = (
    Welcome | Orders | Grant | Nothing | Lease | Done | JobView | JobList | DatumView | DataList
    | ProviderList | NodeList | RevocationList | NeighbourList | Failure
)  # fmt: skip


# --- errors across the wire -------------------------------------------------------------

_TOLD: tuple[type[GridError], ...] = (
    errors.Misused,
    errors.NotFound,
    errors.NotAuthorised,
    errors.Conflict,
    errors.Refused,
    errors.Temporary,
    Gone,
    Revoked,
)
_BY_CODE = {kind.__name__: kind for kind in _TOLD}


def failure(error: GridError) -> Failure:
    """`error` as a reply; a class that does not travel becomes `Temporary`."""
    if type(error) in _TOLD:
        (fact,) = attrs.fields(type(error))
        return Failure(type(error).__name__, str(getattr(error, fact.name))[:1000])
    return Failure("Temporary", str(error)[:1000])


def raised(reply: Failure) -> GridError:
    """The error that `reply` tells of."""
    kind = _BY_CODE.get(reply.code)
    if kind is None:
        return errors.Temporary(why=f"{reply.code}: {reply.why}")
    (fact,) = attrs.fields(kind)
    return kind(**{fact.name: reply.why})
