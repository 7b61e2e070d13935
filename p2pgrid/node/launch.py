"""Start a daemon, wait until it is ready, end it: the command line's side of its life."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import attrs

from p2pgrid.errors import Misconfigured, Misused
from p2pgrid.node import api
from p2pgrid.node.config import ROLES, Config
from p2pgrid.node.console import parse_duration, say

LOG = "daemon.log"
STOP_PATIENCE = 30.0
"""Seconds a daemon may take to stop its VMs and close its store."""


def ensure(home: Path) -> None:
    """Leave with a daemon running on `home`: the one there is, the one set up, or an embedded grid."""
    if api.daemon_runs(home):
        return
    with _alone(home):
        if api.daemon_runs(home):
            return
        if Config.load(home) is None:
            say(f"no daemon runs here: starting an embedded grid in {home} (end it with `p2pgrid down`)")
            Config(roles=ROLES, listen="127.0.0.1:0", name="embedded").save(home)
        else:
            say(f"starting the daemon of {home} (end it with `p2pgrid down`)")
        spawn(home).ready()


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One command at a time starts a daemon on `home`.  Raises `Misconfigured`."""
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as refused:
        raise Misconfigured(why=f"cannot keep a daemon's data in {home}: {refused.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@attrs.frozen
class Starting:
    """A daemon that was started and has not yet said that it is ready."""

    home: Path
    process: subprocess.Popen[bytes]
    news: BinaryIO

    def ready(self) -> subprocess.Popen[bytes]:
        """Wait for its word.  Raises `api.Told` with its own when it does not come up."""
        try:
            with self.news:
                word = self.news.readline()
        except BaseException:
            self.process.terminate()
            self.process.wait()
            raise
        if not word:
            self.process.wait()
            raise Misconfigured(why=f"the daemon did not start; its log is {self.home / LOG}")
        said = json.loads(word)
        if "error" in said:
            self.process.wait()
            raise api.Told.of(said["error"])
        return self.process


def spawn(home: Path, *, with_parent: bool = False) -> Starting:
    """Start the daemon that `home` is set up for.  It outlives this process unless `with_parent`.

    With `with_parent` call it from the main thread: the kernel takes the thread for the parent.
    """
    ready, theirs = os.pipe()  # not inherited: who is started beside does not keep a dead one's pipe
    command = [sys.executable, "-m", "p2pgrid.node.daemon", str(home), "--ready-fd", str(theirs)]
    if with_parent:
        command.append("--with-parent")
    with _uninterrupted() as interrupt:
        try:
            with open(home / LOG, "ab") as log:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(theirs,),
                    start_new_session=True,
                    cwd=home,
                )
        finally:
            os.close(theirs)
        try:
            interrupt()
        except BaseException:
            child.terminate()
            child.wait()
            os.close(ready)
            raise
    return Starting(home, child, os.fdopen(ready, "rb"))


@contextlib.contextmanager
def _uninterrupted() -> Iterator[Callable[[], None]]:
    """Hold SIGINT and SIGTERM back until what this gives is called: amid `Popen` nobody knows the child."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    held: list[tuple[int, FrameType | None]] = []
    before = {n: signal.signal(n, lambda *at: held.append(at)) for n in (signal.SIGINT, signal.SIGTERM)}

    def release() -> None:
        while before:
            signal.signal(*before.popitem())
        for number, _ in held:
            signal.raise_signal(number)

    try:
        yield release
    finally:
        while before:
            signal.signal(*before.popitem())


def stop(home: Path) -> None:
    """End the daemon on `home` and wait until its process is gone."""
    pid = api.call(home, "status")["pid"]
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        try:
            api.call(home, "stop")
        except api.Told as told:
            if told.kind != "Ended":  # it may be gone before it could say so
                raise
        gone, _, _ = select.select([process], [], [], STOP_PATIENCE)
        if not gone:
            raise api.Told(
                kind="TimedOut",
                code=5,
                message=f"the daemon (process {pid}) is still stopping",
                hint=f"see {home / LOG}",
            )
    finally:
        os.close(process)


def ledger_path(db: str | None) -> str | None:
    """The file of a `sqlite:///FILE` address.  Raises `Misused` for another."""
    if db is None:
        return None
    if not db.startswith("sqlite:///"):
        raise Misused(why=f"--db {db!r}: this version keeps its ledger in SQLite; write sqlite:///FILE")
    return str(Path(db.removeprefix("sqlite:///")).absolute())


def lease(text: str) -> float:
    """The duration of a lease in seconds.  Raises `Misused`."""
    seconds = parse_duration(text)
    if not 5 <= seconds <= 3600:
        raise Misused(why=f"--lease {text!r}: choose between 5s and 1h")
    return seconds


def membership(text: str) -> float:
    """For how long a membership can be shown, in seconds.  Raises `Misused`."""
    seconds = parse_duration(text)
    if not 3600 <= seconds <= 366 * 86400:
        raise Misused(why=f"--membership {text!r}: choose between 1h and 366d")
    return seconds


def link_port(number: int) -> int:
    """Raises `Misused`."""
    if not 0 < number < 65536:
        raise Misused(why=f"--link-port {number} is no TCP port")
    return number


def places(count: int) -> int:
    """How many places there may be for other libp2p nodes.  Raises `Misused`."""
    if not 0 <= count <= 1024:
        raise Misused(why="--libp2p-places is between 0 and 1024")
    return count


def relays(addresses: Iterable[str]) -> tuple[str, ...]:
    """The addresses, if all are of libp2p nodes.  Raises `Misconfigured`."""
    from p2pgrid.hole_punch.addresses import relay_at

    for address in addresses:
        relay_at(address)
    return tuple(addresses)


def card(rows: Sequence[tuple[str, str]]) -> str:
    """A consent card: what is asked of the volunteer, a row a matter."""
    return "\n".join(f"  {matter:<10}{what}" for matter, what in rows)
