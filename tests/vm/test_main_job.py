"""The main job as a person does it: a disk goes in, a guest runs, results come back, nothing is left."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from p2pgrid.node import api, launch
from tests.grid_processes import Said, p2pgrid, p2pnode, processes_of
from tests.vm.bios.disk import MARKER, NEVER_ENDS, bios_disk

MIB = 1 << 20
GUEST_EXIT = 7


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Embedded:
    """A grid that `p2pgrid put` started by itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.raw = folder / "bios.raw"
        self.raw.write_bytes(bios_disk(exit_status=GUEST_EXIT).ljust(MIB, b"\0"))
        self.vdi = folder / "bios.vdi"
        command = ["qemu-img", "convert", "-f", "raw", "-O", "vdi", str(self.raw), str(self.vdi)]
        subprocess.run(command, check=True)
        self.script = folder / "job.sh"
        self.script.write_text("#!/bin/sh\necho hello\n")
        self.input = folder / "greeting.txt"
        self.input.write_text("good morning\n")

    def __call__(self, *words: object) -> Said:
        return p2pgrid(*words, home=self.home)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    grid = Embedded(folder)
    try:
        yield grid
    finally:
        if api.daemon_runs(grid.home):
            launch.stop(grid.home)
        assert processes_of(folder) == []


@pytest.fixture(scope="module")
def first(grid):
    """The first `put`, with nothing running."""
    return grid("put", grid.raw)


@pytest.fixture(scope="module")
def disk(first, grid):
    """The CID of the disk that `first` put."""
    return grid("disk", "show", "bios.raw", "--json").json["disk"]


@pytest.fixture(scope="module")
def job(grid, disk):
    """One job, run in the foreground; its view."""
    said = grid("run", "--script", grid.script, "--in", grid.input, "--ram", "64M", "--json")
    assert said.code == GUEST_EXIT
    return said.json


def test_put_with_nothing_running_starts_a_grid_and_says_so(grid, first):
    assert first.code == 0
    assert "starting an embedded grid" in first.err
    assert "p2pgrid down" in first.err
    assert first.out.startswith("bios.raw  b")
    assert (grid.home / api.SOCKET).is_socket()


def test_a_second_put_uses_the_grid_that_runs(grid, disk):
    again = grid("put", grid.raw, "--json")
    assert again.code == 0
    assert "embedded" not in again.err
    assert again.json["disk"] == disk


def test_the_same_disk_in_another_format_is_the_same_content(grid, disk):
    as_raw, as_vdi = grid("disk", "show", "--json").json, grid("put", grid.vdi, "--json").json
    assert as_vdi["content"] == as_raw["content"]
    assert as_vdi["disk"] != disk
    assert as_vdi["format"] == "vdi"
    grid("disk", "rm", "bios.vdi")


def test_run_ends_as_the_guest_and_brings_its_results(grid, job):
    assert job["state"] == "failed"
    assert [t["exit"] for t in job["tasks"]] == [GUEST_EXIT]
    here = Path(job["results"]) / "0"
    assert (here / "greeting.txt").read_text() == "good morning\n"
    assert (here / "context.sh").read_text() == grid.script.read_text()
    assert f"P2PGRID_JOB={job['job']}" in (here / "p2pgrid.env").read_text()
    assert MARKER in (here / ".p2pgrid" / "console.log").read_bytes()


def test_an_array_is_a_task_for_each_index(grid, disk, tmp_path):
    said = grid(
        "run", disk, "--script", grid.script, "--array", "1,4-5", "-o", tmp_path / "out", "--ram", "64M"
    )
    assert said.code == GUEST_EXIT
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1", "4", "5"]
    for folder in (tmp_path / "out").iterdir():
        assert f"P2PGRID_INDEX={folder.name}" in (folder / "p2pgrid.env").read_text()


def test_jobs_are_listed_shown_and_waited_for(grid, job):
    number = job["job"]
    assert number in [j["job"] for j in grid("job", "ls", "--json").json["jobs"]]
    assert number in grid("job", "ls").out
    shown = grid("job", "show", number, "--json").json
    assert shown["tasks"][0]["node"] == "embedded"
    assert f"job {number}" in grid("job", "show", number).out
    waited = grid("job", "wait", number, "--json")
    assert waited.code == GUEST_EXIT
    assert waited.json["state"] == "failed"
    assert MARKER.decode().strip() in grid("job", "logs", number).out


def test_results_are_written_again_but_never_over_others(grid, job, tmp_path):
    said = grid("job", "results", job["job"], "-o", tmp_path / "out", "--json")
    assert (said.code, said.json["tasks"]) == (0, 1)
    assert (tmp_path / "out" / "0" / "greeting.txt").exists()
    assert grid("job", "results", job["job"], "-o", tmp_path / "out").code == 10


def test_disks_and_nodes_are_listed(grid, disk):
    assert disk in [d["disk"] for d in grid("disk", "ls", "--json").json["disks"]]
    assert "bios.raw" in grid("disk", "ls").out
    shown = grid("disk", "show", disk, "--json").json
    assert (shown["size"], shown["chunk_size"], shown["chunks"], shown["holes"]) == (MIB, MIB // 4, 1, 3)
    assert disk in grid("disk", "show").out
    verified = grid("disk", "verify", "bios.raw", "--json")
    assert (verified.code, verified.json["bad"], verified.json["checked"]) == (0, 0, 1)
    (node,) = grid("node", "ls", "--json").json["nodes"]
    assert (node["name"], node["state"], node["slots"]) == ("embedded", "online", 1)
    assert "embedded" in grid("node", "ls").out
    assert p2pnode("status", "--json", home=grid.home).json["name"] == "embedded"


def test_get_writes_what_was_put_and_other_formats(grid, disk, tmp_path):
    assert grid("get", disk, "-o", tmp_path / "back.raw").code == 0
    assert sha256(tmp_path / "back.raw") == sha256(grid.raw)
    for form in ("vdi", "qcow2", "vmdk"):
        out = tmp_path / f"back.{form}"
        said = grid("get", disk, "-o", out, "--format", form, "--json")
        assert (said.code, said.json["format"]) == (0, form)
        command = ["qemu-img", "compare", "-f", form, "-F", "raw", str(out), str(grid.raw)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def test_cancelled_jobs_end(grid, tmp_path):
    endless = tmp_path / "endless.raw"
    endless.write_bytes(bios_disk(NEVER_ENDS).ljust(MIB, b"\0"))
    assert grid("put", endless).code == 0
    number = grid("run", "endless.raw", "--script", grid.script, "--ram", "64M", "-d").out.strip()
    assert grid("job", "wait", number, "--timeout", "0.2s").code == 5
    cancelled = grid("job", "cancel", number, "--json")
    assert (cancelled.code, cancelled.json["state"]) == (0, "cancelled")
    assert grid("job", "wait", number).code == 125
    assert grid("job", "logs", number).code == 3
    assert grid("disk", "rm", "endless.raw").code == 0
    assert "endless.raw" not in grid("disk", "ls").out


def test_a_guest_that_never_ends_is_ended_at_its_time(grid, disk, tmp_path):
    endless = tmp_path / "endless2.raw"
    endless.write_bytes(bios_disk(NEVER_ENDS).ljust(MIB, b"\0"))
    assert grid("put", endless).code == 0
    said = grid("run", "endless2.raw", "--script", grid.script, "--ram", "64M", "--time", "1s", "--json")
    assert said.code == 125
    assert "time limit" in said.json["tasks"][0]["reason"]
    grid("disk", "rm", "endless2.raw")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("put", "{folder}"), 2),
        (("put", "{folder}/empty"), 2),
        (("put", "{folder}/nowhere"), 3),
        (("put", "{folder}/bad.vdi"), 7),
        (("get", "nothing-of-that-name", "-o", "{folder}/x"), 3),
        (("get", "bios.raw", "-o", "{folder}/x", "--format", "floppy"), 2),
        (("get", "bios.raw", "-o", "{folder}/nowhere/x"), 3),
        (("disk", "show", "nothing-of-that-name"), 3),
        (("disk", "rm", "nothing-of-that-name"), 3),
        (("job", "show", "aaaaaaaaaa"), 3),
        (("job", "wait", "aaaaaaaaaa"), 3),
        (("job", "wait", "not a job"), 2),
        (("job", "cancel", "aaaaaaaaaa"), 3),
        (("run", "--script", "{folder}/nowhere.sh"), 127),
        (("run", "--script", "{folder}/job.sh", "--in", "{folder}/nowhere"), 3),
        (("run", "--script", "{folder}/job.sh", "--array", "9-"), 2),
        (("run", "--script", "{folder}/job.sh", "--ram", "lots"), 2),
        (("run", "--script", "{folder}/job.sh", "--cpus", "0"), 2),
        (("run", "--script", "{folder}/job.sh", "--net", "grid"), 2),
        (("run", "nothing-of-that-name", "--script", "{folder}/job.sh"), 3),
        (("token", "create", "--role", "king"), 2),
        (("nonsense",), 2),
        (("put", "{folder}/bios.raw", "--nonsense"), 2),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence_and_a_code(grid, disk, words, code):
    (grid.folder / "empty").touch()
    (grid.folder / "bad.vdi").write_bytes(b"<<< Oracle VM VirtualBox Disk Image >>>\n" + bytes(300))
    said = grid(*(word.format(folder=grid.folder) for word in words))
    assert said.code == code, said.err
    assert said.out == ""
    assert said.err.startswith("error: ") or "\nerror: " in said.err


def test_down_leaves_no_process_and_no_socket(grid, disk):
    if not api.daemon_runs(grid.home):  # run alone, or after another test took it down
        assert grid("put", grid.raw).code == 0
    assert grid("down").code == 0
    assert processes_of(grid.home) == []
    assert not (grid.home / api.SOCKET).exists()
    assert list((grid.home / "vms").iterdir()) == []
    for words in (("disk", "ls"), ("job", "ls"), ("node", "ls"), ("down",)):
        assert grid(*words).code == 6
    assert p2pnode("status", home=grid.home).code == 6
