"""The bench tells sane figures of a small disk, keeps its rate, and leaves nothing, however it ends."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from bench import lab as labs
from bench.account import groups_of
from bench.warm import BLOCK, warm
from tests.grid_processes import until

ROOT = Path(__file__).parents[2]
SIZE = 4 << 20
RATE = 100.0
LATE = 0.1
SECOND = RATE * 1e6 / 8

pytestmark = pytest.mark.skipif(labs.absent() is not None, reason=labs.absent() or "")


def bench(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def remains(pid: int) -> list[object]:
    """What the bench with this process id has left."""
    name = f"pgb{pid}"
    spaces = labs.SPACES.glob(f"{name}-*")
    folders = [*Path("/dev/shm").glob(f"{name}-*"), *labs.LOCKS.glob(name)]
    processes = [
        p for p in psutil.process_iter(["cmdline"]) if f"/{name}-" in " ".join(p.info["cmdline"] or [])
    ]
    return [*spaces, *folders, *processes, *groups_of(name), *held(f"/{name}-")]


def held(path: str) -> list[tuple[Path, str]]:
    """Who has which files open or mapped whose names contain `path`; removed ones, too."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        names = []
        with contextlib.suppress(OSError):  # it ends just now
            names += (process / "maps").read_text().splitlines()
            for fd in (process / "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # it was that of this very list
                    names.append(os.readlink(fd))
        found += [(process, name) for name in names if path in name]
    return found


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "small.raw"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def slow(disk: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Begins a transfer that takes minutes, and gives it when daemons of a worker are running."""
    begun: list[subprocess.Popen[str]] = []

    def begin() -> subprocess.Popen[str]:
        running = bench("swarm", "--disk", disk, "--workers", 1, "--rate", 0.5, "--systems", "p2pgrid")
        begun.append(running)
        space = labs.SPACES / f"pgb{running.pid}-worker-0"

        def runs() -> bool:
            return space.exists() and bool(labs.sh(f"ip netns pids {space.name}"))

        until(runs, "a worker's daemon runs")
        return running

    yield begin
    for running in begun:
        running.kill()
        running.communicate()
    labs.sweep()


def test_figures_are_sane_and_nothing_remains(disk: Path):
    systems = ["p2pgrid", "p2pgrid-written", "libtorrent-v1"]
    running = bench(
        "swarm", "--disk", disk, "--workers", 2, "--rate", RATE, "--late", LATE, "--systems", *systems
    )
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    runs = {row["system"]: row for row in rows if row["bench"] == "swarm"}
    assert list(runs) == systems
    if importlib.util.find_spec("libtorrent") is None:
        assert "libtorrent" in runs.pop("libtorrent-v1")["skipped"]
    for row in runs.values():
        assert "failed" not in row, row["failed"]
        copy = row.get("wire_bytes", SIZE)
        floor = 1.03 * copy / SECOND  # nothing is faster than its bytes with their headers
        assert floor - 0.05 < row["first"] <= row["median"] <= row["last"], row
        assert row["late_took"] <= row["last"] - LATE + 0.002
        assert row["to_wire"] >= row["late_took"] / (copy / SECOND) - 0.01
        assert row["to_wire"] <= row["last"] / (copy / SECOND) + 0.01
        assert 1.03 * copy < row["received"] <= row["received_max"] < 2 * copy, row
        assert 1.03 < row["copies"] < 2.2, row
        assert -0.05 < row["origin_idle"] < 1, row
        assert 0 < row["cpu_origin"] < row["cpu"], row
        assert 10 < row["rss_worker"] < 600, row
        assert row["compared"] == 2
    for name in systems[:2]:
        ours = runs[name]
        assert ours["payload_from_origin"] + ours["payload_from_peers"] == 2 * ours["wire_bytes"]
        if beside := runs.get("libtorrent-v1"):
            (ratio,) = [row for row in rows if row["bench"] == "ratio" and row["system"] == name]
            assert ratio["to"] == "libtorrent-v1"
            assert ratio["last"] == pytest.approx(ours["last"] / beside["last"], rel=0.01)
    assert remains(running.pid) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_bench_leaves_nothing(slow: Callable[[], subprocess.Popen[str]], number: int):
    running = slow()
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 128 + number
    assert "Traceback" not in err
    assert remains(running.pid) == []


def test_what_a_killed_bench_leaves_is_swept_and_a_living_one_is_not_touched(
    slow: Callable[[], subprocess.Popen[str]], tmp_path: Path
):
    living = slow()
    killed = slow()
    (warm,) = {name.split("/warm")[-1] for _, name in held(f"/pgb{killed.pid}-") if "/warm" in name}
    assert warm == " (deleted)"
    killed.kill()
    killed.communicate()
    assert remains(killed.pid)
    assert not [name for _, name in held(f"/pgb{killed.pid}-") if "/warm" in name]  # its daemons live on
    with labs.open_lab(tmp_path):
        assert remains(killed.pid) == []
        assert living.poll() is None
        assert remains(living.pid)
    assert remains(os.getpid()) == []


def test_what_is_kept_warm_is_a_page_in_each_block_and_goes_with_it():
    with labs.open_lab(None) as lab:
        with warm(lab.folder, 20 * BLOCK + 1):
            kept = f"{lab.folder}/warm (deleted)"
            assert len(held(kept)) == 1
            assert list(lab.folder.iterdir()) == []
            (file,) = [
                fd for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == kept
            ]
            file = os.fstat(int(file))
            assert file.st_size == 20 * BLOCK
            assert file.st_blocks * 512 == 20 * mmap.PAGESIZE
        assert held(f"{lab.folder}/warm") == []


def test_a_link_keeps_its_rate_and_counts_headers(tmp_path: Path):
    send = (
        "import socket, sys; door = socket.create_server((sys.argv[1], 5000)); print(flush=True);"
        "door.accept()[0].sendall(bytes(int(sys.argv[2])))"
    )
    receive = (
        "import socket, sys, time; began = time.monotonic(); n = 0\n"
        "with socket.create_connection((sys.argv[1], 5000)) as line:\n"
        "    while more := line.recv(1 << 20): n += len(more)\n"
        "print(n, time.monotonic() - began)"
    )
    for up, down in ((RATE, None), (None, RATE)):
        with labs.open_lab(tmp_path) as lab:
            origin, worker = lab.host("origin", up=up), lab.host("worker-0", down=down)
            sender = origin.start([sys.executable, "-c", send, origin.address, SIZE], stdout=subprocess.PIPE)
            sender.stdout.readline()
            said = worker.run([sys.executable, "-c", receive, origin.address]).split()
            sent, received = origin.traffic()[0], worker.traffic()[1]
        assert int(said[0]) == SIZE
        assert 1.03 < received / SIZE < 1.07
        assert 0.99 * received < sent < 1.2 * received
        assert float(said[1]) > 0.95 * received / SECOND - labs.BUFFER
