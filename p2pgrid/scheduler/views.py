"""Show the grid to people: jobs, tasks, data and nodes as messages.

Pure: reads, changes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TypeVar, cast

from p2pgrid.ids import PeerId
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.facts import DatumRow
from p2pgrid.scheduler.job import State, Task
from p2pgrid.scheduler.members import Members
from p2pgrid.scheduler.roster import Roster
from p2pgrid.scheduler.work import JobState, Work

T = TypeVar("T")

RUNNING_SHOWN = 64
"""Leases of one node that a list shows."""


def page(rows: Sequence[T], ids: Sequence[str], after: str) -> tuple[Sequence[T], bool]:
    """`PAGE` of `rows` after the one whose id is `after`, and whether there are more."""
    start = ids.index(after) + 1 if after in ids else 0
    return rows[start : start + m.PAGE], len(rows) > start + m.PAGE


def counts(job: JobState) -> dict[State, int]:
    """Tasks by state, states without a task left out."""
    return {state: n for state, n in job.counts.items() if n}


def job_view(job: JobState, after: int, work: Work, members: Members, why: str) -> m.JobView:
    """A job and a page of the tasks that changed after version `after`; `why` some are pending."""
    if after > job.version:
        after = 0
    newest = itertools.takewhile(lambda t: job.changed[t] > after, reversed(job.changed))
    changed = list(newest)[::-1]
    shown, more = changed[: m.PAGE], len(changed) > m.PAGE
    return m.JobView(
        job=job.job.id,
        spec=job.job.spec,
        submitter=job.job.submitter,
        created=job.job.created,
        state=job.state,
        version=job.changed[shown[-1]] if more else job.version,
        counts=counts(job),
        why=why,
        tasks=tuple(task_view(work.tasks[t], work, members) for t in shown),
        more=more,
    )


def task_view(task: Task, work: Work, members: Members) -> m.TaskView:
    lease = work.leases.get(task.id)
    note = lease.note if lease else task.reason
    if task.state == "returning":
        since = datetime.fromtimestamp(task.reported, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        note = f"its result waits at {members.name(task.node)} since {since}"
    return m.TaskView(
        task=task.id,
        index=task.index,
        state=task.state,
        epoch=task.epoch,
        attempts=task.attempts,
        lost=task.lost,
        node=task.node or "",
        node_name=members.name(task.node),
        started=task.started,
        reported=task.reported,
        ended=task.ended,
        note=note[:200],
        outcome=None if task.state in ("pending", "running") else task.outcome,
    )


def job_row(job: JobState) -> m.JobRow:
    spec = job.job.spec
    return m.JobRow(
        job.job.id, spec.name, spec.disk, job.job.submitter, job.job.created, job.state, counts(job)
    )


def who_runs(job: JobState) -> dict[PeerId, tuple[int, ...]]:
    """The indices of the tasks that run now, by the node that runs them."""
    runs: dict[PeerId, tuple[int, ...]] = {}
    if job.counts.get("running"):
        for task in job.tasks:
            if task.state == "running" and task.node is not None:
                runs[task.node] = (*runs.get(task.node, ()), task.index)
    return runs


def datum_view(row: DatumRow, roster: Roster, owners_shown: int) -> m.DatumView:
    owners = tuple(roster.owners(row.record.datum))
    return m.DatumView(row.record, row.submitter, row.created, owners[:owners_shown], len(owners))


def node_view(peer: PeerId, members: Members, roster: Roster, now: float) -> m.NodeView:
    member, node = members[peer], roster.node(peer)
    return m.NodeView(
        peer=member.peer,
        name=member.name,
        roles=cast(tuple[m.Role, ...], tuple(sorted(members.roles(peer)))),
        online=node.online,
        age=None if node.seen is None else max(0.0, now - node.seen),
        shares=node.shares or member.shares,
        total=node.total,
        free=node.free,
        running=tuple(itertools.islice(node.leases, RUNNING_SHOWN)),
        holds=len(node.holds),
        addresses=node.addresses,
        status=node.status,
        joined=member.joined,
    )
