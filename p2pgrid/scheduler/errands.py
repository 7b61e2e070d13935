"""Tell each node what to hold, what to drop and what to stop.

Pure.  A submitter's node fetches the results that are on their way to it, oldest first; a
worker fetches the disks it is expected to run and the replicas that are wished for.  Who
is expected is worked out at most once in `refresh` seconds, not at each heartbeat.
"""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from typing import Literal

from p2pgrid.ids import PeerId
from p2pgrid.scheduler.catalogue import Catalogue
from p2pgrid.scheduler.drafts import Drafted, Drafts
from p2pgrid.scheduler.faults import Faults
from p2pgrid.scheduler.job import JobSpec
from p2pgrid.scheduler.messages import DROP_MAX, HOLD_MAX, PROVIDERS_MAX, Orders, Provider, Wanted
from p2pgrid.scheduler.pending import shape_key
from p2pgrid.scheduler.placement import Holder, Wish, expected_workers, should_hold, why_pending
from p2pgrid.scheduler.roster import Node, Roster
from p2pgrid.scheduler.work import Work


def gist(orders: Orders) -> object:
    """What of `orders` is news where it changes: not the providers."""
    hold = [(w.datum, w.task, w.epoch) for w in orders.hold]
    return hold, orders.drop, orders.stop, orders.revocations


class Errands:
    """Orders for nodes, from what is known of data, work and nodes."""

    def __init__(
        self,
        work: Work,
        roster: Roster,
        catalogue: Catalogue,
        drafts: Drafts,
        faults: Faults,
        interval: float,
    ) -> None:
        self._work = work
        self._roster = roster
        self._catalogue = catalogue
        self._drafts = drafts
        self._faults = faults
        self._interval = interval
        self._expected: dict[str, dict[PeerId, None]] = {}
        self._worked_out = -math.inf

    def expected(self, now: float, refresh: float) -> dict[str, dict[PeerId, None]]:
        """Datum to the workers that will soon need it; no older than `refresh` seconds."""
        if now - self._worked_out < refresh:
            return self._expected
        self._worked_out = now
        self._expected = {}
        candidates = self._roster.candidates()
        for shape in self._work.pending:
            spec = shape.spec
            fit = [c for c in candidates if self._faults.until(shape.kind, c.peer) <= now]
            missing = {c.peer: self.lacks(c.peer, spec) for c in fit}
            peers = expected_workers(spec, len(shape.members), fit, missing)
            for datum in filter(None, (spec.disk, spec.inputs)):
                self._expected.setdefault(datum, {}).update(dict.fromkeys(peers))
        return self._expected

    def orders(self, node: Node, now: float) -> Orders:
        """What `node` is told now; a replica it is told to hold counts as promised."""
        expected = self.expected(now, self._interval)
        hold = [self._result(task, node) for task in self.results_for(node)]
        due = self._due(node, expected) if node.works and node.total.slots else []
        hold += [
            self.wanted(datum, node.peer, "job" if node.peer in expected.get(datum, ()) else "replica")
            if (drafted := self._drafts.told.get(datum)) is None
            else self._followed(drafted, node)
            for datum in due
        ]
        self._roster.promise(node, [w.datum for w in hold[:HOLD_MAX] if w.reason == "replica"])
        droppable = self._here(node, self._catalogue.dropped) - self._work.results.keys()
        droppable |= {d for d in self._here(node, self._work.result_of.keys())
                      if d not in self._catalogue and self._work.droppable_result(d, node.peer)}  # fmt: skip
        if node.works:
            droppable |= self._drafts.withdrawn.keys()
        return Orders(
            tuple(hold[:HOLD_MAX]),
            tuple(sorted(droppable)[:DROP_MAX]),
            tuple(node.stops)[:DROP_MAX],
            self._interval,
        )

    @staticmethod
    def _here(node: Node, data: AbstractSet[str]) -> set[str]:
        """What of `data` the node holds, wholly or in part."""
        return (node.holds & data) | {datum for datum in node.partial if datum in data}

    def wanted(self, datum: str, peer: PeerId, reason: Literal["job", "replica"]) -> Wanted:
        """`datum` as something for `peer` to fetch."""
        record = self._catalogue[datum].record
        peers = self._roster.providers(datum, peer, PROVIDERS_MAX)
        return Wanted(datum, record.kind, record.content, record.size, reason, peers)

    def _followed(self, drafted: Drafted, node: Node) -> Wanted:
        """A disk that is being put as something for `node` to follow, from its putter and the others."""
        others = [peer for peer in self._roster.claimed(drafted.draft) if peer != node.peer]
        found = [drafted.submitter, *others[: PROVIDERS_MAX - 1]]
        peers = tuple(Provider(peer, self._roster.node(peer).addresses, False) for peer in found)
        return Wanted(drafted.draft, "draft", None, drafted.size, "replica", peers)

    def _result(self, task_id: str, node: Node) -> Wanted:
        task = self._work.tasks[task_id]
        assert task.node is not None
        tree = task.tree
        peers = self._roster.providers(tree.datum, node.peer, PROVIDERS_MAX)
        maker = self._roster.node(task.node)
        if maker.online and maker is not node and all(p.peer != maker.peer for p in peers):
            peers = (Provider(maker.peer, maker.addresses), *peers[: PROVIDERS_MAX - 1])
        return Wanted(tree.datum, "tree", tree.content, tree.size, "result", peers, task.id, task.epoch)

    def results_for(self, node: Node) -> list[str]:
        """Results to fetch; also those that are here but were not collected, so that they will be."""
        tasks = self._work.returning.get(node.peer, {})
        return [task for task, _ in zip(tasks, range(HOLD_MAX), strict=False)]

    def _due(self, node: Node, expected: dict[str, dict[PeerId, None]]) -> list[str]:
        """Data that placement wants here and that are not here yet."""
        mine = [d for d, peers in expected.items() if node.peer in peers and d in self._catalogue]
        data = [*mine, *(d for d in self._catalogue.wishing if d not in mine)]
        wishes = [Wish(d, self._catalogue[d].record.replica, self.missing(node.peer, d)) for d in data]
        owners = {d: self._roster.claimed(d) for d in data}
        for drafted in self._drafts.told.values():
            if drafted.submitter != node.peer:
                data.append(drafted.draft)
                wishes.append(Wish(drafted.draft, drafted.replica, drafted.size))
                owners[drafted.draft] = self._roster.claimed(drafted.draft) | {drafted.submitter: None}
        holder = Holder(node.peer, node.holds, min(node.free.disk, node.free.store))
        due = should_hold(holder, wishes, owners, expected)
        return [d for d in data if d in due and d not in node.holds]

    def missing(self, peer: PeerId, datum: str) -> int:
        """Bytes of `datum` that `peer` would have to fetch."""
        return self._roster.missing(peer, datum, self._size(datum))

    def lacks(self, peer: PeerId, spec: JobSpec) -> int:
        """Bytes that `peer` would have to fetch before it can run a task of `spec`."""
        return sum(self.missing(peer, datum) for datum in filter(None, (spec.disk, spec.inputs)))

    def why(self, spec: JobSpec, now: float) -> str:
        """What tasks of `spec` wait for."""
        candidates, kind = self._roster.candidates(), shape_key(spec)
        missing = {c.peer: self.lacks(c.peer, spec) for c in candidates}
        pauses = {c.peer: self._faults.until(kind, c.peer) - now for c in candidates}
        return why_pending(spec, candidates, missing, {p: s for p, s in pauses.items() if s > 0})

    def _size(self, datum: str) -> int:
        """Bytes to fetch for a copy."""
        if datum not in self._catalogue:
            return 0
        record = self._catalogue[datum].record
        return record.wire_bytes or record.size
