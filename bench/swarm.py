"""Measure a disk's way from its putter to N workers, and libtorrent's with the same file.

    python -m bench.swarm [--disk FILE] [--workers 1 4] [--systems p2pgrid written libtorrent] [--out FILE]

Everything is on loopback and in processes of its own: the daemons of a real grid, and beside
them one libtorrent seeder and N leechers.  All N begin at the same moment.

    p2pgrid      a coordinator, which is the putter, and N idle workers; the fetch is the first
                 half of `get`, up to the moment where the disk is complete and verified in the
                 worker's store.  Holders are looked up, links made and bytes encrypted (TLS 1.3)
    written      the same, and the whole of `get`: until the VDI is on the worker's file system, too
    libtorrent   BitTorrent v1 over plain TCP; peers are told of each other, the seeder does not
                 hash its file; from the first dial until the file is complete and verified

CPU seconds are those of the processes (/proc/PID/stat) from the beginning until the last of the N
is complete, so seeding to others counts.  A GiB is one of the VDI file.  Peak memory is
VmHWM, forgotten at the beginning.  The table goes to stderr, JSON lines to stdout.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.disk_1g import disk_1g
from bench.grid import bench_grid, forget_peak, peak, report, scratch_folder, spent, together
from tests.grid_processes import Daemon, Grid

PATIENCE = 900.0
"""Seconds that one transfer may take."""
GIB = 1 << 30
SYSTEMS = ["p2pgrid", "written", "libtorrent"]


class Complete(Exception):
    """The disk is in the worker's store; the rest of `get` is not wanted."""


def get(worker: Daemon, datum: str) -> float:
    """Seconds until the disk is a file at the worker's."""
    started = time.monotonic()
    worker.ask("get", disk=datum, out=str(worker.home / "disk"), format=None)
    return time.monotonic() - started


def fetch(worker: Daemon, datum: str) -> float:
    """Seconds until `datum` is complete and verified in the worker's store."""

    def watch(event: dict[str, Any]) -> None:
        if event["phase"] == "writing":
            raise Complete

    started = time.monotonic()
    try:
        worker.ask("get", watch, disk=datum, out=str(worker.home / "unwanted"), format=None)
    except Complete:
        return time.monotonic() - started
    raise AssertionError("written without being complete")


def measure(pids: list[int], work: Any) -> dict[str, Any]:
    """CPU and peak memory of the processes while `work` runs; the first is the sender's."""
    for pid in pids:
        forget_peak(pid)
    before = [spent(pid) for pid in pids]
    walls = work()
    cpu = [spent(pid) - b for pid, b in zip(pids, before, strict=True)]
    return {"wall": walls, "cpu": cpu, "peak": [peak(pid) for pid in pids]}


def row(system: str, gib: float, found: dict[str, Any], from_putter: int, from_peers: int) -> dict[str, Any]:
    walls, (sender, *fetchers), peaks = found["wall"], found["cpu"], found["peak"]
    return {
        "bench": "swarm",
        "system": system,
        "workers": len(walls),
        "gib": round(gib, 3),
        "wall": round(max(walls), 2),
        "cpu_putter_per_gib": round(sender / gib, 2),
        "cpu_worker_per_gib": round(sum(fetchers) / len(fetchers) / gib, 2),
        "cpu_all_per_gib_and_copy": round((sender + sum(fetchers)) / gib / len(fetchers), 2),
        "peak_putter": peaks[0],
        "peak_worker": max(peaks[1:]),
        "mib_from_putter": round(from_putter / 2**20),
        "mib_from_peers": round(from_peers / 2**20),
        "copies_from_putter": round(from_putter * len(walls) / (from_putter + from_peers), 2),
    }


def p2pgrid(disk: Path, count: int, system: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The transfer's row, and what putting the disk took."""
    gib, bring = disk.stat().st_size / GIB, get if system == "written" else fetch
    with bench_grid(count) as grid:
        putter, workers = grid.coordinator, grid.workers
        pids = [daemon.process.pid for daemon in (putter, *workers)]
        started, cpu = time.monotonic(), spent(pids[0])
        put = putter.ask("put", path=str(disk), name="disk", replica=0)
        put_row = {
            "bench": "put",
            "gib": round(gib, 3),
            "wall": round(time.monotonic() - started, 2),
            "cpu_per_gib": round((spent(pids[0]) - cpu) / gib, 2),
            "peak": peak(pids[0]),
            "wire_mib": put["wire_bytes"] >> 20,
        }
        found = measure(
            pids, lambda: together([lambda w=w: bring(w, put["disk"]) for w in workers], PATIENCE)
        )
        return row(system, gib, found, *sources(grid)), put_row


def sources(grid: Grid) -> tuple[int, int]:
    """Payload bytes that the workers had from the putter, and from each other."""
    received = [worker.ask("status")["received"] for worker in grid.workers]
    origin = sum(r.get(grid.coordinator.peer, 0) for r in received)
    return origin, sum(sum(r.values()) for r in received) - origin


def libtorrent(disk: Path, count: int) -> dict[str, Any]:
    with scratch_folder() as folder:
        torrent = make_torrent(disk, folder)
        nodes: list[subprocess.Popen[str]] = []
        try:
            nodes.append(begin(disk.parent, torrent, "seed"))
            for place in range(count):
                home = folder / str(place)
                home.mkdir()
                nodes.append(begin(home, torrent, "fetch"))
            ports = [hear(node)["port"] for node in nodes]

            def transfer(node: subprocess.Popen[str]) -> float:
                started = time.monotonic()
                tell(node, ports)
                assert hear(node)["done"]
                return time.monotonic() - started

            tell(nodes[0], [])
            found = measure(
                [node.pid for node in nodes],
                lambda: together([lambda n=n: transfer(n) for n in nodes[1:]], PATIENCE),
            )
            seeder, *leechers = [json.loads(node.communicate()[0].splitlines()[-1]) for node in nodes]
        finally:
            for node in nodes:
                node.kill()
                node.wait()
        sent = seeder["sent"]
        return row(
            "libtorrent", disk.stat().st_size / GIB, found, sent, sum(n["received"] for n in leechers) - sent
        )


def make_torrent(disk: Path, folder: Path) -> Path:
    import libtorrent as lt

    made = lt.create_torrent(lt.list_files(str(disk)), 0, lt.create_torrent.v1_only)
    lt.set_piece_hashes(made, str(disk.parent))
    out = folder / "disk.torrent"
    out.write_bytes(lt.bencode(made.generate()))
    return out


def begin(folder: Path, torrent: Path, role: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, Path(__file__).with_name("torrent.py"), folder, torrent, role],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def hear(node: subprocess.Popen[str]) -> dict[str, Any]:
    assert node.stdout is not None
    return json.loads(node.stdout.readline())


def tell(node: subprocess.Popen[str], what: Any) -> None:
    assert node.stdin is not None
    node.stdin.write(json.dumps(what) + "\n")
    node.stdin.flush()


HEAD = (
    f"{'':<11}{'workers':>8}{'wall s':>8}{'CPU s/GiB: putter':>19}{'worker':>8}{'all, per copy':>15}"
    f"{'peak MiB: putter':>18}{'worker':>8}{'MiB from putter':>17}{'peers':>7}{'copies':>8}"
)


def line(r: dict[str, Any]) -> str:
    return (
        f"{r['system']:<11}{r['workers']:>8}{r['wall']:>8.1f}{r['cpu_putter_per_gib']:>19.2f}"
        f"{r['cpu_worker_per_gib']:>8.2f}{r['cpu_all_per_gib_and_copy']:>15.2f}{r['peak_putter']:>18}"
        f"{r['peak_worker']:>8}{r['mib_from_putter']:>17}{r['mib_from_peers']:>7}{r['copies_from_putter']:>8.2f}"
    )


def ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    keys = ("wall", "cpu_all_per_gib_and_copy", "peak_worker", "mib_from_putter")
    ratios = {key: round(ours[key] / theirs[key], 2) for key in keys if theirs[key]}
    return {"bench": "ratio to libtorrent", "system": ours["system"], "workers": ours["workers"], **ratios}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--disk", type=Path, help="an image to move [a Debian of about 1 GiB, built once]")
    arguments.add_argument("--workers", type=int, nargs="+", default=[1, 4])
    arguments.add_argument("--systems", choices=SYSTEMS, nargs="+", default=SYSTEMS)
    arguments.add_argument("--out", type=Path, help="where the JSON lines go, too")
    given = arguments.parse_args()
    disk = given.disk.absolute() if given.disk else disk_1g()
    rows: list[dict[str, Any]] = []
    for count in given.workers:
        for system in given.systems:
            if system == "libtorrent":
                rows.append(libtorrent(disk, count))
            else:
                ours, put = p2pgrid(disk, count, system)
                report(f"put: {put}")
                rows += [put, ours]
            report(f"{HEAD}\n{line(rows[-1])}")
    found = {(r["system"], r["workers"]): r for r in rows if r["bench"] == "swarm"}
    rows += [
        ratio(ours, found["libtorrent", count])
        for (system, count), ours in found.items()
        if system != "libtorrent" and ("libtorrent", count) in found
    ]
    report("\n".join(["", HEAD, *map(line, found.values())]))
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    sys.stdout.write(lines)
    if given.out:
        given.out.write_text(lines)


if __name__ == "__main__":
    main()
