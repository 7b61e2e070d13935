"""Each program of Debian's that the bench runs brings a small file whole, and uses an old one if it can."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bench import lab as labs
from bench import logs
from bench.lab import Host
from bench.peers import PEERS, Peer, peer
from bench.scenario import Case, Network, bout

NAMES = [name for name, place in PEERS.items() if place.startswith("bench.peers.")]
SIZE = 4 << 20
KNOWN = 3 << 20
"""Bytes that the old version has in common with the new one, elsewhere in it."""

pytestmark = pytest.mark.skipif(labs.absent() is not None, reason=labs.absent() or "")


def run(name: str, file: Path, old: Path | None, workers: int) -> dict[str, Any]:
    if why := peer(name).absent():
        pytest.skip(why)
    with labs.open_lab(file.parent) as lab:
        row = bout(lab, peer(name), Case("swarm", file, old, workers, Network()))
    assert "failed" not in row, row["failed"]
    return row


@pytest.mark.parametrize("name", NAMES)
def test_every_worker_gets_the_whole_file(name: str, tmp_path: Path):
    file = tmp_path / "disk.raw"
    file.write_bytes(os.urandom(SIZE))
    row = run(name, file, None, 2)
    assert SIZE < row["received"] <= row["received_max"] < 2 * SIZE  # a piece may come twice in the end
    assert 0 < row["first"] <= row["last"]
    assert row["cpu"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_an_old_version_saves_what_the_system_can_find_in_it(name: str, tmp_path: Path):
    common = os.urandom(KNOWN)
    file, old = tmp_path / "disk.raw", tmp_path / "old.raw"
    file.write_bytes(common + os.urandom(SIZE - KNOWN))
    old.write_bytes(
        (os.urandom(100_000) if name != "aria2" else b"") + common
    )  # aria2 finds it only in place
    if not peer(name).updates:
        with labs.open_lab(tmp_path) as lab:
            assert "no use" in bout(lab, peer(name), Case("update", file, old, 1, Network()))["skipped"]
        return
    row = run(name, file, old, 1)
    assert SIZE - KNOWN < row["received"] < 0.6 * SIZE


def test_a_program_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert peer("https").absent() == "nginx, curl, openssl not installed"


class Liar(Peer):
    """Says that the file is there, where something else is, and writes down what it did."""

    name = "liar"

    def fetch(self, worker: Host) -> None:
        (worker.folder / self.bout.file.name).write_bytes(bytes(SIZE))
        (worker.folder / "data").mkdir()
        (worker.folder / "data" / "daemon.log").write_bytes(b"began" + bytes(logs.MOST) + b"lied")
        worker.start(["sh", "-c", f"exit {worker.name[-1]}"]).wait()


def test_what_differs_from_the_source_has_failed_and_its_logs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "disk.raw"
    file.write_bytes(os.urandom(SIZE))
    with labs.open_lab(tmp_path) as lab:
        row = bout(lab, Liar, Case("swarm", file, None, 2, Network()))
    assert "not what was sent" in row["failed"]
    assert row["ended"] == ["worker-1: sh -c exit 1: 1"]
    assert Path(row["logs"]).is_relative_to(tmp_path / "cache")
    for name in ("worker-0", "worker-1"):
        kept = (Path(row["logs"]) / name / "data" / "daemon.log").read_bytes()
        assert len(kept) == logs.MOST
        assert kept.endswith(b"lied")


def test_only_the_newest_logs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(logs, "FOLDERS", 2)
    with labs.open_lab(tmp_path) as lab:
        host = lab.host("origin")
        assert logs.keep(lab.hosts, "none") is None
        (host.folder / "error.log").write_text("no")
        for moment in ("1", "2", "3"):
            monkeypatch.setattr(logs.time, "strftime", lambda _, moment=moment: moment)
            logs.keep(lab.hosts, "nginx")
    kept = sorted((tmp_path / "cache" / "p2pgrid-bench" / "failed").iterdir())
    assert [folder.name[:7] for folder in kept] == ["2-nginx", "3-nginx"]
