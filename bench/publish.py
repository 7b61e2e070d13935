"""Measure what it takes until a file can be fetched, and beside it what compressing and hashing alone take.

new      the system has never seen it
known    it is published once more
zstd     `zstd -1 -T2` of the same bytes, to nowhere
blake3   BLAKE3 of the cached file by two threads
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench import table
from bench.grid import report
from bench.lab import Lab
from bench.peers import Bout, peer
from bench.scenario import FAILURES, what_failed

GIB = 1 << 30
BLAKE3 = (
    "import sys, time; from blake3 import blake3; began = time.monotonic();"
    "blake3(max_threads=2).update_mmap(sys.argv[1]).digest(); print(time.monotonic() - began)"
)
"""Says its seconds: those of an interpreter that starts are none of BLAKE3's."""


def publish(lab: Lab, given: argparse.Namespace, disks: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """A row for each system and file, and for the two programs beside them."""
    for file in disks:
        size = file.stat().st_size
        report(f"\npublish: {file.name}, {size / 1e6:.1f} MB\n{table.PUBLISH_HEAD}")
        for _ in range(given.runs):
            for row in _one_file(lab, given.systems, file):
                found = {"bench": "publish", "disk": file.name, "bytes": size, **row}
                report(table.publish_line(found))
                yield found


def _one_file(lab: Lab, systems: Sequence[str], file: Path) -> Iterator[dict[str, Any]]:
    host = lab.host("origin")
    zstd = partial(host.run, ["zstd", "-1", "-T2", "-q", "-c", file], stdout=subprocess.DEVNULL)
    yield {"system": "zstd", "what": "alone", **_timed(host.account.cpu, zstd)}
    before = host.account.cpu()
    seconds = float(host.run([sys.executable, "-c", BLAKE3, file]))
    cpu = round(host.account.cpu() - before, 3)
    yield {"system": "blake3", "what": "alone", "seconds": round(seconds, 3), "cpu_seconds": cpu}
    lab.clear()
    for name in systems:
        made = peer(name)
        if why := made.absent():
            yield {"system": name, "skipped": why}
            continue
        host = lab.host("origin")
        system = made(Bout(file, None, host, []))
        try:
            system.prepare()
            for what in ("new", "known"):
                yield {"system": name, "what": what, **_timed(host.account.cpu, system.publish)}
        except FAILURES as failed:
            yield {"system": name, **what_failed(failed, made, lab)}
        lab.clear()


def _timed(cpu: Callable[[], float], work: Callable[[], Any]) -> dict[str, float]:
    started, before = time.monotonic(), cpu()
    work()
    return {"seconds": round(time.monotonic() - started, 3), "cpu_seconds": round(cpu() - before, 3)}
