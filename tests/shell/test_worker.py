"""Does a lease end well when it is taken back, and does a node on which all fails slow down?"""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from p2pgrid.dht.publish import publish_tree
from p2pgrid.errors import Unreachable
from p2pgrid.node import worker
from p2pgrid.node.holdings import capacity, free
from p2pgrid.node.worker import Streak
from p2pgrid.scheduler.job import Gone, Outcome, ResultTree, Revoked
from p2pgrid.vm import scratch
from tests.lone_node import Lone, open_lone
from tests.shell.test_attempt import Stage, a_disk, a_grant

FAILED, WORKED = Outcome(why="no room", retry=True), Outcome(exit=0)


def test_a_node_on_which_leases_fail_rests_longer_and_longer():
    streak = Streak()
    assert [streak.after(FAILED) for _ in range(8)] == [15, 30, 60, 120, 240, 480, 600, 600]
    assert streak.after(None) == 0
    assert streak.after(FAILED) == 600
    assert streak.after(WORKED) == 0
    assert streak.after(FAILED) == 15
    assert streak.after(Outcome(exit=3)) == 0


async def test_a_slot_whose_lease_failed_takes_no_other(tmp_path, monkeypatch):
    async def fail(*_: object) -> Outcome:
        await trio.lowlevel.checkpoint()
        return FAILED

    monkeypatch.setattr(worker, "attempt", fail)
    async with open_lone(tmp_path / "home") as lone, trio.open_nursery() as nursery:
        grant = a_grant(a_disk(lone, tmp_path))
        lone.calls.grants = [grant, grant]
        nursery.start_soon(worker.work, lone.node, Stage())
        with trio.fail_after(10):
            while not lone.node.resting:
                await trio.lowlevel.checkpoint()
        assert len(lone.calls.grants) == 1
        assert free(lone.node, capacity(lone.node)).slots == 0
        nursery.cancel_scope.cancel()
    assert lone.node.resting == 0


def a_result(lone: Lone, folder: Path) -> ResultTree:
    (folder / "result").mkdir()
    (folder / "result" / "answer").write_bytes(b"42\n")
    made = publish_tree(lone.node.store, folder / "result", lone.node.identity.signing_key)
    return ResultTree(str(made.datum), str(made.content), made.size, made.wire_bytes)


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (None, True),
        (Unreachable(who="coordinator", why="it is away"), True),
        (Gone(what="job.0"), False),
        (Revoked(what="job.0"), False),
    ],
)
async def test_a_lease_that_ends_while_it_reports_leaves_no_result_that_nobody_knows(
    tmp_path, monkeypatch, answer, kept
):
    async with open_lone(tmp_path / "home") as lone:
        outcome = Outcome(exit=0, result=a_result(lone, tmp_path))
        grant = a_grant(a_disk(lone, tmp_path))
        lease = lone.node.running[grant.task] = worker.running(lone.node, grant)

        async def ended(*_: object) -> Outcome:
            await trio.lowlevel.checkpoint()
            return outcome

        def answered() -> None:
            if len(lone.calls.reports) == 1:
                lease.scope.cancel()
                raise Unreachable(who="coordinator", why="it is away")
            if answer is not None:
                raise answer

        monkeypatch.setattr(worker, "attempt", ended)
        monkeypatch.setattr(worker, "LAST_WORD", 0.5)
        lone.calls.answer = answered
        with trio.fail_after(10):
            assert await worker._work_lease(lone.node, Stage(), grant, lease) == outcome
        assert lone.calls.reports[:2] == [outcome, outcome]
        assert outcome.result is not None
        assert lone.node.complete(outcome.result.datum) == kept
        assert lone.node.running == {}


def test_a_worker_without_mke2fs_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(scratch, "SYSTEM_FOLDERS", str(tmp_path))
    for name, package in (("qemu-system-x86_64", "qemu-system-x86"), ("mke2fs", "e2fsprogs")):
        with pytest.raises(scratch.Misconfigured, match=f"apt install.* {package}"):
            worker.check_programs()
        (tmp_path / name).touch(mode=0o755)
    worker.check_programs()
