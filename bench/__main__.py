"""Measure p2pgrid beside others: one driver for every bench.

    python -m bench swarm   [--disk FILE] [--slice 128M] [--workers 1 4 8] [--rate 200] [--slow 20] [--late 5]
    python -m bench update  --old v1.vdi --disk v2.vdi v2r.vdi [--workers 1 8] [--rate 200]
    python -m bench publish [--disk FILE]
    python -m bench kills | lan | latency | memory | nat | planner | plane | rates | relay  (--help: more)

Hosts are network namespaces on one bridge (root is needed), shaped where `--rate` is given.
JSON lines go to stdout, a table to stderr, plots to `--plot DIR`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import lab as labs
from bench import table
from bench.grid import report
from bench.lab import Lab
from bench.middle import middle, ratios
from bench.peers import PEERS, peer
from bench.publish import publish
from bench.scenario import Case, Network, bout
from bench.warm import warm

OTHERS = {
    "kills": "bench.kills",
    "lan": "bench.lan",
    "latency": "bench.latency",
    "memory": "bench.memory",
    "nat": "bench.nat",
    "planner": "bench.planner",
    "plane": "bench.exchange",
    "proxy": "bench.proxy",
    "rates": "bench.rates",
    "relay": "bench.relay",
}


PROCESSES = 256 << 20
"""Bytes of memory that a host's processes and sockets take."""


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in OTHERS:
        sys.argv = [f"bench {sys.argv[1]}", *sys.argv[2:]]
        importlib.import_module(OTHERS[Path(sys.argv[0]).name.split()[-1]]).main()
        return
    given = _arguments().parse_args()
    if why := labs.absent():
        sys.exit(f"bench: {why}")
    rows: list[dict[str, Any]] = []
    with (
        labs.stoppable(),
        labs.open_lab(given.folder, given.congestion, given.ahead) as lab,
        warm(lab.folder, _memory(given)) if given.folder is None else contextlib.nullcontext(),
    ):
        disks = [_sliced(disk, given.slice, lab.folder) for disk in given.disk]
        for file in (*disks, *([given.old] if given.bench == "update" else [])):
            _cache(file)
        run = publish if given.bench == "publish" else transfer
        for row in run(lab, given, disks):
            rows.append(row)
            print(json.dumps(row), flush=True)
    for row in ratios(rows):
        rows.append(row)
        print(json.dumps(row), flush=True)
    if given.plot:
        from bench.plot import plot

        plot(rows, given.plot)


def transfer(lab: Lab, given: argparse.Namespace, disks: Sequence[Path]):
    """Every system in every case, one after the other."""
    network = Network(given.rate, given.slow, given.late)
    for file in disks:
        for workers in given.workers:
            case = Case(given.bench, file, given.old if given.bench == "update" else None, workers, network)
            report(f"\n{table.title(case.describe())}\n{table.head()}")
            seen: dict[str, list[dict[str, Any]]] = {system: [] for system in given.systems}
            for run in range(given.runs):
                for system in given.systems:
                    row = {**bout(lab, peer(system), case), "run": run}
                    report(table.line(row))
                    seen[system].append(row)
                    yield row
            if given.runs > 1:
                report(f"\nmedians of {given.runs} runs; last and CPU from least to most")
                for rows in seen.values():
                    report(table.line(middle(rows)))


def _arguments() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    kinds = top.add_subparsers(dest="bench", required=True)
    for name, what in (
        ("swarm", "the workers have nothing"),
        ("update", "the workers have an older version"),
        ("publish", "what it takes until a file can be fetched"),
    ):
        one = kinds.add_parser(name, help=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        one.add_argument("--disk", type=_file, nargs="+", required=True, help="what the origin publishes")
        one.add_argument(
            "--slice", type=_size, help="take only so many bytes out of its middle, such as 128M"
        )
        one.add_argument("--systems", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="SYSTEM")
        one.add_argument("--runs", type=int, default=1)
        one.add_argument("--folder", type=Path, help="where the hosts keep things, instead of in memory")
        one.add_argument("--plot", type=Path, metavar="DIR", help="draw PNG and SVG there")
        one.add_argument("--congestion", default="cubic", help="TCP's control, as the kernel calls it")
        one.add_argument(
            "--ahead", action="store_true", help="let the hosts go before all else on this machine"
        )
        if name == "publish":
            continue
        one.add_argument("--workers", type=int, nargs="+", default=[1, 4, 8])
        one.add_argument("--rate", type=float, help="Mbit/s of every host, up and down")
        one.add_argument("--slow", type=float, help="Mbit/s that the first worker sends with at most")
        one.add_argument("--late", type=float, help="seconds after the others when the last worker begins")
        if name == "update":
            one.add_argument("--old", type=_file, required=True, help="what the workers have already")
    for name in OTHERS:
        kinds.add_parser(name, add_help=False)
    return top


def _file(text: str) -> Path:
    path = Path(text).absolute()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"no file {text}; python -m bench.data builds the usual ones")
    return path


def _size(text: str) -> int:
    if not (found := re.fullmatch(r"(\d+)([KMG]?)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 128M")
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]]


def _memory(given: argparse.Namespace) -> int:
    """Bytes of memory that hosts take at most: the files, and what processes need."""
    sizes = [min(disk.stat().st_size, given.slice or disk.stat().st_size) for disk in given.disk]
    old = given.old.stat().st_size if given.bench == "update" else 0
    workers = 1 if given.bench == "publish" else max(given.workers)
    return (workers + 2) * (max(sizes) + old + PROCESSES)


def _sliced(disk: Path, size: int | None, folder: Path) -> Path:
    """`size` bytes out of the middle of `disk`, as a raw disk of their own."""
    if size is None or size >= disk.stat().st_size:
        return disk
    out = folder / f"{disk.stem}-{size >> 20}M.raw"
    with disk.open("rb") as whole:
        whole.seek((disk.stat().st_size - size) // 2 >> 20 << 20)
        out.write_bytes(whole.read(size))
    return out


def _cache(file: Path) -> None:
    """Read it once: every system finds it in memory."""
    with file.open("rb") as opened:
        while opened.read(8 << 20):
            pass


if __name__ == "__main__":
    main()
