"""Does a daemon behind a router have itself let in, tell others where, and answer `p2pnode netcheck`?"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pgrid.node import api
from tests.netns.gateway import HUB, gateway, needs_miniupnpd
from tests.netns.lab import Host, Lab, lab, needs_namespaces
from tests.netns.test_behind_nat import daemon, p2pgrid

pytestmark = [needs_namespaces, needs_miniupnpd]


@pytest.fixture
def world() -> Iterator[Lab]:
    with lab() as built:
        yield built


def netcheck(host: Host, home: Path) -> tuple[int, dict]:
    words = host.words(sys.executable, "-m", "p2pgrid.node.cli", "netcheck", "--json", "--data-dir", home)
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    return done.returncode, json.loads(done.stdout)


def test_a_daemon_is_let_in_and_says_so(world: Lab, tmp_path: Path) -> None:
    hub, home, host = tmp_path / "hub", tmp_path / "home", world.home()
    with contextlib.ExitStack() as running:
        router = running.enter_context(gateway(world, host, tmp_path))
        listen = ("--listen", f"{HUB}:4321", "--data-dir", str(hub))
        running.enter_context(daemon(world.hub, "p2pgrid.cli", "coordinator", *listen))
        ticket = p2pgrid(hub, "token", "create", "--role", "submitter")["ticket"]
        words = ("join", ticket, "--yes", "--foreground", "--name", "home", "--data-dir", str(home))
        with daemon(host.space, "p2pgrid.node.cli", *words):
            code, said = netcheck(host, home)
            assert (code, said["verdict"], said["running"]) == (0, "mapped", True)
            assert said["port_mapping"]["address"].startswith(f"{router.external}:")
            [observer] = said["observers"]
            assert observer["role"] == "coordinator"
            assert observer["called"] is True
            assert 0 < observer["delay"] < 5
            assert router.maps
            api.call(home, "prefs", {"changes": {"port_mapping": "off"}})
        assert not router.maps, "it was given back"
        code, said = netcheck(host, home)
        assert (code, said["running"], said["port_mapping"]["address"]) == (0, False, None)
        assert said["observers"][0]["delay"] is not None
        assert "port_mapping=on" in "".join(said["advice"])
    code, said = netcheck(host, home)
    assert (code, said["verdict"]) == (6, "cut-off")
