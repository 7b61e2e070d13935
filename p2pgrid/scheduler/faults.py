"""Decide whose fault it is that a task could not be run, and who gets no task for a while.

Pure, and volatile.  A failure is one that its worker reports as the grid's: a disk not to be
had, no boot.  Three may be at fault, and each is answered differently:

    the worker   every kind of work fails on it       it gets no task for 15, 30, … 600 s
    the work     it fails on one worker after another  each of them gets other work meanwhile
    chance                                             the task is tried again, by another

A *kind* of work is what tasks have in common that ask the same of a worker (`shape_key`).
The retries of a task are spent by different workers only: one that failed this kind of work
before spends none, as long as there is an able worker that did not fail it yet.  So one broken worker
cannot use up a job, and a job that nobody can run still comes to its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import attrs

from p2pgrid.ids import PeerId
from p2pgrid.scheduler.events import Rules

Kind: TypeAlias = tuple[object, ...]

REMEMBERED = 3600.0
"""Seconds after the end of its pause for which a failure is remembered."""


@attrs.define
class _Streak:
    """Failures of a worker since its last success."""

    count: int = 0
    until: float = 0.0

    def grow(self, rules: Rules, now: float) -> None:
        """One more; those of leases that ran side by side count once."""
        if now >= self.until:
            self.until = now + min(rules.fault_pause * 2.0**self.count, rules.fault_pause_max)
            self.count += 1


@attrs.define
class _Record:
    """What is known of a kind of work."""

    failed: dict[PeerId, _Streak] = attrs.field(factory=dict)
    proven: bool = False
    """Somebody could run it."""


class Faults:
    """Failures by worker, by kind of work and by task."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._workers: dict[PeerId, _Streak] = {}
        self._kinds: dict[Kind, _Record] = {}
        self._tried: dict[str, dict[str, set[PeerId]]] = {}
        """Job to task to the workers that failed it."""

    def until(self, kind: Kind, peer: PeerId) -> float:
        """The time before which `peer` gets no task of this kind."""
        record = self._kinds.get(kind)
        own, at_this = self._workers.get(peer), record.failed.get(peer) if record else None
        return max(own.until if own else 0.0, at_this.until if at_this else 0.0)

    def failed(
        self, job: str, task: str, kind: Kind, peer: PeerId, able: Iterable[PeerId], now: float
    ) -> bool:
        """`peer` could not run `task`: whether that spends one of the task's retries.

        `able` are the workers online that could take it once they are free.
        """
        self._prune(now)
        record = self._kinds.setdefault(kind, _Record())
        tried = self._tried.setdefault(job, {}).setdefault(task, set())
        tainted = record.failed.keys() | tried
        counts = peer not in tainted or all(other in tainted for other in able)
        is_the_works = not record.proven and any(other != peer for other in record.failed)
        record.failed.setdefault(peer, _Streak()).grow(self._rules, now)
        if not is_the_works:
            self._workers.setdefault(peer, _Streak()).grow(self._rules, now)
        tried.add(peer)
        return counts

    def worked(self, kind: Kind, peer: PeerId) -> None:
        """`peer` ran a task of this kind."""
        self._workers.pop(peer, None)
        record = self._kinds.setdefault(kind, _Record())
        record.failed.pop(peer, None)
        record.proven = True

    def ended(self, job: str) -> None:
        """No task of `job` will be tried again."""
        self._tried.pop(job, None)

    def _prune(self, now: float) -> None:
        for kind, record in list(self._kinds.items()):
            if all(streak.until + REMEMBERED < now for streak in record.failed.values()):
                del self._kinds[kind]
