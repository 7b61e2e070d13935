"""Keep what the hosts of a failed bout said, where it outlasts the lab.

    ~/.cache/p2pgrid-bench/failed/20261122-221500-p2pgrid-x1y2z3/worker-0/data/daemon.log

Every file `*.log` (and `*.log.1`) below a host's folder, its last `MOST` bytes.  The oldest folders
beyond `FOLDERS` go.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from bench import data
from bench.lab import Host

MOST = 1 << 20
"""Bytes of one file."""
FOLDERS = 20


def keep(hosts: Iterable[Host], system: str) -> Path | None:
    """The folder in which the logs of `hosts` now are; None where nobody wrote any."""
    logs = [(host, path) for host in hosts for path in sorted(host.folder.rglob("*.log*")) if _is_log(path)]
    if not logs:
        return None
    kept = data.folder() / "failed"
    kept.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{time.strftime('%Y%m%d-%H%M%S')}-{system}-", dir=kept))
    for host, path in logs:
        out = folder / host.name / path.relative_to(host.folder)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(_tail(path))
    for old in sorted(kept.iterdir())[:-FOLDERS]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _is_log(path: Path) -> bool:
    return path.name.endswith((".log", ".log.1")) and path.is_file() and not path.is_symlink()


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - MOST))
        return file.read(MOST)
