"""Start a child process that cannot outlive us, wait for it, and bury those of earlier lives.

The kernel kills a child when the *thread* that started it ends (PR_SET_PDEATHSIG, set in
`jail.py`), so children are started from trio's own thread and not from a worker thread.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

import attrs
import trio

from p2pgrid.vm import jail

BURIAL = 10.0
"""Seconds that a killed process may take to let go of its memory."""
ROOM = "machine"
"""The folder, in a guest's folder, that holds what only lives as long as its machine."""
PID_FILE = "pid"


@attrs.frozen
class Limits:
    """What a jailed child may use; see `jail.lock_down`."""

    disk: int
    memory: int
    seconds: int = 0
    files: int = 256
    uid: int = jail.NOBODY

    def arguments(self) -> list[str]:
        """The arguments of `lock_down` in order, with this process as parent."""
        numbers = (os.getpid(), self.uid, self.files, self.disk, self.memory, self.seconds)
        return [str(n) for n in numbers]


def jailed(limits: Limits, command: Sequence[str]) -> list[str]:
    """`command` (an absolute path and its arguments), run in the jail."""
    return [sys.executable, "-I", "-S", jail.__file__, *limits.arguments(), "--", *command]


@attrs.frozen
class Child:
    """A running process."""

    pid: int
    _popen: subprocess.Popen[bytes]
    _handle: int

    async def wait(self) -> int:
        """Its return code (negative: the signal that ended it)."""
        handle = os.dup(self._handle)  # trio lets one task wait for a descriptor; many may wait for a child
        try:
            await trio.lowlevel.wait_readable(handle)
        finally:
            os.close(handle)
        return self._popen.wait()

    def kill(self) -> None:
        """End it now; nothing happens if it has ended."""
        if self._popen.poll() is None:
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)


@asynccontextmanager
async def running(
    command: Sequence[str], fds: Collection[int] = (), stdout: IO[bytes] | int | None = None,
    stderr: IO[bytes] | int | None = None,
) -> AsyncIterator[Child]:  # fmt: skip
    """Start `command` with the descriptors `fds` (same numbers); kill and reap it on leaving."""
    popen = _start(command, fds, stdout, stderr)
    handle = os.pidfd_open(popen.pid)
    child = Child(popen.pid, popen, handle)
    try:
        yield child
    finally:
        child.kill()
        with trio.move_on_after(BURIAL) as burial:
            burial.shield = True
            await child.wait()
        os.close(handle)


def _start(
    command: Sequence[str],
    fds: Collection[int],
    stdout: IO[bytes] | int | None,
    stderr: IO[bytes] | int | None,
) -> subprocess.Popen[bytes]:
    null = subprocess.DEVNULL
    return subprocess.Popen(
        command, pass_fds=fds, stdin=null, stdout=stdout or null, stderr=stderr or null,
        cwd="/", env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL": "C"}, start_new_session=True,
    )  # fmt: skip


def remember(folder: Path, child: Child) -> None:
    """Write down who runs in `folder`, a `ROOM`, for `reap`."""
    (folder / PID_FILE).write_text(f"{child.pid} {_started(child.pid)}\n")


def reap(folder: Path) -> int:
    """Kill the machines of guests that an earlier life left in `folder`; remove those guests' folders.

    Returns how many were still running.  A process counts only if it started when the note says:
    pids are used again.
    """
    killed = 0
    for guest in sorted(folder.iterdir()) if folder.is_dir() else []:
        if guest.is_dir() and not guest.is_symlink():
            killed += _kill_noted(guest / ROOM / PID_FILE)  # and no other: a result may have any name
            shutil.rmtree(guest, ignore_errors=True)
    return killed


def _kill_noted(note: Path) -> bool:
    try:
        pid, started = note.read_text().split()
        handle = os.pidfd_open(int(pid))
    except (OSError, ValueError):
        return False
    try:
        if not started or _started(int(pid)) != started:
            return False
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def _started(pid: int) -> str:
    """When process `pid` started, in clock ticks since boot; empty if it is gone or dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]
