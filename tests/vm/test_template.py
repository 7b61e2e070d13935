"""Does the tiny template keep the guest's contract under a plain QEMU, whatever it is given?"""

import io
import os
import shutil
import subprocess
from pathlib import Path

import attrs
import pytest
from pycdlib import PyCdlib

from p2pgrid.errors import Misconfigured, Misused
from p2pgrid.vm.distribution import find_program, need
from p2pgrid.vm.template import build_template
from tests.tiny_disk import tiny_disk

QEMU = shutil.which("qemu-system-x86_64")
pytestmark = pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed")

BUSES = {
    "virtio": "virtio-blk-pci,drive={0},serial=p2p{0}",
    "ide": "ide-hd,drive={0},serial=p2p{0},bus=ide.{1},unit={2}",
}
PLACES = {"boot": (0, 0), "ctx": (0, 1), "scr": (1, 1)}


@attrs.frozen
class Ran:
    console: str
    status: str
    scratch: Path

    def result(self, name: str) -> str:
        return debugfs(self.scratch, f"cat /{name}")


def debugfs(disk: Path, command: str) -> str:
    words = [find_program("debugfs") or "debugfs", "-R", command, str(disk)]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def context(path: Path, files: dict[str, bytes], mode: int) -> None:
    iso = PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident="CONTEXT")
    for number, (name, data) in enumerate(files.items()):
        names = {"rr_name": name, "joliet_path": f"/{name}", "file_mode": 0o100000 | mode}
        iso.add_fp(io.BytesIO(data), len(data), f"/F{number}.;1", **names)
    iso.write(str(path))
    iso.close()


def boot(
    folder: Path,
    files: dict[str, bytes] | None,
    *,
    disk: Path | None = None,
    memory: int = 96,
    bus: str = "virtio",
    mode: int = 0o555,
) -> Ran:
    """Boot the tiny disk with `files` on its context disk and an empty scratch disk, until it is off."""
    disks = {"boot": disk or tiny_disk()}
    if files is not None:
        disks |= {"ctx": folder / "ctx.iso", "scr": folder / "scr.raw"}
        context(disks["ctx"], files, mode)
        with disks["scr"].open("wb") as scratch:
            scratch.truncate(64 << 20)
        mke2fs = [find_program("mke2fs") or "mke2fs", "-q", "-F", "-t", "ext4", "-L", "SCRATCH"]
        subprocess.run([*mke2fs, "-O", "^has_journal", str(disks["scr"])], check=True)
    words = [
        QEMU,
        "-no-user-config",
        "-nodefaults",
        "-accel",
        "tcg",
        "-machine",
        "pc",
        "-cpu",
        "max",
        "-m",
        "128",
    ]
    words += ["-display", "none", "-vga", "none", "-no-reboot"]
    for name in ("console", "status"):
        words += ["-chardev", f"file,id={name},path={folder / name}", "-device", f"isa-serial,chardev={name}"]
    for name, path in disks.items():
        form, snapshot = ("vdi", "on") if name == "boot" else ("raw", "on" if name == "ctx" else "off")
        words += ["-drive", f"if=none,id={name},format={form},snapshot={snapshot},file={path}"]
        words += ["-device", BUSES[bus].format(name, *PLACES[name])]
    subprocess.run(words, check=True, timeout=200, stdin=subprocess.DEVNULL)
    console = (folder / "console").read_text(errors="replace")
    return Ran(console, (folder / "status").read_text(), folder / "scr.raw")


JOB = b"""#!/bin/sh
echo "task $P2PGRID_INDEX on $(uname -s)"
echo "to stderr" >&2
cat /mnt/xwcontext/input.txt > copy.txt
echo "$P2PGRID_JOB in $(pwd)" > facts.txt
sleep 1000 > held.txt &
exit 7
"""


def test_a_job_runs_to_its_end(tmp_path: Path):
    env = b"P2PGRID_JOB='a job'\nP2PGRID_INDEX=3\n"
    ran = boot(tmp_path, {"context.sh": JOB, "p2pgrid.env": env, "input.txt": b"the input\n"})
    assert ran.status == "exit 7\n", ran.console
    assert "task 3 on Linux\n" in ran.console
    assert "to stderr\n" in ran.console
    assert ran.result("copy.txt") == "the input\n"
    assert ran.result("facts.txt") == "a job in /scratch\n"
    assert "Filesystem state:         clean" in debugfs(ran.scratch, "show_super_stats -h")


def test_disks_on_ide_and_a_script_that_is_not_executable(tmp_path: Path):
    ran = boot(tmp_path, {"context.sh": b"id -u > uid.txt\nkill -9 $$\n"}, bus="ide", mode=0o444)
    assert ran.status == "exit 137\n", ran.console
    assert ran.result("uid.txt") == "0\n"


def test_without_a_script_the_status_says_so(tmp_path: Path):
    ran = boot(tmp_path, {"readme": b"nothing to run"})
    assert ran.status == "exit 127\n", ran.console
    assert "no context.sh" in ran.console


def test_without_a_context_disk_it_powers_off(tmp_path: Path):
    ran = boot(tmp_path, None)
    assert ran.status == ""
    assert "no context disk" in ran.console


@pytest.mark.skipif("P2PGRID_SLOW" not in os.environ, reason="two minutes of work: set P2PGRID_SLOW=1")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can build a debian disk")
def test_a_debian_keeps_the_contract_too(tmp_path: Path):
    disk = build_template("debian", tmp_path / "debian.vdi")
    script = b"#!/usr/bin/python3\nopen('seven', 'w').write(str(3 + 4))\nraise SystemExit(7)\n"
    ran = boot(tmp_path, {"context.sh": script}, disk=disk, memory=512)
    assert ran.status == "exit 7\n", ran.console
    assert ran.result("seven") == "7"


def test_a_refused_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(Misused):
        build_template("tiny", tmp_path / "t.vdi", packages=["gcc"])
    monkeypatch.setattr("p2pgrid.vm.distribution.depends", lambda name: [])
    with pytest.raises(Misconfigured, match="apt-get update"):
        build_template("tiny", tmp_path / "t.vdi")
    assert list(tmp_path.iterdir()) == []


def test_missing_programs_come_with_the_line_to_type():
    with pytest.raises(Misconfigured, match="type: sudo apt-get install dpkg thing"):
        need(("sh", "dash"), ("no-such-program", "thing"), ("nor-this", "dpkg"))
