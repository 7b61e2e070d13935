"""What else a person runs into: each is said in one sentence with a code, and nothing breaks by it."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from p2pgrid.node import api, launch
from p2pgrid.node.config import Config
from tests.grid_processes import command, interrupted, open_grid, p2pgrid, p2pnode, processes_of
from tests.vm.bios.disk import bios_disk

MIB = 1 << 20


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A coordinator without workers, its store no larger than a few small disks."""
    with open_grid(tmp_path_factory.mktemp("grid"), 0, quota=4 * MIB) as grid:
        yield grid


@contextlib.contextmanager
def embedded(home):
    try:
        yield home
    finally:
        if api.daemon_runs(home):
            launch.stop(home)
        assert processes_of(home) == []


def disk(folder, name="disk.raw"):
    path = folder / name
    path.write_bytes(bios_disk().ljust(MIB, b"\0"))
    return path


def test_a_data_directory_that_cannot_be_is_said_so(tmp_path):
    (tmp_path / "file").touch()
    image = disk(tmp_path)
    for home in (tmp_path / "file", tmp_path / "file" / "home"):
        said = p2pgrid("put", image, "--data-dir", home, home=tmp_path)
        assert said.code in (2, 6, 78), said.err
        assert said.err.startswith("error: ")


def test_without_qemu_it_says_what_to_install(tmp_path):
    home = tmp_path / "home"
    Config(roles=("coordinator", "submitter", "worker"), listen="127.0.0.1:0", name="x").save(home)
    code = f"""
import sys
from p2pgrid.vm import scratch
scratch.SYSTEM_FOLDERS = ""  # where programs are looked for whatever PATH says
from p2pgrid.node import daemon
sys.argv = ["daemon", {str(home)!r}, "--ready-fd", "1"]
sys.exit(daemon.main())
"""
    said = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": str(tmp_path)},
    )
    assert said.returncode == 78
    error = json.loads(said.stdout)["error"]
    assert "apt install qemu-system-x86" in error["message"]
    assert error["exit_code"] == 78


def test_a_port_in_use_is_said_so(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = p2pgrid("coordinator", "--listen", address, home=tmp_path / "home")
    assert said.code == 78
    assert "cannot listen on" in said.err


@pytest.mark.parametrize("listen", ["nonsense", "127.0.0.1", "127.0.0.1:99999", ":1"])
def test_an_address_that_is_none_changes_nothing(tmp_path, listen):
    assert p2pgrid("coordinator", "--listen", listen, home=tmp_path / "home").code == 2
    assert not (tmp_path / "home").exists()


def test_a_coordinator_in_the_foreground_keeps_what_was_set_up(tmp_path):
    home = tmp_path / "home"
    first = ("coordinator", "--listen", "127.0.0.1:0", "--lease", "9s")
    said = interrupted(command("p2pgrid", *first, home=home), "ready: ")
    assert said.code == 0
    before = Config.load(home)
    assert before is not None
    assert before.lease == 9
    assert not before.listen.endswith(":0")
    again = interrupted(command("p2pgrid", "coordinator", home=home), "ready: ", signal.SIGTERM)
    assert again.code == 0
    assert Config.load(home) == before
    assert not (home / api.SOCKET).exists()


def test_of_two_daemons_on_one_directory_one_runs(grid):
    said = p2pgrid("coordinator", home=grid.home)
    assert said.code == 10
    assert "p2pgrid down" in said.err
    with pytest.raises(api.Told) as told:
        launch.spawn(grid.home).ready()
    assert told.value.code == 78
    assert grid.coordinator.ask("status")["name"] == "coordinator"


def test_two_commands_that_start_a_grid_at_once_share_it(tmp_path):
    image = disk(tmp_path)
    with embedded(tmp_path / "home") as home:
        both = [command("p2pgrid", "put", image, "--json", home=home) for _ in range(2)]
        said = [process.communicate(timeout=60) for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        assert len({json.loads(out)["disk"] for out, _ in said}) == 1


def test_a_killed_daemon_is_started_again(tmp_path):
    image = disk(tmp_path)
    with embedded(tmp_path / "home") as home:
        first = p2pgrid("put", image, "--json", home=home).json
        daemon = psutil.Process(api.call(home, "status")["pid"])
        daemon.kill()
        psutil.wait_procs([daemon], timeout=10)
        assert (home / api.SOCKET).exists()
        assert p2pgrid("disk", "ls", home=home).code == 6
        (tmp_path / "job.sh").write_text("")
        said = p2pgrid("run", "--script", "job.sh", "--ram", "64M", "--json", home=home)
        assert said.code == 0
        assert "starting the daemon" in said.err
        assert said.json["disk"] == first["disk"]


def test_run_without_a_disk_says_to_put_one(grid, tmp_path):
    (tmp_path / "job.sh").write_text("")
    said = p2pgrid("run", "--script", tmp_path / "job.sh", home=grid.home)
    assert said.code == 3
    assert "p2pgrid put DISK" in said.err


def test_without_workers_a_job_says_why_it_waits(grid, tmp_path):
    cid = grid.put("lonely", bios_disk().ljust(MIB, b"\0"), replica=0)
    job = grid.submit("lonely")
    said = p2pgrid("job", "wait", job, "--timeout", "0.5s", home=grid.home)
    assert said.code == 5
    assert "no worker is online" in said.err
    assert "no worker is online" in p2pgrid("job", "show", job, home=grid.home).out
    removed = p2pgrid("disk", "rm", cid, home=grid.home)
    assert (removed.code, "needs" in removed.err) == (10, True)
    assert p2pgrid("job", "cancel", job, home=grid.home).code == 0
    assert p2pgrid("disk", "rm", cid, home=grid.home).code == 0


def test_a_disk_over_the_quota_leaves_no_trace(grid, tmp_path):
    big = tmp_path / "big.raw"
    big.write_bytes(random.Random(5).randbytes(8 * MIB))
    before = p2pgrid("disk", "ls", "--json", home=grid.home).json
    assert p2pgrid("put", big, home=grid.home).code == 8
    assert p2pgrid("disk", "ls", "--json", home=grid.home).json == before
    assert not [f for f in (grid.home / "store").rglob("*") if f.is_file() and f.stat().st_size > MIB]


def test_tickets_that_are_not_good_leave_nothing(grid, tmp_path):
    home = tmp_path / "worker"
    good = p2pgrid("token", "create", "--uses", 1, home=grid.home).out.strip()
    for ticket, code in (("nonsense", 2), (good[:-9], 2), (f"file:{tmp_path}/nowhere", 3)):
        assert p2pnode("join", ticket, "--yes", home=home).code == code
    assert p2pnode("join", good, home=home).code == 9  # nobody is there to say yes
    assert p2pnode("join", home=home).code == 2
    assert not (home / "daemon.json").exists()
    with embedded(tmp_path / "first") as first:
        assert p2pnode("join", good, "--yes", "--listen", "127.0.0.1:0", home=first).code == 0
        used = p2pnode("join", good, "--yes", "--listen", "127.0.0.1:0", home=home)
        assert used.code == 4
        assert "used 1 times" in used.err
        assert not (home / "daemon.json").exists()
        other = p2pnode("join", good, "--yes", home=grid.home)
        assert other.code == 10
        assert p2pnode("leave", home=first).code == 0
    assert not (first / "daemon.json").exists()
    assert p2pnode("status", home=first).code == 6
    assert p2pnode("leave", home=first).code == 3
    assert p2pnode("leave", home=grid.home).code == 10  # the owner cannot


def test_two_submitters_cannot_have_one_name(grid, tmp_path):
    theirs = grid.member("theirs", "submitter")
    image = disk(tmp_path, "name.raw")
    assert p2pgrid("put", image, home=grid.home).code == 0
    refused = p2pgrid("put", image, home=theirs.home)
    assert refused.code == 10
    assert theirs.ask("status")["holds"] == []
    assert p2pgrid("put", image, "--name", "mine", home=theirs.home).code == 0
    assert p2pgrid("disk", "ls", "--json", home=theirs.home).json["disks"][0]["name"] == "mine"


def test_a_put_waits_for_a_coordinator_that_restarts(grid, tmp_path):
    submitter = grid.member("patient", "submitter")
    grid.coordinator.kill()
    put = command("p2pgrid", "put", disk(tmp_path, "patient.raw"), home=submitter.home)
    assert put.stderr is not None
    assert any(line.startswith("cutting: 100 %") for line in put.stderr)
    grid.coordinator.restart()
    out, err = put.communicate(timeout=60)
    assert put.returncode == 0, out + err
    assert "patient.raw" in p2pgrid("disk", "ls", home=submitter.home).out
