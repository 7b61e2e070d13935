"""Bring one file from an origin to N workers by one system after the other, and count.

    swarm     the workers have nothing
    update    they have an older version already (`bout.old`), as the system keeps it

Every bout has hosts of its own and begins at one moment for all workers, except for one that may
be late.  Its row, in the order of the table:

    first, median, last      seconds from that moment until the workers are complete
    late_took                seconds that the late one took from its own beginning
    cpu                      CPU seconds per GiB delivered: all processes of all hosts, over file size x N
    received, received_max   bytes at a worker's interface, with all headers: mean and most
    sent_origin, copies      bytes at the origin's; over those of one copy: the pack, or the file; where
                             workers had something before, what one of them received
    origin_idle              share of its shaped uplink that it did not use until the last was complete
    rss_origin, rss_worker   MiB, peak; the worker's is the largest
    to_file, to_wire         shaped: T ÷ (file size ÷ rate) and T ÷ (bytes of one copy ÷ rate), where T is the
                             most that any worker took from its own beginning
    compared                 workers whose file was then compared with the source, byte by byte

Where a bout fails, `ended` has the processes that had ended badly by then, and `logs` is the folder in
which what its hosts wrote down is kept (`bench/logs.py`).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from bench import logs
from bench.account import looking
from bench.grid import together
from bench.lab import Host, Lab
from bench.peers import Bout, Peer
from p2pgrid.errors import GridError

GIB = 1 << 30
PATIENCE = 900.0
"""Seconds that one transfer may take."""
FAILURES = (OSError, RuntimeError, AssertionError, ValueError, subprocess.SubprocessError, GridError)
"""What a system may meet without ending the bench."""


@attrs.frozen
class Network:
    """How the hosts of a bout are connected."""

    rate: float | None = None
    """Mbit/s of every host, up and down; None: as fast as it goes."""
    slow: float | None = None
    """Mbit/s that the first worker sends with at most."""
    late: float | None = None
    """Seconds after the others at which the last worker begins."""


@attrs.frozen
class Case:
    """What is measured."""

    bench: str
    file: Path
    old: Path | None
    workers: int
    network: Network

    def describe(self) -> dict[str, Any]:
        shape = {k: v for k, v in attrs.asdict(self.network).items() if v is not None}
        return {
            "bench": self.bench,
            "disk": self.file.name,
            "bytes": self.file.stat().st_size,
            "workers": self.workers,
            **shape,
        }


def bout(lab: Lab, made: type[Peer], case: Case) -> dict[str, Any]:
    """One run of one system: its row.  The lab is empty before and after.

    What goes wrong with the system is told in the row, under `failed`.
    """
    row = {**case.describe(), "system": made.name, "load": round(os.getloadavg()[0], 1)}
    if why := made.absent() or (case.old and not made.updates and "it has no use for an old version"):
        return row | {"skipped": why}
    try:
        return row | _measured(made(Bout(case.file, case.old, *_hosts(lab, case))), case)
    except FAILURES as failed:
        return row | what_failed(failed, made, lab)
    finally:
        lab.clear()


def what_failed(failed: Exception, made: type[Peer], lab: Lab) -> dict[str, Any]:
    """For the row of a bout that failed; its hosts are still there."""
    said = getattr(failed, "stderr", None) or ""
    found: dict[str, Any] = {"failed": f"{type(failed).__name__}: {failed}\n{said}".strip()}
    if ended := [f"{host.name}: {told}" for host in lab.hosts for told in host.ended()]:
        found["ended"] = ended
    if kept := logs.keep(lab.hosts, made.name):
        found["logs"] = str(kept)
    return found


def _hosts(lab: Lab, case: Case) -> tuple[Host, list[Host]]:
    net = case.network
    origin = lab.host("origin", up=net.rate, down=net.rate)
    uplinks = [net.slow or net.rate] + [net.rate] * (case.workers - 1)
    return origin, [lab.host(f"worker-{i}", up=up, down=net.rate) for i, up in enumerate(uplinks)]


def _measured(system: Peer, case: Case) -> dict[str, Any]:
    hosts = [system.bout.origin, *system.bout.workers]
    with looking([host.account for host in hosts]):
        system.prepare()
        started, cpu = time.monotonic(), system.bout.origin.account.cpu()
        system.publish()
        published = {
            "publish": round(time.monotonic() - started, 2),
            "publish_cpu": round(system.bout.origin.account.cpu() - cpu, 2),
        }
        system.serve()
        for worker in system.bout.workers:
            system.arm(worker)
        for host in hosts:
            host.account.forget_peak()
        before = [Counts.of(host) for host in hosts]
        walls = together([_fetch(system, worker, case) for worker in system.bout.workers], PATIENCE)
        counts = [Counts.of(host) - b for host, b in zip(hosts, before, strict=True)]
        peaks = [host.account.peak() for host in hosts]
        facts = system.facts()
    compared = sum(together([_proof(system, worker, case) for worker in system.bout.workers], PATIENCE))
    return {**published, **_row(case, walls, counts, peaks, facts), **facts, "compared": compared}


def _fetch(system: Peer, worker: Host, case: Case) -> Callable[[], float]:
    """Seconds from now until `worker` is complete."""
    started = time.monotonic()
    wait = case.network.late if worker is system.bout.workers[-1] else None

    def fetch() -> float:
        if wait:
            time.sleep(wait)
        system.fetch(worker)
        return time.monotonic() - started

    return fetch


def _proof(system: Peer, worker: Host, case: Case) -> Callable[[], bool]:
    """Whether `worker` shows what it has; raises `AssertionError` where that is something else."""
    return lambda: _compare(system.output(worker), case.file)


@attrs.frozen
class Counts:
    """What a host has used so far, or between two moments."""

    cpu: float
    sent: int
    received: int

    @classmethod
    def of(cls, host: Host) -> Counts:
        return cls(host.account.cpu(), *host.traffic())

    def __sub__(self, before: Counts) -> Counts:
        return Counts(self.cpu - before.cpu, self.sent - before.sent, self.received - before.received)


def _row(
    case: Case, walls: list[float], counts: list[Counts], peaks: list[float], facts: dict[str, Any]
) -> dict[str, Any]:
    origin, *workers = counts
    size, last, rate = case.file.stat().st_size, max(walls), case.network.rate
    late = walls[-1] - (case.network.late or 0)
    received = statistics.mean(c.received for c in workers)
    copy = received if case.old else facts.get("wire_bytes", size)
    delivered = size / GIB * len(walls)
    row = {
        "first": round(min(walls), 3),
        "median": round(statistics.median(walls), 3),
        "last": round(last, 3),
        "cpu": round(sum(c.cpu for c in counts) / delivered, 3),
        "cpu_origin": round(origin.cpu / delivered, 3),
        "received": round(received),
        "received_max": max(c.received for c in workers),
        "sent_origin": origin.sent,
        "copies": round(origin.sent / copy, 3),
        "rss_origin": round(peaks[0]),
        "rss_worker": round(max(peaks[1:])),
    }
    if case.network.late:
        row["late_took"] = round(late, 3)
    if rate:
        second, longest = rate * 1e6 / 8, max(*walls[:-1], late, 0.0)
        row |= {
            "origin_idle": round(1 - origin.sent / second / last, 3),
            "to_file": round(longest / (size / second), 3),
            "to_wire": round(longest / (copy / second), 3),
        }
    return row


def _compare(came: Path | None, file: Path) -> bool:
    """Whether there was something to compare.  Raises `AssertionError` where something else came out."""
    if came is None:
        return False
    done = subprocess.run(["cmp", came, file], capture_output=True, text=True)
    assert done.returncode == 0, f"not what was sent: {done.stdout}{done.stderr}"
    return True
