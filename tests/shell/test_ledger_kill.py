"""Is anything acknowledged lost, or counted twice, when the coordinator is killed with -9 at any moment?"""

from __future__ import annotations

import base64
import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio

from p2pgrid import wire
from p2pgrid.errors import Unreachable
from p2pgrid.ids import Cid, PeerId, digest
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.client import Calls
from p2pgrid.scheduler.job import Gone, JobSpec, Outcome, ResultTree
from p2pgrid.scheduler.ledger import SqliteLedger

KILLS = 24
SEED = 2011
WORKERS = 4
ROOM = m.Capacity(slots=1, memory=1 << 40, cpus=64, disk=1 << 45)


def cid(name: str) -> str:
    return str(Cid(0x71, digest(name.encode())))


class Process:
    """The coordinator in a child process, killed and started again at will."""

    def __init__(self, path: Path, nursery: trio.Nursery) -> None:
        self._path = path
        self._nursery = nursery
        self._child: trio.Process | None = None
        self._replies: dict[int, trio.MemorySendChannel[m.Reply]] = {}
        self._last_call = 0
        self._up = trio.Event()
        self._sending = trio.Lock()
        self._countdown = 0
        self._struck = trio.Event()

    async def calls(self, count: int) -> None:
        """Wait until `count` more calls were sent; the last of them is under way."""
        self._countdown, self._struck = count, trio.Event()
        await self._struck.wait()

    async def start(self) -> None:
        command = [sys.executable, "-m", "tests.shell.coordinator_process", str(self._path)]
        child = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._child = child
        self._nursery.start_soon(self._read, child)
        self._up.set()

    async def kill(self) -> None:
        """kill -9; every call under way is cut off."""
        assert self._child is not None
        self._up = trio.Event()
        os.kill(self._child.pid, signal.SIGKILL)
        assert await self._child.wait() == -signal.SIGKILL
        for channel in self._replies.values():
            channel.close()

    async def end(self) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        await self._child.stdin.aclose()
        assert await self._child.wait() == 0

    async def _read(self, child: trio.Process) -> None:
        rest = b""
        assert child.stdout is not None
        async for data in child.stdout:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                call, body = line.split()
                channel = self._replies.get(int(call))
                if channel is not None:
                    channel.send_nowait(wire.decode(base64.b64decode(body), m.Reply))

    async def answer(self, peer: PeerId, request: m.Request) -> m.Reply:
        """Raises `Unreachable` when the process dies first."""
        await self._up.wait()
        assert self._child is not None
        assert self._child.stdin is not None
        self._last_call += 1
        call = self._last_call
        send, receive = trio.open_memory_channel[m.Reply](1)
        self._replies[call] = send
        body = base64.b64encode(wire.encode(request)[wire.HEADER :])
        try:
            async with self._sending:
                await self._child.stdin.send_all(b"%d %s %s\n" % (call, peer.encode(), body))
            self._countdown -= 1
            if self._countdown == 0:
                self._struck.set()
            return await receive.receive()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.EndOfChannel) as broken:
            raise Unreachable(who="coordinator", why=type(broken).__name__) from None
        finally:
            del self._replies[call]


class Piped(Calls):
    """A client that asks again until it is answered, as daemons do."""

    def __init__(self, process: Process, me: str) -> None:
        self.process, self.me = process, PeerId(me)

    async def _call(self, request: m.Request) -> m.Reply:
        while True:
            with contextlib.suppress(Unreachable):
                return await self.process.answer(self.me, request)
            await trio.lowlevel.checkpoint()


@contextlib.asynccontextmanager
async def coordinator(path: Path) -> AsyncIterator[Process]:
    async with trio.open_nursery() as nursery:
        process = Process(path, nursery)
        await process.start()
        try:
            yield process
        finally:
            if process._child is not None and process._child.returncode is None:
                process._child.kill()


class Story:
    """What clients were told, to be compared with the ledger."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.owner = Piped(process, "owner")
        self.jobs: dict[str, JobSpec] = {}
        self.reported: dict[tuple[str, int], str] = {}
        self.collected: dict[str, int] = {}
        self.submitting = True

    async def submit(self) -> None:
        await self.owner.put(m.DatumRecord(cid("disk"), "disk", name="disk"))
        n = 0
        while self.submitting:
            spec = JobSpec(cid("disk"), name=f"job {n}", array=(0, 1, 2))
            job = await self.owner.submit(spec, f"key-{n}")
            assert job not in self.jobs
            self.jobs[job] = spec
            n += 1
            while 3 * len(self.jobs) - len(self.collected) > 30 and self.submitting:
                await self.collect()

    async def collect(self) -> None:
        for wanted in (await self.owner.beat(m.Beat())).hold:
            with contextlib.suppress(Gone):
                await self.owner.collect(wanted.task, wanted.epoch)
                assert self.collected.setdefault(wanted.task, wanted.epoch) == wanted.epoch

    async def work(self, name: str) -> None:
        client = Piped(self.process, name)
        await client.join("ticket", name)
        holds: set[str] = set()
        while True:
            grant = await client.pull(ROOM, patience=1)
            if grant is None:
                continue
            await client.renew(grant.task, grant.epoch)
            result = ResultTree(cid(f"{name} {grant.task} {grant.epoch}"))
            holds.add(result.datum)
            with contextlib.suppress(Gone):
                await client.report(grant.task, grant.epoch, Outcome(0, "off", result))
                self.reported[grant.task, grant.epoch] = result.datum
            orders = await client.beat(m.Beat(holds=tuple(holds)[-8000:], total=ROOM, free=ROOM))
            holds -= set(orders.drop)


async def test_nothing_acknowledged_is_lost_and_nothing_counted_twice(tmp_path: Path):
    path = tmp_path / "grid.db"
    chance = random.Random(SEED)
    async with coordinator(path) as process:
        story = Story(process)
        async with trio.open_nursery() as nursery:
            for n in range(WORKERS):
                nursery.start_soon(story.work, f"worker{n}")
            async with trio.open_nursery() as submitting:
                submitting.start_soon(story.submit)
                for _ in range(KILLS):
                    await process.calls(chance.randrange(1, 60))
                    await process.kill()
                    await process.start()
                story.submitting = False
            while len(story.collected) < 3 * len(story.jobs):
                await story.collect()
            nursery.cancel_scope.cancel()
        await process.end()
    await compare(path, story)


async def compare(path: Path, story: Story) -> None:
    ledger = SqliteLedger(path)
    past = await ledger.load()
    assert ledger._db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    ledger.close()
    tasks: dict[str, Any] = {task.id: task for task in past.tasks}
    assert {job.id: job.spec for job in past.jobs} == story.jobs
    assert set(tasks) == {f"{job}.{i}" for job, spec in story.jobs.items() for i in spec.array}
    assert set(story.collected) == set(tasks)
    for id_, epoch in story.collected.items():
        task = tasks[id_]
        assert (task.state, task.epoch) == ("completed", epoch)
        assert task.outcome.result.datum == story.reported[id_, epoch]
    assert len(tasks) > KILLS
