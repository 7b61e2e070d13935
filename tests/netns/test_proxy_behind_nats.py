"""Do guests behind two different NATs, and who submitted them, reach each other's programs by plain names?"""

from __future__ import annotations

import contextlib
import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pgrid.node import api
from tests.grid_processes import command, until
from tests.netns.lab import HUB, Lab, lab, needs_namespaces
from tests.netns.nats import ADDRESS_RESTRICTED, PORT_RESTRICTED
from tests.netns.spaces import inside
from tests.netns.test_behind_nat import daemon, p2pgrid
from tests.tiny_disk import tiny_disk
from tests.vm.test_proxy_guests import SCRIPT, Quiet, ended, fetched

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


def test_client_job_and_job_talk_across_two_nats(world: Lab, tmp_path: Path) -> None:
    disk, hub = tiny_disk(), tmp_path / "hub"
    (tmp_path / "job.sh").write_text(SCRIPT)
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "page").write_text("kept by the submitter\n")
    with contextlib.ExitStack() as running:
        running.enter_context(
            daemon(world.hub, "p2pgrid.cli", "coordinator", "--listen", f"{HUB}:4321", "--data-dir", str(hub))
        )
        ticket = p2pgrid(hub, "token", "create")["ticket"]
        homes = [tmp_path / f"home{n}" for n in (1, 2)]
        for home, nat in zip(homes, (PORT_RESTRICTED, ADDRESS_RESTRICTED), strict=True):
            words = ("join", ticket, "--yes", "--foreground", "--name", home.name, "--data-dir", str(home))
            running.enter_context(daemon(world.home(nat).space, "p2pgrid.node.cli", *words))
        p2pgrid(hub, "put", str(disk), "--name", "tiny", "--replica", "-1")
        small = ("--ram", "96M", "--scratch", "64M", "--time", "90s", "--array", "0-1")
        job = p2pgrid(hub, "run", "tiny", "--script", str(tmp_path / "job.sh"), *small,
                      "--net", "lan", "--accept", "80:job", "-d")["job"]  # fmt: skip
        port = running.enter_context(web_server(world.hub, tmp_path / "www"))
        exposed = command("p2pgrid", "expose", port, "--as", 8000, "--to", job, home=hub)
        running.callback(ended, exposed)
        forward = command("p2pgrid", "job", "forward", job, "80", "--index", 1, home=hub)
        running.callback(ended, forward)
        assert forward.stderr is not None
        at = forward.stderr.readline().split(" ")[0]

        def page() -> bytes | None:
            return inside(world.hub, lambda: fetched(f"http://{at}/page"))

        assert until(page, "a page from the guest") == b"kept by task 1\n"
        (tmp_path / "www" / "over").write_text("")
        done = api.call(hub, "job_wait", {"job": job, "patience": 60.0})
        assert done["state"] == "completed", done
        assert {task["node"] for task in done["tasks"]} == {"home1", "home2"}
        p2pgrid(hub, "job", "results", job, "-o", str(tmp_path / "out"))
    for me, other in ((0, 1), (1, 0)):
        out = tmp_path / "out" / str(me)
        assert (out / "owner.txt").read_text() == "kept by the submitter\n"
        assert (out / "other.txt").read_text() == f"kept by task {other}\n"
        assert (out / "closed.txt").read_text() != "0\n"
        assert (out / "denied.txt").read_text() != "0\n"
