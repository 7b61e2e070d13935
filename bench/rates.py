"""Measure whether caps are kept, and whether the owner's own traffic is hurt.

    python -m bench rates [--disk FILE] [--seconds 30] [--only caps courtesy]

caps      two workers fetch from an origin, unshaped but for the caps of `p2pnode prefs`; what is counted is
          what crossed the interfaces in `--seconds`, with all headers, over cap times seconds
courtesy  an origin with an uplink of 20 Mbit/s and 300 ms of buffer, as home routers have, sends a
          disk while a foreground TCP stream of its own leaves through the same uplink: the stream's
          speed and the uplink's delay (ping) alone, beside a courteous p2pgrid, beside one that is not
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.grid import report
from bench.lab import Host, Lab, open_lab, sh, stoppable
from bench.ours import P2pgrid, ask
from bench.peers import Bout
from p2pgrid.errors import GridError

UPLINK, BLOAT = 20.0, 0.3
"""Mbit/s, and seconds of buffer."""
SETTLE = 5.0
"""Seconds before anything is counted: links are made, and rates find their level."""
CAPS: list[tuple[str, str, dict[str, str]]] = [
    ("origin", "up", {"up": "40Mbit"}),
    ("origin", "up", {"up_per_link": "12Mbit"}),
    ("worker", "down", {"down": "16Mbit"}),
]
SINK = """
import socket
c = socket.create_server(("0.0.0.0", 9)).accept()[0]
while c.recv(1 << 20):
    pass
"""
SOURCE = """
import socket, sys, time
c = socket.create_connection((sys.argv[1], 9))
end, sent, block = time.monotonic() + float(sys.argv[2]), 0, bytes(65536)
while time.monotonic() < end:
    sent += c.send(block)
print(sent)
"""


def caps(lab: Lab, disk: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """Each cap: what was moved within it, over what it allows."""
    for who, way, changes in CAPS:
        hosts = [lab.host("origin"), lab.host("worker-0"), lab.host("worker-1")]
        system = _published(hosts, disk)
        capped = [hosts[0]] if who == "origin" else hosts[1:2]
        for host in capped:
            ask(host, "prefs", changes=changes)
        _begin(system)
        time.sleep(SETTLE)
        began, before = time.monotonic(), [h.traffic() for h in capped]
        time.sleep(seconds)
        elapsed, after = time.monotonic() - began, [h.traffic() for h in capped]
        place = 0 if way == "up" else 1
        moved = sum(a[place] - b[place] for a, b in zip(after, before, strict=True))
        ((name, text),) = changes.items()
        links = 2 if name.endswith("per_link") else 1
        allowed = links * float(text.removesuffix("Mbit")) * 1e6 / 8 * elapsed
        yield {"bench": "caps", "cap": f"{name}={text}", "at": who, "kept": round(moved / allowed, 3)}
        lab.clear()


def courtesy(lab: Lab, disk: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """The owner's own stream and delay, alone and beside us."""
    for mode in ("alone", "courteous", "not courteous", "nobody else"):
        hosts = [
            lab.host("origin", up=UPLINK, down=100.0, buffer=BLOAT),
            lab.host("worker-0"),
            lab.host("friend"),
        ]
        origin, worker, friend = hosts
        if mode != "alone":
            system = _published([origin, worker], disk)
            wish = "never" if mode == "not courteous" else "always"
            ask(origin, "prefs", changes={"courteous": wish})
            _begin(system)
            time.sleep(SETTLE)
        before, began = worker.traffic()[1], time.monotonic()
        row: dict[str, Any] = {"bench": "courtesy", "mode": mode}
        ping = _ping(origin, friend, seconds)
        if mode != "nobody else":
            row["own_stream"] = round(_stream(origin, friend, seconds), 3)
        row["ping_ms"] = _median_delay(ping)
        ours = (worker.traffic()[1] - before) / (time.monotonic() - began)
        row["ours"] = round(ours / (UPLINK * 1e6 / 8), 3)
        yield row
        lab.clear()


def _published(hosts: list[Host], disk: Path) -> P2pgrid:
    system = P2pgrid(Bout(disk, None, hosts[0], hosts[1:]))
    system.prepare()
    system.publish()
    return system


def _begin(system: P2pgrid) -> None:
    """Let all workers fetch; they are cut off when the lab is cleared."""

    def fetch(worker: Host) -> None:
        try:
            system.fetch(worker)
        except GridError as cut:
            report(f"{worker.name}: {cut}")

    for worker in system.bout.workers:
        threading.Thread(target=fetch, args=(worker,), daemon=True).start()


def _stream(origin: Host, friend: Host, seconds: float) -> float:
    """The share of the uplink that the owner's own stream gets."""
    friend.start([sys.executable, "-c", SINK])
    while ":9 " not in sh(f"ip netns exec {friend.space} ss -ltn"):
        time.sleep(0.05)
    sent = origin.run([sys.executable, "-c", SOURCE, friend.address, seconds])
    return float(sent) / seconds / (UPLINK * 1e6 / 8)


def _ping(origin: Host, friend: Host, seconds: float) -> subprocess.Popen[str]:
    return origin.start(
        ["ping", "-i", "0.2", "-w", int(seconds), friend.address], stdout=subprocess.PIPE, text=True
    )


def _median_delay(ping: subprocess.Popen[str]) -> float:
    """Milliseconds."""
    delays = sorted(float(t) for t in re.findall(r"time=([\d.]+)", ping.communicate()[0]))
    return delays[len(delays) // 2]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    asked.add_argument("--disk", type=Path, required=True, help="large enough to last")
    asked.add_argument("--seconds", type=float, default=30.0)
    asked.add_argument("--only", nargs="+", choices=("caps", "courtesy"), default=["caps", "courtesy"])
    given = asked.parse_args()
    with stoppable(), open_lab(Path("/dev/shm"), ahead=True) as lab:
        for name in given.only:
            for row in {"caps": caps, "courtesy": courtesy}[name](lab, given.disk.absolute(), given.seconds):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
