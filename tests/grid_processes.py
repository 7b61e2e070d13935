"""Run real grids for tests: daemons and command lines as processes, all ended with the block.

Nothing here sleeps for luck: a daemon says when it is ready, a job tells its news, and what
nobody tells is asked for until it is so, or `PATIENCE` is over.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import psutil

from p2pgrid.node import api, launch
from p2pgrid.node.config import TICKET, Config

PATIENCE = 60.0
"""Seconds; far more than anything takes here."""


def command(
    program: str, *words: object, home: Path, cwd: Path | None = None, **env: str
) -> subprocess.Popen[str]:
    """`p2pgrid` or `p2pnode` with `words`, started as leader of a process group, as a shell does."""
    module = {"p2pgrid": "p2pgrid.cli", "p2pnode": "p2pgrid.node.cli"}[program]
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd or home.parent,
        env={**os.environ, "P2PGRID_HOME": str(home), **env},
        process_group=0,
    )


@attrs.frozen
class Said:
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout, which says its schema."""
        said = json.loads(self.out)
        assert said["schema"] == 1
        return said


def run(program: str, *words: object, home: Path, cwd: Path | None = None, **env: str) -> Said:
    """Run a command to its end; it never shows a traceback."""
    with command(program, *words, home=home, cwd=cwd, **env) as process:
        try:
            out, err = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert "Traceback" not in out + err, err
    return Said(process.returncode, out, err)


def p2pgrid(*words: object, home: Path, cwd: Path | None = None, **env: str) -> Said:
    return run("p2pgrid", *words, home=home, cwd=cwd, **env)


def p2pnode(*words: object, home: Path, cwd: Path | None = None, **env: str) -> Said:
    return run("p2pnode", *words, home=home, cwd=cwd, **env)


def interrupted(process: subprocess.Popen[str], at: str, number: int = signal.SIGINT) -> Said:
    """Send `number` to the process group, as a terminal does, once `process` has said `at` on stderr."""
    assert process.stderr is not None
    said = []
    with process:
        for line in process.stderr:
            said.append(line)
            if line.startswith(at):
                break
        else:
            raise AssertionError(f"it never said {at!r}: {said}")
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=PATIENCE)
    said.append(err)
    assert "Traceback" not in out + "".join(said), said
    return Said(process.returncode, out, "".join(said))


def until(true: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Ask until the answer is true, and give it; fails with `what` was waited for."""
    limit = time.monotonic() + patience
    while not (answer := true()):
        assert time.monotonic() < limit, f"{what}: not in {patience:.0f} s"
        time.sleep(0.05)
    return answer


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process that has `folder` in its command line: daemons, and commands that name it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and str(folder) in " ".join(process.cmdline()):
                found.append(process)
    return found


@attrs.define(eq=False)
class Daemon:
    """One daemon of a grid, which can be killed and started again on the same data."""

    home: Path
    process: subprocess.Popen[bytes]

    def ask(self, op: str, on_event: Callable[[Any], None] | None = None, **args: Any) -> Any:
        return api.call(self.home, op, args, on_event)

    @property
    def name(self) -> str:
        return self.home.name

    @property
    def peer(self) -> str:
        peer: str = self.ask("status")["peer"]
        return peer

    @property
    def log(self) -> str:
        return (self.home / launch.LOG).read_text(errors="replace")

    def machines(self) -> list[psutil.Process]:
        """The virtual machines that this daemon runs; not QEMU asked for its version, or as a probe."""
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.process.pid).children(recursive=True)
            return [c for c in children if c.name().startswith("qemu") and "-name" in c.cmdline()]
        return []

    def kill(self) -> None:
        """As a power cut would, for this process."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def restart(self) -> None:
        """On the same data directory, with what it remembers."""
        self.process = launch.spawn(self.home, with_parent=True).ready()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Frozen: it answers nobody, and its connections stay."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@attrs.define(eq=False)
class Grid:
    """A coordinator (which is also the submitter) and workers, under one folder."""

    folder: Path
    coordinator: Daemon
    workers: list[Daemon]

    @property
    def home(self) -> Path:
        return self.coordinator.home

    def member(self, name: str, role: str, ticket: str = "") -> Daemon:
        """One more, by a ticket."""
        if not ticket:
            ticket = self.coordinator.ask("token_create", role=role, uses=1, expires=600.0)["ticket"]
        made = Daemon(self.folder / name, _begin(self._config(name, role, ticket)).ready())
        self.workers.append(made)
        return made

    def _config(self, name: str, role: str, ticket: str) -> Path:
        grid = self.coordinator.ask("status")
        home = self.folder / name
        Config(
            roles=(role,),
            listen="127.0.0.1:0",
            name=name,
            coordinator=grid["peer"],
            addresses=tuple(grid["addresses"]),
        ).save(home)
        (home / TICKET).write_text(ticket)
        return home

    def submit(self, disk: str, by: Daemon | None = None, **more: Any) -> str:
        """A job of `disk`; its id.  `by` is the coordinator's own daemon unless told."""
        script = self.folder / "job.sh"
        script.write_text("#!/bin/sh\n")
        spec = {
            "disk": disk,
            "script": str(script),
            "inputs": [],
            "array": [0],
            "memory": 64 << 20,
            "cpus": 1,
            "time_limit": 60.0,
            "scratch": 64 << 20,
            "needs": [],
            "name": "",
        } | more
        job: str = (by or self.coordinator).ask("submit", **spec)["job"]
        return job

    def put(
        self, name: str, data: bytes, replica: int = 1, wait: bool = False, by: Daemon | None = None
    ) -> str:
        """A raw disk; its CID."""
        path = self.folder / f"{name}.raw"
        path.write_bytes(data)
        args = {"path": str(path), "name": name, "replica": replica, "wait": wait}
        cid: str = (by or self.coordinator).ask("put", **args)["disk"]
        return cid

    def booted(self, job: str) -> list[psutil.Process]:
        """The job's machines, as soon as each of its tasks has one; no other job may be under way."""
        tasks = len(self.coordinator.ask("job_show", job=job)["tasks"])

        def machines() -> list[psutil.Process] | None:
            found = [machine for worker in self.workers for machine in worker.machines()]
            return found if len(found) == tasks else None

        booted: list[psutil.Process] = until(machines, "the guests run")
        return booted

    def finished(self, job: str) -> dict[str, Any]:
        done: dict[str, Any] = self.coordinator.ask("job_wait", job=job, patience=PATIENCE)
        return done

    def worker_of(self, machine: psutil.Process) -> Daemon:
        """Who runs it."""
        return next(w for w in self.workers if w.process.pid in [p.pid for p in machine.parents()])


def _begin(home: Path) -> launch.Starting:
    return launch.spawn(home, with_parent=True)


@contextlib.contextmanager
def open_grid(folder: Path, workers: int, **config: Any) -> Iterator[Grid]:
    """A grid on loopback; when the block is left, in whatever way, no process of it is left."""
    home = folder / "coordinator"
    Config(roles=("coordinator", "submitter"), listen="127.0.0.1:0", name="coordinator", **config).save(home)
    grid: Grid | None = None
    begun: list[subprocess.Popen[bytes]] = []
    try:
        starting = _begin(home)
        begun.append(starting.process)
        grid = Grid(folder, Daemon(home, starting.ready()), [])
        ticket = grid.coordinator.ask("token_create", role="worker", uses=workers + 1, expires=600.0)[
            "ticket"
        ]
        all_starting = []
        for i in range(workers):
            starting = _begin(grid._config(f"worker-{i}", "worker", ticket))
            begun.append(starting.process)
            all_starting.append(starting)
        for starting in all_starting:
            grid.workers.append(Daemon(starting.home, starting.ready()))
        yield grid
    finally:
        if grid is not None:
            begun += [d.process for d in (grid.coordinator, *grid.workers)]
        for process in begun:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in begun:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
