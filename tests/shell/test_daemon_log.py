"""Is a daemon's log bounded while it goes on writing?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from p2pgrid.node import daemon_log
from p2pgrid.node.daemon import _plain
from p2pgrid.node.daemon_log import shorten
from p2pgrid.node.launch import LOG


@pytest.fixture
def fd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(daemon_log, "LOG_MAX", 100)
    fd = os.open(tmp_path / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    yield fd
    os.close(fd)


def test_a_long_log_begins_anew_and_its_last_length_is_kept(tmp_path: Path, fd: int) -> None:
    for number in range(30):
        os.write(fd, b"line %02d, of 20 bytes\n" % number)
        shorten(tmp_path, fd)
    log, before = tmp_path / LOG, tmp_path / f"{LOG}.1"
    assert log.stat().st_size <= 100 < before.stat().st_size <= 121
    lines = (before.read_bytes() + log.read_bytes()).splitlines()
    assert lines == [b"line %02d, of 20 bytes" % n for n in range(30 - len(lines), 30)]


def test_what_is_not_the_log_is_left_alone(tmp_path: Path, fd: int) -> None:
    os.write(fd, b"x" * 200)
    with (tmp_path / "other").open("wb") as other:
        other.write(b"y" * 200)
        other.flush()
        shorten(tmp_path, other.fileno())
    assert (tmp_path / "other").stat().st_size == 200
    assert (tmp_path / LOG).stat().st_size == 200
    reader, writer = os.pipe()
    shorten(tmp_path, writer)
    os.close(reader)
    os.close(writer)
    (tmp_path / LOG).unlink()
    shorten(tmp_path, fd)


def test_what_others_wrote_is_plain_in_it() -> None:
    said = _plain(None, "info", {"event": "a\nb", "why": "\x1b[2J\u202e", "count": 3})
    assert said == {"event": "a\nb", "why": "\\x1b[2J\\u202e", "count": 3}
