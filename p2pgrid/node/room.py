"""Decide what still fits on a volunteer's disk, and what a job may ask of it.

Pure.  A virtual machine is counted with all that it may come to write, from the moment its
lease is taken: what is free now says nothing of that.  `MIN_FREE` bytes stay free whatever happens.

    free on the file system = MIN_FREE + what running guests may yet write + offered
"""

from __future__ import annotations

from p2pgrid.dht.store import MIN_FREE
from p2pgrid.errors import NoSpace, Refused
from p2pgrid.vm.console import KEPT
from p2pgrid.vm.results import Caps

INPUTS_MAX = 4 << 30
"""Bytes of a job's inputs, holes included: these cost nothing on the way, but do on the context disk."""
RESULT_MAX = Caps().bytes + 2 * KEPT
"""Bytes of a result tree: what a guest may leave, and its console."""


def reservation(scratch: int, base: int, overlay: int) -> int:
    """Bytes that a guest may come to write: its scratch disk, and the changes to its boot disk.

    `base` is the size of that disk; `overlay` is where the hypervisor ends the changes.
    """
    return scratch + min(base, max(overlay, scratch))


def offered(free: int, reserved: int) -> int:
    """Bytes that a worker can still promise, where `reserved` are promised already."""
    return max(0, free - MIN_FREE - reserved)


def store_room(quota: int | None, used: int, free: int) -> int:
    """Bytes that the store still takes of data that are not here yet."""
    left = offered(free, 0)
    return left if quota is None else max(0, min(left, quota - used))


def check_inputs(size: int) -> None:
    """Raise `Refused` for inputs that no worker takes."""
    if size > INPUTS_MAX:
        raise Refused(why=f"inputs of {size} bytes; {INPUTS_MAX} is the most")


def check_fits(inputs: int, guest: int, free: int, reserved: int, where: str) -> None:
    """Raise `NoSpace` unless a guest that may write `guest` bytes fits beside the `reserved` ones.

    Its inputs are written twice: as files, and on the context disk.
    """
    wanted, left = guest + 2 * inputs, offered(free, reserved)
    if wanted > left:
        raise NoSpace(wanted=wanted, free=left, where=where)
