"""Do two guests behind two NATs find each other on their job's LAN, by programs that know nothing of it?"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pgrid.node import api
from tests.netns.lab import HUB, Lab, lab, needs_namespaces
from tests.netns.nats import ADDRESS_RESTRICTED, PORT_RESTRICTED, SYMMETRIC, Nat
from tests.netns.test_behind_nat import daemon, p2pgrid
from tests.tiny_disk import tiny_disk
from tests.vm.test_lan_guests import SCRIPT

pytestmark = [
    needs_namespaces,
    pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed"),
]


@pytest.fixture
def world() -> Iterator[Lab]:
    with lab() as built:
        yield built


SLOW = pytest.mark.skipif("P2PGRID_SLOW" not in os.environ, reason="half a minute: set P2PGRID_SLOW=1")


@pytest.mark.parametrize(
    ("nat", "way"), [(ADDRESS_RESTRICTED, "punched"), pytest.param(SYMMETRIC, "relayed", marks=SLOW)], ids=str
)
def test_guests_ping_and_fetch_by_name(world: Lab, tmp_path: Path, nat: Nat, way: str) -> None:
    disk, hub = tiny_disk(), tmp_path / "hub"
    script = tmp_path / "job.sh"
    script.write_text(SCRIPT)
    with contextlib.ExitStack() as running:
        running.enter_context(
            daemon(world.hub, "p2pgrid.cli", "coordinator", "--listen", f"{HUB}:4321", "--data-dir", str(hub))
        )
        ticket = p2pgrid(hub, "token", "create")["ticket"]
        homes = [tmp_path / f"home{n}" for n in (1, 2)]
        for home, before in zip(homes, (PORT_RESTRICTED, nat), strict=True):
            words = ("join", ticket, "--yes", "--foreground", "--name", home.name, "--data-dir", str(home))
            running.enter_context(daemon(world.home(before).space, "p2pgrid.node.cli", *words))
        p2pgrid(hub, "put", str(disk), "--name", "tiny", "--replica", "-1")
        job = p2pgrid(hub, "run", "tiny", "--script", str(script), "--array", "0-1", "--net", "lan",
                      "--ram", "96M", "--scratch", "64M", "--time", "90s",
                      "-o", str(tmp_path / "out"))  # fmt: skip
        assert {(t["state"], t["exit"]) for t in job["tasks"]} == {("completed", 0)}
        assert {t["node"] for t in job["tasks"]} == {"home1", "home2"}
        for me, other in ((0, 1), (1, 0)):
            fetched = (tmp_path / "out" / str(me) / "fetched.txt").read_text()
            assert fetched == (tmp_path / "out" / str(other) / "served.txt").read_text()
            assert f"PING task{other}" in (tmp_path / "out" / str(me) / "ping.txt").read_text()
        peer = api.call(homes[1], "status")["peer"]
        links = api.call(homes[0], "status")["links"]
        assert {link["way"] for link in links if link["peer"] == peer} == {way}
