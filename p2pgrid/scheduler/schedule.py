"""Decide who runs what and who holds what: the coordinator's state behind one door.

Pure: no clock, no sockets, no database.  Every call of a peer is an event; effects are
rows to save and answers to give, and no answer may leave before the rows of its step are
saved.  A call that waits (pull, beat, watch) is *parked* and answered by a later step.

    Called(pull)    -> a pending task that fits: its disk is here, else the oldest
    Called(report)  -> returning: the submitter's node is told to fetch the result
    Called(collect) -> final
    Tick            -> leases that ran out and nodes that fell silent give their tasks back

`now` is in seconds and never runs backwards.  A step that comes much later than `deadline`
means that the coordinator slept, not that everybody else did: all get a new term.
"""

from __future__ import annotations

from typing import Any

import msgspec

from p2pgrid.errors import Conflict, GridError, NotAuthorised
from p2pgrid.hole_punch.membership import ALLOWANCE_MAX
from p2pgrid.ids import PeerId
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.catalogue import Catalogue
from p2pgrid.scheduler.drafts import TTL, Drafts
from p2pgrid.scheduler.errands import Errands, gist
from p2pgrid.scheduler.events import Answer, Called, Effect, Event, Hung, Rules, Save, Undelivered
from p2pgrid.scheduler.facts import Past, Row
from p2pgrid.scheduler.faults import Faults
from p2pgrid.scheduler.job import Revoked, Task
from p2pgrid.scheduler.matching import Matching
from p2pgrid.scheduler.members import Admission, Members
from p2pgrid.scheduler.parking import Parked, Parking, Timers
from p2pgrid.scheduler.returns import Returns
from p2pgrid.scheduler.roster import Node, Roster
from p2pgrid.scheduler.submissions import Submissions
from p2pgrid.scheduler.work import Lease, Work


class Schedule:
    """The machine.  After a restart, whoever had a lease or a result has a whole term more."""

    def __init__(self, owner: PeerId, past: Past, now: float, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()
        self._rows: list[Row] = []
        self._answers: list[Answer] = []
        self.members = Members(owner, past, self._rows, now, self.rules.membership + ALLOWANCE_MAX)
        self.roster = Roster()
        self.catalogue = Catalogue(past.data)
        self.drafts = Drafts()
        self.work = Work(self.roster, self._rows)
        self._faults = Faults(self.rules)
        self._returns = Returns(self.rules.return_patience)
        self._errands = Errands(
            self.work, self.roster, self.catalogue, self.drafts, self._faults, self.rules.beat_interval
        )
        self._matching = Matching(self.work, self.roster, self._errands, self._faults)
        self._submissions = Submissions(self.members, self.work, self.roster, self.catalogue, self._errands,
                                        self._returns, self.drafts, self._rows)  # fmt: skip
        self._parking = Parking()
        self._timers = Timers()
        self._jobs_seen = 0
        self._now = now
        for peer in self.members:
            self._note_role(peer)
        self.work.restore(past, now, now + self.rules.lease_ttl)
        for task_id, lease in self.work.leases.items():
            self._time(task_id, lease)
        for node in self.roster.nodes.values():
            if node.leases or node.results:
                self._heard(node, now)
        self._close_jobs(now)

    # --- the door ---------------------------------------------------------------------------

    @property
    def deadline(self) -> float:
        return self._timers.next

    def step(self, event: Event, now: float) -> list[Effect]:
        """Take one event.  Effects are in order: rows first, then the answers that need them."""
        if now > self.deadline + self.rules.lost_after:
            self._slept(now)
        self._now = now
        match event:
            case Called():
                try:
                    if not isinstance(event.request, m.Join):
                        self.members.authorise(event.peer, event.request)
                        self._heard(self.roster.node(event.peer), now)
                    reply = self._ask(event, now)
                except GridError as error:
                    reply = m.failure(error)
                if reply is not None:
                    self._answers.append(Answer(event.call, reply))
            case Hung(call):
                self._parking.remove(call)
            case Undelivered(task, epoch):
                self._undelivered(task, epoch)
        self._ring(now)
        self._match(now)
        self._close_jobs(now)
        self._spread_news(now)
        effects: list[Effect] = [*map(Save, self._rows), *self._answers]
        self._rows.clear()
        self._answers.clear()
        return effects

    def _ask(self, event: Called, now: float) -> m.Reply | None:
        """The answer to a call, or None where it is parked.  Raises what the caller is to be told."""
        peer, submissions = event.peer, self._submissions
        match event.request:
            case m.Join() as join:
                return self._join(peer, join, event.admission, now)
            case m.Leave():
                return self._leave(peer, now)
            case m.Revoke(token):
                return self._revoke(token, now)
            case m.Revocations():
                return self.members.revocations
            case m.Beat() as beat:
                return self._beat(event.call, peer, beat, now)
            case m.Pull() as pull:
                return self._pull(event.call, peer, pull, now)
            case m.Renew() as renew:
                return self._renew(peer, renew, now)
            case m.Report() as report:
                return self._report(peer, report, now)
            case m.Watch() as watch:
                return self._watch(event.call, peer, watch, now)
            case m.Submit() as submit:
                return submissions.submit(peer, submit, event.chance, now)
            case m.Collect() as collect:
                return submissions.collect(peer, collect, now)
            case m.Cancel() as cancel:
                return submissions.cancel(peer, cancel, now)
            case m.Jobs() as jobs:
                return submissions.jobs(peer, jobs)
            case m.Put() as put:
                return submissions.put(peer, put, now)
            case m.Draft() as draft:
                return self._draft(peer, draft, now)
            case m.Forget() as forget:
                return submissions.forget(peer, forget)
            case m.Datum() as datum:
                return submissions.datum(peer, datum)
            case m.Data() as data:
                return submissions.data(peer, data)
            case m.Nodes() as nodes:
                return submissions.nodes(nodes, now)
            case m.Neighbours() as neighbours:
                return submissions.neighbours(peer, neighbours)
            case m.Providers(datum_cid):
                return m.ProviderList(self.roster.providers(datum_cid, peer, 64))

    # --- members ------------------------------------------------------------------------------

    def _note_role(self, peer: PeerId) -> Node:
        node = self.roster.node(peer)
        node.works = "worker" in self.members.roles(peer)
        return node

    def _join(self, peer: PeerId, join: m.Join, admission: Admission | None, now: float) -> m.Reply:
        member = self.members.join(peer, join, admission, now)
        node = self._note_role(peer)
        self.work.fresh |= node.shares != join.shares
        node.shares, node.addresses = join.shares, join.addresses or node.addresses
        self._heard(node, now)
        roles: tuple[Any, ...] = tuple(sorted(self.members.roles(peer)))
        rules = self.rules
        return m.Welcome(roles, member.name, self.members.owner, rules.beat_interval, rules.lease_ttl, now)

    def _leave(self, peer: PeerId, now: float) -> m.Reply:
        if peer == self.members.owner:
            raise Conflict(what="the membership of the grid's owner: it cannot leave")
        self.members.dismiss(peer, now)
        self._expel(peer, "its worker left the grid")
        return m.Done()

    def _revoke(self, token: str, now: float) -> m.Reply:
        for peer in self.members.revoke(token, now):
            if not self._note_role(peer).works:
                self._expel(peer, "its worker's ticket was revoked")
        self.roster.news |= dict.fromkeys(self._parking.beats)  # all refuse them from now on
        return m.Done()

    def _expel(self, peer: PeerId, why: str) -> None:
        """`peer` is no worker any more: what it had goes back at once, for good."""
        node = self._note_role(peer)
        held = self.work.results.keys() & node.holds
        self.roster.lost(node)
        self._give_back(node, why, revivable=False)
        self._orphaned(held)
        for parked in (self._parking.pulls.get(peer), self._parking.beats.get(peer)):
            if parked is not None:
                self._answer(parked, m.failure(NotAuthorised(why=why)))

    def _give_back(self, node: Node, why: str, *, revivable: bool) -> None:
        """Take every lease from `node`, and every result that nobody else holds."""
        for task in [*node.leases, *(t for t in node.results if not self._elsewhere(t))]:
            self.work.lapse(self.work.tasks[task], why, revivable=revivable)

    def _elsewhere(self, task_id: str) -> bool:
        """Whether a node other than its maker is online and holds the result of the task."""
        task = self.work.tasks[task_id]
        return any(peer != task.node for peer in self.roster.owners(task.tree.datum))

    def _orphaned(self, results: set[str]) -> None:
        """A node no longer has `results`: was it the last one that had them?"""
        for task_id in [t for datum in sorted(results) for t in self.work.results.get(datum, ())]:
            task = self.work.tasks[task_id]
            assert task.node is not None
            if not self.roster.node(task.node).online and not self._elsewhere(task_id):
                self.work.lapse(task, "the node that has the result fell silent")

    # --- heartbeats ---------------------------------------------------------------------------

    def _heard(self, node: Node, now: float) -> None:
        if node.online:
            assert node.seen is not None
            node.awake += now - node.seen
        node.seen = now
        if not node.online:
            node.online = True
            self._timers.set(now + self.rules.lost_after, "node", node.peer)

    def _beat(self, call: int, peer: PeerId, beat: m.Beat, now: float) -> m.Reply | None:
        node = self.roster.node(peer)
        self.work.fresh |= node.shares != beat.shares
        before, partial = node.holds, node.partial
        self.roster.beat(node, beat)
        gone = self.work.results.keys() & (before - node.holds)
        self.work.fresh |= peer in self._parking.pulls and (before, partial) != (node.holds, node.partial)
        self._own_results(node, now)
        self._overdue(node, now)
        self._orphaned(gone)
        if peer in self._parking.beats:
            self._answer(self._parking.beats[peer], self._orders(node, now))
        orders = self._ordered(node, now)
        if beat.patience and gist(orders) == node.told:
            self._parking.beat(self._parked(call, peer, beat, now))
            return None
        return self._tell(node, orders)

    def _own_results(self, node: Node, now: float) -> None:
        """See whether `node` still has, or has again, the results that it made."""
        for task in [self.work.tasks[t] for t in node.lapsed]:
            result = task.outcome.result if task.outcome is not None else None
            if result is not None and result.datum in node.holds:
                self.work.revive_result(task)
        for task in [self.work.tasks[t] for t in node.results]:
            has_it = task.tree.datum in node.holds or self._elsewhere(task.id)
            if not has_it and not node.cut and now - task.reported > self.rules.lost_after:
                self.work.lapse(task, "its worker no longer has the result")

    def _overdue(self, node: Node, now: float) -> None:
        """Have results made again that `node`, for which they are, could not fetch."""
        queue = [self.work.tasks[t] for t in self._errands.results_for(node)]
        for task in self._returns.overdue(node, queue):
            assert task.node is not None
            until = now + self.rules.fault_pause_max
            self._matching.avoid(task.id, task.node, until)
            self._timers.set(until, "avoid", task.id)
            waited = f"{self.rules.return_patience:.0f} s"
            where = self.members.name(task.node)
            self.work.abandon(task, f"its result could not be fetched from {where} in {waited}", now)

    def _orders(self, node: Node, now: float) -> m.Orders:
        return self._tell(node, self._ordered(node, now))

    def _ordered(self, node: Node, now: float) -> m.Orders:
        orders = self._errands.orders(node, now)
        relays = self.roster.relays(node.peer, m.RELAYS_MAX)
        revision = self.members.revocations.revision
        return msgspec.structs.replace(orders, now=now, revocations=revision, relays=relays)

    @staticmethod
    def _tell(node: Node, orders: m.Orders) -> m.Orders:
        node.stops.clear()
        node.dropping = set(orders.drop)
        node.told = gist(msgspec.structs.replace(orders, stop=()))
        return orders

    def _spread_news(self, now: float) -> None:
        """Answer parked beats whose orders changed, and watches whose job did."""
        news, self.roster.news = self.roster.news, {}
        for peer in news:
            parked = self._parking.beats.get(peer)
            if parked is not None:
                node = self.roster.node(peer)
                orders = self._ordered(node, now)
                if gist(orders) != node.told:
                    self._answer(parked, self._tell(node, orders))
        touched, self.work.touched = self.work.touched, {}
        for job in touched:
            for parked in self._parking.watches(job):
                view = self._submissions.view(self.work.jobs[job], parked.request.version, now)
                self._answer(parked, view)

    # --- work ---------------------------------------------------------------------------------

    def _pull(self, call: int, peer: PeerId, pull: m.Pull, now: float) -> m.Reply | None:
        node = self.roster.node(peer)
        if peer in self._parking.pulls:
            self._answer(self._parking.pulls[peer], m.Nothing())
        for task_id in [t for t in node.leases if t not in pull.working]:
            lease = self.work.leases[task_id]
            if not lease.known:
                lease.until = now + self.rules.lease_ttl
                return self._granted(self.work.tasks[task_id])
            self.work.lapse(self.work.tasks[task_id], "its worker does not run it any more")
        task = self._matching.choose(pull.free, node, now, self.rules.fairness)
        if task is not None:
            return self._grant(task, node, now)
        if not pull.patience:
            return m.Nothing()
        self._parking.pull(self._parked(call, peer, pull, now))
        return None

    def _match(self, now: float) -> None:
        """Give tasks that became pending to pulls that wait, holders of the disk first."""
        fresh, self.work.fresh = self.work.fresh, False
        for shape in list(self.work.pending) if fresh else ():
            for parked in self._matching.takers(shape, self._parking.pulls.values()):
                task = self._matching.allowed(shape, parked.peer, now)
                if task is not None:
                    self._answer(parked, self._grant(task, self.roster.node(parked.peer), now))
        if len(self.work.jobs) > self._jobs_seen:
            self._jobs_seen = len(self.work.jobs)
            self._timers.set(now + self.rules.beat_interval / 20, "place", "")

    def _grant(self, task_id: str, node: Node, now: float) -> m.Grant:
        task = self.work.tasks[task_id]
        until = now + self.rules.lease_ttl
        self.work.grant(task, node, now, until)
        self._time(task_id, self.work.leases[task_id])
        return self._granted(task)

    def _granted(self, task: Task) -> m.Grant:
        job = self.work.jobs[task.job].job
        spec = job.spec
        assert task.node is not None
        disk = self._errands.wanted(spec.disk, task.node, "job")
        inputs = self._errands.wanted(spec.inputs, task.node, "job") if spec.inputs else None
        return m.Grant(task.id, task.epoch, job.id, task.index, spec, job.submitter,
                       self.rules.lease_ttl, disk, inputs)  # fmt: skip

    def _undelivered(self, task_id: str, epoch: int) -> None:
        task = self.work.tasks.get(task_id)
        if task is None or task.state != "running" or task.epoch != epoch:
            return
        if not self.work.leases[task_id].known:
            self.work.lapse(task, "its worker hung up", counted=False, revivable=False)

    def _renew(self, peer: PeerId, renew: m.Renew, now: float) -> m.Reply:
        node = self.roster.node(peer)
        until = now + self.rules.lease_ttl
        try:
            task = self.work.claim(renew.task, renew.epoch, peer, until)
        except Revoked:
            node.stops.pop(renew.task, None)
            raise
        lease = self.work.leases[task.id]
        lease.until, lease.known = until, True
        self._time(task.id, lease)
        if lease.note != renew.note:
            lease.note = renew.note
            self.work.touch(task)
        return m.Lease(task.id, task.epoch, self.rules.lease_ttl)

    def _report(self, peer: PeerId, report: m.Report, now: float) -> m.Reply:
        node = self.roster.node(peer)
        task = self.work.report(
            report.task, report.epoch, peer, report.outcome, now, lambda task: self._failed(task, peer, now)
        )
        if task is not None and not report.outcome.retry:
            self._matching.worked(task, peer)
        if task is not None and task.state == "returning":
            self.roster.hold(node, task.tree.datum)
        return m.Done(report.task)

    def _failed(self, task: Task, peer: PeerId, now: float) -> bool:
        """`peer` could not run `task`: whether that counts against the task.  `peer` pauses."""
        counts, until = self._matching.failed(task, peer, now)
        self._timers.set(until, "avoid", task.id)
        return counts

    def _watch(self, call: int, peer: PeerId, watch: m.Watch, now: float) -> m.Reply | None:
        job = self._submissions.visible(watch.job, peer)
        if watch.version != job.version or not watch.patience or job.final:
            return self._submissions.view(job, watch.version, now)
        self._parking.watch(self._parked(call, peer, watch, now), watch.job)
        return None

    # --- time and waiting ---------------------------------------------------------------------

    def _parked(self, call: int, peer: PeerId, request: Any, now: float) -> Parked:
        until = now + request.patience
        self._timers.set(until, "call", str(call))
        return Parked(call, until, peer, request)

    def _answer(self, parked: Parked, reply: m.Reply) -> None:
        self._parking.remove(parked.call)
        self._answers.append(Answer(parked.call, reply))

    def _ring(self, now: float) -> None:
        """Do what is due."""
        for due, key in list(self._timers.ring(now)):
            match due:
                case "lease":
                    self._lease_due(key, now)
                case "node":
                    self._node_due(self.roster.node(PeerId(key)), now)
                case "call":
                    self._call_due(int(key), now)
                case "place":
                    for peers in self._errands.expected(now, refresh=self.rules.beat_interval / 20).values():
                        self.roster.news |= peers
                case "avoid":
                    self.work.fresh = True
                    self._matching.forgive(key, now)
                case "retire":
                    self._retire(key, now)
                case "draft":
                    self._draft_due(key, now)

    def _time(self, task_id: str, lease: Lease) -> None:
        """Have its end noticed, once."""
        if not lease.timed:
            lease.timed = True
            self._timers.set(lease.until, "lease", task_id)

    def _lease_due(self, task_id: str, now: float) -> None:
        lease = self.work.leases.get(task_id)
        if lease is None:
            return
        if lease.until > now:
            self._timers.set(lease.until, "lease", task_id)
        else:
            self.work.lapse(self.work.tasks[task_id], "its worker fell silent")

    def _node_due(self, node: Node, now: float) -> None:
        if not node.online:
            return
        assert node.seen is not None
        if node.seen + self.rules.lost_after > now:
            self._timers.set(node.seen + self.rules.lost_after, "node", node.peer)
            return
        held = self.work.results.keys() & node.holds
        self.roster.lost(node)
        self._orphaned(held)
        for task in [t for t in node.results if not self._elsewhere(t)]:
            self.work.lapse(self.work.tasks[task], "the worker that has the result fell silent")

    def _call_due(self, call: int, now: float) -> None:
        parked = self._parking.get(call)
        if parked is None:
            return
        match parked.request:
            case m.Pull():
                self._answer(parked, m.Nothing())
            case m.Beat():
                self._answer(parked, self._orders(self.roster.node(parked.peer), now))
            case m.Watch(job, version):
                self._answer(parked, self._submissions.view(self.work.jobs[job], version, now))

    def _close_jobs(self, now: float) -> None:
        """Clear up after jobs that became final."""
        ended, self.work.ended = self.work.ended, {}
        for job in ended:
            self._faults.ended(job)
            inputs = self.work.jobs[job].job.spec.inputs
            if inputs is not None and inputs in self.catalogue:
                self._timers.set(now + self.rules.beat_interval, "retire", inputs)

    def _retire(self, inputs: str, now: float) -> None:
        again = self._submissions.retire(inputs, now, self.rules.inputs_grace)
        if again is not None:
            self._timers.set(again, "retire", inputs)

    def _draft(self, peer: PeerId, draft: m.Draft, now: float) -> m.Reply:
        if self.drafts.tell(peer, draft, now):
            self._timers.set(now + TTL, "draft", draft.draft)
            self._submissions.spread()
        return m.Done()

    def _draft_due(self, draft: str, now: float) -> None:
        again = self.drafts.ring(draft, now)
        if again is not None:
            self._timers.set(again, "draft", draft)
        self._submissions.spread()

    def _slept(self, now: float) -> None:
        """Nobody could be heard for a while: nobody is to blame for it."""
        for lease in self.work.leases.values():
            lease.until = max(lease.until, now + self.rules.lease_ttl)
        for node in self.roster.nodes.values():
            if node.online:
                node.seen = now

    def check(self) -> None:
        """Assert every invariant."""
        self.work.check()
        self.roster.check()
        self.catalogue.check()
        self.drafts.check()
        self._parking.check()
        assert not self._rows, "a step left something behind"
        assert not self._answers
        assert not self.roster.news
        assert not self.work.touched
        soonest = min((lease.until for lease in self.work.leases.values()), default=None)
        assert soonest is None or self.deadline <= soonest, "a lease without a timer"
        for node in self.roster.nodes.values():
            if node.online:
                assert node.seen is not None
                assert self.deadline <= node.seen + self.rules.lost_after
        self._matching.check(self._parking.pulls.values(), self._now)
