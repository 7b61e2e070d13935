"""Do the coordinator and its clients do what the messages promise, over any channel?"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock

from p2pgrid.errors import Conflict, Misconfigured, Misused, NotAuthorised, NotFound, Unreachable
from p2pgrid.hole_punch.membership import read
from p2pgrid.ids import Cid, PeerId, digest
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.client import Calls, Coordinator
from p2pgrid.scheduler.coordinator import Desk, serve_coordinator
from p2pgrid.scheduler.events import Rules
from p2pgrid.scheduler.facts import DatumRow, LedgerStuck, Member, Past, Row, TokenUse
from p2pgrid.scheduler.job import Gone, JobSpec, Outcome, ResultTree, Revoked
from p2pgrid.scheduler.ledger import SqliteLedger
from tests.memory_ledger import MemoryLedger
from tests.memory_network import MemoryWorld, open_world

OWNER = PeerId("owner")
GIB = 1 << 30
ROOM = m.Capacity(slots=1, memory=4 * GIB, cpus=4, disk=100 * GIB)


def cid(name: str) -> str:
    return str(Cid(0x71, digest(name.encode())))


DISK = cid("disk")


@attrs.frozen
class Pass:
    """What `verify` makes of the ticket "ROLE:ID:USES"."""

    role: str
    token_id: str
    uses: int | None
    expires: float = 1e12


def verify(ticket: str, peer: PeerId, now: float) -> Pass:
    role, token, uses = ticket.split(":")
    if role not in ("worker", "submitter"):
        raise NotAuthorised(why="the ticket does not hold")
    return Pass(role, token, int(uses) if uses else None)


class Grid:
    """A coordinator in memory that can be ended and started again, and its clients."""

    def __init__(self, world: MemoryWorld, ledger: MemoryLedger) -> None:
        self.world, self.ledger = world, ledger
        self.desk: Desk
        self.network = world.join("owner")
        self._scope = trio.CancelScope()
        self._ended = trio.Event()

    async def start(self) -> None:
        self._scope, self._ended = trio.CancelScope(), trio.Event()
        self.world.down.discard(OWNER)
        self.desk = await self.world.nursery.start(self._run)

    async def _run(self, task_status: trio.TaskStatus[Desk]) -> None:
        with self._scope:
            await serve_coordinator(
                self.network, self.ledger, verify, owner=OWNER, clock=lambda: 1e9 + trio.current_time(),
                rules=Rules(lease_ttl=30, beat_interval=5, lost_after=20), check=True,
                task_status=task_status,
            )  # fmt: skip
        self._ended.set()

    async def stop(self) -> None:
        self.world.down.add(OWNER)
        self._scope.cancel()
        await self._ended.wait()

    def owner(self) -> Calls:
        return self.desk.local(OWNER)

    def client(self, name: str) -> Coordinator:
        network = self.world.join(name)
        network.learn(OWNER, self.network.addresses)
        return Coordinator(network, OWNER)

    async def worker(
        self, name: str, holds: tuple[str, ...] = (), shares: tuple[str, ...] = ()
    ) -> Coordinator:
        client = self.client(name)
        await client.join("worker:w:", name, shares)
        await client.beat(m.Beat(holds=holds, total=ROOM, free=ROOM, shares=shares, addresses=(f"/{name}",)))
        return client


@contextlib.asynccontextmanager
async def open_grid():
    async with open_world() as world:
        grid = Grid(world, MemoryLedger())
        await grid.start()
        await grid.owner().put(m.DatumRecord(DISK, "disk", name="debian", size=100, wire_bytes=50))
        yield grid


@pytest.fixture
def autojump_clock():
    return MockClock(autojump_threshold=0)


def ended(result: str, exit_: int = 0) -> Outcome:
    return Outcome(exit=exit_, why="off", result=ResultTree(cid(result)), seconds=1.5, sources={"owner": 50})


async def test_a_job_from_submit_to_collect(autojump_clock):
    async with open_grid() as grid:
        owner, ann = grid.owner(), await grid.worker("ann")
        job = await owner.submit(JobSpec(DISK, array=(3, 5)), "key")
        assert await owner.submit(JobSpec(DISK, array=(3, 5)), "key") == job
        with pytest.raises(Conflict):
            await owner.submit(JobSpec(DISK), "key")

        grant = await ann.pull(ROOM)
        assert (grant.job, grant.index, grant.epoch, grant.submitter) == (job, 3, 1, OWNER)
        assert grant.disk.datum == DISK
        assert [p.peer for p in grant.disk.peers] == ["owner"] or not grant.disk.peers
        await ann.renew(grant.task, 1, "booting")
        view = await owner.job(job)
        assert [(t.state, t.node_name, t.note) for t in view.tasks] == [
            ("running", "ann", "booting"),
            ("pending", "", ""),
        ]
        assert view.counts == {"running": 1, "pending": 1}
        assert "waiting for a free slot" in view.why

        await ann.report(grant.task, 1, ended("result", 7))
        await ann.report(grant.task, 1, ended("another"))
        assert (await owner.job(job)).tasks[0].state == "returning"
        orders = await owner.beat(m.Beat())
        (wanted,) = orders.hold
        assert (wanted.datum, wanted.reason, wanted.task, wanted.epoch) == (
            cid("result"),
            "result",
            grant.task,
            1,
        )
        assert [(p.peer, p.addresses) for p in wanted.peers] == [("ann", ("/ann",))]
        await owner.collect(grant.task, 1)
        await owner.collect(grant.task, 1)
        task = (await owner.job(job)).tasks[0]
        assert (task.state, task.outcome.exit, task.outcome.sources) == ("failed", 7, {"owner": 50})
        dropped = await ann.beat(m.Beat(holds=(DISK, cid("result")), total=ROOM, free=ROOM))
        assert dropped.drop == (cid("result"),)

        second = await ann.pull(ROOM)
        await ann.report(second.task, second.epoch, ended("result 2"))
        await owner.collect(second.task, second.epoch)
        view = await owner.job(job)
        assert (view.state, view.counts) == ("failed", {"failed": 1, "completed": 1})
        assert await ann.pull(ROOM, patience=0) is None


async def test_a_pull_waits_for_a_job_and_ends_with_its_patience(autojump_clock):
    async with open_grid() as grid:
        ann = await grid.worker("ann")
        start = trio.current_time()
        assert await ann.pull(ROOM, patience=20) is None
        assert trio.current_time() - start == pytest.approx(20)
        granted = []

        async def work():
            granted.append(await ann.pull(ROOM, patience=20))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            await trio.sleep(7)
            job = await grid.owner().submit(JobSpec(DISK), "k")
        assert granted[0].job == job
        assert trio.current_time() - start == pytest.approx(27)


async def test_the_worker_that_holds_the_disk_is_preferred(autojump_clock):
    async with open_grid() as grid:
        granted = {}

        async def work(name: str, client: Calls) -> None:
            granted[name] = await client.pull(ROOM, patience=20)

        ann, bob = await grid.worker("ann"), await grid.worker("bob", holds=(DISK,))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work, "ann", ann)
            await trio.sleep(1)
            nursery.start_soon(work, "bob", bob)
            await trio.sleep(1)
            await grid.owner().submit(JobSpec(DISK), "k")
        assert granted["bob"] is not None
        assert granted["ann"] is None


async def test_a_silent_worker_loses_its_lease_and_may_take_it_up_again(autojump_clock):
    async with open_grid() as grid:
        owner, ann = grid.owner(), await grid.worker("ann")
        job = await owner.submit(JobSpec(DISK), "k")
        grant = await ann.pull(ROOM)
        await trio.sleep(31)
        view = await owner.job(job)
        assert [(t.state, t.lost, t.note) for t in view.tasks] == [("pending", 1, "its worker fell silent")]
        await ann.renew(grant.task, grant.epoch)
        assert (await owner.job(job)).tasks[0].state == "running"
        await trio.sleep(31)
        bob = await grid.worker("bob")
        again = await bob.pull(ROOM)
        assert (again.task, again.epoch) == (grant.task, 2)
        for call in (ann.renew(grant.task, 1), ann.report(grant.task, 1, ended("late"))):
            with pytest.raises(Gone):
                await call
        with pytest.raises(Gone):
            await owner.collect(grant.task, 1)


async def test_a_result_whose_holder_is_lost_is_made_again(autojump_clock):
    async with open_grid() as grid:
        owner, ann = grid.owner(), await grid.worker("ann")
        job = await owner.submit(JobSpec(DISK), "k")
        grant = await ann.pull(ROOM)
        await ann.report(grant.task, 1, ended("result"))
        await trio.sleep(25)
        assert (await owner.job(job)).tasks[0].state == "pending"
        # It comes back before anybody else took the task: the result counts after all.
        await ann.beat(m.Beat(holds=(cid("result"),), total=ROOM, free=ROOM))
        assert (await owner.job(job)).tasks[0].state == "returning"
        await owner.collect(grant.task, 1)
        assert (await owner.job(job)).state == "completed"


async def test_a_grant_that_nobody_heard_is_told_again(autojump_clock):
    async with open_grid() as grid:
        owner, ann = grid.owner(), await grid.worker("ann")
        await owner.submit(JobSpec(DISK), "k")
        first = await ann.pull(ROOM)
        assert await ann.pull(ROOM) == first
        await ann.renew(first.task, 1)
        # It knew of this lease and names it no more: the lease is lost, under a new epoch it starts again.
        again = await ann.pull(ROOM)
        assert (again.task, again.epoch) == (first.task, 2)
        assert await ann.pull(ROOM, working=(first.task,), patience=0) is None


async def test_a_cancelled_pull_takes_no_task(autojump_clock):
    async with open_grid() as grid:
        owner, ann = grid.owner(), await grid.worker("ann")
        with trio.move_on_after(3):
            await grid.desk.local(PeerId("ann")).pull(ROOM)
        job = await owner.submit(JobSpec(DISK), "k")
        assert (await owner.job(job)).tasks[0].state == "pending"
        assert (await ann.pull(ROOM)).job == job


async def test_failures_of_the_grid_are_tried_again_with_a_pause(autojump_clock):
    async with open_grid() as grid:
        owner, ann = grid.owner(), await grid.worker("ann")
        job = await owner.submit(JobSpec(DISK, retries=1), "k")
        grant = await ann.pull(ROOM)
        await ann.report(grant.task, 1, Outcome(why="no KVM", retry=True))
        task = (await owner.job(job)).tasks[0]
        assert (task.state, task.attempts, task.note) == ("pending", 1, "no KVM")
        start = trio.current_time()
        grant = await ann.pull(ROOM)
        assert trio.current_time() - start == pytest.approx(15)
        await ann.report(grant.task, 2, Outcome(why="no KVM", retry=True))
        assert (await owner.job(job)).state == "error"


async def test_cancel_revokes_leases_at_once(autojump_clock):
    async with open_grid() as grid:
        owner, ann = grid.owner(), await grid.worker("ann")
        job = await owner.submit(JobSpec(DISK, array=(0, 1)), "k")
        grant = await ann.pull(ROOM)
        told = []

        async def beat():
            told.append(await ann.beat(m.Beat(holds=(DISK,), total=ROOM, patience=20)))

        start = trio.current_time()
        await ann.beat(m.Beat(holds=(DISK,), total=ROOM))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(beat)
            await trio.sleep(4)
            await owner.cancel(job)
        assert trio.current_time() - start == pytest.approx(4)
        assert told[0].stop == (grant.task,)
        for call in (ann.renew(grant.task, 1), ann.report(grant.task, 1, ended("late"))):
            with pytest.raises(Revoked):
                await call
        assert (await owner.job(job)).counts == {"cancelled": 2}


async def test_a_watch_tells_what_changed_since(autojump_clock):
    async with open_grid() as grid:
        owner, ann = grid.owner(), await grid.worker("ann")
        job = await owner.submit(JobSpec(DISK, array=tuple(range(300))), "k")
        view = await owner.job(job)
        assert [t.index for t in view.tasks] == list(range(300))
        changed = []

        async def watch():
            changed.append(await owner.watch(job, view.version, 20))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await trio.sleep(2)
            await ann.pull(ROOM)
        assert [(t.index, t.state) for t in changed[0].tasks] == [(0, "running")]
        start = trio.current_time()
        assert (await owner.watch(job, changed[0].version, 20)).tasks == ()
        assert trio.current_time() - start == pytest.approx(20)


async def test_roles_and_tickets(autojump_clock):
    async with open_grid() as grid:
        eve = grid.client("eve")
        for call in (eve.beat(m.Beat()), eve.jobs(), eve.pull(ROOM), eve.join("", "eve")):
            with pytest.raises(NotAuthorised):
                await call
        with pytest.raises(NotAuthorised, match="does not hold"):
            await eve.join("forged:x:", "eve")
        sam, tom = grid.client("sam"), grid.client("tom")
        assert (await sam.join("submitter:once:1", "sam")).roles == ("submitter",)
        assert (await sam.join("submitter:once:1", "sam")).name == "sam"
        with pytest.raises(NotAuthorised, match="used 1 times"):
            await tom.join("submitter:once:1", "tom")
        await tom.join("submitter:two:", "tom")
        with pytest.raises(NotAuthorised, match="role of a worker"):
            await sam.pull(ROOM)
        with pytest.raises(NotAuthorised, match="role of a submitter"):
            await (await grid.worker("ann")).nodes()

        disk = cid("sam's disk")
        await sam.put(m.DatumRecord(disk, "disk", name="mine"))
        job = await sam.submit(JobSpec(disk), "k")
        for call in (tom.job(job), tom.cancel(job), tom.datum("mine"), tom.submit(JobSpec(disk), "k")):
            with pytest.raises(NotFound):
                await call
        assert await tom.jobs() == []
        assert (
            [row.job for row in await sam.jobs()] == [row.job for row in await grid.owner().jobs()] == [job]
        )
        with pytest.raises(Conflict):
            await tom.put(m.DatumRecord(cid("other"), "disk", name="mine"))

        with pytest.raises(NotAuthorised, match="coordinator"):
            await sam.revoke("two")
        await grid.owner().revoke("once")
        with pytest.raises(NotAuthorised):
            await sam.jobs()
        with pytest.raises(NotAuthorised, match="revoked"):
            await sam.join("submitter:once:1", "sam")


async def test_names_of_data(autojump_clock):
    async with open_grid() as grid:
        owner = grid.owner()
        assert (await owner.datum()).record.datum == DISK
        newer = cid("newer")
        await owner.put(m.DatumRecord(newer, "disk", name="debian"))
        await owner.put(m.DatumRecord(cid("inputs"), "tree"))
        for name in ("", "debian", newer):
            assert (await owner.datum(name)).record.datum == newer
        job = await owner.submit(JobSpec(newer), "k")
        with pytest.raises(Conflict):
            await owner.forget(newer)
        await owner.cancel(job)
        ann = await grid.worker("ann", holds=(newer, DISK))
        assert [p.peer for p in await ann.providers(newer)] == ["owner"]
        assert (await owner.datum(newer)).owners == ("owner", "ann")
        await owner.forget(newer)
        assert (await owner.datum("debian")).record.datum == DISK
        assert (await ann.beat(m.Beat(holds=(newer, DISK), total=ROOM))).drop == (newer,)
        assert [v.record.datum for v in await owner.data()] == [cid("inputs"), DISK]
        with pytest.raises(NotFound):
            await owner.datum(newer)


async def test_expected_workers_and_replicas_get_data_first(autojump_clock):
    async with open_grid() as grid:
        owner = grid.owner()
        busy = m.Beat(total=ROOM, free=m.Capacity(disk=GIB))
        names = ["ann", "bob", "cid", "dan"]
        workers = [await grid.worker(name) for name in names]
        for worker in workers:
            await worker.beat(busy)
        await owner.submit(JobSpec(DISK, array=(0, 1)), "k")
        await trio.sleep(1)
        told = [(await worker.beat(busy)).hold for worker in workers]
        assert [[(w.datum, w.reason) for w in hold] for hold in told] == [[(DISK, "job")]] * 2 + [[]] * 2
        await owner.put(m.DatumRecord(cid("r"), "tree", replica=3))
        told = [(await worker.beat(busy)).hold for worker in workers]
        assert sum(cid("r") in [w.datum for w in hold] for hold in told) == 2  # the putter has one
        await owner.put(m.DatumRecord(cid("all"), "tree", replica=-1))
        told = [(await worker.beat(busy)).hold for worker in workers]
        assert all(cid("all") in [w.datum for w in hold] for hold in told)


async def test_a_restart_keeps_jobs_and_leases(autojump_clock):
    async with open_grid() as grid:
        ann = await grid.worker("ann", shares=("root",))
        job = await grid.owner().submit(JobSpec(DISK, array=(0, 1, 2), needs=("root",)), "k")
        running = await ann.pull(ROOM)
        done = await ann.pull(ROOM, working=(running.task,))
        await ann.report(done.task, 1, ended("result"))
        await ann.renew(running.task, 1)
        await grid.stop()
        with pytest.raises(Unreachable):
            await ann.renew(running.task, 1)
        await trio.sleep(100)
        await grid.start()
        await trio.sleep(15)
        states = [t.state for t in (await grid.owner().job(job)).tasks]
        assert states == ["running", "returning", "pending"]
        await ann.renew(running.task, 1)
        await ann.beat(m.Beat(holds=(cid("result"),), total=ROOM, shares=("root",)))
        assert [w.datum for w in (await grid.owner().beat(m.Beat())).hold] == [cid("result")]
        assert await grid.owner().submit(JobSpec(DISK, array=(0, 1, 2), needs=("root",)), "k") == job


async def test_too_much_is_refused_also_in_process(autojump_clock):
    async with open_grid() as grid:
        for client in (grid.owner(), grid.client("sam")):
            with pytest.raises(Misused):
                await client.submit(JobSpec(DISK, name="x" * 1000), "k")
        assert await grid.owner().jobs() == []


async def test_a_coordinator_that_does_not_answer_is_unreachable(autojump_clock):
    async with open_world() as world:

        async def deaf(channel):
            await trio.sleep_forever()

        far, near = world.join("owner"), world.join("ann")
        far.serve(m.PROTOCOL, deaf)
        near.learn(OWNER, far.addresses)
        with pytest.raises(Unreachable):
            await Coordinator(near, OWNER).pull(ROOM)
        assert trio.current_time() >= 50


async def test_leaving_gives_everything_back(autojump_clock):
    async with open_grid() as grid:
        owner, ann = grid.owner(), await grid.worker("ann")
        job = await owner.submit(JobSpec(DISK, array=(0, 1)), "k")
        first = await ann.pull(ROOM)
        await ann.report(first.task, 1, ended("result"))
        await ann.pull(ROOM)
        await ann.leave()
        assert [t.state for t in (await owner.job(job)).tasks] == ["pending", "pending"]
        with pytest.raises(NotAuthorised):
            await ann.beat(m.Beat())
        assert [n.name for n in await owner.nodes()] == ["coordinator"]
        with pytest.raises(Conflict):
            await owner.leave()


class FullLedger(MemoryLedger):
    """Cannot be written for the next `broken` times."""

    broken = 0
    refused = 0

    async def save(self, rows: Sequence[Row]) -> None:
        if self.broken:
            self.broken -= 1
            self.refused += 1
            raise LedgerStuck(why="database or disk is full")
        await super().save(rows)


async def test_answers_wait_while_the_ledger_cannot_be_written(autojump_clock):
    async with open_world() as world:
        ledger = FullLedger()
        grid = Grid(world, ledger)
        await grid.start()
        await grid.owner().put(m.DatumRecord(DISK, "disk"))
        ann = await grid.worker("ann")
        ledger.broken, start, saves = 3, trio.current_time(), ledger.saves
        job = await grid.owner().submit(JobSpec(DISK), "k")
        assert trio.current_time() - start == pytest.approx(3)
        assert (ledger.refused, ledger.saves) == (3, saves + 1)
        assert (await ann.pull(ROOM)).job == job
        # For longer than callers wait: they learn that it is away, and later find what they asked for done.
        ledger.broken, start = 100, trio.current_time()
        for call in (lambda: grid.owner().cancel(job), lambda: ann.join("", "anna")):
            with pytest.raises(Unreachable):
                await call()
        assert ledger.broken > 0
        await trio.sleep_until(start + 101)
        assert (await grid.owner().job(job)).state == "cancelled"
        assert {n.name for n in await grid.owner().nodes()} == {"coordinator", "anna"}


async def test_a_full_disk_is_a_ledger_that_is_stuck(tmp_path: Path):
    ledger = SqliteLedger(tmp_path / "grid.db")
    (pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
    ledger._db.execute(f"PRAGMA max_page_count={pages}").fetchall()
    rows = [DatumRow(m.DatumRecord(cid(f"{n}"), "tree"), OWNER, float(n)) for n in range(500)]
    for _ in range(2):
        with pytest.raises(LedgerStuck):
            await ledger.save(rows)
    assert (await ledger.load()).data == []
    ledger._db.execute("PRAGMA max_page_count=100000").fetchall()
    await ledger.save(rows)
    assert (await ledger.load()).data == rows
    ledger.close()


async def test_sqlite_keeps_what_memory_keeps(tmp_path: Path):
    memory = MemoryLedger()
    async with open_world() as world:
        grid = Grid(world, memory)
        await grid.start()
        await grid.owner().put(m.DatumRecord(DISK, "disk", name="debian", size=100))
        ann = await grid.worker("ann")
        await grid.owner().submit(JobSpec(DISK, array=(0, 1)), "k")
        grant = await ann.pull(ROOM)
        await ann.report(grant.task, 1, ended("result"))
    past = memory.past()
    path = tmp_path / "grid.db"
    ledger = SqliteLedger(path)
    assert await ledger.load() == Past([], [], [], [], [], [])
    rows = [*past.members, *past.data, *past.uses, *past.jobs, *past.tasks]
    await ledger.save(rows)
    await ledger.save(rows)
    with pytest.raises(Misconfigured, match="another coordinator"):
        SqliteLedger(path)
    ledger.close()
    ledger = SqliteLedger(path)
    again = await ledger.load()
    ledger.close()
    for field in ("members", "data", "uses", "jobs", "tasks"):
        assert [attrs.asdict(r, recurse=False) for r in getattr(again, field)] == [
            attrs.asdict(r, recurse=False) for r in getattr(past, field)
        ]
    assert TokenUse("w", PeerId("ann")) in again.uses


async def test_a_ledger_of_before_revocations_were_kept_is_taken_over(tmp_path: Path):
    path = tmp_path / "grid.db"
    ledger = SqliteLedger(path)
    ledger._db.execute("ALTER TABLE member DROP COLUMN revoked; PRAGMA user_version=1").fetchall()
    ledger._db.execute("INSERT INTO member VALUES ('ann', 'Ann', x'80', x'90', 5.0)").fetchall()
    ledger.close()
    for revoked in (0.0, 7.0):  # at once, and as what it is from then on
        ledger = SqliteLedger(path)
        (ann,) = (await ledger.load()).members
        assert ann == Member(PeerId("ann"), "Ann", {}, (), 5.0, revoked)
        await ledger.save([attrs.evolve(ann, revoked=7.0)])
        ledger.close()


async def test_who_joins_gets_a_membership_that_others_can_check(autojump_clock):
    async with open_grid() as grid:
        client = grid.client("ann")
        verify = client._network.verify
        first = await client.join("worker:w:", "ann")
        shown = read(first.membership, OWNER, verify)
        assert (shown.peer, shown.roles) == ("ann", ("worker",))
        assert shown.issued == pytest.approx(first.now, abs=0.001)
        assert shown.expires - shown.issued == pytest.approx(7 * 86400)
        await trio.sleep(3600)
        again = await client.join("", "ann")
        assert again.now == pytest.approx(first.now + 3600)
        assert read(again.membership, OWNER, verify).expires == pytest.approx(shown.expires + 3600)
        assert (await client.beat(m.Beat())).now == pytest.approx(again.now)
        await grid.owner().revoke("w")
        with pytest.raises(NotAuthorised):
            await client.join("", "ann")


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path):
    path = tmp_path / "grid.db"
    path.write_bytes(b"not a database, but longer than a header of one hundred bytes " * 4)
    with pytest.raises(Misconfigured, match="cannot be used as a ledger"):
        SqliteLedger(path)
