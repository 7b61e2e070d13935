"""Keep memory warm, so that systems are measured and not the hypervisor.

A virtual machine hands large blocks of memory that lie free for seconds back to its host, and who
touches them next waits for the host: 0.4 to 3 CPU seconds per GiB, counted as those of the system that
just wrote a file there.  So the lab touches as much memory as its hosts will take, and gives it up but for
one page in `BLOCK`: no large block is free any more, and the kernel takes small ones first.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path

BLOCK = 1 << 20
"""Bytes in which one page is kept; blocks of 2 MiB and more are handed back."""
LEFT = 2 << 30
"""Bytes of this machine's memory that are not for the lab."""


@contextlib.contextmanager
def warm(folder: Path, size: int) -> Iterator[None]:
    """Have `size` bytes warm, as far as there are; `folder` is of memory's file system, in pages of 4 KiB."""
    size = max(BLOCK, min(size, _free() - LEFT) // BLOCK * BLOCK)
    path, zeros = folder / "warm", bytes(BLOCK)
    with path.open("w+b") as file:
        path.unlink()
        for _ in range(0, size, BLOCK):
            file.write(zeros)
        file.flush()
        with mmap.mmap(file.fileno(), size) as pages:
            for at in range(0, size, BLOCK):
                pages.madvise(mmap.MADV_REMOVE, at, BLOCK - mmap.PAGESIZE)
        yield


def _free() -> int:
    """Bytes of memory that nothing uses."""
    shown = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(shown["MemFree"].split()[0]) << 10
