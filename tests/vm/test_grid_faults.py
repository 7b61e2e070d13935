"""A grid of real processes, some of which die: nothing is lost, or counted twice, or left behind."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import psutil
import pytest

from tests.grid_processes import Daemon, Grid, open_grid, p2pgrid, p2pnode, until
from tests.vm.bios.disk import MARKER, NAPS, bios_disk

MIB = 1 << 20
LEASE = 6.0
"""Seconds, where 30 are usual: so long do the tests wait for a worker that died."""


def napping(seconds: float) -> bytes:
    """A disk whose guest takes so long, and ends with 0."""
    return bios_disk(NAPS, nap=seconds).ljust(MIB, b"\0")


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    with open_grid(tmp_path_factory.mktemp("grid"), 3, lease=LEASE) as grid:
        grid.put("short", napping(1.0), replica=-1, wait=True)
        grid.put("long", napping(5.0), replica=-1, wait=True)
        yield grid


@contextlib.contextmanager
def killed(*victims: Daemon) -> Iterator[None]:
    """Kill them now; all are back when the block is left."""
    for victim in victims:
        victim.kill()
    try:
        yield
    finally:
        for victim in victims:
            victim.restart()


def seen_by(daemon: Daemon, grid: Grid) -> str:
    """How the coordinator sees it."""
    rows = {n["name"]: n["state"] for n in grid.coordinator.ask("node_ls")["nodes"]}
    return rows[daemon.name]


def test_an_array_runs_on_different_workers(grid):
    done = grid.finished(grid.submit("short", array=[0, 1, 2]))
    assert done["state"] == "completed"
    assert {t["node"] for t in done["tasks"]} == {w.name for w in grid.workers}
    assert [t["attempts"] for t in done["tasks"]] == [1, 1, 1]


def test_a_killed_workers_task_runs_elsewhere(grid):
    job = grid.submit("long")
    machines = grid.booted(job)
    victim = grid.worker_of(machines[0])
    with killed(victim):
        gone, alive = psutil.wait_procs(machines, timeout=2)
        assert (len(gone), alive) == (1, [])
        (again,) = grid.finished(job)["tasks"]
        assert again["state"] == "completed"
        assert again["node"] != victim.name
        assert again["attempts"] == 2
        assert list((victim.home / "vms").iterdir()) != []  # what its next life will clean
    until(lambda: seen_by(victim, grid) == "online", f"{victim.name} is back")
    assert list((victim.home / "vms").iterdir()) == []
    assert not (victim.home / "join.ticket").exists()


def test_a_coordinator_that_died_loses_no_job_and_starts_none_again(grid):
    finished = grid.submit("short")
    before = grid.finished(finished)
    job = grid.submit("long", array=[0, 1, 2])
    machines = grid.booted(job)
    with killed(grid.coordinator):
        assert all(machine.is_running() for machine in machines)
    assert all(machine.is_running() for machine in machines)
    done = grid.finished(job)
    assert done["state"] == "completed"
    assert done["counts"] == {"completed": 3}
    assert [t["attempts"] for t in done["tasks"]] == [1, 1, 1]
    assert grid.coordinator.ask("job_show", job=finished) == before


def test_a_coordinator_may_be_away_when_guests_end(grid):
    job = grid.submit("short", array=[0, 1, 2])
    machines = grid.booted(job)
    with killed(grid.coordinator):
        assert psutil.wait_procs(machines, timeout=30)[1] == []
    done = grid.finished(job)
    assert (done["state"], [t["attempts"] for t in done["tasks"]]) == ("completed", [1, 1, 1])


def test_a_result_that_died_with_its_holder_is_made_again(grid):
    submitter = grid.member("submitter", "submitter")
    grid.put("mine", napping(1.0), by=submitter)
    job = grid.submit("mine", by=submitter)

    def state():
        return grid.coordinator.ask("job_show", job=job)["tasks"][0]["state"]

    with contextlib.ExitStack() as later:
        (machine,) = grid.booted(job)
        victim = grid.worker_of(machine)
        with submitter.stopped():  # nobody collects
            until(lambda: state() == "returning", "the result is reported")
            later.enter_context(killed(victim))
        (again,) = grid.finished(job)["tasks"]
        assert (again["state"], again["attempts"]) == ("completed", 2)
        assert again["node"] != victim.name


def rot(daemon: Daemon, at: int) -> None:
    """Flip a bit of the longest pack that it holds."""
    frames = max((daemon.home / "store").rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0)
    with frames.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def test_a_guest_does_not_notice_that_its_disk_has_rotted(tmp_path):
    with open_grid(tmp_path, 1) as grid:
        (worker,) = grid.workers
        disk = bios_disk() + random.Random(7).randbytes(MIB)
        cid = grid.put("rotten", disk, replica=-1, wait=True)
        rot(worker, 100)  # in the boot sector's chunk; the coordinator's node has it, too
        (task,) = grid.finished(grid.submit(cid))["tasks"]
        assert (task["state"], task["attempts"], task["exit"]) == ("completed", 1, 0)
        assert "has rotted" in worker.log
        assert p2pgrid("disk", "verify", cid, "--no-repair", home=worker.home).code == 0


def test_verify_repairs_a_flipped_bit_from_peers(grid):
    worker = grid.workers[0]
    data = bios_disk() + random.Random(1).randbytes(3 * MIB)
    cid = grid.put("precious", data, replica=-1, wait=True)
    assert p2pgrid("disk", "verify", cid, home=worker.home).code == 0
    rot(worker, 2 * MIB)
    kept = p2pgrid("disk", "verify", cid, "--no-repair", "--json", home=worker.home)
    assert (kept.code, kept.json["bad"], kept.json["repaired"]) == (7, 1, 0)
    mended = p2pgrid("disk", "verify", cid, "--json", home=worker.home)
    assert mended.code == 0
    assert p2pgrid("disk", "verify", cid, "--json", home=worker.home).json["bad"] == 0
    back = grid.folder / "precious.back"
    assert p2pgrid("get", cid, "-o", back, home=worker.home).code == 0
    assert back.read_bytes() == data


@pytest.mark.parametrize("away", ["killed", "stopped"])
def test_a_disk_is_found_while_the_coordinator_is_away(grid, away):
    data = bios_disk() + random.Random(away).randbytes(MIB)
    cid = grid.put(away, data, replica=-1, wait=True)
    submitter = grid.member(f"reader-{away}", "submitter")
    back = grid.folder / f"{away}.back"
    with killed(grid.coordinator) if away == "killed" else grid.coordinator.stopped():
        assert p2pgrid("get", cid, "-o", back, home=submitter.home).code == 0
        received = submitter.ask("status")["received"]
        assert sum(received.values()) > MIB
        assert grid.coordinator.home.name not in received
    assert back.read_bytes() == data
    assert p2pnode("leave", home=submitter.home).code == 0


def test_console_and_results_come_home_from_far(grid, tmp_path):
    job = grid.submit("short")
    grid.finished(job)
    assert MARKER.decode().strip() in p2pgrid("job", "logs", job, home=grid.home).out
    said = p2pgrid("job", "results", job, "-o", tmp_path / "out", home=grid.home)
    assert said.code == 0
    assert (tmp_path / "out" / "0" / "context.sh").exists()
