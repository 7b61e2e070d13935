"""Build the bench's network: one namespace for each host on one bridge, shaped and counted; leave nothing.

    with open_lab(folder) as lab:
        origin = lab.host("origin", up=200.0, down=200.0)        # Mbit/s; None: as fast as it goes
        origin.start(["nginx", …])

    origin ── eth0 ═ veth ═ bridge (namespace "wire") ═ veth ═ eth0 ── worker-0 …

A host's uplink is shaped where it leaves the host, its downlink where it leaves the bridge:
HTB, and before it a queue of `BUFFER` seconds, as a home router has.  Bytes are those that the
queues count: with the headers of every segment, even where a large one was never cut.

Every name begins with `pgb` and the number of this process, which holds a lock in `LOCKS` as
long as it lives: what a killed bench left behind is found by the lock that nobody holds, and
removed when the next one begins.  Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

from bench.account import Account, groups_of, remove_group

LOCKS = Path("/run/p2pgrid-bench")
SPACES = Path("/run/netns")
MEMORY = Path("/dev/shm")
BUFFER = 0.025
"""Seconds of its rate that a shaped link holds back before it drops."""
BURST = 32 << 10
"""Bytes that HTB sends at once: about 1 ms of 200 Mbit/s."""
PATIENCE = 10.0
"""Seconds that killed processes may take to be gone."""


def sh(line: str, stdin: str | None = None) -> str:
    """Run a command of the system.  Raises `subprocess.CalledProcessError`, with what it said."""
    done = subprocess.run(line.split(), capture_output=True, input=stdin, text=True, timeout=30)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, line, done.stdout, done.stderr)
    return done.stdout


def absent() -> str | None:
    """Why there can be no lab on this machine."""
    if os.geteuid():
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc", "nsenter") if not shutil.which(tool)]
    return f"{', '.join(missing)} not installed" if missing else None


@attrs.define(eq=False)
class Host:
    """A computer of the lab."""

    name: str
    space: str
    """Its namespace."""
    wire: str
    """The bridge's namespace, where the other end of its cable is called as the host."""
    address: str
    folder: Path
    account: Account
    up: float | None
    """Mbit/s; None: not shaped."""
    down: float | None
    started: list[subprocess.Popen[Any]] = attrs.field(factory=list)

    def words(self, command: Sequence[object]) -> list[str]:
        """`command` as it must be started to run in this host."""
        inside = ["nsenter", f"--net={SPACES / self.space}", "--", *map(str, command)]
        return self.account.words(inside)

    def start(self, command: Sequence[object], **popen: Any) -> subprocess.Popen[Any]:
        """Start a process in this host; it is killed with the lab at the latest."""
        process = subprocess.Popen(self.words(command), **({"stdin": subprocess.DEVNULL} | popen))
        self.started.append(process)
        self.account.watch(process.pid)
        return process

    def run(self, command: Sequence[object], **popen: Any) -> str:
        """Run a command in this host to its end, and give what it says.

        Raises `subprocess.CalledProcessError` with its stderr when it fails.
        """
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = self.start(command, **(pipes | popen))
        out, err = process.communicate()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, [*map(str, command)], out, err)
        return out or ""

    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received so far, headers of all layers counted."""
        return _counted(self.space, "eth0"), _counted(self.wire, self.name)

    def ended(self) -> list[str]:
        """What was started here and has ended badly: the command, and its exit code or minus the signal."""
        bad = [(p.args[p.args.index("--") + 1 :], code) for p in self.started if (code := p.poll())]
        return [f"{' '.join(words)[:200]}: {code}" for words, code in bad]

    def kill(self) -> None:
        """End what was started here; children of it end with the namespace."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
        for process in self.started:
            process.wait(PATIENCE)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


class Lab:
    """Hosts on one bridge; made by `open_lab`, which takes down what this builds."""

    def __init__(self, name: str, folder: Path, congestion: str, ahead: bool) -> None:
        self.name = name
        self.folder = folder
        self.hosts: list[Host] = []
        self._congestion = congestion
        self._ahead = ahead
        self._wire = self._space("wire")
        sh(f"ip -n {self._wire} link add name bridge0 type bridge")
        sh(f"ip -n {self._wire} link set bridge0 up")

    def host(
        self, name: str, *, up: float | None = None, down: float | None = None, buffer: float = BUFFER
    ) -> Host:
        """One more host; `name` must fit an interface's name, `buffer` is that of its uplink (s)."""
        space = self._space(name)
        home = self.folder / name
        home.mkdir()
        address = f"10.77.0.{10 + len(self.hosts)}"
        account = Account(space, self._ahead)
        made = Host(name, space, self._wire, address, home, account, up, down)
        self.hosts.append(made)
        sh(f"ip -n {space} link add eth0 type veth peer name {name} netns {self._wire}")
        sh(f"ip -n {space} addr add {address}/24 dev eth0 noprefixroute")
        shape(space, "eth0", up, buffer)
        shape(self._wire, name, down)
        sh(f"ip -n {self._wire} link set {name} master bridge0 up")
        sh(f"ip -n {space} link set eth0 up")
        # by route: a namespace may not choose any control for itself
        sh(f"ip -n {space} route add 10.77.0.0/24 dev eth0 src {address} congctl {self._congestion}")
        return made

    def clear(self) -> None:
        """Take all hosts away, with what runs and lies there."""
        while self.hosts:
            host = self.hosts[-1]
            host.kill()
            sh(f"ip -n {host.wire} link del {host.name}")  # at once: a namespace takes its time
            _remove(host.space)
            shutil.rmtree(host.folder, ignore_errors=True)
            self.hosts.pop()

    def _space(self, name: str) -> str:
        space = f"{self.name}-{name}"
        sh(f"ip netns add {space}")
        sh(f"ip -n {space} link set lo up")
        return space


def shape(space: str, device: str, rate: float | None, buffer: float = BUFFER) -> None:
    """Let `device` send `rate` Mbit/s at most; without one it has a queue that only counts."""
    if rate is None:
        sh(f"tc -n {space} qdisc add dev {device} root pfifo_fast")
        return
    limit = max(round(rate * 1e6 / 8 * buffer), 4 * 1514)
    burst = max(min(BURST, limit // 4), 2 * 1514)
    sh(f"tc -n {space} qdisc add dev {device} root handle 1: htb default 1")
    sh(
        f"tc -n {space} class add dev {device} parent 1: classid 1:1 "
        f"htb rate {rate}mbit ceil {rate}mbit burst {burst} cburst {burst} quantum 60000"
    )
    sh(f"tc -n {space} qdisc add dev {device} parent 1:1 bfifo limit {limit}")
    most = max(limit // 8, 1514)  # a segment larger than the queue would always be dropped
    if most < 65536:
        sh(f"ip -n {space} link set dev {device} gso_max_size {most}")


def _counted(space: str, device: str) -> int:
    shown = json.loads(sh(f"tc -n {space} -s -j qdisc show dev {device}"))
    return int(next(q["bytes"] for q in shown if q.get("root")))


def _empty(space: str) -> None:
    """Kill what runs in a namespace, until nothing does."""
    limit = time.monotonic() + PATIENCE
    while pids := sh(f"ip netns pids {space}").split():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if time.monotonic() > limit:
            raise TimeoutError(f"processes {pids} of {space} do not end")
        time.sleep(0.01)


# --- beginning and end -------------------------------------------------------------------


@contextlib.contextmanager
def open_lab(folder: Path | None, congestion: str = "cubic", ahead: bool = False) -> Iterator[Lab]:
    """A lab of this process, with scratch in `folder`; gone without a trace when the block is left.

    Without a folder it is in memory.

    `congestion` is TCP's control in every host, as the kernel calls it; `ahead`: the hosts' processes go
    before everything else on this machine.
    """
    LOCKS.mkdir(parents=True, exist_ok=True)
    lock = LOCKS / f"pgb{os.getpid()}"
    lab = None
    with (LOCKS / "beginning").open("w") as one_at_a_time:  # none is swept before it holds its lock
        fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
        sweep()
        held = lock.open("x")
        fcntl.flock(held, fcntl.LOCK_EX)
    with held:
        scratch = Path(tempfile.mkdtemp(prefix=f"{lock.name}-", dir=folder or MEMORY))
        held.write(str(scratch))
        held.flush()
        try:
            lab = Lab(lock.name, scratch, congestion, ahead)
            with Account(f"{lock.name}-driver", ahead).joined():  # or it would hear late that they are done
                yield lab
        finally:
            if lab:
                lab.clear()
            _remove(lock.name)
            shutil.rmtree(scratch, ignore_errors=True)
            lock.unlink()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and a lost terminal leave the block once; what comes after waits for the end."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number: int, _: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    before = [signal.signal(each, stop) for each in signals]
    try:
        yield
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)


def sweep() -> None:
    """Remove what killed benches left: those whose lock nobody holds."""
    for lock in LOCKS.glob("pgb*"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock.name)
            scratch = Path(file.read())
            if scratch.name.startswith(f"{lock.name}-"):
                shutil.rmtree(scratch, ignore_errors=True)
            lock.unlink()  # last: an interrupted removal is done again


def _remove(name: str) -> None:
    """Every namespace, process and control group that is called `name` or `name-…`."""
    for space in (*SPACES.glob(name), *SPACES.glob(f"{name}-*")):
        _empty(space.name)
        sh(f"ip netns del {space.name}")
    for group in groups_of(name):
        remove_group(group)
