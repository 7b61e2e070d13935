"""Are speed and time left what a person may believe?"""

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from p2pgrid.ids import PeerId
from p2pgrid.node import console
from p2pgrid.node.console import Bars
from p2pgrid.node.speed import FIRST, NOTE_PERIOD, WINDOW, FetchNote, Speed, duration, facts
from p2pgrid.transfer.progress import Progress

STEP = 0.25


def run(speed: Speed, start: float, seconds: float, rate: float, moved: float, total: float) -> float:
    """`speed` sees `seconds` of work at `rate`; what has moved then."""
    for step in range(1, int(seconds / STEP) + 1):
        at = min(total, moved + rate * step * STEP)
        speed.note(start + step * STEP, at, total - at)
    return min(total, moved + rate * int(seconds / STEP) * STEP)


@given(st.floats(1, 1e9), st.floats(FIRST + 1, 300))
def test_steady_work_is_told_exactly(rate, seconds):
    speed, total = Speed(), 2 * rate * seconds
    speed.note(0, 0, total)
    moved = run(speed, 0, seconds, rate, 0, total)
    assert speed.rate == pytest.approx(rate, rel=1e-6)
    assert speed.left == pytest.approx((total - moved) / rate, rel=1e-3, abs=0.1)


@given(st.floats(1e3, 1e6), st.floats(0.1, 10))
def test_another_speed_is_believed_within_a_minute_and_not_at_once(rate, factor):
    assume(not 0.9 < factor < 1.1)
    speed, total = Speed(), 1e9 * factor + 1e9
    speed.note(0, 0, total)
    moved = run(speed, 0, 60, rate, 0, total)
    before = speed.left
    moved = run(speed, 60, STEP, rate * factor, moved, total)
    assert speed.left == pytest.approx(before, rel=0.1), "one report does not make it jump"
    moved = run(speed, 60 + STEP, 60, rate * factor, moved, total)
    assert speed.rate == pytest.approx(rate * factor, rel=0.01)
    assert speed.left == pytest.approx((total - moved) / (rate * factor), rel=0.02)


@given(st.floats(10, 60), st.floats(1.2, 4))
def test_the_last_seconds_are_right_after_a_slow_start(seconds, factor):
    speed, total = Speed(), 1e6
    speed.note(0, 0, total)
    moved = run(speed, 0, 10, total / 2 / 10 / factor, 0, total)
    rate = (total - moved) / seconds
    moved = run(speed, 10, seconds - 1, rate, moved, total)
    assert speed.left <= 1.3 * (total - moved) / speed.rate + 1


def test_nothing_is_said_before_there_is_something_to_say():
    speed = Speed()
    assert (speed.rate, speed.left) == (0, None)
    speed.note(0, 0, 100)
    speed.note(FIRST / 2, 50, 50)
    assert (speed.rate, speed.left) == (0, None)


def test_a_moment_without_anything_does_not_show_and_a_stall_has_no_end():
    speed = Speed()
    speed.note(0, 0, 1000)
    moved = run(speed, 0, 30, 10, 0, 1000)
    run(speed, 30, 1, 0, moved, 1000)
    assert speed.rate == pytest.approx(10, rel=0.1)
    run(speed, 31, WINDOW + 1, 0, moved, 1000)
    assert (speed.rate, speed.left) == (0, None)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1e12), st.floats(0, 1e12)), max_size=60))
def test_no_history_makes_it_negative_or_fail(history):
    speed, now = Speed(), 0.0
    for passed, moved, rest in history:
        now += passed
        speed.note(now, moved, rest)
        assert speed.rate >= 0
        assert speed.left is None or speed.left >= 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.2, "1 s"), (59, "59 s"), (60, "1:00"), (61.5, "1:02"), (299, "4:59"), (301, "5:05"),
        (3596, "1:00 h"), (3600, "1:00 h"), (5400, "1:30 h"), (86399, "1.0 days"), (260000, "3.0 days"),
        (1e9, "11574 days"),
    ],
)  # fmt: skip
def test_a_duration_is_as_exact_as_it_can_be_meant(seconds, text):
    assert duration(seconds) == text


@given(st.floats(0, 1e8), st.floats(0, 1e8))
def test_durations_are_never_too_short(a, b):
    def back(text: str) -> float:
        number, _, unit = text.partition(" ")
        if unit == "days":
            return float(number) * 86400 + 86400 * 0.05
        parts = [int(p) for p in number.split(":")]
        if unit == "h":
            return parts[0] * 3600 + parts[1] * 60
        return parts[0] if unit else parts[0] * 60 + parts[1]

    assert back(duration(a)) >= a * 0.99
    if a <= b:
        assert back(duration(a)) <= back(duration(b)) * 1.01 + 1


def event(**more):
    return {"phase": "fetching", "unit": "bytes", "done": 50 << 20, "total": 100 << 20} | more


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({}, "50.0 MiB of 100.0 MiB"),
        ({"rate": 10 << 20, "left": 5.0}, "50.0 MiB of 100.0 MiB, 10.0 MiB/s, 5 s left"),
        ({"done": 100 << 20, "rate": 1 << 20, "left": 0.0}, "100.0 MiB of 100.0 MiB"),
        ({"total": 0, "done": 0, "rate": 0, "left": None}, ""),
        ({"note": "x"}, "50.0 MiB of 100.0 MiB, x"),
        (
            {"sources": {"peers": 3 << 20, "origins": 1 << 20, "resumed": 46 << 20, "connected": 2}},
            "50.0 MiB of 100.0 MiB, 3.0 MiB from peers (2 connected) + 46.0 MiB here before + 1.0 MiB origin",
        ),
        (
            {"rate": 5, "left": 7.0, "stall": "nobody", "stalled_for": 9.4},
            "50.0 MiB of 100.0 MiB, stalled for 10 s: nobody",
        ),
    ],
)  # fmt: skip
def test_an_event_is_told_in_words(more, text):
    assert facts(event(**more)) == text


def test_what_is_not_bytes_has_no_sizes():
    assert facts({"phase": "job", "done": 1, "total": 2, "note": "1 running"}) == "1 running"


def test_a_stall_is_told_at_once_and_once(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with Bars() as bars:
        for step in range(40):  # a quarter of a second each
            now[0] = step / 4
            stalled = 8 <= now[0] < 9
            bars.event(event(stall="nobody" if stalled else "", stalled_for=now[0]))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert [line.endswith("nobody") for line in lines] == [False, False, True, False]


def test_with_json_events_are_lines_of_json_once_a_second(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with Bars(as_json=True) as bars:
        for step in range(21):
            now[0] = step / 5
            bars.event(event(done=(step + 1) << 20, total=21 << 20))
    said = capsys.readouterr()
    assert said.out == ""
    lines = [json.loads(line) for line in said.err.splitlines()]
    assert [line["done"] >> 20 for line in lines] == [1, 6, 11, 16, 21]
    assert all(line["schema"] == 1 and line["event"] == "progress" for line in lines)


def test_what_is_not_known_yet_is_no_hundred_percent(capsys):
    with Bars() as bars:
        bars.event(event(done=0, total=0))
    assert capsys.readouterr().err == "fetching: 0 %\n"


def test_a_note_for_people_far_away_changes_seldom_but_when_it_stalls():
    note, notes = FetchNote("fetching the disk"), []
    for step in range(4 * 40):
        now, done = step / 4, min(step, 80) * 1000
        progress = Progress(done, 160_000, {PeerId("a"): done}, 0, 0, 0.0, 1, 9, 0, max(0.0, now - 20),
                            chunks=9, silent=1)  # fmt: skip
        said = note.of(progress, now)
        if not notes or notes[-1][1] != said:
            notes.append((now, said))
    assert len(notes) <= 40 / NOTE_PERIOD + 2
    assert notes[0][1] == "fetching the disk: 0 % of 156.2 KiB"
    assert notes[3][1] == "fetching the disk: 37 % of 156.2 KiB, 3.9 KiB/s, 25 s left"
    named = next(at for at, text in notes if "stalled: 1 peer connected, none answers" in text)
    assert 20 < named <= 30
    done = Progress(160_000, 160_000, {}, 0, 0, 0.0, 1, 0, 0, 0.0, {"h" * 300: "x"}, chunks=9)
    assert note.of(done, 41.0) == "fetching the disk: 100 % of 156.2 KiB"
