"""Whose fault is it when an attempt goes wrong, and is the volunteer's disk spared?

The guests are played; store, disks, results and trees are real.
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from p2pgrid.dht import publish, store
from p2pgrid.dht.manifest import CHUNK_SIZE, Tree
from p2pgrid.dht.publish import publish_disk, publish_tree
from p2pgrid.errors import GridError, Temporary
from p2pgrid.ids import Cid
from p2pgrid.node import attempt as attempts
from p2pgrid.node import room
from p2pgrid.node.attempt import attempt
from p2pgrid.node.node import Running
from p2pgrid.node.worker import running
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.job import JobSpec, Outcome
from p2pgrid.vm.blockdev import BlockSource
from p2pgrid.vm.guest import Disks, GuestSpec, Why
from p2pgrid.vm.scratch import find_program
from tests.lone_node import Lone, open_lone
from tests.small_disks import chunk

MIB = 1 << 20


@attrs.frozen
class Played:
    """A guest that reads its whole boot disk and does `scene`; it hangs where the disk cannot be read."""

    console: trio.abc.ReceiveStream
    status: trio.abc.ReceiveStream
    base: BlockSource
    disks: Disks
    scene: Callable[[Disks], Awaitable[None]]

    async def wait(self) -> tuple[Why, str]:
        try:
            for offset in range(0, self.base.size, CHUNK_SIZE):
                await self.base.read(offset, min(CHUNK_SIZE, self.base.size - offset))
        except GridError:
            await trio.sleep_forever()
        await self.scene(self.disks)
        return "off", ""


async def nothing(disks: Disks) -> None:
    await trio.lowlevel.checkpoint()


@attrs.define
class Stage:
    """A hypervisor of such guests, who all end with `exit 0`."""

    scene: Callable[[Disks], Awaitable[None]] = nothing
    booted: int = 0

    @asynccontextmanager
    async def boot(self, spec: GuestSpec, base: BlockSource, disks: Disks) -> AsyncIterator[Played]:
        self.booted += 1
        say, console = trio.testing.memory_stream_one_way_pair()
        tell, status = trio.testing.memory_stream_one_way_pair()
        await say.send_all(b"hello\n")
        await tell.send_all(b"exit 0\n")
        yield Played(console, status, base, disks, self.scene)
        await say.aclose()
        await tell.aclose()


def a_disk(lone: Lone, folder: Path) -> Cid:
    """A disk of four chunks in the node's store."""
    image = folder / "disk.raw"
    image.write_bytes(b"".join(chunk(n) for n in range(1, 5)))
    return publish_disk(lone.node.store, image, lone.node.identity.signing_key).datum


def a_grant(disk: Cid, inputs: Cid | None = None, time_limit: float = 30.0) -> m.Grant:
    def wanted(datum: Cid, kind: str) -> m.Wanted:
        return m.Wanted(str(datum), kind, None, MIB, "job")

    spec = JobSpec(str(disk), str(inputs) if inputs else None, scratch=16 * MIB, time_limit=time_limit)
    tree = wanted(inputs, "tree") if inputs else None
    return m.Grant("job.0", 1, "job", 0, spec, "submitter", 30.0, wanted(disk, "disk"), tree)


async def tried(lone: Lone, stage: Stage, grant: m.Grant) -> tuple[Outcome, Running]:
    lease = lone.node.running[grant.task] = running(lone.node, grant)
    with trio.fail_after(20):
        return await attempt(lone.node, stage, grant, lease), lease


def rot(lone: Lone, disk: Cid) -> bytes:
    """Flip a bit of its last frame; the frame as it was."""
    shelf = lone.node.store.begin(disk)
    last = len(shelf.frames.lengths) - 1
    frame = shelf.get_frame(last)
    path = lone.node.store.root / "packs" / str(shelf.pack) / "frames"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return frame


async def test_a_guest_ends_and_its_console_comes_home(tmp_path):
    async with open_lone(tmp_path / "home") as lone:
        disk = a_disk(lone, tmp_path)
        outcome, lease = await tried(lone, Stage(), a_grant(disk))
        assert (outcome.exit, outcome.why, outcome.retry) == (0, "off", False)
        assert outcome.result is not None
        tree = Tree.decode(lone.node.store.get_object(Cid.parse(outcome.result.datum)))
        assert [f.path for f in tree.files] == [".p2pgrid/console.log"]
        assert lease.reserved == 0
        assert list((lone.node.home / "tmp").iterdir()) == []


async def test_a_chunk_that_rotted_is_fetched_again_while_the_guest_waits(tmp_path):
    async with open_lone(tmp_path / "home") as lone:
        disk = a_disk(lone, tmp_path)
        frame = rot(lone, disk)

        def bring(datum: Cid) -> None:
            shelf = lone.node.store.begin(datum)
            assert not shelf.complete
            shelf.put_frame(len(shelf.frames.lengths) - 1, frame)

        lone.peers.bring = bring
        outcome, _ = await tried(lone, Stage(), a_grant(disk))
        assert (outcome.exit, outcome.retry, lone.peers.asked) == (0, False, [disk])


async def test_a_chunk_that_nobody_has_is_not_the_guests_fault(tmp_path):
    async with open_lone(tmp_path / "home") as lone:
        disk = a_disk(lone, tmp_path)
        rot(lone, disk)

        def bring(datum: Cid) -> None:
            raise Temporary(why="nobody has it")

        lone.peers.bring = bring
        outcome, lease = await tried(lone, Stage(), a_grant(disk))
        assert (outcome.exit, outcome.retry, outcome.result) == (None, True, None)
        assert "nobody has it" in outcome.why
        assert not lease.folder.exists()


async def test_nor_is_the_time_that_a_guest_waited_for_a_chunk(tmp_path):
    async with open_lone(tmp_path / "home") as lone:
        disk = a_disk(lone, tmp_path)
        rot(lone, disk)  # and whoever is asked for it is silent
        outcome, _ = await tried(lone, Stage(), a_grant(disk, time_limit=0.5))
        assert (outcome.exit, outcome.retry) == (None, True)


def some_inputs(lone: Lone, folder: Path) -> Cid:
    (folder / "in").mkdir()
    (folder / "in" / "context.sh").write_bytes(b"#!/bin/sh\n" + bytes(5000))
    return publish_tree(lone.node.store, folder / "in", lone.node.identity.signing_key).datum


async def test_inputs_that_no_worker_takes_are_the_jobs_own_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "INPUTS_MAX", 5000)
    async with open_lone(tmp_path / "home") as lone:
        stage, disk = Stage(), a_disk(lone, tmp_path)
        outcome, lease = await tried(lone, stage, a_grant(disk, some_inputs(lone, tmp_path)))
        assert (outcome.exit, outcome.retry, stage.booted) == (None, False, 0)
        assert "inputs" in outcome.why
        assert not lease.folder.exists()


@pytest.mark.parametrize("lacking", [1, 20 * MIB, 1 << 30])
async def test_what_does_not_fit_is_tried_elsewhere(tmp_path, monkeypatch, lacking):
    async with open_lone(tmp_path / "home") as lone:
        stage, disk = Stage(), a_disk(lone, tmp_path)
        inputs = some_inputs(lone, tmp_path)
        enough = store.MIN_FREE + 16 * MIB + 4 * CHUNK_SIZE + 2 * (5000 + len(b"#!/bin/sh\n"))
        monkeypatch.setattr(attempts, "free", lambda folder: enough - lacking)
        outcome, _ = await tried(lone, stage, a_grant(disk, inputs))
        assert (outcome.retry, stage.booted) == (True, 0)
        assert "room" in outcome.why
        monkeypatch.setattr(attempts, "free", lambda folder: enough)
        outcome, _ = await tried(lone, stage, a_grant(disk, inputs))
        assert (outcome.retry, stage.booted) == (False, 1)


async def test_what_another_lease_may_write_is_not_free(tmp_path, monkeypatch):
    async with open_lone(tmp_path / "home") as lone:
        stage, disk = Stage(), a_disk(lone, tmp_path)
        enough = store.MIN_FREE + 16 * MIB + 4 * CHUNK_SIZE
        monkeypatch.setattr(attempts, "free", lambda folder: enough)
        lone.node.running["other"] = Running("other", 1, tmp_path / "other", reserved=1)
        outcome, _ = await tried(lone, stage, a_grant(disk))
        assert (outcome.retry, stage.booted) == (True, 0)


async def test_too_many_small_results_still_bring_the_console(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "FILES_MAX", 4)

    async def leave_files(disks: Disks) -> None:
        (tmp_path / "left").mkdir()
        for i in range(8):
            (tmp_path / "left" / str(i)).touch()
        command = [find_program("mke2fs", "e2fsprogs"), "-q", "-F", "-t", "ext4", "-O", "^has_journal",
                   "-d", str(tmp_path / "left"), str(disks.scratch)]  # fmt: skip
        await trio.run_process(command, stdin=subprocess.DEVNULL, capture_stdout=True)

    async with open_lone(tmp_path / "home") as lone:
        disk = a_disk(lone, tmp_path)
        outcome, _ = await tried(lone, Stage(leave_files), a_grant(disk))
        assert (outcome.exit, outcome.retry) == (None, False)
        assert "left out" in outcome.why
        assert outcome.result is not None
        tree = Tree.decode(lone.node.store.get_object(Cid.parse(outcome.result.datum)))
        assert [f.path for f in tree.files] == [".p2pgrid/console.log"]


async def test_packing_ends_at_once_when_the_lease_does(tmp_path, monkeypatch):
    async with open_lone(tmp_path / "home") as lone:
        disk, packing = a_disk(lone, tmp_path), trio.Event()

        def endless(store: object, folder: Path, key: object, progress: Callable[[int, int], None]) -> None:
            trio.from_thread.run_sync(packing.set)
            while True:
                progress(0, 1)

        monkeypatch.setattr(attempts, "publish_tree", endless)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tried, lone, Stage(), a_grant(disk))
                await packing.wait()
                nursery.cancel_scope.cancel()
        assert len(lone.node.store.held()) == 1
