"""Account for a host's processes: the CPU that all of them took, and the most memory they had at once.

CPU comes from a control group of the host's own, in either version of them, so that what short-lived
children took is in it.  Where no group can be made it is what was last seen of each process in /proc
(`exact` is False then: up to `PERIOD` seconds at a process's end are not seen).

Memory is the sum of the processes' VmHWM (MiB), looked at every `PERIOD`: what two of them
share counts twice.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import psutil

PERIOD = 0.1
PATIENCE = 5.0
"""Seconds until a control group has noticed that its processes are gone."""
TICK = os.sysconf("SC_CLK_TCK")


WEIGHTS = {"cpu.shares": "100000", "cpu.weight": "10000"}
"""What lets a control group go before the others, in either version."""


def _roots() -> list[Path]:
    """Where control groups count and share out CPU here; version 1's places, or version 2's one."""
    first, second = [], []
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup" and {"cpu", "cpuacct"} & set(options.split(",")):
            first.append(Path(place))
        elif kind == "cgroup2":
            second.append(Path(place))
    return first or second


def groups_of(name: str) -> list[Path]:
    """The groups that are called `name` or `name-…`."""
    return [group for root in _roots() for group in (*root.glob(name), *root.glob(f"{name}-*"))]


def remove_group(group: Path) -> None:
    """Its processes have been killed, and may take a moment to be gone."""
    limit = time.monotonic() + PATIENCE
    while group.exists():
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.01)


def spent(pid: int) -> float:
    """CPU seconds of the process so far, user and system, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def peak(pid: int) -> int:
    """The most memory the process had, KiB, since its start or `forget_peak`; 0 where it is ending."""
    _, found, rest = Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")
    return int(rest.split()[0]) if found else 0


def forget_peak(pid: int) -> None:
    """Let `peak` begin anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


class Account:
    """Of the processes that are started by `words()` and told to `watch()`, and of their children."""

    def __init__(self, name: str, ahead: bool = False) -> None:
        """`ahead`: they go before everything else on this machine, where control groups allow it."""
        self._group: Path | None = None
        self._groups: list[Path] = []
        for root in _roots():
            with contextlib.suppress(OSError):
                group = root / name
                group.mkdir()
                self._groups.append(group)
                if (group / "cpuacct.usage").exists() or "usage_usec" in (group / "cpu.stat").read_text():
                    self._group = group
                for weight, most in WEIGHTS.items() if ahead else ():
                    if (group / weight).exists():
                        (group / weight).write_text(most)
        self._roots: list[int] = []
        self._seen: dict[int, float] = {}
        self._most = 0

    @property
    def exact(self) -> bool:
        return self._group is not None

    def words(self, command: Sequence[str]) -> list[str]:
        """`command` so that what it starts is on this account."""
        into = "".join(f'echo 0 > "{group}/cgroup.procs"; ' for group in self._groups)
        return ["sh", "-c", f'{into}exec "$0" "$@"', *command] if into else list(command)

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """This process itself is on the account within the block."""
        for group in self._groups:
            (group / "cgroup.procs").write_text("0")
        try:
            yield
        finally:
            for group in self._groups:
                (group.parent / "cgroup.procs").write_text("0")

    def watch(self, pid: int) -> None:
        self._roots.append(pid)

    def look(self) -> None:
        """See who runs, and how much memory and CPU each has."""
        memory = 0
        for pid in self._pids():
            with contextlib.suppress(OSError, ValueError):
                memory += peak(pid)
                self._seen[pid] = spent(pid)
        self._most = max(self._most, memory)

    def cpu(self) -> float:
        """Seconds so far."""
        if self._group is None:
            self.look()
            return sum(self._seen.values())
        with contextlib.suppress(FileNotFoundError):
            return int((self._group / "cpuacct.usage").read_text()) / 1e9
        return int((self._group / "cpu.stat").read_text().split()[1]) / 1e6

    def forget_peak(self) -> None:
        for pid in self._pids():
            with contextlib.suppress(OSError):
                forget_peak(pid)
        self._most = 0

    def peak(self) -> float:
        """MiB."""
        self.look()
        return self._most / 1024

    def _pids(self) -> Iterable[int]:
        if self._group is not None:
            return map(int, (self._group / "cgroup.procs").read_text().split())
        found = set()
        for pid in self._roots:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                found |= {pid, *(child.pid for child in process.children(recursive=True))}
        return found


@contextlib.contextmanager
def looking(accounts: Sequence[Account]) -> Iterator[None]:
    """Look at all of them every `PERIOD` while the block runs."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(PERIOD):
            for account in accounts:
                account.look()

    eyes = threading.Thread(target=look, daemon=True)
    eyes.start()
    try:
        yield
    finally:
        over.set()
        eyes.join()
