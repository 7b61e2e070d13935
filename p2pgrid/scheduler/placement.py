"""Decide which data a node should hold, and which nodes a job should expect to work for it.

Pure: functions over a snapshot.  `should_hold` is BitDew's Algorithm 1 (Fedak, He, Cappello
2008) with the inequality as in its code (`owners < replica`; the paper prints it reversed),
and what it lacked: *expected workers* get a job's disk before they get the task.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import attrs

from p2pgrid.ids import PeerId
from p2pgrid.scheduler.job import JobSpec
from p2pgrid.scheduler.messages import Capacity

EVERYWHERE = -1


@attrs.frozen
class Wish:
    """How a datum wishes to live: `replica` copies, or -1 for one on every worker."""

    datum: str
    replica: int
    bytes: int
    """What the node has yet to fetch of it."""


@attrs.frozen
class Holder:
    """A node as placement sees it: what it holds or is already fetching, and its room (bytes)."""

    peer: PeerId
    holds: Collection[str]
    room: int


def should_hold(
    node: Holder,
    data: Iterable[Wish],
    owners: Mapping[str, Collection[PeerId]],
    expected: Mapping[str, Collection[PeerId]],
) -> set[str]:
    """The data of `data` that `node` should hold; what it holds already, it keeps.

    `owners` counts nodes that hold a datum or were told to.  Data that do not fit the
    node's room (any more) are left out; those it was told to hold, and then those of expected
    jobs, are first to be placed.
    """
    kept: set[str] = set()
    wanted: list[Wish] = []
    room = node.room
    for wish in data:
        if wish.datum in node.holds:
            kept.add(wish.datum)
        else:
            wanted.append(wish)
    told = {w.datum for w in wanted if node.peer in owners.get(w.datum, ())}
    wanted.sort(key=lambda w: (w.datum not in told, node.peer not in expected.get(w.datum, ())))
    for wish in wanted:
        is_due = (
            wish.datum in told
            or node.peer in expected.get(wish.datum, ())
            or wish.replica == EVERYWHERE
            or len(owners.get(wish.datum, ())) < wish.replica
        )
        if is_due and wish.bytes <= room:
            kept.add(wish.datum)
            room -= wish.bytes
    return kept


def fits(spec: JobSpec, offer: Capacity, shares: Collection[str], missing: int = 0) -> bool:
    """Whether a worker that offers `offer` and shares `shares` may run a task of `spec`.

    `missing` bytes of its data are to be fetched first.
    """
    return (
        offer.slots > 0
        and spec.memory <= offer.memory
        and spec.cpus <= offer.cpus
        and spec.scratch <= offer.disk
        and missing <= offer.store
        and all(need in shares for need in spec.needs)
    )


@attrs.frozen
class Candidate:
    """A worker that is online: what it offers when idle, and what is free now."""

    peer: PeerId
    total: Capacity
    free: Capacity
    shares: Collection[str]


def expected_workers(
    spec: JobSpec, count: int, candidates: Sequence[Candidate], missing: Mapping[PeerId, int]
) -> list[PeerId]:
    """The workers that will likely run `count` pending tasks of `spec`, likeliest first.

    Those with a free slot come first, then those to whom the fewest bytes of its data are
    `missing`.  At most `count`: a disk that nobody needs is not sent ahead.
    """
    able = [c for c in candidates if fits(spec, c.total, c.shares, missing[c.peer])]
    able.sort(key=lambda c: (not fits(spec, c.free, c.shares), missing[c.peer], c.peer))
    return [c.peer for c in able[:count]]


def why_pending(
    spec: JobSpec,
    candidates: Sequence[Candidate],
    missing: Mapping[PeerId, int],
    paused: Mapping[PeerId, float],
) -> str:
    """In one sentence, what tasks of `spec` wait for: the condition that most workers fail.

    `missing` bytes of its data by worker; seconds for which a worker is `paused`, as it failed lately.
    """
    if not candidates:
        return "no worker is online"
    tests: list[tuple[str, Callable[[Candidate], bool]]] = [
        *((f"shares {need}", lambda c, need=need: need in c.shares) for need in spec.needs),
        (f"offers {spec.memory >> 20} MiB of memory", lambda c: spec.memory <= c.total.memory),
        (f"offers {spec.cpus} CPUs", lambda c: spec.cpus <= c.total.cpus),
        (f"has {spec.scratch >> 20} MiB of disk for scratch", lambda c: spec.scratch <= c.total.disk),
        ("has room in its store for the disk and the inputs", lambda c: missing[c.peer] <= c.total.store),
    ]
    online = f"of {len(candidates)} workers online"
    left = list(candidates)
    for what, passes in tests:
        kept = [c for c in left if passes(c)]
        if not kept:
            others = "" if len(left) == len(candidates) else " of those that meet the rest"
            return f"{online} none{others} {what}"
        left = kept
    pauses = [paused[c.peer] for c in left if c.peer in paused]
    if not pauses:
        return f"{online} {len(left)} can run it; waiting for a free slot"
    failed = "all" if len(pauses) == len(left) else str(len(pauses))
    return (
        f"{online} {len(left)} can run it; {failed} of these failed lately and get no task for up to "
        f"{max(pauses):.0f} s; waiting for a free slot"
    )
