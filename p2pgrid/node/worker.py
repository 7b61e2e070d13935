"""Work leases: pull one, make an attempt at its task, report, pull the next.

    pull ──> attempt (attempt.py) ──> report
      └─ renew, from the first moment to the last ─┘

Cancelling a lease's scope is stopping its VM and leaving nothing behind.  While the
coordinator is away the VM runs on; whether the lease still holds is found out when it is back.
A node on which one lease after the other fails takes them more and more seldom: it would
otherwise eat every job of the grid.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import attrs
import structlog
import trio

from p2pgrid.errors import GridError, Temporary, Unreachable
from p2pgrid.node.attempt import attempt, guest_spec
from p2pgrid.node.holdings import capacity, free
from p2pgrid.node.node import Node, Running
from p2pgrid.node.patience import backoff, patiently
from p2pgrid.node.room import reservation
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.job import Gone, Outcome, Revoked
from p2pgrid.vm.child import reap
from p2pgrid.vm.guest import Hypervisor
from p2pgrid.vm.probe import find_qemu
from p2pgrid.vm.scratch import find_program

log = structlog.get_logger()

RENEWALS = 4
"""Renewals within one lease's time: three may be lost."""
NEWS_PERIOD = 1.0
"""Seconds between two words on how the work goes."""
PULL_PATIENCE = 20.0
"""Seconds that a pull may wait at the coordinator."""
LAST_WORD = 5.0
"""Seconds that a lease which is ended from outside gets to report the result that it has already."""
REST_MIN, REST_MAX = 15.0, 600.0
"""Seconds that a slot rests after a lease that failed here: doubled from the one to the other."""


def check_programs() -> None:
    """Raise `Misconfigured`, with what to install, where a worker's programs are missing."""
    find_qemu()
    find_program("mke2fs", "e2fsprogs")


@attrs.define
class Streak:
    """Leases in a row that failed by this node's own fault."""

    failures: int = 0

    def after(self, outcome: Outcome | None) -> float:
        """Count one more lease (None: it was ended from outside); seconds to rest before the next."""
        if outcome is None:
            return 0.0
        if not outcome.retry:
            self.failures = 0
            return 0.0
        self.failures += 1
        return min(REST_MAX, REST_MIN * 2.0 ** min(self.failures - 1, 10))


async def work(node: Node, hypervisor: Hypervisor) -> None:
    """Pull and work leases for ever, as many at once as there are slots."""
    slots = trio.Semaphore(node.config.slots)
    streak = Streak()
    failures = 0
    async with trio.open_nursery() as nursery:
        while True:
            await slots.acquire()
            try:
                grant = await node.coordinator.pull(
                    free(node, capacity(node)), tuple(node.running), PULL_PATIENCE
                )
                failures = 0
            except GridError:  # why is said where orders are waited for
                grant = None
                await trio.sleep(backoff(failures))
                failures += 1
            if grant is None or grant.task in node.running:
                slots.release()
                continue
            lease = node.running[grant.task] = running(node, grant)
            node.reserved()
            nursery.start_soon(_use_slot, node, hypervisor, grant, lease, slots, streak)


def running(node: Node, grant: m.Grant) -> Running:
    spec = guest_spec(grant)
    needs = {wanted.datum for wanted in (grant.disk, grant.inputs) if wanted is not None}
    return Running(
        grant.task,
        grant.epoch,
        folder=node.home / "vms" / f"{grant.task}-{grant.epoch}",
        data=frozenset(needs),
        reserved=reservation(spec.scratch, grant.disk.size, spec.overlay),
    )


async def _use_slot(
    node: Node,
    hypervisor: Hypervisor,
    grant: m.Grant,
    lease: Running,
    slots: trio.Semaphore,
    streak: Streak,
) -> None:
    """One lease, and the rest that this node needs after it."""
    try:
        rest = streak.after(await _work_lease(node, hypervisor, grant, lease))
        if rest:
            log.warning("no lease for a while", failures=streak.failures, seconds=rest)
            node.resting += 1
            try:
                await trio.sleep(rest)
            finally:
                node.resting -= 1
                node.tell()
    finally:
        slots.release()


async def _work_lease(node: Node, hypervisor: Hypervisor, grant: m.Grant, lease: Running) -> Outcome | None:
    """One lease, from the grant to the acknowledged report; None where it was ended from outside."""
    log.info("lease", task=grant.task, epoch=grant.epoch)
    outcome: Outcome | None = None
    try:
        with lease.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_renew, node, grant, lease)
                outcome = await attempt(node, hypervisor, grant, lease)
                await _report(node, grant, outcome)
                nursery.cancel_scope.cancel()
        if lease.scope.cancelled_caught:
            log.info("lease ended early", task=grant.task, epoch=grant.epoch)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(lambda: shutil.rmtree(lease.folder, ignore_errors=True))
        del node.running[grant.task]
        node.tell()
    return outcome


async def _renew(node: Node, grant: m.Grant, lease: Running) -> None:
    """Keep the lease, and tell how the work goes; where it was taken back, end the work."""
    told, due = "", 0.0
    while True:
        if lease.note != told or trio.current_time() >= due:
            told, due = lease.note, trio.current_time() + grant.ttl / RENEWALS
            await _renew_once(node, grant, lease)
        await trio.sleep(min(NEWS_PERIOD, grant.ttl / RENEWALS))


async def _renew_once(node: Node, grant: m.Grant, lease: Running) -> None:
    try:
        await node.coordinator.renew(grant.task, grant.epoch, lease.note)
    except (Gone, Revoked):
        lease.scope.cancel()
    except GridError as away:
        log.debug("lease not renewed", task=grant.task, why=str(away))


async def _report(node: Node, grant: m.Grant, outcome: Outcome) -> None:
    """Report until it is acknowledged, or nobody wants it any more.

    Cancelled, it says it once more: a result that is here is either known to the coordinator
    (which then has it fetched, or dropped), or it is not here for long.
    """
    try:
        await _tell(node, grant, outcome, math.inf)
    except trio.Cancelled:
        with trio.move_on_after(LAST_WORD) as last:
            last.shield = True
            await _tell(node, grant, outcome, LAST_WORD)
        raise


async def _tell(node: Node, grant: m.Grant, outcome: Outcome, patience: float) -> None:
    try:
        await patiently(lambda: node.coordinator.report(grant.task, grant.epoch, outcome), patience)
    except (Unreachable, Temporary) as away:
        log.warning("a result that nobody was told of", task=grant.task, why=str(away))
    except GridError as unwanted:
        if not isinstance(unwanted, (Gone, Revoked)):
            log.error("report refused", task=grant.task, epoch=grant.epoch, why=str(unwanted))
        if outcome.result is not None:
            await node.drop(outcome.result.datum)


def sweep(home: Path) -> None:
    """End the machines that an earlier life left, and empty the folders that leases use."""
    killed = reap(home / "vms")
    if killed:
        log.warning("ended virtual machines of an earlier life", machines=killed)
    for name in ("vms", "tmp"):
        shutil.rmtree(home / name, ignore_errors=True)
        os.makedirs(home / name, mode=0o700)
