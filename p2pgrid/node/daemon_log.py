"""Keep the log of a detached daemon from growing for ever.

Its standard error is `daemon.log`, opened for appending.  When that is longer than `LOG_MAX`, it is
copied to `daemon.log.1` and emptied; what was written between the two is lost.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import trio

from p2pgrid.node.launch import LOG

LOG_MAX = 8 << 20
LOOK = 60.0
"""Seconds between two looks."""


async def keep_log_short(home: Path, fd: int = 2) -> None:
    """Look again and again, as long as `fd` is the log in `home`."""
    while True:
        with contextlib.suppress(OSError):  # a full disk is others' to tell of
            shorten(home, fd)
        await trio.sleep(LOOK)


def shorten(home: Path, fd: int) -> None:
    """Empty the log, if `fd` is it and it has become long; what it said is kept once."""
    log = home / LOG
    if not log.exists() or not os.path.samestat(os.fstat(fd), log.stat()) or log.stat().st_size <= LOG_MAX:
        return
    try:
        shutil.copyfile(log, home / f"{LOG}.1")
    finally:
        os.ftruncate(fd, 0)
