"""Rows become the right pictures, a bar is the median of its runs, and the same rows give the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.middle import middle, ratios
from bench.plot import _medians, _most, pictures, plot, tables
from bench.table import line


def row(system: str, **facts: Any) -> dict[str, Any]:
    found = {"bench": "swarm", "system": system, "disk": "v1.vdi", "bytes": 1_300_000_000, "workers": 1}
    return found | {"last": 2.0, "cpu": 1.0, "received": 5e8, "rss_worker": 100} | facts


ROWS = [
    row("http", last=3.0),
    row("http", last=9.0),
    row("http", last=4.0),
    row("p2pgrid", workers=8),
    row("p2pgrid", workers=8, rate=200.0, to_file=0.4, copies=1.1),
    row("rsync", bench="update", disk="v2.vdi"),
    row("rsync", bench="update", disk="v2r.vdi", workers=8),
    {"bench": "ratio", "system": "p2pgrid", "to": "http", "last": 0.5},
]


def test_cases_are_pictures_and_the_rest_is_left_out():
    found = pictures(ROWS)
    assert [picture.name for picture in found] == ["swarm-v1", "swarm-v1-rate200", "update"]
    assert [bar for bar, _ in found[0].rows] == ["N = 1", "N = 1", "N = 1", "N = 8"]
    assert [bar for bar, _ in found[2].rows] == ["v2, N = 1", "v2r, N = 8"]
    assert "200 Mbit/s" in found[1].title


def test_a_bar_is_the_median_of_the_runs_that_came_to_an_end():
    failed = row("http", failed="it was slow")
    del failed["last"]
    (picture,) = pictures([*ROWS[:3], failed])
    assert _medians(picture)["http", "N = 1"]["last"] == 4.0
    (alone,) = pictures([failed])
    assert "failed" in _medians(alone)["http", "N = 1"]


def test_the_same_rows_give_the_same_file(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra `bench`")
    skipped = {key: value for key, value in row("casync").items() if key not in ("last", "cpu")}
    rows = [ROWS[0], skipped | {"skipped": "casync not installed"}]
    one, two = plot(rows, tmp_path / "one"), plot(rows, tmp_path / "two")
    assert [path.name for path in one][:2] == ["swarm-v1.png", "swarm-v1.svg"]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert "skipped" in one[1].read_text()


def test_runs_are_shown_as_a_line_from_the_least_to_the_most(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra `bench`")
    (_, three), (_, one) = plot(ROWS[:3], tmp_path / "three"), plot([ROWS[2]], tmp_path / "one")
    assert three.read_text().count("<use") == one.read_text().count("<use") + 2 * len(
        pictures(ROWS)[0].panels
    )


def test_tables_tell_every_system_and_why_one_is_missing():
    page = tables([*ROWS, row("zsync", failed="no|way\nTraceback")])
    assert "| http | N = 1 | 4.0 (3.0 to 9.0) | 1.00 | 500.0 | 100 |" in page
    assert "| zsync | N = 1 | failed: no/way |" in page
    assert page.count("\n## ") == 3


def test_a_ratio_is_that_of_medians_and_tells_how_far_runs_of_the_same_number_differ():
    ours = [row("p2pgrid", last=last, run=run, sent_origin=1) for run, last in enumerate((1.0, 2.0, 8.0))]
    theirs = [row("http", last=last, run=run, sent_origin=0) for run, last in enumerate((4.0, 2.0, 5.0))]
    theirs.append(row("http", failed="it was slow", run=3))
    del theirs[-1]["last"]
    (found,) = ratios([*ours, *theirs])
    assert (found["system"], found["to"]) == ("p2pgrid", "http")
    assert (found["last"], found["least"]["last"], found["most"]["last"]) == (0.5, 0.25, 1.6)
    assert (found["runs"], "sent_origin" in found) == (3, False)
    middles = middle(theirs)
    assert (middles["last"], middles["runs"], middles["runs_failed"]) == (4.0, 3, 1)
    assert "last 2.00 to 5.00" in line(middles)
    assert "1 more failed" in line(middles)
    assert middle(theirs[-1:])["failed"] == "it was slow"


def test_an_axis_ends_where_one_bar_would_dwarf_the_rest():
    assert _most([1.0, 4.0, 10.0, 28.0, 97.0]) == 28.0
    assert _most([1.0, 9.0, 12.0, 30.0]) == 30.0
    assert _most([5.0]) == 5.0
    assert _most([0.0]) == _most([]) == 1.0
