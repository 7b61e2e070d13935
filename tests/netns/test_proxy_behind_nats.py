"""Do guests behind two different NATs, and their submitter behind a third, reach each other by names?"""

from __future__ import annotations

import contextlib
import functools
import http.server
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pgrid.node import api
from tests.grid_processes import command, until
from tests.netns.lab import HUB, Host, Lab, lab, needs_namespaces
from tests.netns.nats import ADDRESS_RESTRICTED, PORT_RESTRICTED, SYMMETRIC, Nat
from tests.netns.spaces import inside
from tests.netns.test_behind_nat import daemon, p2pgrid
from tests.tiny_disk import tiny_disk
from tests.vm.test_proxy_guests import SCRIPT, Quiet, ended, fetched, needs_ssh, ssh_job

pytestmark = [
    needs_namespaces,
    pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed"),
]


@pytest.fixture
def world() -> Iterator[Lab]:
    with lab() as built:
        yield built


@contextlib.contextmanager
def web_server(space: str, folder: Path) -> Iterator[int]:
    """Of the machine in this namespace, for itself alone."""
    handler = functools.partial(Quiet, directory=str(folder))
    server = inside(space, lambda: http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def grid(world: Lab, folder: Path, *nats: Nat) -> Iterator[tuple[Host, Path]]:
    """A coordinator that all reach, a submitter behind a symmetric NAT, and a worker behind each of `nats`.

    Gives the submitter's host and home.
    """
    hub, mine, submitter = folder / "hub", folder / "mine", world.home(SYMMETRIC)
    with contextlib.ExitStack() as running:
        running.enter_context(
            daemon(world.hub, "p2pgrid.cli", "coordinator", "--listen", f"{HUB}:4321", "--data-dir", str(hub))
        )
        for n, host in enumerate([submitter, *map(world.home, nats)]):
            role, home = ("worker", folder / f"home{n}") if n else ("submitter", mine)
            ticket = p2pgrid(hub, "token", "create", "--role", role)["ticket"]
            words = ("join", ticket, "--yes", "--foreground", "--name", home.name, "--data-dir", str(home))
            running.enter_context(daemon(host.space, "p2pgrid.node.cli", *words))
        yield submitter, mine


def test_client_job_and_job_talk_across_nats(world: Lab, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(SCRIPT)
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "page").write_text("kept by the submitter\n")
    with contextlib.ExitStack() as running:
        submitter, mine = running.enter_context(grid(world, tmp_path, PORT_RESTRICTED, ADDRESS_RESTRICTED))
        p2pgrid(mine, "put", str(tiny_disk()), "--name", "tiny", "--replica", "-1")
        small = ("--ram", "96M", "--scratch", "64M", "--time", "90s", "--array", "0-1")
        job = p2pgrid(mine, "run", "tiny", "--script", str(tmp_path / "job.sh"), *small,
                      "--net", "lan", "--accept", "80:job", "-d")["job"]  # fmt: skip
        port = running.enter_context(web_server(submitter.space, tmp_path / "www"))
        exposed = command("p2pgrid", "expose", port, "--as", 8000, "--to", job, home=mine)
        running.callback(ended, exposed)
        for index in range(2):
            forward = command("p2pgrid", "job", "forward", job, "80", "--index", index, home=mine)
            running.callback(ended, forward)
            assert forward.stderr is not None
            at = forward.stderr.readline().split(" ")[0]

            def served(name: str, at: str = at) -> bytes | None:
                return submitter.call(lambda: fetched(f"http://{at}/{name}"))

            page = until(functools.partial(served, "page"), "a page from the guest")
            assert page == b"kept by task %d\n" % index
            until(functools.partial(served, "ready"), "a guest that has fetched all it wants")
        (tmp_path / "www" / "over").write_text("")
        done = api.call(mine, "job_wait", {"job": job, "patience": 60.0})
        assert done["state"] == "completed", done
        assert {task["node"] for task in done["tasks"]} == {"home1", "home2"}
        p2pgrid(mine, "job", "results", job, "-o", str(tmp_path / "out"))
    for me, other in ((0, 1), (1, 0)):
        out = tmp_path / "out" / str(me)
        assert (out / "owner.txt").read_text() == "kept by the submitter\n"
        assert (out / "other.txt").read_text() == f"kept by task {other}\n"
        assert (out / "closed.txt").read_text() != "0\n"
        assert (out / "denied.txt").read_text() != "0\n"


@needs_ssh
def test_ssh_opens_a_guest_across_nats(world: Lab, tmp_path: Path) -> None:
    with grid(world, tmp_path, PORT_RESTRICTED) as (submitter, mine):
        p2pgrid(mine, "put", str(tiny_disk()), "--name", "tiny")
        job = p2pgrid(mine, "run", "tiny", *map(str, ssh_job(tmp_path)), "-d")["job"]
        words = [sys.executable, "-m", "p2pgrid.cli", "job", "ssh", job, "--data-dir", str(mine)]

        def ssh(*command: str) -> subprocess.CompletedProcess[str]:
            line = submitter.words(*words, "-i", tmp_path / "key", "--", *command)
            return subprocess.run(line, capture_output=True, text=True, timeout=60)

        until(lambda: ssh("true").returncode == 0, "a shell in the guest")
        assert ssh("hostname").stdout == "task0\n"
        assert ssh("echo told by ssh >/tmp/over.new && mv /tmp/over.new /tmp/over").returncode == 0
        done = api.call(mine, "job_wait", {"job": job, "patience": 60.0})
        assert done["state"] == "completed", done
        p2pgrid(mine, "job", "results", job, "-o", str(tmp_path / "out"))
    assert (tmp_path / "out" / "0" / "over.txt").read_text() == "told by ssh\n"
