"""Decide which results have waited too long for the node of their submitter.

Pure, and volatile.  A submitter's node fetches its results oldest first, so a result may wait
for its elders; but where for `patience` seconds, in which that node was online, neither it nor an elder of it
came nearer, it cannot travel: its task is better run elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from p2pgrid.ids import PeerId
from p2pgrid.scheduler.job import Task
from p2pgrid.scheduler.roster import Node


@attrs.frozen
class _Wait:
    """Of one result."""

    since: float
    """When it came nearer for the last time, in seconds that the node was online."""
    missing: int
    """Bytes, the fewest so far."""


class Returns:
    """Results under way, by the submitter's node."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._waits: dict[PeerId, dict[tuple[str, int], _Wait]] = {}

    def overdue(self, node: Node, tasks: Sequence[Task]) -> list[Task]:
        """Which of `tasks`, the results that `node` is to fetch now, oldest first, waited too long."""
        old, new = self._waits.get(node.peer, {}), {}
        is_nearer = False
        for task in tasks:
            tree = task.tree
            whole = tree.wire_bytes or tree.size or 1
            missing = 0 if tree.datum in node.holds else node.partial.get(tree.datum, whole + 1)
            wait = old.get((task.id, task.epoch), _Wait(node.awake, missing))
            is_nearer |= missing < wait.missing
            since = node.awake if is_nearer else wait.since
            new[task.id, task.epoch] = _Wait(since, min(missing, wait.missing))
        self._waits[node.peer] = new
        return [task for task in tasks
                if task.tree.datum not in node.holds
                and node.awake - new[task.id, task.epoch].since >= self._patience]  # fmt: skip

    def collected(self, node: Node, task: Task, younger: Iterable[Task]) -> None:
        """`task` is there: those that waited for it begin to wait anew."""
        waits = self._waits.get(node.peer, {})
        for other in younger:
            key = other.id, other.epoch
            if key in waits:
                waits[key] = attrs.evolve(waits[key], since=node.awake)
        waits.pop((task.id, task.epoch), None)
