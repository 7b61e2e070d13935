"""Enter network namespaces."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

SPACES = Path("/run/netns")
CLONE_NEWNET = 0x40000000

T = TypeVar("T")


def enter_space(space: str) -> None:
    """Move this thread into a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (SPACES / space).open() as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {space}: {os.strerror(ctypes.get_errno())}")


def inside(space: str, make: Callable[[], T]) -> T:
    """Call `make` in a thread whose namespace is `space`.  What it raises is raised here."""
    made: list[T] = []
    wrong: list[BaseException] = []

    def enter() -> None:
        try:
            enter_space(space)
            made.append(make())
        except BaseException as error:  # handed over as it is
            wrong.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if wrong:
        raise wrong[0]
    return made[0]
