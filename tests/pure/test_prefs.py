"""Do an owner's words mean what they say, at any moment of the week?"""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.errors import Misconfigured, Misused
from p2pgrid.hole_punch.rates import Limits
from p2pgrid.node.prefs import DAYS, FILE, Prefs, format_rate, parse_rate, parse_window

MONDAY = datetime(2026, 11, 23)


def at(day: int, hour: int, minute: int = 0) -> datetime:
    return MONDAY + timedelta(days=day, hours=hour, minutes=minute)


def limits(prefs: Prefs, now: datetime, *, battery: bool = False, metered: bool = False) -> Limits | str:
    return prefs.limits(now, battery=battery, metered=metered)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("20Mbit", 2.5e6),
        ("8 kbit/s", 1000.0),
        ("2.5MB", 2.5e6),
        ("1gbit", 125e6),
        ("none", math.inf),
        ("3MB/s", 3e6),
    ],
)
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@given(st.floats(0.008, 1e5))
def test_a_rate_is_read_as_it_is_shown(mbit: float) -> None:
    assert parse_rate(format_rate(parse_rate(f"{mbit:f}Mbit"))) == pytest.approx(mbit * 125e3, rel=1e-4)


@pytest.mark.parametrize("text", ["", "fast", "20", "20 Mpixel", "-3MB", "1bit", "0Mbit", "1e9MB", "nan MB"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(Misused):
        parse_rate(text)


def test_a_window_of_office_hours() -> None:
    prefs = Prefs(up="20Mbit", windows=("mon-fri 08:00-18:00 up=1Mbit",))
    assert limits(prefs, at(0, 8)) == Limits(up=125e3)
    assert limits(prefs, at(4, 17, 59)) == Limits(up=125e3)
    assert limits(prefs, at(4, 18)) == Limits(up=2.5e6)
    assert limits(prefs, at(5, 12)) == Limits(up=2.5e6)


def test_a_window_over_midnight_belongs_to_the_day_on_which_it_begins() -> None:
    window = parse_window("fri 22:00-06:00 stop")
    assert not window.covers(at(4, 5, 59))
    assert window.covers(at(4, 22))
    assert window.covers(at(5, 5, 59))
    assert not window.covers(at(5, 22))


def test_the_first_window_that_fits_counts() -> None:
    prefs = Prefs(windows=("12:00-13:00 up=none down=none", "08:00-18:00 stop"))
    assert limits(prefs, at(2, 12, 30)) == Limits()
    assert isinstance(limits(prefs, at(2, 13)), str)


@given(
    st.integers(0, 6),
    st.integers(0, 24 * 60 - 1),
    st.integers(0, 24 * 60 - 1),
    st.integers(0, 7 * 24 * 60 - 1),
)
def test_a_window_and_its_complement_cover_the_week_once(day: int, begin: int, end: int, minute: int) -> None:
    def clock(minutes: int) -> str:
        return f"{minutes // 60:02}:{minutes % 60:02}"

    if begin == end:
        return
    now = MONDAY + timedelta(minutes=minute)
    one = parse_window(f"{clock(begin)}-{clock(end)} stop")
    other = parse_window(f"{clock(end)}-{clock(begin)} stop")
    assert one.covers(now) != other.covers(now)
    only = parse_window(f"{DAYS[day]} {clock(begin)}-{clock(end)} stop")
    assert one.covers(now) or not only.covers(now)


@pytest.mark.parametrize(
    "text",
    ["", "stop", "08:00-18:00", "25:00-26:00 stop", "08:61-09:00 stop", "mon-frei 08:00-09:00 stop",
     "08:00-09:00 sideways=1Mbit", "08:00-09:00 up=fast", "08:00-09:00 up"],
)  # fmt: skip
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(Misused):
        Prefs(windows=(text,))


def test_on_battery_and_on_a_metered_network_nothing_moves_unless_allowed() -> None:
    assert "battery" in str(limits(Prefs(), MONDAY, battery=True))
    assert "metered" in str(limits(Prefs(), MONDAY, metered=True))
    brave = Prefs(on_battery="go", on_metered="go")
    assert limits(brave, MONDAY, battery=True, metered=True) == Limits()


def test_they_are_kept_and_a_broken_file_is_named(tmp_path: Path) -> None:
    assert Prefs.load(tmp_path) == Prefs()
    prefs = Prefs().changed({"up": "5Mbit", "windows": ["sat,sun 00:00-24:00 up=none"]})
    prefs.save(tmp_path)
    assert Prefs.load(tmp_path) == prefs
    for broken in ('{"up": "fast"}', '{"upp": "5Mbit"}', '{"up": 5}', "[]", "{"):
        (tmp_path / FILE).write_text(broken)
        with pytest.raises(Misconfigured, match=FILE):
            Prefs.load(tmp_path)
