"""Make one attempt at a task: what it needs is fetched, its machine runs, its results become a tree.

    fetch disk and inputs ──> room for it? ──> boot ──> pack results and console

Whose fault is it?  What a job asks for and cannot be (inputs too large, a name that cannot travel) is
its own, and final; what goes wrong on this node is the grid's, and is tried elsewhere.  A chunk of
the disk that has rotted here is neither: the guest waits while it is fetched again.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import attrs
import structlog
import trio

from p2pgrid.dht.files import free
from p2pgrid.dht.manifest import Tree
from p2pgrid.dht.publish import Published, publish_tree
from p2pgrid.dht.restore import restore_tree
from p2pgrid.dht.shelf import Shelf
from p2pgrid.errors import BadObject, ChunkCorrupt, GridError, Misused, NotFound, Refused
from p2pgrid.ids import Cid, PeerId
from p2pgrid.node.node import OWN, STALL_PATIENCE, Node, Running
from p2pgrid.node.proxy.guests import open_guest
from p2pgrid.node.room import INPUTS_MAX, check_fits, check_inputs, reservation
from p2pgrid.node.speed import FetchNote
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.job import Outcome, ResultTree
from p2pgrid.transfer.exchange import Progress
from p2pgrid.vm.guest import Cable, GuestEnd, GuestSpec, Hypervisor, run_guest

log = structlog.get_logger()

JOBS_OWN = (Refused, Misused, BadObject)
"""What is wrong with the job wherever it is tried."""


def guest_spec(grant: m.Grant) -> GuestSpec:
    """What the guest of this lease gets."""
    return GuestSpec(
        memory=grant.spec.memory,
        cpus=grant.spec.cpus,
        time=grant.spec.time_limit,
        scratch=grant.spec.scratch,
        env={"P2PGRID_JOB": grant.job, "P2PGRID_TASK": grant.task, "P2PGRID_INDEX": str(grant.index)},
    )


async def attempt(node: Node, hypervisor: Hypervisor, grant: m.Grant, lease: Running) -> Outcome:
    """Run the lease's VM.  Its result tree stays in the store, what else it leaves in the lease's folder."""
    outcome = Outcome(retry=True)
    try:
        outcome = await _run(node, hypervisor, grant, lease)
    except* JOBS_OWN as group:
        outcome = Outcome(why=str(_first(group))[:200])
    except* GridError as group:
        log.warning("lease failed", task=grant.task, why=str(_first(group)))
        outcome = Outcome(why=str(_first(group))[:200], retry=True)
    except* Exception as group:  # the lease's door: a bug here costs one attempt, not the node
        log.error("lease failed", task=grant.task, exc_info=group)
        outcome = Outcome(why=f"internal error: {_first(group)!r}"[:200], retry=True)
    return outcome


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


async def _run(node: Node, hypervisor: Hypervisor, grant: m.Grant, lease: Running) -> Outcome:
    started = trio.current_time()
    sources = await _gather(node, grant, lease)
    at_hand = trio.current_time()
    shelf = await trio.to_thread.run_sync(node.store.begin, Cid.parse(grant.disk.datum))
    spec = guest_spec(grant)
    async with node.scratchpad() as pad:
        context = await _context(node, grant, lease, shelf.layout.content.size, pad / "inputs")
        lease.note = "running"
        end = await _boot(node, hypervisor, grant, lease, shelf, spec, context)
    lease.reserved = 0  # its disks are gone
    node.reserved()
    lease.note = "packing the results"
    result, left_out = await trio.to_thread.run_sync(_pack, node, end.results, end.console)
    node.announce(result.datum)
    note = "; ".join(filter(None, (end.note, left_out)))
    lost = note != "" and end.why == "off"  # it ended well, and its results could not be read
    return Outcome(
        exit=None if lost else end.exit,
        why=f"{end.why}: {note}"[:200] if note else end.why,
        result=result,
        retry=end.why == "boot",
        seconds=end.seconds,
        timings={"fetch": at_hand - started, "run": end.seconds},
        sources={str(peer): count for peer, count in sources.most_common(64)},
    )


async def _gather(node: Node, grant: m.Grant, lease: Running) -> Counter[PeerId]:
    """Have the disk and the inputs here; bytes by peer."""
    sources: Counter[PeerId] = Counter()
    for wanted in (grant.disk, grant.inputs):
        if wanted is None or node.complete(wanted.datum):
            continue
        what = "disk" if wanted is grant.disk else "inputs"

        note = FetchNote(f"fetching the {what}")

        def watch(p: Progress, note: FetchNote = note) -> None:
            lease.note = note.of(p, trio.current_time())

        most = None if wanted is grant.disk else INPUTS_MAX
        fetched = await node.fetch(wanted.datum, wanted.peers, watch, STALL_PATIENCE, most)
        sources.update(fetched.bytes_by_peer)
    return sources


async def _context(
    node: Node, grant: m.Grant, lease: Running, base: int, folder: Path
) -> dict[str, bytes | Path]:
    """The job's inputs, written to `folder` for the context disk, once it is sure that all of it fits."""
    cid, size = None, 0
    if grant.inputs is not None:
        cid = Cid.parse(grant.inputs.datum)
        tree = Tree.decode(await trio.to_thread.run_sync(node.store.get_object, cid))
        size = sum(file.size for file in tree.files)
    check_inputs(size)
    spec = guest_spec(grant)
    guest = reservation(spec.scratch, base, spec.overlay)
    lease.reserved = 0  # what the submitter said of the disk; now it is here
    check_fits(size, guest, free(node.home), node.reserved(), str(node.home))
    lease.reserved = guest
    node.reserved()
    if cid is None:
        return {}
    written = await trio.to_thread.run_sync(
        restore_tree, node.store, cid, folder, INPUTS_MAX, stop_if_cancelled
    )
    return {file.path: folder / file.path for file in written.files}


async def _boot(
    node: Node,
    hypervisor: Hypervisor,
    grant: m.Grant,
    lease: Running,
    shelf: Shelf,
    spec: GuestSpec,
    context: dict[str, bytes | Path],
) -> GuestEnd:
    """Run the guest.  Raises what its disk broke with: then the guest's own end says nothing."""
    end: GuestEnd | None = None
    async with _lan(node, grant) as cable:
        with trio.CancelScope() as scope:
            base = ShelfSource(node, grant.disk, shelf, scope)
            end = await run_guest(hypervisor, base, attrs.evolve(spec, lan=cable), context, lease.folder)
    if base.broken is not None:
        raise base.broken
    assert end is not None
    return end


def _lan(node: Node, grant: m.Grant) -> AbstractAsyncContextManager[Cable | None]:
    """What the guest's network card is plugged into, where its job has a LAN."""
    if not grant.spec.lan:
        return contextlib.nullcontext()
    assert node.lans is not None
    assert node.proxy is not None
    return open_guest(node.proxy, node.lans, grant)


def _pack(node: Node, results: Path, console: Path) -> tuple[ResultTree, str]:
    """Make the results and the console a tree in the store; and why it is the console alone, if so."""
    own = results / OWN
    shutil.rmtree(own, ignore_errors=True)  # a guest may not write in the node's name
    own.unlink(missing_ok=True)
    left_out = ""
    try:
        published = _publish(node, results, console)
    except Misused as refused:
        left_out = f"its results were left out: {refused.why}"
        shutil.rmtree(results)
        results.mkdir()
        published = _publish(node, results, console)
    content = str(published.content) if published.content else None
    return ResultTree(str(published.datum), content, published.size, published.wire_bytes), left_out


def _publish(node: Node, results: Path, console: Path) -> Published:
    (results / OWN).mkdir()
    if console.exists():
        shutil.copyfile(console, results / OWN / "console.log")
    return publish_tree(node.store, results, node.identity.signing_key, stop_if_cancelled)


def stop_if_cancelled(done: int = 0, total: int = 0) -> None:
    """End the work of this thread where whoever waits for it was cancelled."""
    trio.from_thread.check_cancelled()


@attrs.define(eq=False)
class ShelfSource:
    """A disk in the store as the base of a VM; every chunk is verified as it leaves.

    One that has rotted is fetched again, while the guest waits.  Where nobody has it the disk is
    `broken`, and `scope`, which the guest runs in, is cancelled.
    """

    node: Node
    disk: m.Wanted
    shelf: Shelf
    scope: trio.CancelScope
    patience: float = STALL_PATIENCE
    broken: GridError | None = None
    """Set while a chunk is missing, too: a guest whose time ran out meanwhile was not at fault."""
    _mending: trio.Lock = attrs.field(factory=trio.Lock)

    @property
    def size(self) -> int:
        return self.shelf.layout.content.size

    async def read(self, offset: int, length: int) -> bytes:
        try:
            return await trio.to_thread.run_sync(self.shelf.read, offset, length)
        except (ChunkCorrupt, NotFound) as rotten:
            async with self._mending:
                return await self._mended(offset, length, rotten)
        except GridError as hopeless:
            self._break(hopeless)
            raise

    async def _mended(self, offset: int, length: int, rotten: GridError) -> bytes:
        log.warning("a chunk of a disk has rotted; fetching it again", disk=self.disk.datum, why=str(rotten))
        self.broken = self.broken or rotten
        peers = (*self.disk.peers, *await self.node.providers(self.disk.datum))
        try:
            await self.node.fetch(self.disk.datum, peers, patience=self.patience)
            self.shelf = await trio.to_thread.run_sync(self.node.store.begin, Cid.parse(self.disk.datum))
            data = await trio.to_thread.run_sync(self.shelf.read, offset, length)
        except GridError as hopeless:
            self._break(hopeless)
            raise
        if not self.scope.cancel_called:
            self.broken = None
        return data

    def _break(self, error: GridError) -> None:
        self.broken = error
        self.scope.cancel()
