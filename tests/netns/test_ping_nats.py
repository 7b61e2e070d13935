"""Does a person see by which way two nodes behind NATs are linked, and when that gets better?"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from p2pgrid.node import api
from tests.grid_processes import until
from tests.netns.lab import HUB, lab, needs_namespaces
from tests.netns.nats import PORT_RESTRICTED, SYMMETRIC, Nat
from tests.netns.test_behind_nat import daemon, p2pgrid

pytestmark = needs_namespaces


@attrs.frozen
class Homes:
    """Two nodes, each behind a NAT of its own, and the coordinator, which relays."""

    hub: Path
    mine: Path

    def ping(self, *words: str) -> tuple[int, dict[str, Any]]:
        """Exit code and document of a ping from one to the other."""
        command = [sys.executable, "-m", "p2pgrid.node.cli", "ping", *words, "--data-dir", str(self.mine)]
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)


@contextlib.contextmanager
def open_homes(folder: Path, nat: Nat) -> Iterator[Homes]:
    hub, mine, theirs = (folder / name for name in ("hub", "mine", "theirs"))
    with lab() as world, contextlib.ExitStack() as running:
        _run(running, world.hub, hub, "p2pgrid.cli", "coordinator", "--listen", f"{HUB}:4321")
        for home in (mine, theirs):
            ticket = p2pgrid(hub, "token", "create", "--role", "submitter")["ticket"]
            words = ("p2pgrid.node.cli", "join", ticket, "--yes", "--foreground", "--name", home.name)
            _run(running, world.home(nat).space, home, *words)
        until(lambda: _reachable(hub), "each has a place at a relay, and the coordinator knows it")
        yield Homes(hub, mine)


def _run(running: contextlib.ExitStack, space: str, home: Path, module: str, *words: str) -> None:
    running.enter_context(daemon(space, module, *words, "--data-dir", str(home)))


def _reachable(hub: Path) -> bool:
    nodes = {node["name"]: node["addresses"] for node in api.call(hub, "node_ls")["nodes"]}
    return all(any("p2p-circuit" in a for a in nodes[name]) for name in ("mine", "theirs"))


def test_the_upgrade_is_seen_as_it_happens(tmp_path: Path):
    with open_homes(tmp_path, PORT_RESTRICTED) as homes:
        code, said = homes.ping("theirs", "--until-direct")
        assert (code, said["name"], said["way"]) == (0, "theirs", "punched"), said
        relay = api.call(homes.hub, "status")["peer"]
        ways = [(row["way"], row["via"]) for row in said["pings"]]
        assert set(ways[:-1]) <= {("relayed", relay)}, said
        assert ways[-1] == ("punched", None)
        assert all(row["seconds"] is not None for row in said["pings"]), said
        (link,) = [link for link in api.call(homes.mine, "status")["links"] if link["peer"] == said["peer"]]
        assert (link["way"], link["via"], link["connected"]) == ("punched", None, True)


def test_what_cannot_be_punched_stays_relayed_and_is_said_so(tmp_path: Path):
    with open_homes(tmp_path, SYMMETRIC) as homes:
        code, said = homes.ping("theirs", "--until-direct", "--count", "3")
        assert (code, said["answered"], said["way"]) == (5, 3, "relayed"), said
        assert said["via"] == api.call(homes.hub, "status")["peer"]
        code, said = homes.ping("theirs", "--count", "1")
        assert (code, said["way"]) == (0, "relayed")
        code, said = homes.ping("coordinator", "--until-direct")
        assert (code, said["way"], len(said["pings"])) == (0, "direct", 1), said
