"""Be p2pgrid in the bench: real daemons, the putter a coordinator, one data directory each.

`p2pgrid` is the fetch that a task waits for: the first half of `get`, until the disk is complete and
verified in the worker's store, ready to boot; when all is measured it is written out of there to be compared,
by every worker where that is little, by the last one where it is more than `PROOF`.  `p2pgrid-written` is the
whole of `get`, until the image is a file at the worker's, too.  Holders are looked up, links made and
bytes encrypted within the time that is measured.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from bench.lab import Host
from bench.peers import Bout, Peer
from p2pgrid.node import api
from p2pgrid.node.config import TICKET, Config
from p2pgrid.node.launch import LOG

PORT = 4321
PATIENCE = 60.0
"""Seconds until every worker is a member and idle."""


PROOF = 1 << 30
"""Bytes that workers write in all, at most, to show what they have; beyond it one of them does."""


class Complete(Exception):
    """The disk is in the worker's store; the rest of `get` is not wanted."""


class P2pgrid(Peer):
    name: ClassVar[str] = "p2pgrid"

    def __init__(self, bout: Bout) -> None:
        super().__init__(bout)
        self._published: dict[str, Any] = {}
        self._had: list[Counter[str]] = []
        """What each worker had received of whom before."""

    def prepare(self) -> None:
        """Daemons run and are members; where there is an old version, all of them hold it."""
        origin = self.bout.origin
        Config(roles=("coordinator", "submitter"), listen=f"{origin.address}:{PORT}", name=origin.name).save(
            _home(origin)
        )
        _begin(origin)()
        grid = ask(origin, "status")
        ticket = ask(origin, "token_create", role="worker", uses=len(self.bout.workers) + 1, expires=3600.0)
        begun = []
        for worker in self.bout.workers:
            Config(
                roles=("worker",),
                listen=f"{worker.address}:{PORT}",
                name=worker.name,
                coordinator=grid["peer"],
                addresses=tuple(grid["addresses"]),
            ).save(_home(worker))
            (_home(worker) / TICKET).write_text(ticket["ticket"])
            begun.append(_begin(worker))
        for ready in begun:
            ready()
        self._until_idle()
        if self.bout.old:
            old = ask(origin, "put", path=str(self.bout.old), name="old", replica=0)["disk"]
            for worker in self.bout.workers:
                fetch(worker, old)

    def publish(self) -> None:
        name = f"disk-{len(self._published)}"
        self._published = ask(self.bout.origin, "put", path=str(self.bout.file), name=name, replica=0)

    def serve(self) -> None:
        self._had = self._received()

    def fetch(self, worker: Host) -> None:
        fetch(worker, self._published["disk"])

    def output(self, worker: Host) -> Path | None:
        workers = self.bout.workers
        if worker is not workers[-1] and self.bout.file.stat().st_size * len(workers) > PROOF:
            return None
        return self._write(worker)

    def _write(self, worker: Host) -> Path:
        out = worker.folder / self.bout.file.name
        ask(worker, "get", disk=self._published["disk"], out=str(out), format=None)
        return out

    def facts(self) -> dict[str, Any]:
        """The pack's bytes, and whose of them the workers had."""
        origin = ask(self.bout.origin, "status")["peer"]
        came = [now - had for now, had in zip(self._received(), self._had, strict=True)]
        direct = sum(c[origin] for c in came)
        return {
            "wire_bytes": self._published["wire_bytes"],
            "payload_from_origin": direct,
            "payload_from_peers": sum(c.total() for c in came) - direct,
        }

    def _received(self) -> list[Counter[str]]:
        return [Counter(ask(worker, "status")["received"]) for worker in self.bout.workers]

    def _until_idle(self) -> None:
        limit = time.monotonic() + PATIENCE
        while True:
            nodes = ask(self.bout.origin, "node_ls")["nodes"]
            if sum(n["state"] == "online" and n["slots"] > 0 for n in nodes) == len(self.bout.workers):
                return
            if time.monotonic() > limit:
                raise TimeoutError(f"not every worker is online in {PATIENCE:.0f} s: {nodes}")
            time.sleep(0.05)


class P2pgridWritten(P2pgrid):
    name = "p2pgrid-written"

    def fetch(self, worker: Host) -> None:
        self._write(worker)

    def output(self, worker: Host) -> Path:
        return worker.folder / self.bout.file.name


def ask(host: Host, op: str, /, on_event: Callable[[Any], None] | None = None, **args: Any) -> Any:
    """What the host's daemon answers."""
    return api.call(_home(host), op, args, on_event)


def fetch(worker: Host, datum: str) -> None:
    """Until `datum` is complete and verified in the worker's store."""

    def watch(event: dict[str, Any]) -> None:
        if event["phase"] == "writing":
            raise Complete

    try:
        ask(worker, "get", watch, disk=datum, out=str(worker.folder / "unwanted"), format=None)
    except Complete:
        return
    raise AssertionError("written without being complete")


def _home(host: Host) -> Path:
    return host.folder / "data"


def _begin(host: Host) -> Callable[[], None]:
    """Start the host's daemon; call what this gives to wait until it is ready."""
    home = _home(host)
    ready, theirs = os.pipe()
    try:
        with (home / LOG).open("ab") as log:
            words = [sys.executable, "-m", "p2pgrid.node.daemon", home, "--ready-fd", theirs]
            host.start(words, stdout=log, stderr=log, pass_fds=(theirs,), cwd=home)
    finally:
        os.close(theirs)

    def until_ready() -> None:
        with os.fdopen(ready) as news:
            said = json.loads(news.readline() or "{}")
        if "ready" not in said:
            raise RuntimeError(f"the daemon of {host.name} did not start: {said}\n{(home / LOG).read_text()}")

    return until_ready
