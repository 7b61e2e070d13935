"""A real guest of 512 bytes boots, copies its context to the scratch disk, and is cleaned up after."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import trio

from p2pgrid.errors import Misconfigured, Misused, NotFound
from p2pgrid.vm import qemu as qemu_module
from p2pgrid.vm.blockdev import FileSource
from p2pgrid.vm.child import reap
from p2pgrid.vm.guest import Cable, GuestEnd, GuestSpec, run_guest
from p2pgrid.vm.probe import SECTOR, Accelerator, find_accelerator
from p2pgrid.vm.qemu import Qemu, Wires, command, overlay_header
from p2pgrid.vm.qmp import Event
from p2pgrid.vm.results import Caps
from tests.vm.bios.disk import FLOODS, MARKER, NEVER_ENDS, READS_FAR, bios_disk

pytestmark = pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed")

CONTEXT = {"context.sh": b"#!/bin/sh\necho hello\n", "in/data.bin": bytes(range(256)) * 500, "in/empty": b""}
ENV = {"P2PGRID_JOB": "j1", "P2PGRID_INDEX": "2"}
SPEC = GuestSpec(memory=64 << 20, time=60, env=ENV)


@attrs.frozen
class Memory:
    """A disk in memory."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    async def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


@pytest.fixture(scope="session")
def hypervisor(tmp_path_factory):
    return Qemu(tmp_path_factory.mktemp("cache"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def qemus(folder: Path) -> list[int]:
    """Processes that hold a file below `folder` open."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            files = [os.readlink(fd) for fd in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(file.startswith(str(folder)) for file in files):
            found.append(int(process.name))
    return found


async def until(holds: Callable[[], bool], patience: float = 60) -> None:
    """Wait for something that another process does and that nobody tells us of."""
    with trio.fail_after(patience):
        while not holds():  # noqa: ASYNC110
            await trio.sleep(0.02)


def said_marker(room: Path) -> bool:
    console = room / "console"
    return console.exists() and MARKER in console.read_bytes()


def assert_came_home(end: GuestEnd, exit_status: int = 0) -> None:
    assert (end.exit, end.why, end.note) == (exit_status, "off", "")
    assert contents(end.results) == {**CONTEXT, "p2pgrid.env": b"P2PGRID_JOB=j1\nP2PGRID_INDEX=2\n"}


@pytest.mark.parametrize("bus", ["virtio", "ide"])
async def test_the_context_disk_comes_home(hypervisor, tmp_path, bus):
    room = tmp_path / "room"
    end = await run_guest(hypervisor, Memory(bios_disk()), attrs.evolve(SPEC, bus=bus), CONTEXT, room)
    assert_came_home(end)
    assert end.console.read_bytes() == MARKER
    assert sorted(p.name for p in room.iterdir()) == ["console", "results"]
    assert not qemus(tmp_path)


async def test_the_exit_status_comes_home(hypervisor, tmp_path):
    end = await run_guest(hypervisor, Memory(bios_disk(exit_status=7)), SPEC, CONTEXT, tmp_path / "room")
    assert_came_home(end, 7)


async def test_inputs_may_be_files(hypervisor, tmp_path):
    big = tmp_path / "big"
    big.write_bytes(os.urandom(3 << 20))
    end = await run_guest(hypervisor, Memory(bios_disk()), SPEC, {"deep/er/big": big}, tmp_path / "room")
    assert contents(end.results)["deep/er/big"] == big.read_bytes()


async def test_the_base_disk_is_read_through_us_and_stays_as_it_was(hypervisor, tmp_path):
    image = tmp_path / "disk.raw"
    disk = bios_disk(READS_FAR, far=4999, more=bytes(4998 * 512) + b"from far away\0".ljust(512, b"\0"))
    image.write_bytes(disk)
    with FileSource(image) as base:
        end = await run_guest(hypervisor, base, SPEC, CONTEXT, tmp_path / "room")
    assert end.console.read_bytes() == MARKER + b"from far away"
    assert image.read_bytes() == disk


async def test_the_time_limit_ends_it(hypervisor, tmp_path):
    spec = attrs.evolve(SPEC, time=1.0)
    end = await run_guest(hypervisor, Memory(bios_disk(NEVER_ENDS)), spec, CONTEXT, tmp_path / "room")
    assert (end.exit, end.why, contents(end.results)) == (None, "time", {})
    assert "time limit of 1 s" in end.note
    assert not qemus(tmp_path)


async def test_a_talkative_guest_fills_no_disk(hypervisor, tmp_path):
    spec = attrs.evolve(SPEC, console=100_000)
    end = await run_guest(hypervisor, Memory(bios_disk(FLOODS)), spec, CONTEXT, tmp_path / "room")
    assert_came_home(end)
    console = end.console.read_bytes()
    assert console.startswith(MARKER)
    assert b"bytes left out]" in console
    assert 100_000 < len(console) < 100_100


async def test_a_disk_that_does_not_boot_says_so_at_once(hypervisor, tmp_path):
    end = await run_guest(hypervisor, Memory(bytes(4 << 20)), SPEC, CONTEXT, tmp_path / "room")
    assert (end.exit, end.why, end.note) == (None, "boot", "the BIOS found nothing to boot on the disk")
    assert end.seconds < 30


async def test_a_disk_with_a_hole_in_it_does_not_boot_either(hypervisor, tmp_path):
    class Lost(Memory):
        async def read(self, offset: int, length: int) -> bytes:
            raise NotFound(what="the chunk")

    end = await run_guest(hypervisor, Lost(bytes(1 << 20)), SPEC, CONTEXT, tmp_path / "room")
    assert end.why == "boot"


async def test_the_guest_is_paused_while_a_chunk_is_on_its_way(hypervisor, tmp_path, monkeypatch):
    told: list[str] = []
    arrived = trio.Event()

    class Slow(Memory):
        async def read(self, offset: int, length: int) -> bytes:
            if offset + length > 2 << 20:
                await arrived.wait()
            return await super().read(offset, length)

    def overhear(name: str, data: dict[str, object]) -> Event:
        told.append(name)
        if name == "STOP":
            arrived.set()  # the chunk comes when the guest has been paused, and not before
        return Event(name, data)

    monkeypatch.setattr("p2pgrid.vm.qmp.Event", overhear)
    far = (2 << 20) // 512 + 7
    disk = bios_disk(READS_FAR, far=far, more=bytes((far - 1) * 512) + b"late\0".ljust(512, b"\0"))
    with trio.fail_after(60):
        impatient = attrs.evolve(hypervisor, patience=0.2)
        end = await run_guest(impatient, Slow(disk), SPEC, CONTEXT, tmp_path / "room")
    assert_came_home(end)
    assert end.console.read_bytes() == MARKER + b"late"
    assert [name for name in told if name in ("STOP", "RESUME")] == ["STOP", "RESUME"]


async def test_cancelling_leaves_nothing(hypervisor, tmp_path):
    room = tmp_path / "room"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_guest, hypervisor, Memory(bios_disk(NEVER_ENDS)), SPEC, CONTEXT, room)
        await until(lambda: said_marker(room))
        assert qemus(tmp_path)
        nursery.cancel_scope.cancel()
    assert not room.exists()
    assert not qemus(tmp_path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../b", "a//b", "", "p2pgrid.env"])
async def test_unsafe_names_of_inputs_are_refused(hypervisor, tmp_path, name):
    with pytest.raises(Misused):
        await run_guest(hypervisor, Memory(bios_disk()), SPEC, {name: b"x"}, tmp_path / "room")
    assert not (tmp_path / "room").exists()


async def test_results_beyond_the_caps_are_refused_and_the_console_kept(hypervisor, tmp_path):
    spec = attrs.evolve(SPEC, results=Caps(files=2))
    end = await run_guest(hypervisor, Memory(bios_disk()), spec, CONTEXT, tmp_path / "room")
    assert (end.exit, end.why, contents(end.results)) == (0, "off", {})
    assert "more than 2 files" in end.note
    assert end.console.read_bytes() == MARKER


async def test_a_disk_quota_is_an_error_to_the_guest(hypervisor, tmp_path):
    spec = attrs.evolve(SPEC, scratch=1 << 20, overlay=1 << 20)
    big = {"big": bytes(3 << 20)}
    end = await run_guest(hypervisor, Memory(bios_disk()), spec, big, tmp_path / "room")
    assert (end.exit, end.why) == (None, "off")
    assert b"disk error" in end.console.read_bytes()


# --- what is left after kill -9 ---------------------------------------------------------

OWNER = """
import sys, trio
from pathlib import Path
from p2pgrid.vm.guest import GuestSpec, run_guest
from p2pgrid.vm.qemu import Qemu
from tests.vm.bios.disk import NEVER_ENDS, bios_disk
from tests.vm.test_guest_qemu import CONTEXT, SPEC, Memory

async def main():
    # The worker threads that trio starts die when idle; the guest must not die with them.
    await run_guest(Qemu(Path(sys.argv[1])), Memory(bios_disk(NEVER_ENDS)), SPEC, CONTEXT, Path(sys.argv[2]))

trio.run(main)
"""


def owner(hypervisor: Qemu, room: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", OWNER, str(hypervisor.cache), str(room)], cwd=Path(__file__).parents[2]
    )


async def test_kill_9_of_the_owner_leaves_no_machine(hypervisor, tmp_path):
    rooms = tmp_path / "rooms"
    process = owner(hypervisor, rooms / "a")
    try:
        await until(lambda: said_marker(rooms / "a"))
        assert qemus(rooms)
        process.send_signal(signal.SIGKILL)
        await until(lambda: not qemus(rooms), patience=2)
    finally:
        process.kill()
        process.wait()
    assert reap(rooms) == 0
    assert list(rooms.iterdir()) == []


def test_the_reaper_kills_what_the_kernel_did_not(tmp_path):
    room = tmp_path / "a" / "machine"
    room.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as orphan:
        ticks = Path(f"/proc/{orphan.pid}/stat").read_text().rpartition(")")[2].split()[19]
        (room / "pid").write_text(f"{orphan.pid} {ticks}\n")
        assert reap(tmp_path) == 1
        assert orphan.wait() == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("note", ["{pid} 1\n", "rubbish", "", "99999999 1", "{pid}"])
def test_the_reaper_spares_whom_it_does_not_know(tmp_path, note):
    room = tmp_path / "a" / "machine"
    room.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as other:
        (room / "pid").write_text(note.format(pid=other.pid))
        assert reap(tmp_path) == 0
        assert other.poll() is None
        other.kill()


# --- the jail and the command line ---------------------------------------------------------


def look_at(pid: int) -> tuple[str, str, str, int]:
    """Its status, its limits, its network, its niceness."""
    process = Path(f"/proc/{pid}")
    network = os.readlink(process / "ns/net")
    nice = os.getpriority(os.PRIO_PROCESS, pid)
    return (process / "status").read_text(), (process / "limits").read_text(), network, nice


async def test_qemu_has_no_rights(hypervisor, tmp_path):
    room = tmp_path / "room"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_guest, hypervisor, Memory(bios_disk(NEVER_ENDS)), SPEC, CONTEXT, room)
        await until(lambda: said_marker(room))
        (pid,) = qemus(room)
        status, limits, network, nice = look_at(pid)
        nursery.cancel_scope.cancel()
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(facts["CapEff"], 16) == 0
    assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")
    assert nice == 19
    assert "0" in next(line for line in limits.splitlines() if line.startswith("Max core")).split()
    if os.geteuid() == 0:
        assert set(facts["Uid"].split()) == {"65534"}
        assert network != os.readlink("/proc/self/ns/net"), "it has a network of its own, and nothing in it"


def test_the_jail_is_light():
    jail = Path(qemu_module.__file__).with_name("jail.py")
    show = f"import sys; sys.path.insert(0, {str(jail.parent)!r}); import jail; print(len(sys.modules))"
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", show], capture_output=True, check=True)
    assert int(loaded.stdout) < 80, "it runs before every machine"


async def test_the_probe_is_asked_once(hypervisor, monkeypatch):
    first = await find_accelerator(hypervisor.cache, hypervisor.uid)
    assert first.name in ("kvm", "tcg")
    monkeypatch.setattr("p2pgrid.vm.probe._probe", None)
    assert await find_accelerator(hypervisor.cache, hypervisor.uid) == first


async def test_a_kvm_that_hangs_is_found_out(tmp_path, monkeypatch):
    """A stand-in QEMU that hangs with KVM and runs otherwise: what many machines do."""
    fake = tmp_path / "qemu"
    fake.write_text('#!/bin/sh\ncase "$*" in *version*) echo fake;; *kvm*) exec sleep 60;; esac\nexit 99\n')
    fake.chmod(0o755)
    tmp_path.chmod(0o755)
    monkeypatch.setattr("p2pgrid.vm.probe.find_qemu", lambda: str(fake))
    monkeypatch.setattr("p2pgrid.vm.probe.PATIENCE", 0.5)
    found = await find_accelerator(tmp_path / "cache", os.geteuid())
    assert found.name == "tcg"
    assert "no sign of life" in found.why


async def test_without_qemu_it_says_what_to_install(hypervisor, tmp_path, monkeypatch):
    monkeypatch.setattr("p2pgrid.vm.probe.PROGRAM", "no-such-qemu")
    with pytest.raises(Misconfigured, match="apt install qemu-system-x86"):
        await run_guest(hypervisor, Memory(bios_disk()), SPEC, CONTEXT, tmp_path / "room")
    assert not (tmp_path / "room").exists()


def test_the_command_line_names_every_driver_and_no_file():
    wires = Wires(overlay=3, context=4, scratch=5, base=6, monitor=7, console=8, status=9, firmware=10)
    words = command("/usr/bin/qemu", Accelerator("tcg", ""), SPEC, wires)
    line = " ".join(words)
    assert words[words.index("-sandbox") + 1].count("deny") == 4
    assert {"-no-user-config", "-nodefaults", "-no-reboot"} < set(words)
    assert words[words.index("-nic") + 1] == "none"
    for gone in ("-hda", "-drive", "-netdev", "-vnc", "-usb", "tcp:", "if=", "path="):
        assert gone not in line
    nodes = [json.loads(words[i + 1]) for i, word in enumerate(words) if word == "-blockdev"]
    assert [(n["driver"], n["read-only"]) for n in nodes] == [("qcow2", False), ("raw", True), ("raw", False)]
    assert nodes[0]["backing"]["driver"] == "raw"
    assert nodes[0]["backing"]["file"]["driver"] == "nbd"
    assert all(n["file"]["filename"].startswith("/dev/fdset/") for n in nodes)


def test_there_is_a_card_only_where_there_is_a_cable():
    wires = Wires(overlay=3, context=4, scratch=5, base=6, monitor=7, console=8, status=9, firmware=10)
    near, far = socket.socketpair()
    with near, far:
        spec = attrs.evolve(SPEC, lan=Cable(socket=far, mac="02:70:32:00:00:07", mtu=1500))
        words = command("/usr/bin/qemu", Accelerator("tcg", ""), spec, wires)
        (wire,) = [words[i + 1] for i, word in enumerate(words) if word == "-netdev"]
        (card,) = [word for word in words if word.startswith("virtio-net")]
        assert wire == f"stream,id=lan,server=off,addr.type=fd,addr.str={far.fileno()}"
        assert "netdev=lan,mac=02:70:32:00:00:07,host_mtu=1500" in card


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 512, 100 << 30, 1 << 45])
@pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")
def test_the_overlay_is_a_sound_qcow2(tmp_path, size):
    path = tmp_path / "overlay"
    path.write_bytes(overlay_header(size))
    subprocess.run(["qemu-img", "check", "-f", "qcow2", path], check=True, stdout=subprocess.DEVNULL)
    told = subprocess.run(
        ["qemu-img", "info", "-f", "qcow2", "--output=json", path], check=True, capture_output=True
    )
    assert json.loads(told.stdout)["virtual-size"] == size
    assert "backing-filename" not in json.loads(told.stdout)


@pytest.mark.skipif(not (shutil.which("as") and shutil.which("ld")), reason="binutils are not installed")
@pytest.mark.parametrize(
    ("name", "bits", "machine", "sector"),
    [
        ("guest", "--32", "elf_i386", bios_disk()),
        ("probe", "--64", "elf_x86_64", SECTOR.ljust(510, b"\0") + b"\x55\xaa"),
    ],
)
def test_the_sectors_are_what_their_sources_say(tmp_path, name, bits, machine, sector):
    source = Path(__file__).parent / "bios" / f"{name}.S"
    subprocess.run(["as", bits, source, "-o", tmp_path / "o"], check=True)
    link = [
        "ld",
        "-m",
        machine,
        "-Ttext",
        "0x7c00",
        "--oformat",
        "binary",
        tmp_path / "o",
        "-o",
        tmp_path / "b",
    ]
    subprocess.run(link, check=True)
    assert (tmp_path / "b").read_bytes() == sector
