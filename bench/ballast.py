"""Keep memory at hand that was used a moment ago, so that systems are measured and not the hypervisor.

A virtual machine hands memory that lies free for seconds back to its host, and who touches it next waits
for it: 0.4 to 3 CPU seconds per GiB, counted as the system's own that just wrote a file there, and more
for whoever writes more.  So the lab fills the file `ballast` beside the hosts' folders before a case, and
gives it up in the course of it just as fast as memory is taken; the kernel hands out first what came
back last.  Where memory costs nothing, neither does this.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

PERIOD = 0.03
"""Seconds between looks at what was taken."""
AHEAD = 384 << 20
"""Bytes that are free and warm beyond what was taken: more than is used within a period."""
STIR = 0.5
"""Seconds after which these are used once, before they count as lying free."""
LEFT = 2 << 30
"""Bytes of this machine's memory that are not for the lab."""


def free() -> int:
    """Bytes of memory that nothing uses."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemFree":
            return int(rest.split()[0]) << 10
    raise OSError("no MemFree in /proc/meminfo")


@contextlib.contextmanager
def ballast(folder: Path, size: int) -> Iterator[None]:
    """Have `size` bytes (as far as there are) in memory's file system `folder`; they go within the block."""
    path = folder / "ballast"
    with path.open("wb") as file:
        path.unlink()
        size = max(0, min(size, free() - LEFT))
        _touch(file.fileno(), 0, size)
        over = threading.Event()
        thread = threading.Thread(target=_give_up, args=(file.fileno(), size, over), name="ballast")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _give_up(file: int, rest: int, over: threading.Event) -> None:
    """Have `AHEAD` bytes more free than at first, until there is no rest."""
    wanted, stirred = free() + AHEAD, time.monotonic()
    while rest and not over.wait(PERIOD):
        if (taken := wanted - free()) > 0:
            rest = max(0, rest - taken)
            os.ftruncate(file, rest)
        if time.monotonic() > stirred + STIR:
            _touch(file, rest, rest + AHEAD)
            os.ftruncate(file, rest)
            stirred = time.monotonic()


def _touch(file: int, begin: int, end: int) -> None:
    """Write there: memory that is only allocated has been touched by nobody."""
    zeros = bytes(1 << 20)
    for at in range(begin, end, len(zeros)):
        os.pwrite(file, zeros, at)
