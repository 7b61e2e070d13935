"""Do programs that know nothing of the grid talk to each other, in real guests of different volunteers?"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from tests.grid_processes import PATIENCE, Grid, open_grid, p2pgrid, processes_of
from tests.tiny_disk import tiny_disk

pytestmark = pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed")

SCRIPT = """#!/bin/sh
# Both guests do the same: find the other, give it a file by HTTP, and fetch its own.
other=task$((1 - P2PGRID_INDEX))
ifconfig eth0 >card.txt
hostname >name.txt
mkdir /tmp/www
head -c 3000000 /dev/urandom >/tmp/www/file
sha256sum </tmp/www/file >served.txt
httpd -p 80 -h /tmp/www
until ping -c 1 -W 1 $other; do sleep 0.2; done >/dev/null 2>&1
ping -c 3 $other >ping.txt || exit 3
until wget -q -O /tmp/file http://$other/file; do sleep 0.2; done 2>/dev/null
sha256sum </tmp/file >fetched.txt
cp /etc/resolv.conf resolv.txt
ip route >route.txt
: >/tmp/www/done
until wget -q -O /dev/null http://$other/done; do sleep 0.2; done 2>/dev/null
sleep 1 # the other one is about to ask for the last time
"""


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    disk = tiny_disk()
    folder = tmp_path_factory.mktemp("lan")
    with open_grid(folder, 2) as grid:
        said = p2pgrid("put", disk, "--name", "tiny", "--replica", "-1", home=grid.home)
        assert said.code == 0, said.err
        yield grid
    assert processes_of(folder) == []


def test_two_guests_on_two_nodes_ping_and_fetch_by_name(grid: Grid, tmp_path: Path):
    script = tmp_path / "job.sh"
    script.write_text(SCRIPT)
    words = (
        "run",
        "tiny",
        "--script",
        script,
        "--array",
        "0-1",
        "--net",
        "lan",
        "--ram",
        "96M",
        "--scratch",
        "64M",
    )
    said = p2pgrid(*words, "--time", f"{PATIENCE:.0f}s", "-o", tmp_path / "out", "--json", home=grid.home)
    assert said.code == 0, said.err
    assert {task["node"] for task in said.json["tasks"]} == {worker.name for worker in grid.workers}

    def result(index: int, name: str) -> str:
        return (tmp_path / "out" / str(index) / name).read_text()

    for me, other in ((0, 1), (1, 0)):
        assert f"addr:10.77.1.{me + 1}" in result(me, "card.txt")
        assert f"HWaddr 02:70:32:00:00:0{me}" in result(me, "card.txt")
        assert "MTU:1500" in result(me, "card.txt")
        assert result(me, "name.txt") == f"task{me}\n"
        assert f"PING task{other} (10.77.1.{other + 1})" in result(me, "ping.txt")
        assert result(me, "fetched.txt") == result(other, "served.txt")
        assert result(me, "resolv.txt") == f"search {said.json['job']}.grid\nnameserver 10.77.0.1\n"
        assert "default" not in result(me, "route.txt"), "it leads nowhere else"
    assert result(0, "fetched.txt") != hashlib.sha256(b"").hexdigest() + "  -\n"
