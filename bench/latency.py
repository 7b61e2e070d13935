"""Measure the time from `run` to results, for small disks on a warm and on a cold worker.

    python -m bench latency [--runs 5] [--disks bios tiny]

`p2pgrid run` is started as a process, as a person does it; one worker is online and idle.
*warm*: it holds the disk since the run before; *cold*: a fresh worker with nothing.
The phases are taken from the clocks that the grid keeps, and add up to the whole:

    submit   the command starts, the daemon makes a datum of script and inputs, the job is in the ledger
    grant    until a worker has its lease
    fetch    the worker brings disk and inputs to its store
    guest    boot, script, power off
    pack     context disk before, results' tree and report after: the rest of the worker's time
    home     the result tree comes to the submitter's node, which acknowledges it
    write    the command hears of it, has the results written to a folder, and ends

Medians; the table goes to stderr, a JSON line for each row to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import statistics
import time
from pathlib import Path
from typing import Any

from bench.grid import bench_grid, report
from p2pgrid.node.grid import LEDGER
from p2pgrid.vm.template import cached_template
from tests.grid_processes import Daemon, Grid, p2pgrid, until
from tests.vm.bios.disk import bios_disk

PHASES = ("submit", "grant", "fetch", "guest", "pack", "home", "write")
MEMORY = {"bios": "64M", "tiny": "256M"}


def image(which: str, folder: Path) -> Path:
    if which == "tiny":
        return cached_template("tiny")
    path = folder / "bios.raw"
    path.write_bytes(bios_disk().ljust(1 << 20, b"\0"))
    return path


def one_run(grid: Grid, which: str, name: str) -> dict[str, float]:
    """`p2pgrid run`, from its start to its end; what the ledger does not tell."""
    script = grid.folder / "job.sh"
    script.write_text("#!/bin/sh\necho done > /scratch/answer.txt\n")
    out = grid.folder / name
    began = time.time()
    words = (
        "run",
        which,
        "--script",
        script,
        "--ram",
        MEMORY[which],
        "--scratch",
        "64M",
        "-o",
        out,
        "--json",
    )
    said = p2pgrid(*words, home=grid.home)
    ended = time.time()
    assert said.code == 0, said.err
    assert any(p.is_file() for p in (out / "0").iterdir())
    timings = said.json["tasks"][0]["timings"]
    return {"job": said.json["job"], "began": began, "ended": ended, **timings}


def phases(run: dict[str, Any], ledger: sqlite3.Connection) -> dict[str, float]:
    created, started, reported, ended = ledger.execute(
        "SELECT created, started, reported, ended FROM job JOIN task ON job.id = task.job WHERE job.id = ?",
        [run["job"]],
    ).fetchone()
    return {
        "whole": run["ended"] - run["began"],
        "submit": created - run["began"],
        "grant": started - created,
        "fetch": run["fetch"],
        "guest": run["run"],
        "pack": reported - started - run["fetch"] - run["run"],
        "home": ended - reported,
        "write": run["ended"] - ended,
    }


def online(grid: Grid) -> int:
    nodes = grid.coordinator.ask("node_ls")["nodes"]
    return sum(n["state"] == "online" and n["slots"] > 0 for n in nodes)


def leave(grid: Grid, worker: Daemon) -> None:
    worker.ask("leave")
    worker.process.terminate()
    worker.process.wait()
    grid.workers.remove(worker)
    until(lambda: not online(grid), "the worker has left")


def fresh(grid: Grid, name: str) -> Daemon:
    worker = grid.member(name, "worker")
    until(lambda: online(grid) == 1, "the worker is online")
    return worker


def measure(which: str, runs: int) -> list[dict[str, Any]]:
    done: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    with bench_grid(1) as grid:
        leave(grid, grid.workers[0])
        grid.coordinator.ask("put", path=str(image(which, grid.folder)), name=which, replica=0)
        for i in range(runs):
            worker = fresh(grid, f"worker-{i}")
            done["cold"].append(one_run(grid, which, f"cold-{i}"))
            done["warm"].append(one_run(grid, which, f"warm-{i}"))
            report(f"{which}: {i + 1} of {runs}")
            leave(grid, worker)
        grid.coordinator.process.terminate()
        grid.coordinator.process.wait()
        ledger = sqlite3.connect(grid.home / LEDGER)
        found = {kind: [phases(run, ledger) for run in all_runs] for kind, all_runs in done.items()}
        ledger.close()
    return [
        {
            "bench": "latency",
            "disk": which,
            "worker": kind,
            "runs": runs,
            **{key: round(statistics.median(p[key] for p in rows), 3) for key in ("whole", *PHASES)},
            "fastest": round(min(p["whole"] for p in rows), 3),
            "slowest": round(max(p["whole"] for p in rows), 3),
        }
        for kind, rows in found.items()
    ]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--disks", nargs="+", choices=list(MEMORY), default=list(MEMORY))
    given = arguments.parse_args()
    rows = [row for which in given.disks for row in measure(which, given.runs)]
    columns = ("whole", *PHASES, "fastest", "slowest")
    report(f"{'disk':<6}{'worker':<7}" + "".join(f"{c:>9}" for c in columns))
    for r in rows:
        report(f"{r['disk']:<6}{r['worker']:<7}" + "".join(f"{r[c]:>9.2f}" for c in columns))
        print(json.dumps(r))
    report(f"seconds, medians of {given.runs}; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
