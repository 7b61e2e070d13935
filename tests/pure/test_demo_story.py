"""Does the demo show what the guests wrote, a line for each of theirs?"""

from __future__ import annotations

from p2pgrid.node import demo, show
from p2pgrid.node.plain import cleaned


def test_what_a_guest_wrote_keeps_its_lines_and_steers_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(show, "put", lambda v: "put")
    monkeypatch.setattr(show, "job", lambda v: "job")
    (tmp_path / "answer.txt").write_bytes(b"one\ntwo \x1b[31m\n")
    task = {"index": 0, "node": "worker-1", "exit": 0, "files": demo._texts(tmp_path)}
    report = {"put": {"wire_bytes": 1}, "results": [task], "sources": [], "seconds": 1.0}
    assert "  answer.txt\n    | one\n    | two \\x1b[31m\n" in demo._story(cleaned(report))
