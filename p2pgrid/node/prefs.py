"""Decide what an owner allows this node to move now: caps, time windows, battery, metered networks.

Pure but for `load` and `save` of the one small file that keeps them.

    preferences + local time + is it on battery? is the network metered? ──> Limits, or why nothing moves

    {"up": "20Mbit", "windows": ["mon-fri 08:00-18:00 up=1Mbit down=10Mbit", "23:00-06:00 up=none"]}

The first window that fits the moment says what it says; what it leaves out stays as it is outside of
windows.  A window may end on the next day; its days are those on which it begins.
"""

from __future__ import annotations

import json
import math
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import attrs

from p2pgrid.errors import Misconfigured, Misused
from p2pgrid.hole_punch.rates import Limits

FILE = "prefs.json"
RATE_MIN = 1000.0
"""Bytes a second: with less, links break instead of being slow."""
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
UNITS = {"bit": 1 / 8, "kbit": 125.0, "mbit": 125e3, "gbit": 125e6, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9}

_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+?)(?:/s|ps)?", re.IGNORECASE)
_WINDOW = re.compile(r"(?:([a-z,-]+)\s+)?(\d\d):(\d\d)-(\d\d):(\d\d)((?:\s+\S+)+)", re.IGNORECASE)


def parse_rate(text: str) -> float:
    """Bytes a second of "20Mbit", "2.5MB" or "none" (`inf`).  Raises `Misused`."""
    if text.strip().lower() == "none":
        return math.inf
    found = _RATE.fullmatch(text.strip())
    unit = UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise Misused(why=f"{text!r} is no rate; write 20Mbit, 2.5MB or none")
    rate = float(found[1]) * unit
    if rate < RATE_MIN:
        raise Misused(why=f"{text!r} is less than 8kbit; to move nothing at all write a window with `stop`")
    return rate


def format_rate(rate: float) -> str:
    """As `parse_rate` reads it."""
    return "none" if rate == math.inf else f"{rate / UNITS['mbit']:g}Mbit"


@attrs.frozen
class Window:
    """Times of the week, and what holds then; None: as outside of windows."""

    days: frozenset[int]
    begin: int
    """Minutes after midnight."""
    end: int
    up: float | None = None
    down: float | None = None
    stop: bool = False

    def covers(self, now: datetime) -> bool:
        minute, day = now.hour * 60 + now.minute, now.weekday()
        if self.begin < self.end:
            return day in self.days and self.begin <= minute < self.end
        return (day in self.days and minute >= self.begin) or (
            (day - 1) % 7 in self.days and minute < self.end
        )


def parse_window(text: str) -> Window:
    """A window as a person writes it: "mon-fri 08:00-18:00 up=1Mbit" or "22:00-06:00 stop"."""
    found = _WINDOW.fullmatch(text.strip())
    if found is None:
        raise Misused(
            why=f'{text!r} is no window; write "mon-fri 08:00-18:00 up=1Mbit down=5Mbit" or "… stop"'
        )
    begin, end = _minute(text, found[2], found[3]), _minute(text, found[4], found[5])
    up: float | None = None
    down: float | None = None
    stop = False
    for word in found[6].split():
        key, _, value = word.lower().partition("=")
        match key:
            case "up" if value:
                up = parse_rate(value)
            case "down" if value:
                down = parse_rate(value)
            case "stop" if not value:
                stop = True
            case _:
                raise Misused(why=f"{word!r} in the window {text!r} is neither up=RATE, down=RATE nor stop")
    return Window(_days(found[1]), begin, end, up, down, stop)


def _minute(text: str, hour: str, minute: str) -> int:
    at = int(hour) * 60 + int(minute)
    if int(minute) > 59 or at > 24 * 60:
        raise Misused(why=f"there is no such time of day in {text!r}")
    return at


def _days(text: str | None) -> frozenset[int]:
    if text is None:
        return frozenset(range(7))
    days: set[int] = set()
    for part in text.lower().split(","):
        first, _, last = part.partition("-")
        if first not in DAYS or (last or first) not in DAYS:
            raise Misused(why=f"{part!r} is neither a day (mon … sun) nor a span of days (mon-fri)")
        begin, end = DAYS.index(first), DAYS.index(last or first)
        days.update((begin + n) % 7 for n in range((end - begin) % 7 + 1))
    return frozenset(days)


@attrs.frozen
class Prefs:
    """What an owner allows, as they wrote it."""

    up: str = "none"
    """Most that all links together send."""
    down: str = "none"
    up_per_link: str = "none"
    down_per_link: str = "none"
    courteous: str = "wan"
    """Give way while the delay grows: "wan", "always" or "never"."""
    on_battery: str = "stop"
    """What happens then: "go" or "stop" (nothing is sent or fetched)."""
    on_metered: str = "stop"
    port_mapping: str = "on"
    """Whether the router is asked to let others reach this node: "on" or "off"."""
    windows: tuple[str, ...] = ()

    def __attrs_post_init__(self) -> None:
        """Raises `Misused` where anything is not understood."""
        if not all(isinstance(value, str) for value in (*attrs.astuple(self)[:-1], *self.windows)):
            raise Misused(why="a preference is a text, windows a list of them")
        for rate in (self.up, self.down, self.up_per_link, self.down_per_link):
            parse_rate(rate)
        for window in self.windows:
            parse_window(window)
        _one_of("courteous", self.courteous, "wan", "always", "never")
        _one_of("on_battery", self.on_battery, "go", "stop")
        _one_of("on_metered", self.on_metered, "go", "stop")
        _one_of("port_mapping", self.port_mapping, "on", "off")

    def limits(self, now: datetime, *, battery: bool, metered: bool) -> Limits | str:
        """The caps in force, or why nothing may move."""
        if battery and self.on_battery == "stop":
            return "this computer runs on battery"
        if metered and self.on_metered == "stop":
            return "the network is metered"
        up, down = parse_rate(self.up), parse_rate(self.down)
        for text in self.windows:
            window = parse_window(text)
            if window.covers(now):
                if window.stop:
                    return f"it is within the window {text!r}"
                up = up if window.up is None else window.up
                down = down if window.down is None else window.down
                break
        return Limits(up, down, parse_rate(self.up_per_link), parse_rate(self.down_per_link), self.courteous)

    def changed(self, settings: dict[str, Any]) -> Prefs:
        """With `settings` by name, each a text; `windows` a list of them.  Raises `Misused`."""
        names = {field.name for field in attrs.fields(Prefs)}
        if unknown := sorted(set(settings) - names):
            raise Misused(why=f"there is no preference {unknown[0]!r}; there are {', '.join(sorted(names))}")
        facts: dict[str, Any] = {**attrs.asdict(self), **settings}
        return Prefs(**{**facts, "windows": tuple(facts["windows"])})

    def save(self, home: Path) -> None:
        draft = home / f"{FILE}.tmp"
        draft.write_text(json.dumps(attrs.asdict(self), indent=2) + "\n")
        os.replace(draft, home / FILE)

    @classmethod
    def load(cls, home: Path) -> Prefs:
        """Those in `home`.  Raises `Misconfigured` where they cannot be read."""
        try:
            return cls().changed(json.loads((home / FILE).read_text()))
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError, AttributeError, OSError, Misused) as broken:
            raise Misconfigured(why=f"{home / FILE} cannot be read: {broken}") from None


def _one_of(name: str, value: str, *values: str) -> None:
    if value not in values:
        raise Misused(why=f"{name} is one of {', '.join(values)}, not {value!r}")
