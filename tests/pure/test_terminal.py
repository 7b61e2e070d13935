"""What people type as sizes, durations and indices, and what they see in their place."""

import contextlib
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.errors import Misused
from p2pgrid.node import console
from p2pgrid.node.console import TASKS_MAX, Bars, parse_duration, parse_indices, parse_size, size, table

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@given(st.integers(0, 10**6), st.sampled_from(list(UNITS)), st.sampled_from(["", "B", "iB"]), st.booleans())
def test_sizes_are_read_in_powers_of_1024(count, unit, tail, lower):
    text = f"{count}{unit}{tail}"
    assert parse_size(text.lower() if lower else text) == count * UNITS[unit]


@given(st.integers(0, 10**6), st.sampled_from([("", 1), ("s", 1), ("m", 60), ("h", 3600), ("d", 86400)]))
def test_durations_are_read_in_seconds(count, unit):
    assert parse_duration(f" {count}{unit[0]} ") == count * unit[1]


@pytest.mark.parametrize(
    ("text", "value"), [("1.5G", 3 << 29), ("0.5K", 512), ("4096", 4096), ("10 MiB", 10 << 20)]
)
def test_sizes_may_have_a_point(text, value):
    assert parse_size(text) == value


@given(st.text(max_size=12))
def test_anything_else_is_a_number_or_misused(text):
    for parse in (parse_size, parse_duration, parse_indices):
        with contextlib.suppress(Misused):
            parse(text)


@pytest.mark.parametrize(
    "text", ["", "lots", "-1", "1e3", "5X", "\u0661", "1.", "G", "inf", "nan", "9" * 400]
)
def test_what_is_no_number_is_refused(text):
    with pytest.raises(Misused):
        parse_size(text)
    with pytest.raises(Misused):
        parse_duration(text)


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 50)), min_size=1, max_size=6))
def test_indices_are_the_union_of_their_parts(spans):
    text = ",".join(f"{first}-{first + more}" if more else f"{first}" for first, more in spans)
    wanted = {i for first, more in spans for i in range(first, first + more + 1)}
    assert parse_indices(text) == sorted(wanted)


@pytest.mark.parametrize(
    "text",
    ["", "9-", "-3", "5-2", "1,,2", "a", "1-2-3", "0-100000", "0-999999999999", "\u0663", "0-99999,0-99999"],
)
def test_indices_that_cannot_be_are_refused(text):
    with pytest.raises(Misused):
        parse_indices(text)


def test_the_longest_array_is_possible():
    assert len(parse_indices(f"0-{TASKS_MAX - 1}")) == TASKS_MAX


@given(st.integers(0, 1 << 50))
def test_a_size_is_said_in_the_largest_unit_that_fits(count):
    number, unit = size(count).split()
    assert float(number) < 1024 or unit == "TiB" or round(count / 1024, 1) >= 1024 or number == "1024.0"
    assert abs(parse_size(f"{number}{unit[0] if unit != 'B' else ''}") - count) <= max(1, count * 0.05)


def test_a_table_is_aligned_and_has_no_blanks_at_its_ends():
    text = table([("a", 1, ""), ("longer", 22, "z")], "NAME", "N", "NOTE")
    assert text == "NAME    N   NOTE\na       1\nlonger  22  z"


def test_json_is_one_document_with_its_schema(capsys):
    console.emit({"disk": "b"}, True, lambda v: "never")
    assert json.loads(capsys.readouterr().out) == {"schema": 1, "disk": "b"}
    console.emit({"disk": "b"}, False, lambda v: f"disk {v['disk']}")
    assert capsys.readouterr().out == "disk b\n"


def test_without_a_terminal_progress_is_a_line_at_a_time(monkeypatch):
    said, now = io.StringIO(), [100.0]
    monkeypatch.setattr("sys.stderr", said)
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with Bars() as bars:
        for step in range(11):  # a second each
            bars.show("cutting", step, 10, "fast")
            now[0] += 1
        bars.show("cutting", 10, 10)
        bars.event({"phase": "job", "done": 0, "total": 0})
    assert said.getvalue().splitlines() == [
        "cutting: 0 % fast",
        "cutting: 50 % fast",
        "cutting: 100 % fast",
        "job: 100 %",
    ]
