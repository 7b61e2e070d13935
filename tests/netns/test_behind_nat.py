"""Workers behind NATs run jobs: only the coordinator has a port that can be reached from outside."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pgrid.node import api
from tests.netns.lab import HUB, Lab, lab, needs_namespaces
from tests.netns.nats import PORT_RESTRICTED, SYMMETRIC, Nat
from tests.vm.bios.disk import bios_disk

pytestmark = [
    needs_namespaces,
    pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed"),
]


@contextlib.contextmanager
def daemon(space: str, module: str, *words: str) -> Iterator[None]:
    """A foreground daemon in a namespace, ready when the block begins, ended when it is left."""
    command = ["ip", "netns", "exec", space, sys.executable, "-m", module, *words]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    assert child.stderr is not None
    try:
        said = []
        for line in child.stderr:
            said.append(line)
            if line.startswith("ready:"):
                break
        else:
            pytest.fail("the daemon did not start: " + "".join(said))
        yield
    finally:
        child.terminate()
        child.communicate(timeout=30)


def p2pgrid(home: Path, *words: str) -> dict:
    """A command of the person at a daemon, as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "p2pgrid.cli", *words, "--data-dir", str(home), "--json"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def world() -> Iterator[Lab]:
    with lab() as built:
        yield built


def test_a_job_runs_on_workers_that_nobody_can_reach(world: Lab, tmp_path: Path):
    hub = tmp_path / "hub"
    (tmp_path / "disk.raw").write_bytes(bios_disk(more=os.urandom(2 << 20)))
    script = tmp_path / "job.sh"
    script.write_text("echo hello\n")
    with contextlib.ExitStack() as running:
        running.enter_context(
            daemon(world.hub, "p2pgrid.cli", "coordinator", "--listen", f"{HUB}:4321", "--data-dir", str(hub))
        )
        ticket = p2pgrid(hub, "token", "create")["ticket"]
        homes = [tmp_path / f"home{n}" for n in (1, 2)]
        for home in homes:
            words = ("join", ticket, "--yes", "--foreground", "--name", home.name, "--data-dir", str(home))
            running.enter_context(daemon(world.home().space, "p2pgrid.node.cli", *words))
        p2pgrid(hub, "put", str(tmp_path / "disk.raw"))
        job = p2pgrid(hub, "run", "--script", str(script), "--array", "0-3", "--ram", "64M",
                      "--scratch", "64M", "-o", str(tmp_path / "out"))  # fmt: skip
        assert {t["state"] for t in job["tasks"]} == {"completed"}
        assert {t["node"] for t in job["tasks"]} == {"home1", "home2"}
        for index in range(4):
            assert (tmp_path / "out" / str(index) / "context.sh").read_text() == "echo hello\n"
        for home in homes:  # each got the disk from the one node that can be reached
            assert api.call(home, "status")["received"]


@pytest.mark.parametrize(("nat", "way"), [(PORT_RESTRICTED, "punched"), (SYMMETRIC, "relayed")], ids=str)
def test_a_job_of_one_home_runs_in_another(world: Lab, tmp_path: Path, nat: Nat, way: str):
    """The disk goes there, and results come back, whatever is between: at worst through the coordinator."""
    (tmp_path / "disk.raw").write_bytes(bios_disk(more=os.urandom(4 << 20)))
    script = tmp_path / "job.sh"
    script.write_text("echo hello\n")
    hub, mine, theirs = (tmp_path / name for name in ("hub", "mine", "theirs"))
    with contextlib.ExitStack() as running:
        running.enter_context(
            daemon(world.hub, "p2pgrid.cli", "coordinator", "--listen", f"{HUB}:4321", "--data-dir", str(hub))
        )
        for home, role in ((mine, "submitter"), (theirs, "worker")):
            ticket = p2pgrid(hub, "token", "create", "--role", role)["ticket"]
            words = ("join", ticket, "--yes", "--foreground", "--name", home.name, "--data-dir", str(home))
            running.enter_context(daemon(world.home(nat).space, "p2pgrid.node.cli", *words))
        p2pgrid(mine, "put", str(tmp_path / "disk.raw"))
        job = p2pgrid(mine, "run", "--script", str(script), "--array", "0-1", "--ram", "64M",
                      "--scratch", "64M", "-o", str(tmp_path / "out"))  # fmt: skip
        assert {(t["state"], t["node"]) for t in job["tasks"]} == {("completed", "theirs")}
        for index in range(2):
            assert (tmp_path / "out" / str(index) / "context.sh").read_text() == "echo hello\n"
        status = api.call(mine, "status")
        peer = api.call(theirs, "status")["peer"]
        assert {link["way"] for link in status["links"] if link["peer"] == peer} == {way}
        assert api.call(hub, "status")["served"] == {}  # a relay passes sealed bytes on, it has none of them
