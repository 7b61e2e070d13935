"""Keep the tasks that wait for a worker, so that none is scanned to find one.

Pure.  Tasks that ask the same of a worker (disk, inputs, memory, …) form a *shape*; a pull looks
at shapes, of which there are as many as different jobs under way, never at all tasks.
Within a shape the oldest task is first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import TypeAlias

import attrs

from p2pgrid.scheduler.job import JobSpec

Order: TypeAlias = tuple[float, str, int]
"""When the job was created, its id, the index: oldest job first, then by index."""


@attrs.define(eq=False)
class Shape:
    """Pending tasks that ask the same of a worker."""

    kind: tuple[object, ...]
    """Its key."""
    spec: JobSpec
    """Of any of its jobs; only what a worker must offer is common."""
    queue: list[tuple[Order, str]] = attrs.field(factory=list)
    """A heap; entries that are no longer in `members` are passed over."""
    members: dict[str, Order] = attrs.field(factory=dict)

    def first(self) -> str:
        """The oldest task."""
        while self.members.get(self.queue[0][1]) != self.queue[0][0]:
            heapq.heappop(self.queue)
        return self.queue[0][1]

    def oldest(self, allowed: Callable[[str], bool]) -> str | None:
        """The oldest task that is `allowed`, or None; costs the number of those that are not."""
        passed = []
        found = None
        while self.queue and found is None:
            order, task = self.queue[0]
            if self.members.get(task) != order:
                heapq.heappop(self.queue)
            elif allowed(task):
                found = task
            else:
                passed.append(heapq.heappop(self.queue))
        for entry in passed:
            heapq.heappush(self.queue, entry)
        return found


def shape_key(spec: JobSpec) -> tuple[object, ...]:
    """What decides which workers may run a task."""
    return (spec.disk, spec.inputs, frozenset(spec.needs), spec.memory, spec.cpus, spec.scratch)


class Pending:
    """The shapes that have tasks, and the tasks in them."""

    def __init__(self) -> None:
        self._shapes: dict[tuple[object, ...], Shape] = {}
        self._where: dict[str, tuple[object, ...]] = {}

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, task: str) -> bool:
        return task in self._where

    def __iter__(self) -> Iterator[Shape]:
        return iter(self._shapes.values())

    def add(self, task: str, spec: JobSpec, order: Order) -> None:
        assert task not in self._where
        key = shape_key(spec)
        shape = self._shapes.setdefault(key, Shape(key, spec))
        shape.members[task] = order
        heapq.heappush(shape.queue, (order, task))
        self._where[task] = key

    def remove(self, task: str) -> None:
        key = self._where.pop(task)
        shape = self._shapes[key]
        del shape.members[task]
        if not shape.members:
            del self._shapes[key]

    def shape_of(self, task: str) -> Shape:
        return self._shapes[self._where[task]]

    def check(self) -> None:
        assert sum(len(s.members) for s in self._shapes.values()) == len(self._where)
        for key, shape in self._shapes.items():
            assert shape.members, "an empty shape is kept"
            entries = set(shape.queue)
            assert all((order, task) in entries for task, order in shape.members.items())
            assert all(self._where[task] == key for task in shape.members)
