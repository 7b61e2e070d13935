"""Answer what submitters ask: jobs and data, each submitter its own, the owner all.

Pure: reads and changes the tables that `schedule.py` holds, never waits.
"""

from __future__ import annotations

from p2pgrid.errors import Conflict, NotFound
from p2pgrid.ids import PeerId, readable_id
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler import views
from p2pgrid.scheduler.catalogue import Catalogue
from p2pgrid.scheduler.drafts import Drafts
from p2pgrid.scheduler.errands import Errands
from p2pgrid.scheduler.facts import Row
from p2pgrid.scheduler.members import Members
from p2pgrid.scheduler.returns import Returns
from p2pgrid.scheduler.roster import Roster
from p2pgrid.scheduler.work import JobState, Work


class Submissions:
    """The submitters' side of the coordinator."""

    def __init__(
        self,
        members: Members,
        work: Work,
        roster: Roster,
        catalogue: Catalogue,
        errands: Errands,
        returns: Returns,
        drafts: Drafts,
        rows: list[Row],
    ) -> None:
        self._members = members
        self._work = work
        self._roster = roster
        self._catalogue = catalogue
        self._errands = errands
        self._returns = returns
        self._drafts = drafts
        self._rows = rows

    def _sees(self, peer: PeerId, submitter: PeerId) -> bool:
        return peer in (submitter, self._members.owner)

    def visible(self, job: str, peer: PeerId) -> JobState:
        """Raises `NotFound`, also for what is another's."""
        state = self._work.jobs.get(job)
        if state is None or not self._sees(peer, state.job.submitter):
            raise NotFound(what=f"job {job}")
        return state

    def submit(self, peer: PeerId, request: m.Submit, chance: bytes, now: float) -> m.Done:
        spec = request.spec
        if (peer, request.key) not in self._work.keys:
            if len(set(spec.array)) != len(spec.array):
                raise Conflict(what="an index that is in the array twice")
            for datum in filter(None, (spec.disk, spec.inputs)):
                if not self._sees(peer, self._catalogue[datum].submitter):
                    raise NotFound(what=f"datum {datum}")
        return m.Done(self._work.submit(readable_id(chance), spec, peer, request.key, now))

    def collect(self, peer: PeerId, request: m.Collect, now: float) -> m.Done:
        task = self._work.tasks.get(request.task)
        if task is None:
            raise NotFound(what=f"task {request.task}")
        state = self.visible(task.job, peer)
        submitter = self._roster.node(state.job.submitter)
        queue = self._errands.results_for(submitter)
        self._work.collect(task, request.epoch, now)
        if task.id in queue:
            younger = [self._work.tasks[t] for t in queue[queue.index(task.id) + 1 :]]
            self._returns.collected(submitter, task, younger)
        self._roster.news |= dict.fromkeys(filter(None, (state.job.submitter, task.node)))
        return m.Done(task.id)

    def cancel(self, peer: PeerId, request: m.Cancel, now: float) -> m.Done:
        job = self.visible(request.job, peer)
        self._work.cancel(job, now)
        return m.Done(job.job.id)

    def view(self, job: JobState, after: int, now: float) -> m.JobView:
        why = self._errands.why(job.job.spec, now) if job.counts.get("pending") else ""
        return views.job_view(job, after, self._work, self._members, why)

    def jobs(self, peer: PeerId, request: m.Jobs) -> m.JobList:
        mine = [j for j in reversed(self._work.jobs.values()) if self._sees(peer, j.job.submitter)]
        shown, more = views.page(mine, [j.job.id for j in mine], request.after)
        return m.JobList(tuple(map(views.job_row, shown)), more)

    def put(self, peer: PeerId, request: m.Put, now: float) -> m.Done:
        row = self._catalogue.put(request.record, peer, now)
        self._rows.append(row)
        self._roster.hold(self._roster.node(peer), request.record.datum)
        drafted = request.draft is not None and self._drafts.place(request.draft, peer, now)
        if request.draft is not None and drafted:
            self._roster.inherit(request.draft, request.record.datum)
        if request.record.replica or drafted:
            self.spread()
        return m.Done()

    def spread(self) -> None:
        """There may be something else to do for every worker."""
        self._roster.news |= {c.peer: None for c in self._roster.candidates()}

    def forget(self, peer: PeerId, request: m.Forget) -> m.Done:
        row = self._catalogue.find(request.datum, peer, peer == self._members.owner)
        datum = row.record.datum
        if self._work.used.get(datum):
            raise Conflict(what=f"a job under way that needs {datum}")
        self._forget(datum)
        return m.Done()

    def _forget(self, datum: str) -> None:
        self._rows.append(self._catalogue.forget(datum))
        self._roster.news |= self._roster.have(datum)

    def retire(self, datum: str, now: float, grace: float) -> float | None:
        """Let the inputs of jobs that are over be dropped; None, or the time to ask again.

        A tree that has a name or a wish, or that is a result as well, is more than inputs and stays.
        """
        if datum not in self._catalogue or self._work.used.get(datum) or self._work.result_of.get(datum):
            return None
        row = self._catalogue[datum]
        if row.record.kind != "tree" or row.record.name or row.record.replica:
            return None
        if row.created + grace > now:
            return row.created + grace
        self._forget(datum)
        return None

    def datum(self, peer: PeerId, request: m.Datum) -> m.DatumView:
        row = self._catalogue.find(request.name, peer, peer == self._members.owner)
        return views.datum_view(row, self._roster, 64)

    def data(self, peer: PeerId, request: m.Data) -> m.DataList:
        mine = [row for row in self._catalogue if self._sees(peer, row.submitter)][::-1]
        shown, more = views.page(mine, [row.record.datum for row in mine], request.after)
        return m.DataList(tuple(views.datum_view(row, self._roster, 0) for row in shown), more)

    def neighbours(self, peer: PeerId, request: m.Neighbours) -> m.NeighbourList:
        job = self._work.jobs.get(request.job)
        runs = views.who_runs(job) if job is not None else {}
        if job is None or not ((job.job.spec.lan and peer in runs) or self._acquainted(peer, job)):
            self.visible(request.job, peer)
        peers = sorted(p for p in runs if p > request.after)
        shown = peers[: m.PAGE]
        rows = (m.Neighbour(p, self._roster.node(p).addresses, runs[p][: m.INDICES_MAX]) for p in shown)
        return m.NeighbourList(tuple(rows), more=len(shown) < len(peers))

    def _acquainted(self, peer: PeerId, job: JobState) -> bool:
        """Whether `peer` runs a job whose guests this one accepts, or one that accepts this one's."""
        node = self._roster.nodes.get(peer)
        runs = {task.rpartition(".")[0] for task in node.leases} if node is not None else set()
        named = {rule.partition(":")[2] for rule in job.job.spec.accept}
        asked = f":{job.job.id}"
        accepts = (rule for other in runs for rule in self._work.jobs[other].job.spec.accept)
        return bool(runs & named) or any(rule.endswith(asked) for rule in accepts)

    def nodes(self, request: m.Nodes, now: float) -> m.NodeList:
        peers = sorted(p for p in self._members if self._members.roles(p))
        shown, more = views.page(peers, peers, request.after)
        return m.NodeList(tuple(views.node_view(p, self._members, self._roster, now) for p in shown), more)
