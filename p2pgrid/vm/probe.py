"""Find out what runs machines on this computer: KVM if it *works*, else QEMU's own translator.

A /dev/kvm that opens proves nothing: inside many virtual machines QEMU then aborts, or the guest
hangs.  So a tiny real guest is run, with the processor and in the jail of a real run: a boot
sector that goes to long mode with paging, stores and adds up 8 MiB, and ends QEMU with code 99 through
isa-debug-exit.  Only 99 within five seconds counts.  The sector's source: `tests/vm/bios/probe.S`.
"""

from __future__ import annotations

import os
import subprocess
import zlib
from pathlib import Path

import attrs
import msgspec
import trio

from p2pgrid.errors import Misconfigured
from p2pgrid.vm.child import Limits, jailed, running
from p2pgrid.vm.scratch import find_program

PROGRAM = "qemu-system-x86_64"
PATIENCE = 5.0
"""Seconds; the translator takes 0.1 to 0.4, KVM less."""
WORKS = 99
SECTOR = bytes.fromhex(
    "ea057c0000fa31c08ed88ec08ed0bc007cfce4920c02e692bf00106631c0b9000c66f3ab66c70600100320000066c706"
    "00200330000066c70600308300000066c70608308300200066b8001000000f22d80f20e06683c8200f22e066b9800000"
    "c00f32660d000100000f300f20c0660d010000800f22c00f0116e87cea817c080066b810008ed88ec08ed0bd04000000"
    "bf00002000b9000004004889e8f348abbe00002000b90000040031db48ad4801c3ffc975f74889e848c1e0124839c375"
    "08ffcd75cbb031eb02b001e6f4f4ebfb000000000000000000000000009a200000000000009200001700d07c"
)
DISK = 1 << 20
"""Bytes; SeaBIOS boots nothing shorter than a cylinder."""


@attrs.frozen
class Accelerator:
    """What runs the guest's instructions."""

    name: str
    """`kvm` or `tcg`."""
    why: str
    """One sentence for `p2pnode doctor`."""

    def arguments(self) -> list[str]:
        """QEMU's -accel and -cpu; under KVM guests get no virtualisation of their own."""
        if self.name == "kvm":
            return ["-accel", "kvm", "-cpu", "host,vmx=off,svm=off"]
        # Not svm=off: without it static programs of Debian 12 abort in translated guests (QEMU 7.2).
        return ["-accel", "tcg,thread=multi", "-cpu", "max"]


KVM = Accelerator("kvm", "KVM ran a test guest")


async def find_accelerator(cache: Path, uid: int) -> Accelerator:
    """What works here; asked once per QEMU, kernel, boot and user, then read from the folder `cache`.

    Raises `Misconfigured` when QEMU is not installed or cannot run a guest at all.
    """
    program = find_qemu()
    key = await trio.to_thread.run_sync(_key, program, uid)
    note = cache / "accelerator.json"
    known = _remembered(note, key)
    if known:
        return known
    found = await _probe(program, uid)
    await trio.to_thread.run_sync(_remember, note, key, found)
    return found


def find_qemu() -> str:
    """The path of QEMU.  Raises `Misconfigured`."""
    return find_program(PROGRAM, "qemu-system-x86")


async def _probe(program: str, uid: int) -> Accelerator:
    refused = await _run(program, KVM, uid)
    if not refused:
        return KVM
    slow = Accelerator("tcg", f"KVM does not work ({refused}); guests run translated, several times slower")
    refused = await _run(program, slow, uid)
    if refused:
        raise Misconfigured(why=f"QEMU cannot run a guest: {refused}")
    return slow


async def _run(program: str, accelerator: Accelerator, uid: int) -> str:
    """Run the test guest; why it failed, or nothing if it worked."""
    disk = os.memfd_create("probe", os.MFD_CLOEXEC)
    error = os.memfd_create("probe-stderr", os.MFD_CLOEXEC)
    try:
        os.pwrite(disk, SECTOR.ljust(510, b"\0") + b"\x55\xaa", 0)
        os.ftruncate(disk, DISK)
        command = [
            program, "-no-user-config", "-nodefaults", "-machine", "pc,usb=off,vmport=off,hpet=off",
            *accelerator.arguments(), "-m", "64M", "-display", "none", "-vga", "none", "-no-reboot",
            "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-add-fd", f"fd={disk},set=1",
            "-blockdev", "driver=raw,node-name=disk,file.driver=file,file.filename=/dev/fdset/1",
            "-device", "virtio-blk-pci,drive=disk,bootindex=1",
        ]  # fmt: skip
        limits = Limits(disk=DISK, memory=6 << 30, uid=uid)
        code: int | None = None
        async with running(jailed(limits, command), fds=[disk], stderr=error) as child:
            with trio.move_on_after(PATIENCE):
                code = await child.wait()
        if code == WORKS:
            return ""
        said = os.pread(error, 300, 0).decode(errors="replace").split("\n")[0]
        return said or (f"no sign of life in {PATIENCE:g} s" if code is None else f"QEMU ended with {code}")
    finally:
        os.close(disk)
        os.close(error)


def _key(program: str, uid: int) -> str:
    version = subprocess.run(
        [program, "--version"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        stdin=subprocess.DEVNULL,
    ).stdout.split("\n")[0]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    sector = f"{zlib.crc32(SECTOR):08x}"
    return "|".join((version, os.uname().release, boot, str(os.geteuid()), str(uid), sector))


def _remembered(note: Path, key: str) -> Accelerator | None:
    try:
        told, name, why = msgspec.json.decode(note.read_bytes(), type=tuple[str, str, str])
    except (OSError, msgspec.MsgspecError):
        return None
    return Accelerator(name, why) if told == key and name in ("kvm", "tcg") else None


def _remember(note: Path, key: str, found: Accelerator) -> None:
    note.parent.mkdir(parents=True, exist_ok=True)
    fresh = note.with_suffix(f".{os.getpid()}")
    fresh.write_bytes(msgspec.json.encode((key, found.name, found.why)))
    fresh.replace(note)
