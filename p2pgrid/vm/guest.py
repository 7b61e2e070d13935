"""Tell the story of one guest: disks are made, it boots, runs, ends, and its results are read.

The only thing that `run_guest` leaves behind is `folder/console` and `folder/results`; cancelled, it
leaves nothing.  What guest and node owe each other: `docs/reference/guest.md`.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import attrs
import trio

from p2pgrid.vm.blockdev import BlockSource
from p2pgrid.vm.child import ROOM
from p2pgrid.vm.console import KEPT, Console, ExitStatus
from p2pgrid.vm.context import write_context
from p2pgrid.vm.results import Caps, ResultsRefused, extract
from p2pgrid.vm.scratch import make_scratch

MIB = 1 << 20
GIB = 1 << 30
SCRATCH_FILE, OVERLAY_FILE = "scratch.img", "overlay.qcow2"
"""What a guest writes, below `ROOM`."""

Bus = Literal["virtio", "ide"]
Why = Literal["off", "time", "killed", "boot"]
"""How a guest ended: it powered off; its time was up; the hypervisor died; nothing booted."""


@attrs.frozen(kw_only=True)
class Cable:
    """What a guest's network card is plugged into: frames, each after its length (u32, big endian)."""

    socket: socket.socket
    """The hypervisor's end; whoever made it closes it."""
    mac: str
    mtu: int
    """Bytes of a packet."""


@attrs.frozen(kw_only=True)
class GuestSpec:
    """What a guest gets."""

    memory: int = 512 * MIB
    cpus: int = 1
    time: float = 3600.0
    """Seconds from power on to the end, whatever the guest does."""
    bus: Bus = "virtio"
    scratch: int = 8 * GIB
    """Bytes of the scratch disk; the host stores what is written."""
    overlay: int = 16 * GIB
    """Bytes that the guest may write to its boot disk."""
    console: int = KEPT
    """Bytes of console kept."""
    results: Caps = attrs.field(factory=Caps)
    env: Mapping[str, str] = attrs.field(factory=dict)
    """For `p2pgrid.env`: P2PGRID_JOB, P2PGRID_TASK, P2PGRID_INDEX, …"""
    lan: Cable | None = None
    """Its network card leads there; without it there is none."""


@attrs.frozen(kw_only=True)
class Disks:
    """The files a hypervisor attaches, and a folder for its own."""

    context: Path
    scratch: Path
    folder: Path


@attrs.frozen(kw_only=True)
class GuestEnd:
    """What became of a guest."""

    exit: int | None
    """Exit status of context.sh; None if the guest never told."""
    why: Why
    seconds: float
    console: Path
    results: Path
    """A folder of regular files; empty when `note` says that they could not be read."""
    note: str = ""
    """One sentence for the person when something went wrong; empty otherwise."""


class Guest(Protocol):
    """A machine that is switched on; leaving `boot` switches it off and closes the streams' other ends."""

    @property
    def console(self) -> trio.abc.ReceiveStream: ...

    @property
    def status(self) -> trio.abc.ReceiveStream: ...

    async def wait(self) -> tuple[Why, str]:
        """How it ended by itself, and a sentence if that was not by powering off."""
        ...


class Hypervisor(Protocol):
    """Something that runs machines."""

    def boot(self, spec: GuestSpec, base: BlockSource, disks: Disks) -> AbstractAsyncContextManager[Guest]:
        """A machine with these disks, switched on; gone without trace when left.

        Raises `Misconfigured` when no machine can be run here at all.
        """
        ...


async def run_guest(
    hypervisor: Hypervisor,
    base: BlockSource,
    spec: GuestSpec,
    context: Mapping[str, bytes | Path],
    folder: Path,
) -> GuestEnd:
    """Boot `base` with `context` (context.sh and input files by relative path) and bring home its results.

    Args:
        folder: made here; must not exist.  Holds `console` and `results` on return.

    Raises `Misconfigured`, `Misused` (a path in `context` that is not safe), `NoSpace`.
    """
    await trio.to_thread.run_sync(partial(folder.mkdir, mode=0o700, parents=True))
    try:
        return await _live(hypervisor, base, spec, context, folder)
    except BaseException as error:
        shutil.rmtree(folder)
        sole = _sole(error)
        if sole is error:
            raise
        raise sole from None


def written(folder: Path) -> int:
    """Bytes of the host's disk that the guest in `folder` has taken so far for what it writes."""
    total = 0
    for name in (SCRATCH_FILE, OVERLAY_FILE):
        with contextlib.suppress(OSError):
            total += (folder / ROOM / name).stat().st_blocks * 512
    return total


def _sole(error: BaseException) -> BaseException:
    """What nurseries wrapped, if it is one error only."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


async def _live(
    hypervisor: Hypervisor,
    base: BlockSource,
    spec: GuestSpec,
    context: Mapping[str, bytes | Path],
    folder: Path,
) -> GuestEnd:
    room = folder / ROOM
    room.mkdir(mode=0o700)
    disks = Disks(context=room / "context.iso", scratch=room / SCRATCH_FILE, folder=room)
    await trio.to_thread.run_sync(write_context, disks.context, context, spec.env)
    await make_scratch(disks.scratch, spec.scratch)

    started = trio.current_time()
    status = ExitStatus()
    why: Why = "time"
    note = f"it was stopped at its time limit of {spec.time:g} s"
    with Console(folder / "console", spec.console) as console:
        # The machine is left before the nursery: both drains end with what it had still said.
        async with trio.open_nursery() as nursery, hypervisor.boot(spec, base, disks) as guest:
            nursery.start_soon(_drain, guest.console, console.write)
            nursery.start_soon(_drain, guest.status, status.feed)
            with trio.move_on_after(spec.time):
                why, note = await guest.wait()
    seconds = trio.current_time() - started

    results = folder / "results"
    results.mkdir()
    try:
        if why != "boot":
            await extract(disks.scratch, results, spec.results)
    except ResultsRefused as refused:
        note = f"{note}; {refused}" if note else str(refused)
        shutil.rmtree(results)
        results.mkdir()
    await trio.to_thread.run_sync(shutil.rmtree, room)
    return GuestEnd(
        exit=status.value, why=why, seconds=seconds, console=folder / "console", results=results, note=note
    )


async def _drain(stream: trio.abc.ReceiveStream, take: Callable[[bytes], None]) -> None:
    """Take all that comes, at once, so that the guest never waits for us."""
    async with stream:
        try:
            async for data in stream:
                take(bytes(data))
        except trio.BrokenResourceError:
            return
