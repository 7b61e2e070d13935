"""Run a real grid on loopback for a measurement, and take all of it down after it.

    with bench_grid(workers=2) as grid:      # a coordinator, which is also the putter, and workers
        …

The processes die with this one, however it ends; the folder goes at the end of the block, on
Ctrl-C and on SIGTERM, too.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.grid_processes import Grid, open_grid


@contextlib.contextmanager
def bench_grid(workers: int) -> Iterator[Grid]:
    """A grid on loopback, gone without a trace at the end."""
    with scratch_folder() as folder, open_grid(folder, workers) as grid:
        yield grid


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that goes with the block, on SIGTERM as on Ctrl-C."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="p2pgrid-bench-"))
    try:
        yield folder
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C does not stop this
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, before)


def together(works: Sequence[Callable[[], Any]], patience: float) -> list[Any]:
    """What all of `works` give, each in a thread; the first error where there is one.

    The threads die with this process: whoever is interrupted need not wait for them.
    """
    news: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()

    def run(place: int) -> None:
        try:
            news.put((place, works[place](), None))
        except BaseException as wrong:
            news.put((place, None, wrong))

    for place in range(len(works)):
        threading.Thread(target=run, args=(place,), daemon=True).start()
    results: list[Any] = [None] * len(works)
    limit = time.monotonic() + patience
    for _ in works:
        try:
            place, result, wrong = news.get(timeout=max(0.1, limit - time.monotonic()))
        except queue.Empty:
            raise TimeoutError(f"not done within {patience:.0f} s") from None
        if wrong is not None:
            raise wrong
        results[place] = result
    return results


def report(line: str) -> None:
    """Something for the person who watches."""
    print(line, file=sys.stderr, flush=True)
