"""Do untouched programs in real guests talk through the proxy?  The examples of the how-to page."""

from __future__ import annotations

import contextlib
import functools
import http.client
import http.server
import os
import shutil
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.grid_processes import (
    PATIENCE,
    Grid,
    Said,
    command,
    open_grid,
    p2pgrid,
    p2pnode,
    processes_of,
    until,
)
from tests.ssh_server import bring_sshd
from tests.tiny_disk import tiny_disk

pytestmark = pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed")

needs_ssh = pytest.mark.skipif(not shutil.which("ssh"), reason="openssh-client is not installed")

SCRIPT = """#!/bin/sh
# A repository for whoever may reach it, and a client of others: by plain names, with plain wget.
mkdir /tmp/www
echo "kept by task $P2PGRID_INDEX" >/tmp/www/page
head -c 3000000 /dev/urandom >/tmp/www/file
sha256sum </tmp/www/file >file.txt
httpd -p 80 -h /tmp/www
until wget -q -O owner.txt http://8000.owner.grid/page; do sleep 0.5; done 2>/dev/null
wget -q -O plain.txt http://OWNER.grid:8000/page
other=$((1 - P2PGRID_INDEX))
until wget -q -O other.txt http://80.$other.$P2PGRID_JOB.grid/page; do sleep 0.5; done 2>/dev/null
wget -q -O /dev/null http://8001.owner.grid/page 2>/dev/null; echo $? >closed.txt
wget -q -O /dev/null http://81.$other.$P2PGRID_JOB.grid/page 2>/dev/null; echo $? >denied.txt
wget -q -T 5 -O /dev/null http://10.77.0.1:22/ 2>/dev/null; echo $? >node.txt
wget -q -T 5 -O /dev/null http://example.org/ 2>/dev/null; echo $? >out.txt
echo ready >/tmp/www/ready  # neither ends before both have had what they want of the other
until wget -q -O /dev/null http://8000.owner.grid/over; do sleep 0.5; done 2>/dev/null
"""


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grid]:
    disk = tiny_disk()
    folder = tmp_path_factory.mktemp("proxy")
    with open_grid(folder, 2) as grid:
        said = p2pgrid("put", disk, "--name", "tiny", "--replica", "-1", home=grid.home)
        assert said.code == 0, said.err
        yield grid
    assert processes_of(folder) == []


SSH_SCRIPT = """#!/bin/sh
# An untouched sshd, brought along with what it is linked to.
cp -r /context/root/. /
mkdir -p /run/sshd /var/empty /root/.ssh /dev/pts
mount -t devpts devpts /dev/pts
echo 'sshd:x:74:74::/var/empty:/bin/false' >>/etc/passwd
cp /context/authorized_keys /root/.ssh/
cp /context/host_key /etc/host_key
chmod 700 /root /root/.ssh
chmod 600 /root/.ssh/authorized_keys /etc/host_key
/usr/sbin/sshd -f /context/sshd_config || exit 3
until [ -e /tmp/over ]; do sleep 0.5; done
cp /tmp/over over.txt
"""
SSHD_CONFIG = """HostKey /etc/host_key
PidFile none
UsePAM no
PasswordAuthentication no
StrictModes no
UseDNS no
"""


@needs_ssh
def test_ssh_opens_a_running_guest(grid: Grid, tmp_path: Path) -> None:
    said = p2pgrid("run", "tiny", *ssh_job(tmp_path), "-d", home=grid.home)
    assert said.code == 0, said.err
    job = said.out.strip()

    def ssh(*words: str) -> Said:
        return p2pgrid("job", "ssh", job, "-i", tmp_path / "key", "--", *words, home=grid.home)

    until(lambda: ssh("true").code == 0, "a shell in the guest")
    assert ssh("hostname").out == "task0\n"
    assert ssh("exit 7").code == 7
    assert len(ssh("head -c 1000000 /dev/zero | tr '\\0' x").out) == 1_000_000
    assert ssh("echo told by ssh >/tmp/over.new && mv /tmp/over.new /tmp/over").code == 0
    done = grid.finished(job)
    assert done["state"] == "completed", done
    out = p2pgrid("job", "results", job, "-o", tmp_path / "out", home=grid.home)
    assert out.code == 0, out.err
    assert (tmp_path / "out" / "0" / "over.txt").read_text() == "told by ssh\n"


def ssh_job(folder: Path) -> list[object]:
    """The words of a job whose guest runs sshd, for the key in `folder`."""
    (folder / "job.sh").write_text(SSH_SCRIPT)
    (folder / "sshd_config").write_text(SSHD_CONFIG)
    bring_sshd(folder / "root")
    for name in ("host_key", "key"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(words, check=True)
    shutil.copy(folder / "key.pub", folder / "authorized_keys")
    brought = [("--in", folder / name) for name in ("root", "sshd_config", "host_key", "authorized_keys")]
    small = ("--ram", "160M", "--scratch", "64M", "--time", "120s", "--net", "lan", "--accept", "22")
    return ["--script", folder / "job.sh", *(word for pair in brought for word in pair), *small]


@contextlib.contextmanager
def web_server(folder: Path) -> Iterator[int]:
    """A web server of the submitter's own machine."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_guests_and_the_submitter_reach_each_other_by_name(grid: Grid, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(SCRIPT)
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "page").write_text("kept by the submitter\n")
    rules = ("--net", "lan", "--accept", "80:job")
    small = ("--ram", "96M", "--scratch", "64M", "--time", "120s", "--array", "0-1")
    said = p2pgrid("run", "tiny", "--script", tmp_path / "job.sh", *small, *rules, "-d", home=grid.home)
    assert said.code == 0, said.err
    job = said.out.strip()
    with web_server(tmp_path / "www") as port:
        exposed = command("p2pgrid", "expose", port, "--as", 8000, "--to", job, home=grid.home)
        forwards = [
            command("p2pgrid", "job", "forward", job, "80", "--index", index, home=grid.home)
            for index in (0, 1)
        ]
        try:
            for index, forward in enumerate(forwards):
                assert forward.stderr is not None
                at = forward.stderr.readline().split(" ")[0]
                page = until(lambda at=at: fetched(f"http://{at}/page"), "a page from the guest")
                assert page == f"kept by task {index}\n".encode()
                assert len(fetched(f"http://{at}/file") or b"") == 3_000_000
                until(lambda at=at: fetched(f"http://{at}/ready"), "a guest that has fetched all it wants")
            flows = p2pnode("proxy", "status", "--json", home=grid.home)
            assert flows.json["exposed"] == [{"port": 8000, "to": job, "host": "", "at": port}]
            (tmp_path / "www" / "over").write_text("")
            done = grid.finished(job)
        finally:
            codes = [ended(process) for process in (*forwards, exposed)]
    assert done["state"] == "completed", done
    assert codes == [0, 0, 0]
    out = p2pgrid("job", "results", job, "-o", tmp_path / "out", home=grid.home)
    assert out.code == 0, out.err

    def result(index: int, name: str) -> str:
        return (tmp_path / "out" / str(index) / name).read_text()

    for me, other in ((0, 1), (1, 0)):
        assert result(me, "owner.txt") == result(me, "plain.txt") == "kept by the submitter\n"
        assert result(me, "other.txt") == f"kept by task {other}\n"
        for name in ("closed.txt", "denied.txt", "node.txt", "out.txt"):
            assert result(me, name) != "0\n", name
    refused = p2pgrid("job", "forward", "nosuchjob2", "80", home=grid.home)
    assert refused.code == 3, refused.err


def ended(process: subprocess.Popen[str]) -> int:
    """Its exit code, after a Ctrl-C."""
    os.killpg(process.pid, signal.SIGINT)
    with process:
        _, err = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in err, err
    return process.returncode


def fetched(url: str) -> bytes | None:
    """None where nobody serves it yet."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.read()
    except (urllib.error.URLError, ConnectionError, http.client.HTTPException):
        return None
