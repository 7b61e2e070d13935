"""Move tasks through their states, and keep every index over them true.

Pure.  `Work` knows jobs, tasks, leases and results; who may ask for a move, and when time
is up, is decided by `schedule.py`.  The picture of the states is in `job.py`.

A lease that lapsed by silence can be *revived* by its holder as long as nobody else got
the task: the epoch is still the newest, so the fence holds, and a running virtual machine
or a finished result survives a cut link.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import msgspec

from p2pgrid.errors import Conflict
from p2pgrid.ids import PeerId
from p2pgrid.scheduler.facts import Past, Row
from p2pgrid.scheduler.job import FINAL, Gone, Job, JobSpec, Outcome, Revoked, State, Task, task_id, verdict
from p2pgrid.scheduler.pending import Order, Pending
from p2pgrid.scheduler.roster import Node, Roster

_FINAL: tuple[State, ...] = ("completed", "failed", "error", "cancelled")

LOST_MAX = 1000
"""Workers that may vanish under one task before it is taken for their murderer."""
STUCK_MAX = 3
"""Results of one task that may fail to travel."""


@attrs.define(eq=False)
class Lease:
    """The right to run (task, epoch) until `until`."""

    until: float
    known: bool = False
    """Its worker has renewed it: it did learn of the grant."""
    timed: bool = False
    """A timer is set for it."""
    note: str = ""


@attrs.define(eq=False)
class JobState:
    """A job with what is counted of it."""

    job: Job
    tasks: list[Task]
    version: int
    """Grows with every change, also over restarts (it starts from the clock, in us)."""
    counts: dict[State, int] = attrs.field(factory=dict)
    changed: dict[str, int] = attrs.field(factory=dict)
    """Task to the version of its last change, oldest change first."""

    @property
    def final(self) -> bool:
        return sum(self.counts.get(state, 0) for state in _FINAL) == len(self.tasks)

    @property
    def state(self) -> State:
        """Of the whole: what it is doing, or once it is final, its worst end."""
        order: tuple[State, ...] = ("running", "returning", "pending", "cancelled", "error", "failed")
        if not self.final and (self.counts.get("running") or self.counts.get("completed")):
            return "running"
        return next((state for state in order if self.counts.get(state)), "completed")


class Work:
    """Jobs and their tasks."""

    def __init__(self, roster: Roster, rows: list[Row]) -> None:
        self.jobs: dict[str, JobState] = {}
        self.tasks: dict[str, Task] = {}
        self.pending = Pending()
        self.leases: dict[str, Lease] = {}
        self.keys: dict[tuple[PeerId, str], str] = {}
        self.returning: dict[PeerId, dict[str, None]] = {}
        """Tasks whose results a submitter is to fetch."""
        self.used: dict[str, int] = {}
        """Data to the number of jobs under way that need them."""
        self.results: dict[str, dict[str, None]] = {}
        """Result trees to the tasks that still return them."""
        self.result_of: dict[str, dict[PeerId, int]] = {}
        """Result trees to the submitters whom they are for, each with the number of tasks; none: a result
        that nobody waits for."""
        self.ended: dict[str, None] = {}
        """Jobs that became final and whose end was not looked at."""
        self.touched: dict[str, None] = {}
        """Jobs that changed since their watchers were told."""
        self.fresh = False
        """Something became pending since waiting workers were looked at."""
        self._stuck: dict[str, int] = {}
        self._roster = roster
        self._rows = rows

    # --- jobs -----------------------------------------------------------------------------

    def restore(self, past: Past, now: float, until: float) -> None:
        """Take up where the ledger ended; leases last until `until`."""
        tasks: dict[str, list[Task]] = {}
        for task in past.tasks:
            tasks.setdefault(task.job, []).append(task)
        for job in past.jobs:
            self.load(job, sorted(tasks[job.id], key=lambda t: t.index), now, until)

    def load(self, job: Job, tasks: list[Task], now: float, until: float) -> None:
        """Take a job in as it is: new, or as the ledger kept it, with leases until `until`."""
        state = JobState(job, tasks, int(now * 1e6))
        self.jobs[job.id] = state
        self.keys[job.submitter, job.key] = job.id
        for task in tasks:
            self.tasks[task.id] = task
            state.counts[task.state] = state.counts.get(task.state, 0) + 1
            state.version += 1
            state.changed[task.id] = state.version
            self._enter(task, state)
            self._await_result(task)
            if task.state == "running":
                self.leases[task.id] = Lease(until)
        if state.final:
            self.ended[job.id] = None
        else:
            self._use(job.spec, +1)

    def submit(self, id_: str, spec: JobSpec, submitter: PeerId, key: str, now: float) -> str:
        """The id of a new job, or of the one with this key.  Raises `Conflict`."""
        known = self.keys.get((submitter, key))
        if known is not None:
            if self.jobs[known].job.spec != spec:
                raise Conflict(what=f"another job has the key {key}")
            return known
        if id_ in self.jobs:
            raise Conflict(what=f"job {id_}")
        job = Job(id_, spec, submitter, key, now)
        tasks = [Task(task_id(id_, index), id_, index) for index in spec.array]
        self.load(job, tasks, now, now)
        self._rows += [job, *(attrs.evolve(t) for t in tasks)]
        self.touched[id_] = None
        return id_

    def cancel(self, state: JobState, now: float) -> None:
        """End every task that is not final."""
        if state.final:
            return
        self._roster.news[state.job.submitter] = None
        state.job.cancelled = True
        self._rows.append(attrs.evolve(state.job))
        for task in state.tasks:
            if task.state in FINAL:
                continue
            if task.state == "running" and task.node is not None:
                self._roster.node(task.node).stops[task.id] = None
                self._roster.news[task.node] = None
            task.ended = now
            self._move(task, "cancelled")

    # --- tasks ----------------------------------------------------------------------------

    def grant(self, task: Task, node: Node, now: float, until: float) -> None:
        """Lease a pending task to `node` until `until`, under a new epoch."""
        assert task.state == "pending"
        self._forget_lapse(task)
        self._forgo_result(task)
        task.epoch += 1
        task.node, task.started, task.reported, task.outcome = node.peer, now, 0.0, None
        self._move(task, "running")
        self.leases[task.id] = Lease(until)

    def claim(self, task: str, epoch: int, peer: PeerId, until: float) -> Task:
        """The task if `peer` holds its lease, revived where it lapsed; `Gone` or `Revoked` if not."""
        found = self._fenced(task, epoch, peer)
        if found.state == "pending" and found.id in self._roster.node(peer).lapsed and found.outcome is None:
            self._forget_lapse(found)
            found.lost -= 1
            self._move(found, "running")
            self.leases[found.id] = Lease(until, known=True)
        if found.state != "running":
            raise Gone(what=f"{task} is {found.state}")
        return found

    def report(
        self,
        task: str,
        epoch: int,
        peer: PeerId,
        outcome: Outcome,
        now: float,
        counts: Callable[[Task], bool],
    ) -> Task | None:
        """Take a report; None if it was taken before.  Raises `Gone` or `Revoked`.

        `counts` is asked whether a failure of the grid spends one of the task's retries.
        """
        found = self._fenced(task, epoch, peer)
        if found.reported:
            if found.id not in self._roster.node(peer).lapsed:
                return None
            self.revive_result(found)
            return found
        self.claim(task, epoch, peer, now)
        found.reported, found.outcome = now, outcome
        self._await_result(found)
        if outcome.retry:
            found.attempts += counts(found)
            found.reason = outcome.why
            if found.attempts <= self.jobs[found.job].job.spec.retries:
                self._move(found, "pending", keep=False)
                return found
        if outcome.result is not None:
            self._move(found, "returning")
        else:
            found.ended = now
            self._move(found, verdict(outcome))
        return found

    def collect(self, task: Task, epoch: int, now: float) -> None:
        """The result is with the submitter: the task is final.  Raises `Gone`."""
        if task.epoch == epoch and task.state in FINAL - {"cancelled"}:
            return
        if task.epoch != epoch or task.state != "returning":
            raise Gone(what=f"{task.id} is {task.state} in epoch {task.epoch}")
        assert task.outcome is not None
        task.ended = now
        self._move(task, verdict(task.outcome))

    def lapse(self, task: Task, reason: str, *, counted: bool = True, revivable: bool = True) -> None:
        """A lease, or the only copy of a result, is lost: the task goes back, or is given up."""
        assert task.state in ("running", "returning")
        assert task.node is not None
        node = self._roster.node(task.node)
        task.reason = reason
        task.lost += counted
        if task.lost > LOST_MAX:
            task.reason = f"{LOST_MAX} workers were lost with it; the last: {reason}"
            self._move(task, "error")
            return
        self._move(task, "pending", keep=revivable)
        if revivable:
            node.lapsed[task.id] = None

    def abandon(self, task: Task, reason: str, now: float) -> None:
        """The result of `task` cannot travel: it is made again elsewhere, or given up."""
        assert task.state == "returning"
        self._stuck[task.id] = self._stuck.get(task.id, 0) + 1
        if self._stuck[task.id] < STUCK_MAX:
            self.lapse(task, reason, revivable=False)
            return
        task.lost += 1
        task.ended = now
        task.reason = f"{STUCK_MAX} results of it could not be brought to its submitter; the last: {reason}"
        self._move(task, "error", keep=False)

    def revive_result(self, task: Task) -> None:
        """The lost holder of a result is back and still has it."""
        assert task.state == "pending"
        assert task.outcome is not None
        self._forget_lapse(task)
        task.lost -= 1
        self._move(task, "returning")

    # --- every index, in one place -----------------------------------------------------------

    def _fenced(self, task: str, epoch: int, peer: PeerId) -> Task:
        found = self.tasks.get(task)
        if found is None or found.epoch != epoch or found.node != peer:
            raise Gone(what=f"{task} in epoch {epoch}")
        if found.state == "cancelled":
            raise Revoked(what=task)
        return found

    def _forget_lapse(self, task: Task) -> None:
        if task.node is not None:
            self._roster.node(task.node).lapsed.pop(task.id, None)

    def _move(self, task: Task, state: State, *, keep: bool = True) -> None:
        """Put `task` into `state`; without `keep`, what it brought will not count."""
        job = self.jobs[task.job]
        was_final = job.final
        self._exit(task)
        if not keep:
            self._forgo_result(task)
        job.counts[task.state] -= 1
        job.counts[state] = job.counts.get(state, 0) + 1
        task.state = state
        self._enter(task, job)
        self.touch(task)
        self._rows.append(attrs.evolve(task))
        assert not was_final, "a final job has no task to move"
        if job.final:
            self._use(job.job.spec, -1)
            self.ended[job.job.id] = None

    def touch(self, task: Task) -> None:
        """Tell watchers that `task` is not what it was."""
        job = self.jobs[task.job]
        job.version += 1
        job.changed.pop(task.id)
        job.changed[task.id] = job.version
        self.touched[task.job] = None

    def _enter(self, task: Task, job: JobState) -> None:
        match task.state:
            case "pending":
                order: Order = (job.job.created, job.job.id, task.index)
                self.pending.add(task.id, job.job.spec, order)
                self.fresh = True
            case "running":
                assert task.node is not None
                self._roster.node(task.node).leases[task.id] = None
            case "returning":
                assert task.node is not None
                self._roster.node(task.node).results[task.id] = None
                self.returning.setdefault(job.job.submitter, {})[task.id] = None
                datum = task.tree.datum
                self.results.setdefault(datum, {})[task.id] = None
                self._roster.news[job.job.submitter] = None
            case _:
                self._forget_lapse(task)
                self._stuck.pop(task.id, None)

    def _exit(self, task: Task) -> None:
        match task.state:
            case "pending":
                self.pending.remove(task.id)
            case "running":
                assert task.node is not None
                del self._roster.node(task.node).leases[task.id]
                del self.leases[task.id]
            case "returning":
                assert task.node is not None
                del self._roster.node(task.node).results[task.id]
                del self.returning[self.jobs[task.job].job.submitter][task.id]
                datum = task.tree.datum
                del self.results[datum][task.id]
                if not self.results[datum]:
                    del self.results[datum]
            case _:
                raise AssertionError(f"{task.id} is final")

    def _use(self, spec: JobSpec, change: int) -> None:
        for datum in filter(None, (spec.disk, spec.inputs)):
            self.used[datum] = self.used.get(datum, 0) + change
            if not self.used[datum]:
                del self.used[datum]

    def _await_result(self, task: Task) -> None:
        """Somebody waits for what `task` brought, or has it."""
        if task.outcome is not None and task.outcome.result is not None:
            waiting = self.result_of.setdefault(task.outcome.result.datum, {})
            submitter = self.jobs[task.job].job.submitter
            waiting[submitter] = waiting.get(submitter, 0) + 1

    def _forgo_result(self, task: Task) -> None:
        """What `task` brought, if anything, will not count."""
        if task.outcome is None or task.outcome.result is None:
            return
        waiting = self.result_of[task.outcome.result.datum]
        task.outcome = msgspec.structs.replace(task.outcome, result=None)
        submitter = self.jobs[task.job].job.submitter
        waiting[submitter] -= 1
        if not waiting[submitter]:
            del waiting[submitter]

    def droppable_result(self, datum: str, peer: PeerId) -> bool:
        """Whether `peer` needs not keep this result tree: collected or in vain, and not for `peer`."""
        to = self.result_of.get(datum)
        return to is not None and peer not in to and datum not in self.results

    def check(self) -> None:
        self.pending.check()
        by_state: dict[str, set[str]] = {}
        for task in self.tasks.values():
            by_state.setdefault(task.state, set()).add(task.id)
            assert task.state in ("pending", "cancelled", "error") or task.epoch >= 1
            assert task.state not in ("completed", "failed") or task.outcome is not None
        nodes = self._roster.nodes.values()
        running = by_state.get("running", set())
        assert {t for t in self.tasks if t in self.pending} == by_state.get("pending", set())
        assert set(self.leases) == running == {t for n in nodes for t in n.leases}
        assert sum(len(n.leases) for n in nodes) == len(running), "a task is leased twice"
        returning = by_state.get("returning", set())
        assert returning == {t for n in nodes for t in n.results}
        assert returning == {t for tasks in self.returning.values() for t in tasks}
        assert all(self.tasks[t].state == "pending" for n in nodes for t in n.lapsed)
        awaited: dict[str, dict[PeerId, int]] = {datum: {} for datum in self.result_of}
        for task in self.tasks.values():
            if task.outcome is not None and task.outcome.result is not None:
                peers = awaited[task.outcome.result.datum]
                submitter = self.jobs[task.job].job.submitter
                peers[submitter] = peers.get(submitter, 0) + 1
        assert awaited == self.result_of
        for job in self.jobs.values():
            assert sum(job.counts.values()) == len(job.tasks) == len(job.changed)
            assert all(sum(t.state == s for t in job.tasks) == n for s, n in job.counts.items())
            assert max(job.changed.values()) <= job.version
