"""Run a machine with QEMU, which is given nothing by name: only descriptors, in a jail.

    base      our NBD server at the other end of a socket pair, read only
    overlay   an empty qcow2 that we write; its backing is named on the command line, never in a file
    context, scratch   raw files, opened by us
    COM1, COM2, the BIOS's own log, QMP     socket pairs

No image that somebody else made is ever opened by QEMU, and no format is ever guessed: each
`-blockdev` names its drivers.  There is no network card, or one whose frames come to us (`GuestSpec.lan`).
QEMU's seccomp filter forbids it to start programs or to gain rights; `jail.py` has taken what else it could.
"""

from __future__ import annotations

import json
import math
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

from p2pgrid.errors import BadFrame, Unreachable
from p2pgrid.vm import jail, nbd
from p2pgrid.vm.blockdev import BlockSource
from p2pgrid.vm.child import Child, Limits, jailed, remember, running
from p2pgrid.vm.guest import OVERLAY_FILE, Disks, GuestSpec, Why
from p2pgrid.vm.probe import Accelerator, find_accelerator, find_qemu
from p2pgrid.vm.qmp import Event, Monitor, open_monitor

MIB = 1 << 20
BASE_MIN = MIB
"""Bytes; SeaBIOS boots no disk shorter than a cylinder (504 KiB), so a shorter one is filled up."""
MEMORY_BESIDE = 4 << 30
"""Bytes of address space beside the guest's memory: translated code, stacks, libraries."""
FIRMWARE_MAX = 16 * 1024
"""Bytes of the BIOS's log looked at."""
CLUSTER = 64 * 1024
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def overlay_header(size: int) -> bytes:
    """An empty qcow2 (version 3) of `size` bytes of guest space, without backing file: header and tables.

    Clusters: header, refcount table, refcount block, L1 table.  Source: QEMU docs/interop/qcow2.txt.
    """
    entries = math.ceil(size / (CLUSTER * (CLUSTER // 8)))
    tables = max(1, math.ceil(entries * 8 / CLUSTER))
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII8x",
        b"QFI\xfb", 3, 0, 0, 16, size, 0, entries, 3 * CLUSTER, CLUSTER, 1, 0, 0, 0, 0, 0, 4, 112,
    )  # fmt: skip
    refcounts = struct.pack(">H", 1) * (3 + tables)
    parts = (header, struct.pack(">Q", 2 * CLUSTER), refcounts, bytes(tables * CLUSTER))
    return b"".join(part.ljust(CLUSTER, b"\0") for part in parts)


@attrs.frozen
class Wires:
    """The descriptors handed to QEMU."""

    overlay: int
    context: int
    scratch: int
    base: int
    monitor: int
    console: int
    status: int
    firmware: int


def command(program: str, accelerator: Accelerator, spec: GuestSpec, wires: Wires) -> list[str]:
    """QEMU's whole command line."""
    words = [
        program, "-no-user-config", "-nodefaults", "-name", "p2pgrid",
        "-machine", "pc,usb=off,vmport=off,dump-guest-core=off,hpet=off", *accelerator.arguments(),
        "-smp", str(spec.cpus), "-m", f"{max(1, spec.memory // MIB)}M",
        "-display", "none", "-vga", "none", "-nic", "none", "-no-reboot", "-boot", "order=c,strict=on",
        "-sandbox", SANDBOX, "-msg", "timestamp=off",
        "-object", "rng-random,id=entropy,filename=/dev/urandom",
        "-device", "virtio-rng-pci,rng=entropy,max-bytes=65536,period=1000",
        "-chardev", f"socket,id=monitor,fd={wires.monitor}", "-mon", "chardev=monitor,mode=control",
        "-chardev", f"socket,id=console,fd={wires.console}", "-device", "isa-serial,chardev=console,index=0",
        "-chardev", f"socket,id=status,fd={wires.status}", "-device", "isa-serial,chardev=status,index=1",
        "-chardev", f"socket,id=firmware,fd={wires.firmware}",
        "-device", "isa-debugcon,iobase=0x402,chardev=firmware",
    ]  # fmt: skip
    if spec.lan is not None:
        words += [
            "-netdev", f"stream,id=lan,server=off,addr.type=fd,addr.str={spec.lan.socket.fileno()}",
            "-device", f"virtio-net-pci,netdev=lan,mac={spec.lan.mac},host_mtu={spec.lan.mtu},romfile=",
        ]  # fmt: skip
    base = {"driver": "raw", "read-only": True, "file": {
        "driver": "nbd", "read-only": True, "server": {"type": "fd", "str": str(wires.base)}}}  # fmt: skip
    slave = spec.bus == "ide"  # IDE disks cannot be read only; the context disk is this guest's own copy
    nodes: tuple[tuple[str, int, bool, dict[str, Any]], ...] = (
        ("boot", wires.overlay, False, {"driver": "qcow2", "backing": base}),
        ("context", wires.context, not slave, {"driver": "raw"}),
        ("scratch", wires.scratch, False, {"driver": "raw"}),
    )
    places = {"boot": "bus=ide.0,unit=0", "context": "bus=ide.0,unit=1", "scratch": "bus=ide.1,unit=1"}
    serials = {"boot": "p2pboot", "context": "p2pctx", "scratch": "p2pscr"}
    for order, (name, fd, read_only, node) in enumerate(nodes, 1):
        # The guest's flushes need not reach the platter: after a power cut there is no guest.
        node |= {"node-name": name, "read-only": read_only, "cache": {"no-flush": True}, "discard": "unmap"}
        node["file"] = {"driver": "file", "filename": f"/dev/fdset/{order}", "read-only": read_only,
                        "discard": "unmap", "locking": "off"}  # fmt: skip
        kind = f"ide-hd,{places[name]}" if spec.bus == "ide" else "virtio-blk-pci"
        words += [
            "-add-fd", f"fd={fd},set={order}", "-blockdev", json.dumps(node),
            "-device", f"{kind},drive={name},serial={serials[name]},bootindex={order},werror=report",
        ]  # fmt: skip
    return words


@attrs.frozen
class Qemu:
    """The hypervisor: QEMU with what `probe.py` found to work.

    `cache` is a folder where that is remembered; `uid` is who QEMU becomes when we are root;
    `patience` is how many seconds a read of the base may take before the guest is paused.
    """

    cache: Path
    uid: int = jail.NOBODY
    patience: float = nbd.PATIENCE

    @asynccontextmanager
    async def boot(self, spec: GuestSpec, base: BlockSource, disks: Disks) -> AsyncIterator[Machine]:
        """A running machine; gone when left.  Raises `Misconfigured`."""
        accelerator = await find_accelerator(self.cache, self.uid)
        overlay = disks.folder / OVERLAY_FILE
        overlay.write_bytes(overlay_header(max(nbd.whole_sectors(base.size), BASE_MIN)))
        limits = Limits(
            disk=max(spec.scratch, spec.overlay), memory=spec.memory + MEMORY_BESIDE, uid=self.uid
        )
        log = disks.folder / "qemu.log"
        with ExitStack() as theirs, ExitStack() as ours:
            streams = {
                name: _pair(ours, theirs) for name in ("base", "monitor", "console", "status", "firmware")
            }
            wires = Wires(
                overlay=_open(theirs, overlay, os.O_RDWR),
                context=_open(theirs, disks.context, os.O_RDWR if spec.bus == "ide" else os.O_RDONLY),
                scratch=_open(theirs, disks.scratch, os.O_RDWR),
                **{name: far for name, (_, far) in streams.items()},
            )
            near = {name: stream for name, (stream, _) in streams.items()}
            argv = jailed(limits, command(find_qemu(), accelerator, spec, wires))
            async with trio.open_nursery() as nursery:
                with log.open("wb") as said:
                    cables = () if spec.lan is None else (spec.lan.socket.fileno(),)
                    process = running(argv, fds=(*attrs.astuple(wires), *cables), stderr=said)
                    async with process as child:
                        remember(disks.folder, child)
                        theirs.close()
                        ours.pop_all()  # each stream is closed by the task that reads it
                        machine = Machine(near["console"], near["status"], child, log)
                        nursery.start_soon(nbd.serve, near["base"], base, machine.stalled, self.patience)
                        nursery.start_soon(machine.follow, near["monitor"])
                        nursery.start_soon(machine.read_firmware, near["firmware"])
                        nursery.start_soon(machine.watch)
                        yield machine
                nursery.cancel_scope.cancel()


def _pair(ours: ExitStack, theirs: ExitStack) -> tuple[trio.SocketStream, int]:
    near, far = socket.socketpair()
    ours.enter_context(near)
    theirs.enter_context(far)
    near.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(near)), far.fileno()


def _open(theirs: ExitStack, path: Path, flags: int) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    theirs.callback(os.close, fd)
    return fd


@attrs.define(eq=False)
class Machine:
    """A QEMU that runs: the `Guest` of this hypervisor."""

    console: trio.SocketStream
    status: trio.SocketStream
    _child: Child
    _log: Path
    _why: Why = "killed"
    _note: str = ""
    _ended: trio.Event = attrs.field(factory=trio.Event)
    _monitor_ended: trio.Event = attrs.field(factory=trio.Event)
    _ready: bool = False
    _off: bool = False
    _stalled: bool = False
    _changed: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)

    async def wait(self) -> tuple[Why, str]:
        """How the guest ended by itself, and a sentence if that was not by powering off."""
        await self._ended.wait()
        return self._why, self._note

    def stalled(self, stalled: bool) -> None:
        """Pause the guest while the base disk has nothing to give."""
        self._stalled = stalled
        self._changed.unpark_all()

    # --- the tasks of `Qemu.boot` ---

    async def watch(self) -> None:
        """Wait until QEMU ends; what it said before on its monitor tells why."""
        code = await self._child.wait()
        await self._monitor_ended.wait()
        said = self._log.read_text(errors="replace").strip()[-300:]
        if self._off:
            self._end("off", "")
        elif self._ready:
            self._end("killed", f"QEMU ended with code {code}: {said or 'it said nothing'}")
        else:
            self._end("boot", f"QEMU did not start (code {code}): {said or 'it said nothing'}")

    async def follow(self, stream: trio.abc.Stream) -> None:
        """Learn from QEMU's monitor that the guest is off; pause and resume it."""
        try:
            async with open_monitor(stream) as monitor, trio.open_nursery() as nursery:
                self._ready = True
                nursery.start_soon(self._pace, monitor)
                async for message in monitor:
                    if isinstance(message, Event) and message.name == "SHUTDOWN":
                        self._off = bool(message.data.get("guest"))
                nursery.cancel_scope.cancel()
        except* (Unreachable, BadFrame):
            pass  # it died, or was taken over: `watch` sees its end, the caller its time limit
        finally:
            self._monitor_ended.set()

    async def _pace(self, monitor: Monitor) -> None:
        paused = False
        while True:
            if paused == self._stalled:
                await self._changed.park()
            else:
                paused = self._stalled
                await monitor.tell("stop" if paused else "cont")

    async def read_firmware(self, stream: trio.abc.ReceiveStream) -> None:
        """Learn from the BIOS that there is nothing to boot, which it would wait for without end."""
        log = b""
        async with stream:
            try:
                async for data in stream:
                    log = (log + bytes(data))[-FIRMWARE_MAX:]
                    if b"No bootable device." in log:
                        self._end("boot", "the BIOS found nothing to boot on the disk")
                        log = b""
            except trio.BrokenResourceError:
                return

    def _end(self, why: Why, note: str) -> None:
        if not self._ended.is_set():
            self._why, self._note = why, note
            self._ended.set()
