"""Kill workers that fetch, and a coordinator with jobs under way, with -9; count what is lost.

    python -m bench kills [worker | coordinator] [--kills N] [--seed S] [--mib M] [--tasks T]

    worker        at random moments of a fetch, every time on the same data directory.  After each
                  restart every chunk on disk is hashed, and what the putter sent is compared with
                  what is new there: only what was in flight may have to come again.  At the end
                  of each fetch `get` gives the file that was put (SHA-256)
    coordinator   at random moments of jobs on two workers; it is the submitter's node, too.
                  What was acknowledged (a job, a result) is there after each restart, unchanged;
                  at the end every task is completed once and its result is at home, whole

A sentence for each goes to stderr, a JSON line to stdout; exits with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import re
import sqlite3
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.grid import bench_grid, report
from p2pgrid.dht.manifest import CHUNK_SIZE
from p2pgrid.node import api
from p2pgrid.node.grid import LEDGER
from p2pgrid.transfer.pace import CHUNKS_MAX
from tests.grid_processes import Daemon, Grid
from tests.vm.bios.disk import bios_disk

LINKING = 0.4
"""Share of a whole fetch's time that one takes which has little left to bring."""
FINISH = 600.0
"""Seconds that what is left may take when the kills are over."""
CUT = (api.Told, api.NoDaemon, OSError)
"""What whoever asked sees of a daemon that is killed."""


# --- a worker that fetches ---------------------------------------------------------------


class Fetch(threading.Thread):
    """`get` in a thread: how far it was when last heard of, and whether it came to its end."""

    def __init__(self, worker: Daemon, datum: str, out: Path) -> None:
        super().__init__(daemon=True)
        self._ask = lambda: worker.ask("get", self._hear, disk=datum, out=str(out), format=None)
        self.fetched = 0
        """Bytes of frames that were verified and stored."""
        self.writing = threading.Event()
        self.done = False
        self.start()

    def run(self) -> None:
        with contextlib.suppress(*CUT):
            self._ask()
            self.done = True
        self.writing.set()

    def _hear(self, event: dict[str, Any]) -> None:
        if event["phase"] == "fetching":
            self.fetched = event["done"]
        else:
            self.writing.set()


def kill_workers(kills: int, seed: int, mib: int) -> dict[str, Any]:
    """Fetch one disk after the other until the worker was killed `kills` times within fetches."""
    rng = random.Random(seed)
    found = Counter[str]()
    most_again = rounds = 0
    started = time.monotonic()
    with bench_grid(1) as grid:
        worker = grid.workers[0]
        peer, usual = worker.peer, None
        while found["kills"] < kills:
            disk = Disk(grid, b"".join(rng.randbytes(1 << 20) for _ in range(mib)), f"disk-{rounds}")
            rounds += 1
            if usual is None:  # the first fetch is not disturbed: how long does one take?
                usual = timed(worker, disk)
                report(f"a fetch takes {usual:.2f} s undisturbed")
            sent, chunks, whole = disk.sent(peer), disk.chunks(worker), False
            while found["kills"] < kills and not whole:
                fetch = Fetch(worker, disk.datum, disk.out)
                missing = 1 - chunks / disk.total
                whole = fetch.writing.wait(rng.uniform(0, usual * max(LINKING, missing)))
                if whole:
                    break
                worker.kill()
                fetch.join()
                found["kills"] += 1
                worker.restart()
                now = disk.verify(worker, found)
                found["midway"] += now > chunks
                new_sent = disk.sent(peer)
                again = round((new_sent - sent) / CHUNK_SIZE) - (now - chunks)
                most_again = max(most_again, again)
                found["fetched again"] += max(0, again)
                found["verified and gone"] += max(0, -(-fetch.fetched // disk.frame) - now)
                found["fewer than before"] += max(0, chunks - now)
                sent, chunks = new_sent, now
            disk.finish(worker, found)
            if rounds % 5 == 0:
                report(f"{found['kills']} kills: {dict(found)}")
    return {
        "bench": "kill a fetching worker",
        "kills": found["kills"],
        "kills_while_chunks_came": found["midway"],
        "seed": seed,
        "disks": rounds,
        "mib": mib,
        "fetch_seconds": round(usual or 0, 2),
        "corrupt_chunks": found["corrupt"],
        "verified_chunks_lost": found["verified and gone"] + found["fewer than before"],
        "wrong_files": found["wrong files"],
        "fetched_again": found["fetched again"],
        "fetched_again_most": most_again,
        "fetched_again_allowed": CHUNKS_MAX + 1,
        "seconds": round(time.monotonic() - started),
    }


class Disk:
    """A raw disk of noise on the putter's node; every chunk has a frame of one size, nearly."""

    def __init__(self, grid: Grid, data: bytes, name: str) -> None:
        self._putter = grid.coordinator
        self.out = grid.folder / f"{name}.out"
        self._sha = hashlib.sha256(data).digest()
        path = grid.folder / f"{name}.raw"
        path.write_bytes(data)
        put = self._putter.ask("put", path=str(path), name=name, replica=0)
        path.unlink()
        self.datum: str = put["disk"]
        self.total: int = put["chunks"]
        self.frame: int = put["wire_bytes"] // put["chunks"]

    def sent(self, peer: str) -> int:
        """Bytes of frames that the putter sent to `peer`."""
        return int(self._putter.ask("status")["served"].get(peer, 0))

    def chunks(self, worker: Daemon) -> int:
        held = worker.ask("status")["holds"]
        return next((h["chunks"] for h in held if h["datum"] == self.datum), 0)

    def verify(self, worker: Daemon, found: Counter[str]) -> int:
        """Hash every chunk that is on the worker; how many are good."""
        if not (held := self.chunks(worker)):
            return 0
        said = worker.ask("disk_verify", disk=self.datum, repair=False)
        found["corrupt"] += said["bad"] + abs(said["checked"] - held)
        return held - int(said["bad"])

    def finish(self, worker: Daemon, found: Counter[str]) -> None:
        """Bring it to the worker, whole, compare, and forget it."""
        worker.ask("get", disk=self.datum, out=str(self.out), format=None)
        found["wrong files"] += hashlib.sha256(self.out.read_bytes()).digest() != self._sha
        self.verify(worker, found)
        self.out.unlink()
        self._putter.ask("disk_rm", disk=self.datum)


def timed(worker: Daemon, disk: Disk) -> float:
    started = time.monotonic()
    fetch = Fetch(worker, disk.datum, disk.out)
    fetch.writing.wait()
    seconds = time.monotonic() - started
    fetch.join()
    return seconds


# --- a coordinator with jobs under way ---------------------------------------------------


class Jobs:
    """What was acknowledged: jobs, and results of tasks."""

    def __init__(self, grid: Grid, tasks: int) -> None:
        self._grid = grid
        self._tasks = tasks
        self.disk = grid.put("bios", bios_disk().ljust(1 << 20, b"\0"))
        self.acknowledged: dict[str, int] = {}
        self.results: dict[tuple[str, int], str] = {}

    def submit(self, tasks: int) -> str:
        job = self._grid.submit(self.disk, array=list(range(tasks)))
        self.acknowledged[job] = tasks
        return job

    def look(self, found: Counter[str]) -> bool:
        """Compare what the coordinator knows with what it has acknowledged; whether work is left."""
        busy = False
        for job, tasks in self.acknowledged.items():
            try:
                view = self._grid.coordinator.ask("job_show", job=job)
            except api.Told as told:
                if told.kind != "NotFound":
                    raise
                found["jobs lost"] += 1
                continue
            found["jobs lost"] += len(view["tasks"]) != tasks
            for task in view["tasks"]:
                known = self.results.get((job, task["index"]))
                found["results lost"] += known is not None and task["result"] != known
                if task["state"] == "completed":
                    self.results[job, task["index"]] = task["result"]
                else:
                    found["given up"] += task["state"] in ("failed", "error", "cancelled")
                    busy = True
        return busy


def kill_coordinators(kills: int, seed: int, tasks: int) -> dict[str, Any]:
    """Keep two workers busy with jobs and kill the coordinator again and again."""
    rng = random.Random(seed)
    found = Counter[str]()
    started = time.monotonic()
    with bench_grid(2) as grid:
        jobs = Jobs(grid, tasks)
        for kill in range(kills):
            if not jobs.look(found):
                jobs.submit(tasks)
            period = rng.uniform(0.2, 4.0)
            submitting = threading.Timer(rng.uniform(0, 1) * period, submit_or_not, [jobs, found])
            submitting.daemon = True
            submitting.start()
            time.sleep(period)
            grid.coordinator.kill()
            submitting.join()
            grid.coordinator.restart()
            jobs.look(found)
            report(f"{kill + 1} kills, {len(jobs.results)} results: {dict(found)}")
        for job in jobs.acknowledged:
            grid.coordinator.ask("job_wait", job=job, patience=FINISH)
        found["tasks left"] += jobs.look(found)
        for job, count in jobs.acknowledged.items():
            found["results wrong or missing"] += count - brought(grid, job)
        leases = sum(len(re.findall(r"event=lease ", w.log)) for w in grid.workers)
        for daemon in (*grid.workers, grid.coordinator):
            daemon.process.terminate()
            daemon.process.wait()
        for job, count in jobs.acknowledged.items():
            found["in the ledger otherwise"] += abs(count - completed_in_ledger(grid, job))
    total = sum(jobs.acknowledged.values())
    return {
        "bench": "kill the coordinator",
        "kills": kills,
        "seed": seed,
        "jobs": len(jobs.acknowledged),
        "tasks": total,
        "submits_cut_off": found["submits cut off"],
        "leases": leases,
        "jobs_lost": found["jobs lost"],
        "results_lost": found["results lost"] + found["results wrong or missing"],
        "tasks_not_completed": found["given up"] + found["tasks left"],
        "ledger_differs": found["in the ledger otherwise"],
        "seconds": round(time.monotonic() - started),
    }


def submit_or_not(jobs: Jobs, found: Counter[str]) -> None:
    """A small job just when the coordinator is killed: with an answer it counts, without one it may not."""
    try:
        jobs.submit(2)
    except CUT:
        found["submits cut off"] += 1


def brought(grid: Grid, job: str) -> int:
    """How many whole results of `job` come home."""
    out = grid.folder / "home" / job
    grid.coordinator.ask("job_results", job=job, out=str(out))
    script = (grid.folder / "job.sh").read_bytes()
    whole = 0
    for folder in out.iterdir():
        env = (folder / "p2pgrid.env").read_text()
        whole += (folder / "context.sh").read_bytes() == script and f"P2PGRID_INDEX={folder.name}\n" in env
    return whole


def completed_in_ledger(grid: Grid, job: str) -> int:
    with contextlib.closing(sqlite3.connect(grid.home / LEDGER)) as ledger:
        found = ledger.execute("SELECT COUNT(*) FROM task WHERE job = ? AND state = 'completed'", [job])
        return int(found.fetchone()[0])


# --- what is said ------------------------------------------------------------------------

LOSSES = (
    "corrupt_chunks",
    "verified_chunks_lost",
    "wrong_files",
    "jobs_lost",
    "results_lost",
    "tasks_not_completed",
    "ledger_differs",
)


def losses(found: dict[str, Any]) -> dict[str, int]:
    """What must not have happened, and did."""
    lost = {what: found[what] for what in LOSSES if found.get(what)}
    if found.get("fetched_again_most", 0) > found.get("fetched_again_allowed", 0):
        lost["fetched_again_most"] = found["fetched_again_most"]
    return lost


def sentence(found: dict[str, Any]) -> str:
    lost = losses(found)
    what = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in lost.items()) or "nothing"
    if "disks" in found:
        more = (
            f"; {found['disks']} disks came whole, {found['fetched_again']} chunks were sent again, "
            f"at most {found['fetched_again_most']} after one kill (in flight: up to {CHUNKS_MAX})"
        )
    else:
        more = f"; {found['tasks']} tasks of {found['jobs']} jobs completed, with {found['leases']} leases"
    return f"{found['kills']} times {found['bench']}: {what} was lost{more}; {found['seconds']} s"


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("what", nargs="?", choices=["worker", "coordinator"])
    arguments.add_argument("--kills", type=int, help="[100 of the worker, 20 of the coordinator]")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--mib", type=int, default=384, help="size of a disk that is fetched")
    arguments.add_argument("--tasks", type=int, default=60, help="tasks of a job")
    given = arguments.parse_args()
    all_found = []
    if given.what != "coordinator":
        all_found.append(kill_workers(given.kills or 100, given.seed, given.mib))
    if given.what != "worker":
        all_found.append(kill_coordinators(given.kills or 20, given.seed, given.tasks))
    for found in all_found:
        report(sentence(found))
        print(json.dumps(found))
    return int(any(losses(found) for found in all_found))


if __name__ == "__main__":
    sys.exit(main())
