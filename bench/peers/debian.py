"""Do what every system that is a program of Debian's needs: be there, have an old file, be open."""

from __future__ import annotations

import shutil

from bench.lab import Host
from bench.peers import Bout

WAIT = 'until (exec 3<>"/dev/tcp/$0/$1") 2>/dev/null; do sleep 0.02; done'
"""bash: return when someone listens; the caller's patience ends it."""
PATIENCE = 20
"""Seconds until a server that does not listen has failed."""


def absent(*programs: str) -> str | None:
    """Why a system that consists of `programs` cannot run here; their packages are called alike."""
    missing = [name for name in programs if shutil.which(name) is None]
    return f"{', '.join(missing)} not installed" if missing else None


def give_old(bout: Bout, name: str) -> None:
    """Let every worker have the old version, if there is one, as the file `name`."""
    if bout.old:
        for worker in bout.workers:
            shutil.copyfile(bout.old, worker.folder / name)


def wait_open(host: Host, port: int) -> None:
    """Return when `host` listens on `port`; `subprocess.CalledProcessError` if it does not in time."""
    host.run(["timeout", PATIENCE, "bash", "-c", WAIT, host.address, port])
