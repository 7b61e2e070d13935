"""Work leases: pull one, run its virtual machine, report, pull the next.

    pull ──> fetch disk and inputs ──> boot ──> results become a tree ──> report
      └───── renew, from the first moment to the last ─────┘

Cancelling a lease's scope is stopping its VM and leaving nothing behind.  While the
coordinator is away the VM runs on; whether the lease still holds is found out when it is back.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from pathlib import Path

import attrs
import structlog
import trio

from p2pgrid.dht.publish import publish_tree
from p2pgrid.dht.restore import restore_tree
from p2pgrid.dht.shelf import Shelf
from p2pgrid.errors import GridError
from p2pgrid.ids import Cid, PeerId
from p2pgrid.node.holdings import capacity, free
from p2pgrid.node.node import STALL_PATIENCE, Node, Running
from p2pgrid.node.patience import backoff, patiently
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.job import Gone, Outcome, ResultTree, Revoked
from p2pgrid.transfer.exchange import Progress
from p2pgrid.vm.child import reap
from p2pgrid.vm.guest import GuestSpec, Hypervisor, run_guest

log = structlog.get_logger()

RENEWALS = 4
"""Renewals within one lease's time: three may be lost."""
NEWS_PERIOD = 1.0
"""Seconds between two words on how the work goes."""
PULL_PATIENCE = 20.0
"""Seconds that a pull may wait at the coordinator."""
OWN = ".p2pgrid"
"""Folder of a result tree for what the node adds: the console."""


async def work(node: Node, hypervisor: Hypervisor) -> None:
    """Pull and work leases for ever, as many at once as there are slots."""
    slots = trio.Semaphore(node.config.slots)
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
            lease = node.running[grant.task] = Running(grant.task, grant.epoch)
            nursery.start_soon(_work_lease, node, hypervisor, grant, lease, slots)


async def _work_lease(
    node: Node, hypervisor: Hypervisor, grant: m.Grant, lease: Running, slots: trio.Semaphore
) -> None:
    """One lease, from the grant to the acknowledged report."""
    log.info("lease", task=grant.task, epoch=grant.epoch)
    folder = node.home / "vms" / f"{grant.task}-{grant.epoch}"
    try:
        with lease.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_renew, node, grant, lease)
                outcome = await _outcome(node, hypervisor, grant, lease, folder)
                await _report(node, grant, outcome)
                nursery.cancel_scope.cancel()
        if lease.scope.cancelled_caught:
            log.info("lease ended early", task=grant.task, epoch=grant.epoch)
    finally:
        del node.running[grant.task]
        slots.release()
        node.tell()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(lambda: shutil.rmtree(folder, ignore_errors=True))


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
    """Report until it is acknowledged, or nobody wants it any more."""
    try:
        await patiently(lambda: node.coordinator.report(grant.task, grant.epoch, outcome), math.inf)
    except GridError as unwanted:
        if not isinstance(unwanted, (Gone, Revoked)):
            log.error("report refused", task=grant.task, epoch=grant.epoch, why=str(unwanted))
        if outcome.result is not None:
            await node.drop(outcome.result.datum)


async def _outcome(
    node: Node, hypervisor: Hypervisor, grant: m.Grant, lease: Running, folder: Path
) -> Outcome:
    """Run the lease's VM.  What goes wrong on this side is the grid's fault: to be tried elsewhere."""
    outcome = Outcome(retry=True)
    try:
        outcome = await _run(node, hypervisor, grant, lease, folder)
    except* GridError as group:
        outcome = Outcome(why=str(_first(group))[:200], retry=True)
    except* Exception as group:  # the lease's door: a bug here costs one attempt, not the node
        log.error("lease failed", task=grant.task, exc_info=group)
        outcome = Outcome(why=f"internal error: {_first(group)!r}"[:200], retry=True)
    return outcome


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


async def _run(node: Node, hypervisor: Hypervisor, grant: m.Grant, lease: Running, folder: Path) -> Outcome:
    started = trio.current_time()
    sources: Counter[PeerId] = Counter()
    for wanted in (grant.disk, grant.inputs):
        if wanted is not None and not node.complete(wanted.datum):
            what = "disk" if wanted is grant.disk else "inputs"

            def watch(p: Progress, what: str = what) -> None:
                lease.note = f"fetching the {what}: {10 * (10 * p.bytes_done // max(1, p.bytes_total))} %"

            fetched = await node.fetch(wanted.datum, wanted.peers, watch, STALL_PATIENCE)
            sources.update(fetched.bytes_by_peer)
    at_hand = trio.current_time()
    shelf = await trio.to_thread.run_sync(node.store.begin, Cid.parse(grant.disk.datum))
    spec = GuestSpec(
        memory=grant.spec.memory,
        cpus=grant.spec.cpus,
        time=grant.spec.time_limit,
        scratch=grant.spec.scratch,
        env={"P2PGRID_JOB": grant.job, "P2PGRID_TASK": grant.task, "P2PGRID_INDEX": str(grant.index)},
    )
    async with node.scratchpad() as pad:
        context = await _context(node, grant, pad / "inputs")
        lease.note = "running"
        end = await run_guest(hypervisor, ShelfSource(shelf), spec, context, folder)
    lease.note = "packing the results"
    result = await trio.to_thread.run_sync(_pack, node, end.results, end.console)
    node.announce(result.datum)
    lost = end.note != "" and end.why == "off"  # it ended well, and its results could not be read
    return Outcome(
        exit=None if lost else end.exit,
        why=f"{end.why}: {end.note}"[:200] if end.note else end.why,
        result=result,
        retry=end.why == "boot",
        seconds=end.seconds,
        timings={"fetch": at_hand - started, "run": end.seconds},
        sources={str(peer): count for peer, count in sources.most_common(64)},
    )


async def _context(node: Node, grant: m.Grant, folder: Path) -> dict[str, bytes | Path]:
    """The job's inputs, written to `folder`, for the context disk."""
    if grant.inputs is None:
        return {}
    cid = Cid.parse(grant.inputs.datum)
    tree = await trio.to_thread.run_sync(restore_tree, node.store, cid, folder)
    return {file.path: folder / file.path for file in tree.files}


def _pack(node: Node, results: Path, console: Path) -> ResultTree:
    """Make the results and the console a tree in the store."""
    own = results / OWN
    shutil.rmtree(own, ignore_errors=True)  # a guest may not write in the node's name
    own.unlink(missing_ok=True)
    own.mkdir()
    if console.exists():
        shutil.copyfile(console, own / "console.log")
    published = publish_tree(node.store, results, node.identity.signing_key)
    return ResultTree(
        datum=str(published.datum),
        content=str(published.content) if published.content else None,
        size=published.size,
        wire_bytes=published.wire_bytes,
    )


@attrs.frozen
class ShelfSource:
    """A disk in the store as the base of a VM; every chunk is verified as it leaves."""

    shelf: Shelf

    @property
    def size(self) -> int:
        return self.shelf.layout.content.size

    async def read(self, offset: int, length: int) -> bytes:
        return await trio.to_thread.run_sync(self.shelf.read, offset, length)


def sweep(home: Path) -> None:
    """End the machines that an earlier life left, and empty the folders that leases use."""
    killed = reap(home / "vms")
    if killed:
        log.warning("ended virtual machines of an earlier life", machines=killed)
    for name in ("vms", "tmp"):
        shutil.rmtree(home / name, ignore_errors=True)
        os.makedirs(home / name, mode=0o700)
