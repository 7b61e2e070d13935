"""Decide which pending task a worker gets.

Pure.  A worker gets work that fits what it offers, whose data have room in its store, and at which
neither it nor its results failed lately.  Tasks that waited long come first, then those whose data
are at hand, then the oldest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from p2pgrid.ids import PeerId
from p2pgrid.scheduler.errands import Errands
from p2pgrid.scheduler.faults import Faults
from p2pgrid.scheduler.job import Task
from p2pgrid.scheduler.messages import Capacity
from p2pgrid.scheduler.parking import Parked
from p2pgrid.scheduler.pending import Shape, shape_key
from p2pgrid.scheduler.placement import fits
from p2pgrid.scheduler.roster import Node, Roster
from p2pgrid.scheduler.work import Work


class Matching:
    """Pending tasks against workers."""

    def __init__(self, work: Work, roster: Roster, errands: Errands, faults: Faults) -> None:
        self._work = work
        self._roster = roster
        self._errands = errands
        self._faults = faults
        self._avoid: dict[str, dict[PeerId, float]] = {}
        """Workers from which a result of the task did not come home, and until when they do not get it."""

    def choose(self, free: Capacity, node: Node, now: float, fairness: float) -> str | None:
        """A task for `node`, which offers `free`; those that waited `fairness` seconds come first."""
        best: tuple[Any, ...] | None = None
        chosen = None
        for shape in self._work.pending:
            if not self._fits(shape, free, node.peer):
                continue
            order = shape.members[shape.first()]
            is_old = now - order[0] > fairness
            rank = (0 if is_old else self._errands.lacks(node.peer, shape.spec), order)
            if best is None or rank < best:
                task = self.allowed(shape, node.peer, now)
                if task is not None:
                    best, chosen = rank, task
        return chosen

    def takers(self, shape: Shape, pulls: Iterable[Parked]) -> list[Parked]:
        """Those of `pulls` that a task of `shape` fits, holders of its data first."""
        able = [p for p in pulls if self._fits(shape, p.request.free, p.peer)]
        return sorted(able, key=lambda p: self._errands.lacks(p.peer, shape.spec))

    def _fits(self, shape: Shape, free: Capacity, peer: PeerId) -> bool:
        missing = self._errands.lacks(peer, shape.spec)
        return fits(shape.spec, free, self._roster.node(peer).shares, missing)

    def allowed(self, shape: Shape, peer: PeerId, now: float) -> str | None:
        """The oldest task of `shape` that `peer` may have."""
        if self._faults.until(shape.kind, peer) > now:
            return None
        return shape.oldest(lambda task: self._avoid.get(task, {}).get(peer, 0.0) <= now)

    def avoid(self, task: str, peer: PeerId, until: float) -> None:
        """Do not give `task` to `peer` for a while."""
        self._avoid.setdefault(task, {})[peer] = until

    def forgive(self, task: str, now: float) -> None:
        """Look whose time is up."""
        left = {p: until for p, until in self._avoid.pop(task, {}).items() if until > now}
        if left:
            self._avoid[task] = left

    def failed(self, task: Task, peer: PeerId, now: float) -> tuple[bool, float]:
        """`peer` could not run `task`: whether that counts against the task, and until when `peer` pauses."""
        spec = self._work.jobs[task.job].job.spec
        kind = shape_key(spec)
        able = [
            c.peer
            for c in self._roster.candidates()
            if fits(spec, c.total, c.shares, self._errands.lacks(c.peer, spec))
        ]
        counts = self._faults.failed(task.job, task.id, kind, peer, able, now)
        return counts, self._faults.until(kind, peer)

    def worked(self, task: Task, peer: PeerId) -> None:
        """`peer` ran `task`."""
        self._faults.worked(shape_key(self._work.jobs[task.job].job.spec), peer)

    def check(self, pulls: Iterable[Parked], now: float) -> None:
        for parked in pulls:
            for shape in self._work.pending:
                waits = self._fits(shape, parked.request.free, parked.peer)
                waits = waits and self.allowed(shape, parked.peer, now) is not None
                assert not waits, "a worker waits while a task for it is pending"
