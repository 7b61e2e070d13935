"""Ctrl-C, at any moment: exit 130, and no process, no file, no job and no traceback is left."""

from __future__ import annotations

import signal

import psutil
import pytest

from p2pgrid.node import launch
from tests.grid_processes import command, interrupted, p2pgrid, processes_of, until
from tests.tiny_disk import tiny_disk
from tests.vm.bios.disk import NEVER_ENDS, bios_disk


@pytest.fixture(scope="module", autouse=True)
def _template():
    """Built before, so that the demo does not have to."""
    tiny_disk()


def demo(folder):
    return command("p2pgrid", "demo", "--workers", 1, home=folder / "home", cwd=folder, TMPDIR=str(folder))


@pytest.mark.parametrize(
    ("at", "number"),
    [
        ("grid: 0 %", signal.SIGINT),
        ("grid: 0 %", signal.SIGTERM),
        ("grid: 100 %", signal.SIGINT),
        ("cutting: 0 %", signal.SIGINT),
        ("job: 0 %", signal.SIGINT),
        ("job: 0 %", signal.SIGTERM),
        ("taking down: 0 %", signal.SIGINT),
    ],
)
def test_an_interrupted_demo_leaves_nothing(tmp_path, at, number):
    said = interrupted(demo(tmp_path), at, number)
    assert said.code == 130, said.err
    assert "interrupted" in said.err
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []


def test_a_killed_demo_leaves_no_process(tmp_path):
    with demo(tmp_path) as process:
        assert process.stderr is not None
        assert any(line.startswith("job: 0 %") for line in process.stderr)
        daemons = processes_of(tmp_path)
        assert len(daemons) == 2
        machines = [c for d in daemons for c in d.children(recursive=True)]
        process.kill()
        assert psutil.wait_procs([*daemons, *machines], timeout=20)[1] == []


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An embedded grid with a disk whose guest never ends."""
    folder = tmp_path_factory.mktemp("embedded")
    home = folder / "home"
    endless = folder / "endless.raw"
    endless.write_bytes(bios_disk(NEVER_ENDS).ljust(1 << 20, b"\0"))
    (folder / "job.sh").write_text("#!/bin/sh\n")
    assert p2pgrid("put", endless, home=home).code == 0
    try:
        yield home
    finally:
        launch.stop(home)
        assert processes_of(folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_cancels_its_job(home, number):
    process = command("p2pgrid", "run", "--script", "job.sh", "--ram", "64M", home=home)
    said = interrupted(process, "job: 0 %", number)
    assert said.code == (-9 if number == signal.SIGKILL else 130)

    def newest():
        return p2pgrid("job", "ls", "--json", home=home).json["jobs"][0]["state"]

    until(lambda: newest() == "cancelled", "the job is cancelled")
    daemon = next(p for p in processes_of(home) if "p2pgrid.node.daemon" in p.cmdline())
    until(lambda: not daemon.children(recursive=True), "its machine is off")


def test_an_interrupted_wait_leaves_the_job_alone(home):
    job = p2pgrid("run", "--script", "job.sh", "--ram", "64M", "-d", home=home).out.strip()
    said = interrupted(command("p2pgrid", "job", "wait", job, home=home), "job: 0 %")
    assert said.code == 130
    assert p2pgrid("job", "show", job, "--json", home=home).json["state"] in ("pending", "running")
    assert p2pgrid("job", "cancel", job, home=home).code == 0


def test_an_interrupted_start_leaves_no_daemon(tmp_path):
    home = tmp_path / "home"
    (tmp_path / "disk.raw").write_bytes(bios_disk().ljust(1 << 20, b"\0"))
    said = interrupted(command("p2pgrid", "put", "disk.raw", home=home), "no daemon runs here")
    assert said.code == 130
    assert processes_of(tmp_path) == []
    assert p2pgrid("disk", "ls", home=home).code == 6
    assert p2pgrid("put", "disk.raw", home=home).code == 0  # and the next one does
    assert p2pgrid("down", home=home).code == 0
