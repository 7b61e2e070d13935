"""Run the main job on one machine, over real processes, and take everything down again.

A coordinator (which is also the putter) and some workers, each a process with a data
directory of its own, under one temporary folder.  What stays is the template disk in the
cache.  The daemons die with this process, however it ends.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from p2pgrid.errors import Misused
from p2pgrid.node import api, launch, show
from p2pgrid.node.config import TICKET, Config
from p2pgrid.node.console import Bars, emit, say, size, uninterrupted

SCRIPT = """#!/bin/sh
# Runs in each guest at the end of boot; /scratch comes home.
echo "hello from task $P2PGRID_INDEX on $(uname -sr)"
{
    echo "task $P2PGRID_INDEX of job $P2PGRID_JOB"
    echo "input: $(cat /context/greeting.txt)"
    echo "checksum of the input: $(md5sum < /context/greeting.txt | cut -c1-32)"
} > /scratch/answer.txt
"""
GREETING = "Run virtual machines on the PCs you already have.\n"
PATIENCE = 10.0
"""Seconds a daemon gets to end by itself when the demo is over."""


def run_demo(workers: int, *, keep: bool, as_json: bool) -> int:
    """Set up, run and take down; prints what each guest wrote and where the bytes came from."""
    if not 1 <= workers <= 16:
        raise Misused(why="--workers is between 1 and 16")
    started = time.monotonic()
    with Bars() as bars:
        disk = _template(bars)
        with _folder(keep) as folder, _grid(folder, workers, bars) as homes:
            report = _main_job(homes, folder, disk, bars)
            report["seconds"] = round(time.monotonic() - started, 1)
            bars.show("taking down", 0, 1)
        bars.show("taking down", 1, 1)
    emit(report, as_json, _story)
    return show.exit_code(report)


def _template(bars: Bars) -> Path:
    """The tiny Linux disk as a VDI, built once and kept in the cache."""
    from p2pgrid.vm.template import cached_template

    return cached_template(
        "tiny",
        progress=lambda what, done, total: bars.show(f"disk: {what}", done, total),
    )


@contextlib.contextmanager
def _folder(keep: bool) -> Iterator[Path]:
    with contextlib.ExitStack() as leaving:
        with uninterrupted():
            folder = Path(tempfile.mkdtemp(prefix="p2pgrid-demo-"))
            leaving.callback(_let_go, folder, keep)
        yield folder


def _let_go(folder: Path, keep: bool) -> None:
    if keep:
        say(f"kept: {folder}")
    else:
        with uninterrupted():
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _grid(folder: Path, workers: int, bars: Bars) -> Iterator[list[Path]]:
    """A coordinator and `workers` workers as processes; the coordinator's home comes first."""
    homes = [folder / "coordinator", *(folder / f"worker-{i + 1}" for i in range(workers))]
    running: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as leaving:
        leaving.callback(_end, running)
        bars.show("grid", 0, len(homes), "starting")
        Config(roles=("coordinator", "submitter"), listen="127.0.0.1:0", name="coordinator").save(homes[0])
        _begin(homes[0], running).ready()
        bars.show("grid", 1, len(homes), "coordinator")
        made = api.call(homes[0], "token_create", {"role": "worker", "uses": workers, "expires": 3600.0})
        grid = api.call(homes[0], "status")
        starting = []
        for home in homes[1:]:
            Config(
                roles=("worker",),
                listen="127.0.0.1:0",
                name=home.name,
                coordinator=grid["peer"],
                addresses=tuple(grid["addresses"]),
            ).save(home)
            (home / TICKET).write_text(made["ticket"])
            starting.append(_begin(home, running))
        for i, one in enumerate(starting):
            one.ready()
            bars.show("grid", i + 2, len(homes), one.home.name)
        yield homes


def _begin(home: Path, running: list[subprocess.Popen[bytes]]) -> launch.Starting:
    with uninterrupted():
        starting = launch.spawn(home, with_parent=True)
        running.append(starting.process)
    return starting


def _end(running: list[subprocess.Popen[bytes]]) -> None:
    """End the daemons, workers first; a second Ctrl-C does not stop the tidying up."""
    with uninterrupted():
        for process in reversed(running):
            process.terminate()
        limit = time.monotonic() + PATIENCE
        for process in reversed(running):
            try:
                process.wait(max(0.1, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _main_job(homes: list[Path], folder: Path, disk: Path, bars: Bars) -> dict[str, Any]:
    """Put, run as an array with one task a worker, wait, bring home."""
    coordinator = homes[0]
    script, greeting = folder / "job.sh", folder / "greeting.txt"
    script.write_text(SCRIPT)
    greeting.write_text(GREETING)
    put = api.call(
        coordinator,
        "put",
        {"path": str(disk), "name": "tiny", "replica": 1, "wait": False},
        bars.event,
    )
    job = api.call(
        coordinator,
        "submit",
        {
            "disk": "tiny",
            "script": str(script),
            "inputs": [str(greeting)],
            "array": list(range(len(homes) - 1)),
            "memory": 256 << 20,
            "cpus": 1,
            "time_limit": 600.0,
            "scratch": 1 << 30,
            "needs": [],
            "name": "demo",
        },
    )
    view = api.call(coordinator, "job_wait", {"job": job["job"], "patience": None}, bars.event)
    brought = api.call(coordinator, "job_results", {"job": job["job"], "out": str(folder / "results")})
    putter = api.call(coordinator, "status")["peer"]
    return {
        **view,
        "put": put,
        "results": [
            {**task, "files": _texts(Path(brought["folder"]) / str(task["index"]))} for task in view["tasks"]
        ],
        "sources": [_sources(home, putter) for home in homes[1:]],
    }


def _texts(folder: Path) -> dict[str, list[str]]:
    """The lines of the small files that a guest left in /scratch."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and ".p2pgrid" not in p.parts)
    return {str(p.relative_to(folder)): p.read_text(errors="replace")[:4096].splitlines() for p in files}


def _sources(home: Path, putter: str) -> dict[str, Any]:
    """How many bytes a worker got from the putter, and how many from other workers."""
    status = api.call(home, "status")
    received: dict[str, int] = status["received"]
    origin = received.get(putter, 0)
    return {"worker": status["name"], "from_putter": origin, "from_peers": sum(received.values()) - origin}


def _story(v: dict[str, Any]) -> str:
    lines = [show.put(v["put"]), "", show.job(v), ""]
    for task in v["results"]:
        lines.append(f"task {task['index']} on {task['node']}, exit {task['exit']}, wrote to /scratch:")
        for name, text in task["files"].items():
            lines += [f"  {name}", *(f"    | {line}" for line in text)]
    lines += ["", "bytes of the disk (and of the job's inputs) by source:"]
    for s in v["sources"]:
        lines.append(
            f"  {s['worker']:<10} {size(s['from_putter']):>10} from the putter, "
            f"{size(s['from_peers']):>10} from other workers"
        )
    origin = sum(s["from_putter"] for s in v["sources"])
    lines.append(
        f"  the putter sent {origin / max(1, v['put']['wire_bytes']):.2f} copies "
        f"to {len(v['sources'])} workers; all in {v['seconds']} s"
    )
    return "\n".join(lines)
