"""Do the schedule's promises hold after any history of calls, silences and restarts?

What is promised: an acknowledged job is never lost, each of its tasks is recorded exactly
once, from a result that was reported under the epoch that counts; whoever lost a lease
cannot spoil it; and in the end, with one honest worker, everything finishes.
"""

from __future__ import annotations

import sys
from typing import Any

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.events import Rules, Undelivered
from p2pgrid.scheduler.job import FINAL, JobSpec, Outcome
from tests.schedule_history import OWNER, History, Pass, cid, tree

GIB = 1 << 30
ROOM = m.Capacity(slots=1, memory=4 * GIB, cpus=4, disk=100 * GIB)
WORKERS = ("ann", "bob", "eve")
SUBMITTERS = ("sam", "tom")
DISKS = ("a", "b")
names = st.sampled_from(WORKERS)


@attrs.define
class Worker:
    """What a worker believes."""

    leases: dict[str, int] = attrs.field(factory=dict)
    holds: set[str] = attrs.field(factory=set)
    pulls: list[int] = attrs.field(factory=list)


class AnyHistory(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.history = History(
            rules=Rules(lease_ttl=30, beat_interval=5, lost_after=20, return_patience=60, inputs_grace=60)
        )
        self.workers = {name: Worker() for name in WORKERS}
        self.jobs: dict[str, tuple[str, JobSpec, str]] = {}
        self.final: dict[str, Any] = {}
        self.reports: dict[tuple[str, int], Outcome] = {}
        self.granted: dict[tuple[str, int], str] = {}
        self.stale: list[tuple[str, str, int]] = []
        for name in WORKERS:
            assert isinstance(self.ask(name, m.Join(name=name), Pass("worker")), m.Welcome)
        for name in SUBMITTERS:
            self.ask(name, m.Join(name=name), Pass("submitter"))
            for disk in DISKS:
                self.ask(name, m.Put(m.DatumRecord(cid(name + disk), "disk", wire_bytes=100)))

    def ask(self, peer: str, request: m.Request, admission: Pass | None = None) -> Any:
        reply = self.history.ask(peer, request, admission)
        self.hear()
        if isinstance(reply, m.Orders):
            self.nothing_needed_is_dropped(peer, set(reply.drop))
        return reply

    def nothing_needed_is_dropped(self, peer: str, drop: set[str]) -> None:
        for task in self.history.schedule.work.tasks.values():
            who, spec, _ = self.jobs.get(task.job, (None, None, None))
            if spec is not None and task.state not in FINAL:
                assert not drop & {spec.disk, spec.inputs}, "a job under way needs it"
            if task.outcome is not None and task.outcome.result is not None:
                if task.state == "returning":
                    assert task.tree.datum not in drop, "a result was not collected yet"
                elif task.state in FINAL:
                    assert who != peer or task.tree.datum not in drop, "it is the submitter's"

    def hear(self) -> None:
        """Workers learn of the grants that came to pulls that waited."""
        for name, worker in self.workers.items():
            for call in [c for c in worker.pulls if c in self.history.answers]:
                worker.pulls.remove(call)
                self.learn(name, self.history.answers[call])

    def learn(self, name: str, reply: Any) -> None:
        if isinstance(reply, m.Grant):
            holder = self.granted.setdefault((reply.task, reply.epoch), name)
            assert holder == name, "one epoch was granted to two workers"
            self.workers[name].leases[reply.task] = reply.epoch

    @rule(
        who=st.sampled_from(SUBMITTERS),
        disk=st.sampled_from(DISKS),
        size=st.integers(1, 4),
        needs=st.sampled_from(((), ("root",))),
        has_inputs=st.booleans(),
        key=st.integers(0, 3),
        retries=st.integers(0, 1),
    )
    def submit(self, who, disk, size, needs, has_inputs, key, retries):
        inputs = cid(f"{who} inputs") if has_inputs else None
        if inputs is not None:
            self.ask(who, m.Put(m.DatumRecord(inputs, "tree", wire_bytes=10)))
        spec = JobSpec(cid(who + disk), inputs, array=tuple(range(size)), needs=needs, retries=retries)
        reply = self.ask(who, m.Submit(spec, f"key{key}"))
        known = next((j for j, (w, _, k) in self.jobs.items() if (w, k) == (who, f"key{key}")), None)
        if known is None:
            assert reply.id not in self.jobs
            self.jobs[reply.id] = (who, spec, f"key{key}")
        elif self.jobs[known][1] == spec:
            assert reply.id == known
        else:
            assert reply.code == "Conflict"

    @rule(name=names, root=st.booleans(), cut=st.booleans(), patience=st.sampled_from((0, 5, 20)))
    def pull(self, name, root, patience, cut=False):
        """A worker beats, now and then not with all it holds, and asks for a task."""
        worker = self.workers[name]
        holds = sorted(worker.holds)[: 1 if cut else None]
        partial = tuple(m.Holding(cid(f"{who} inputs"), 5) for who in SUBMITTERS)
        self.ask(name, m.Beat(tuple(holds), partial, total=ROOM, free=ROOM,
                              shares=("root",) if root else (), cut=cut))  # fmt: skip
        worker.pulls.append(self.history.call(name, m.Pull(ROOM, tuple(worker.leases), patience)))
        self.hear()

    @rule(name=names, lost=st.booleans())
    def forget_work(self, name, lost):
        """A worker's process dies; its store may be lost, too."""
        worker = self.workers[name]
        self.stale += [(name, task, epoch) for task, epoch in worker.leases.items()]
        worker.leases.clear()
        if lost:
            worker.holds.clear()

    @rule(name=names, data=st.data())
    def renew(self, name, data):
        leases = self.workers[name].leases
        if not leases:
            return
        task = data.draw(st.sampled_from(sorted(leases)))
        if isinstance(self.ask(name, m.Renew(task, leases[task], "note")), m.Failure):
            del leases[task]

    @rule(name=names, data=st.data(), exit_=st.sampled_from((0, 1)), retry=st.booleans())
    def report(self, name, data, exit_, retry):
        leases = self.workers[name].leases
        if leases:
            task = data.draw(st.sampled_from(sorted(leases)))
            self.tell(name, task, leases.pop(task), exit_, retry)

    @rule(name=names)
    def break_down(self, name):
        """All that a worker takes fails at once, while the others are online: it spends one retry a job."""
        for other in WORKERS:
            self.ask(other, m.Beat(tuple(self.workers[other].holds), total=ROOM, free=ROOM, shares=("root",)))
        before = {t.id: t.attempts for t in self.history.schedule.work.tasks.values()}
        for _ in range(3):
            self.pull(name, root=True, patience=0)
        tainted = self.history.schedule._faults._kinds.values()
        untried = not any(other in kind.failed for kind in tainted for other in WORKERS if other != name)
        tried = bool(self.history.schedule._faults._tried)
        for task, epoch in list(self.workers[name].leases.items()):
            self.tell(name, task, epoch, 1, True)
            del self.workers[name].leases[task]
        if untried and not tried:
            spent: dict[str, int] = {}
            for task in self.history.schedule.work.tasks.values():
                spent[task.job] = spent.get(task.job, 0) + task.attempts - before.get(task.id, 0)
            assert all(n <= 1 for n in spent.values())

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def report_late(self, data):
        name, task, epoch = data.draw(st.sampled_from(self.stale))
        self.tell(name, task, epoch, 0, False)

    @precondition(lambda self: any(w.leases for w in self.workers.values()))
    @rule(name=names, data=st.data())
    def forge(self, name, data):
        """A worker reports and renews a lease that is another's."""
        all_leases = [(n, t, e) for n, w in self.workers.items() for t, e in w.leases.items() if n != name]
        if all_leases:
            _, task, epoch = data.draw(st.sampled_from(all_leases))
            assert isinstance(self.ask(name, m.Renew(task, epoch)), m.Failure)
            self.tell(name, task, epoch, 0, False)

    @precondition(lambda self: any(w.leases for w in self.workers.values()))
    @rule(data=st.data())
    def start_over(self, data):
        """A worker that knew of its lease starts anew, gets a task, and then tells of the old one."""
        name = data.draw(st.sampled_from([n for n, w in self.workers.items() if w.leases]))
        leases = self.workers[name].leases
        task, epoch = next(iter(leases.items()))
        self.ask(name, m.Renew(task, epoch))
        self.forget_work(name, lost=False)
        self.pull(name, root=True, patience=0)
        self.tell(name, task, epoch, 0, False)

    def tell(self, name: str, task: str, epoch: int, exit_: int, retry: bool) -> None:
        result = tree(f"{name} {task} {epoch}" if exit_ else "the same")
        outcome = Outcome(exit_, "off", None if retry else result, retry=retry)
        self.workers[name].holds.add(result.datum)
        reply = self.ask(name, m.Report(task, epoch, outcome))
        if isinstance(reply, m.Done):
            newest = max((e for t, e in self.granted if t == task), default=0)
            assert (task, epoch) in self.reports or epoch == newest, "a late report was taken"
            assert self.granted[task, epoch] == name, "the report of another worker was taken"
            self.reports.setdefault((task, epoch), outcome)
        else:
            assert reply.code in ("Gone", "Revoked")

    @rule(name=names)
    def hang_up(self, name):
        """The link breaks before a grant is heard."""
        worker = self.workers[name]
        if worker.leases:
            task, epoch = next(iter(worker.leases.items()))
            self.history.feed(Undelivered(task, epoch))
            self.hear()

    @rule(who=st.sampled_from(SUBMITTERS))
    def collect(self, who):
        orders = self.ask(who, m.Beat(partial=(m.Holding(tree("the same").datum, 5),)))
        for wanted in orders.hold:
            assert self.jobs[wanted.task.split(".")[0]][0] == who
            assert self.reports[wanted.task, wanted.epoch].result.datum == wanted.datum
            assert isinstance(self.ask(who, m.Collect(wanted.task, wanted.epoch)), m.Done)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data):
        job = data.draw(st.sampled_from(sorted(self.jobs)))
        self.ask(self.jobs[job][0], m.Cancel(job))

    @rule(who=st.sampled_from(SUBMITTERS))
    def stay_online(self, who):
        """A submitter's node beats for a while, and gets no result home."""
        for _ in range(5):
            self.history.until(self.history.now + 15)
            self.hear()
            for name, worker in self.workers.items():
                self.ask(name, m.Beat(tuple(sorted(worker.holds)), total=ROOM, free=ROOM))
            self.ask(who, m.Beat())

    @rule(seconds=st.sampled_from((0.5, 6, 21, 31)))
    def wait(self, seconds):
        self.history.until(self.history.now + seconds)
        self.hear()

    @rule(away=st.sampled_from((0, 100)))
    def restart(self, away):
        self.history.now += away
        self.history.restart()
        for worker in self.workers.values():
            worker.pulls.clear()

    @rule()
    def sleep(self):
        """The coordinator's machine is suspended for an hour."""
        before = set(self.history.schedule.work.leases)
        self.history.now += 3600
        self.ask(OWNER, m.Jobs())
        assert before <= set(self.history.schedule.work.leases), "leases were lost in our own sleep"

    @invariant()
    def what_is_final_stays(self):
        tasks = self.history.schedule.work.tasks
        for id_, recorded in self.final.items():
            task = tasks[id_]
            assert (task.state, task.epoch, task.outcome) == recorded
        for id_, task in tasks.items():
            if task.state in FINAL and id_ not in self.final:
                self.final[id_] = (task.state, task.epoch, task.outcome)
                if task.state in ("completed", "failed"):
                    assert task.outcome == self.reports[id_, task.epoch]
                    assert task.state == ("failed" if task.outcome.exit else "completed")
        assert {f"{job}.{i}" for job, (_, spec, _) in self.jobs.items() for i in spec.array} == set(tasks)

    def teardown(self) -> None:
        """One honest worker and the submitters finish everything."""
        if not hasattr(self, "history"):
            return
        self.history.until(self.history.now + 70)
        shares = ("root",)
        for turn in range(400):
            if all(t.state in FINAL for t in self.history.schedule.work.tasks.values()):
                break
            self.ask("ann", m.Beat(tuple(self.workers["ann"].holds), total=ROOM, free=ROOM, shares=shares))
            self.workers["ann"].leases.clear()
            grant = self.ask("ann", m.Pull(ROOM, (), 0))
            if isinstance(grant, m.Grant):
                self.learn("ann", grant)
                self.tell("ann", grant.task, grant.epoch, 0, turn % 7 == 6)
            else:
                self.history.until(self.history.now + 2)
            for who in SUBMITTERS:
                self.collect(who)
            self.what_is_final_stays()
        assert all(t.state in FINAL for t in self.history.schedule.work.tasks.values()), "no progress"


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


def calls_of_a_grant(pending: int) -> int:
    """Python calls that one pull takes among `pending` tasks."""
    history = History(check=False)
    history.ask("ann", m.Join(), Pass("worker"))
    history.ask(OWNER, m.Put(m.DatumRecord(cid("d"), "disk")))
    for n in range(0, pending, 10_000):
        array = tuple(range(min(10_000, pending - n)))
        history.ask(OWNER, m.Submit(JobSpec(cid("d"), array=array), f"k{n}"))
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    grant = history.ask("ann", m.Pull(ROOM))
    sys.setprofile(None)
    assert isinstance(grant, m.Grant)
    return calls


def test_a_grant_among_many_tasks_costs_no_more_than_among_few():
    assert calls_of_a_grant(50_000) <= calls_of_a_grant(10) + 50


@pytest.mark.parametrize("uses", [1, 3])
def test_a_ticket_is_good_for_so_many_peers_also_over_restarts(uses):
    history = History()
    replies = []
    for n in range(4):
        history.restart()
        replies += [history.ask(f"peer{n}", m.Join(), Pass("worker", "t", uses)) for _ in range(2)]
    assert [isinstance(r, m.Welcome) for r in replies] == [n // 2 < uses for n in range(8)]
