"""Be a grid of volunteers under one clock and one seed: churn, silent deaths, late results.

Discrete events in virtual seconds, no tasks, no sockets: the same seed gives the same trace.
Calls may be lost on their way, and so may their answers, in which case they are made again.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable
from typing import Any

import attrs

from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.job import JobSpec, Outcome
from tests.schedule_history import OWNER, History, Pass, cid, tree

ROOM = m.Capacity(slots=1, memory=1 << 40, cpus=64, disk=1 << 45)
SESSION, PAUSE = 1800.0, 600.0
"""Mean seconds that a volunteer is on and off."""
SILENT = 0.3
"""Of departures that nobody is told of."""
LOSS = 0.02
"""Of calls, and again of answers."""
RUN = (60.0, 400.0)
"""Seconds that a task takes."""
BEAT, RENEW = 5.0, 10.0


@attrs.define(eq=False)
class Volunteer:
    """A worker that comes and goes; `life` grows with each start, to tell old errands."""

    name: str
    on: bool = False
    life: int = 0
    holds: set[str] = attrs.field(factory=set)
    lease: tuple[str, int] | None = None
    late: list[tuple[str, int]] = attrs.field(factory=list)
    """Results that it finished while it was cut off."""


class GridWorld:
    """Everything that happens, in order."""

    def __init__(self, seed: int, volunteers: int, tasks: int, restarts: int) -> None:
        self.chance = random.Random(seed)
        self.history = History(now=1e6, check=False)
        self.trace = hashlib.sha256()
        self.agenda: list[tuple[float, int, Callable[[], None]]] = []
        self.count = 0
        self.steps = 0
        self.seen: dict[str, int] = dict.fromkeys(
            ("granted", "fenced", "lapsed", "recorded", "recorded twice", "restarts"), 0
        )
        self.recorded: dict[str, tuple[int, str]] = {}
        self.ask(OWNER, m.Put(m.DatumRecord(cid("disk"), "disk", wire_bytes=1000)))
        self.job: str = self.ask(OWNER, m.Submit(JobSpec(cid("disk"), array=tuple(range(tasks))), "k")).id
        for n in range(volunteers):
            volunteer = Volunteer(f"v{n:03}")
            self.after(self.chance.uniform(0, 60), lambda v=volunteer: self.come(v))
        self.after(1, self.submitter)
        for n in range(restarts):
            self.after(600 * (n + 1) + self.chance.uniform(0, 300), self.restart)

    # --- the clock ------------------------------------------------------------------------

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.agenda, (self.history.now + seconds, self.count, do))

    def run(self, seconds: float) -> None:
        """Until everything is final, at most `seconds`."""
        end = self.history.now + seconds
        while self.agenda and self.history.now < end and not self.finished:
            when, _, do = heapq.heappop(self.agenda)
            self.history.until(when)
            do()
            self.steps += 1
            if self.steps % 1000 == 0:
                self.history.schedule.check()

    @property
    def finished(self) -> bool:
        return self.history.schedule.work.jobs[self.job].final

    def ask(self, peer: str, request: m.Request, admission: Pass | None = None) -> Any:
        """The answer; None where the call waits, or it or its answer was lost."""
        if peer != OWNER and self.chance.random() < LOSS:
            return None
        reply = self.history.ask(peer, request, admission)
        self.trace.update(f"{self.history.now:.6f} {peer} {request} {reply}\n".encode())
        return None if peer != OWNER and self.chance.random() < LOSS else reply

    def restart(self) -> None:
        """The coordinator dies and comes back after a minute at most."""
        self.seen["restarts"] += 1
        self.history.now += self.chance.uniform(0, 60)
        self.history.restart()

    # --- volunteers -----------------------------------------------------------------------

    def come(self, v: Volunteer) -> None:
        v.on, v.life, v.lease = True, v.life + 1, None
        while self.ask(v.name, m.Join(name=v.name), Pass("worker")) is None:
            pass
        life = v.life
        self.after(self.chance.expovariate(1 / SESSION), lambda: self.go(v, life))
        self.beat(v, life)

    def go(self, v: Volunteer, life: int) -> None:
        if not v.on or v.life != life:
            return
        v.on = False
        if self.chance.random() < SILENT:
            if v.lease is not None and self.chance.random() < 0.5:
                v.late.append(v.lease)  # only cut off: its guest goes on
            if self.chance.random() < 0.2:
                v.holds.clear()  # a new disk
        else:
            self.ask(v.name, m.Leave())
        self.after(self.chance.expovariate(1 / PAUSE), lambda: self.come(v))

    def beat(self, v: Volunteer, life: int) -> None:
        if not v.on or v.life != life:
            return
        free = ROOM if v.lease is None else m.Capacity()
        orders = self.ask(v.name, m.Beat(tuple(sorted(v.holds)), total=ROOM, free=free))
        if isinstance(orders, m.Orders):
            v.holds |= {w.datum for w in orders.hold}
            v.holds -= set(orders.drop)
        for task, epoch in v.late:
            self.report(v, task, epoch)
        v.late.clear()
        if v.lease is None:
            self.pull(v, life)
        self.after(BEAT, lambda: self.beat(v, life))

    def pull(self, v: Volunteer, life: int) -> None:
        grant = self.ask(v.name, m.Pull(ROOM, (), 0))
        if not isinstance(grant, m.Grant):
            return
        self.seen["granted"] += 1
        v.lease = (grant.task, grant.epoch)
        v.holds.add(cid("disk"))
        self.after(RENEW, lambda: self.renew(v, life, grant.task, grant.epoch))
        self.after(self.chance.uniform(*RUN), lambda: self.end(v, life, grant.task, grant.epoch))

    def renew(self, v: Volunteer, life: int, task: str, epoch: int) -> None:
        if not v.on or v.life != life or v.lease != (task, epoch):
            return
        if isinstance(self.ask(v.name, m.Renew(task, epoch)), m.Failure):
            self.seen["fenced"] += 1
            v.lease = None
            return
        self.after(RENEW, lambda: self.renew(v, life, task, epoch))

    def end(self, v: Volunteer, life: int, task: str, epoch: int) -> None:
        if v.on and v.life == life and v.lease == (task, epoch):
            self.report(v, task, epoch)

    def report(self, v: Volunteer, task: str, epoch: int) -> None:
        """Tell of a result until it is acknowledged."""
        outcome = Outcome(0, "off", tree(f"{v.name} {task} {epoch}"))
        v.holds.add(outcome.result.datum)
        reply = self.ask(v.name, m.Report(task, epoch, outcome))
        if reply is None:
            life = v.life
            self.after(1, lambda: self.report(v, task, epoch) if v.on and v.life == life else None)
            return
        if isinstance(reply, m.Failure):
            self.seen["fenced"] += 1
            v.holds.discard(outcome.result.datum)
        v.lease = None if v.lease == (task, epoch) else v.lease

    # --- the submitter --------------------------------------------------------------------

    def submitter(self) -> None:
        for wanted in self.ask(OWNER, m.Beat()).hold:
            if wanted.peers and self.chance.random() < 0.9:  # else the transfer fails this time
                assert isinstance(self.ask(OWNER, m.Collect(wanted.task, wanted.epoch)), m.Done)
                self.seen["recorded"] += 1
                self.seen["recorded twice"] += wanted.task in self.recorded
                self.recorded[wanted.task] = (wanted.epoch, wanted.datum)
        tasks = self.history.schedule.work.tasks.values()
        self.seen["lapsed"] = sum(task.lost for task in tasks)
        self.after(BEAT, self.submitter)
