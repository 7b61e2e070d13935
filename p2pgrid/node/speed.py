"""Say how fast work goes and how long it still takes, so that a person believes it.

Pure.  The speed is what moved in the last `WINDOW` seconds, over them: a pause of a moment does not
show, and what was fast an hour ago does not count.  The end is moved towards where that speed
puts it, never at once, so that the time left does not jump.  While nothing moves there is none.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2pgrid.transfer.progress import Progress

WINDOW = 15.0
FIRST = 2.0
"""Seconds before anything is said."""
SAMPLE = 0.5
"""Seconds between two samples."""
NOTE_PERIOD = 5.0
"""Seconds between two notes to the coordinator."""
NOTE_MAX = 200
"""Characters of a note."""
SMOOTH = 5.0
"""Seconds in which the end moves most of the way, while there is time."""


class Speed:
    """The speed of one piece of work."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque()
        self._last = (0.0, 0.0)
        self._end: float | None = None

    def note(self, now: float, moved: float, rest: float) -> None:
        """`moved` so far, `rest` still to come; in whatever unit."""
        before, self._last = self._last[0], (now, moved)
        if not self._samples or now - self._samples[-1][0] >= SAMPLE:
            self._samples.append(self._last)
        while len(self._samples) > 2 and self._samples[1][0] <= now - WINDOW:
            self._samples.popleft()
        if not self.rate:
            self._end = None
            return
        end = now + rest / self.rate
        if self._end is None:
            self._end = end
        else:
            within = min(SMOOTH, max((end - now) / 4, SAMPLE))  # near the end it has to be right soon
            self._end += (end - self._end) * (1 - math.exp(-(now - before) / within))

    @property
    def rate(self) -> float:
        """A second; 0 while it is not known or nothing moves."""
        if not self._samples:
            return 0.0
        (then, before), (now, moved) = self._samples[0], self._last
        return max(0.0, moved - before) / (now - then) if now - then >= FIRST else 0.0

    @property
    def left(self) -> float | None:
        """Seconds; None while nobody can know."""
        return None if self._end is None else max(0.0, self._end - self._last[0])


def duration(seconds: float) -> str:
    """'7 s', '2:05', '1:30 h', '3 days'; as exact as it can be meant."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        step = 1 if whole < 300 else 5
        whole = -(-whole // step) * step
        if whole < 3600:
            return f"{whole // 60}:{whole % 60:02}"
    minutes = -(-whole // 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}:{minutes % 60:02} h"
    days = minutes / (24 * 60)
    return f"{days:.1f} days" if days < 100 else f"{days:.0f} days"


def size(count: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def facts(news: Mapping[str, Any]) -> str:
    """What a progress event tells beside its share: bytes, speed, time left, sources, or why it stalls."""
    words: list[str] = []
    if news.get("unit") == "bytes" and news["total"]:
        words.append(f"{size(news['done'])} of {size(news['total'])}")
        if news["done"] < news["total"] and not news.get("stall"):
            if news.get("rate"):
                words.append(f"{size(news['rate'])}/s")
            if news.get("left") is not None:
                words.append(f"{duration(news['left'])} left")
    if sources := _sources(news.get("sources") or {}):
        words.append(sources)
    if news.get("note"):
        words.append(str(news["note"]))
    if news.get("stall"):
        words.append(f"stalled for {duration(news['stalled_for'])}: {news['stall']}")
    return ", ".join(words)


class FetchNote:
    """How a fetch goes, for people far away: changed seldom, since each change is a message."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._speed = Speed()
        self._said = what
        self._due = -math.inf
        self._stalled = False

    def of(self, progress: Progress, now: float) -> str:
        """The note, at this time."""
        rest = progress.bytes_total - progress.bytes_done
        if progress.bytes_total:
            self._speed.note(now, progress.from_peers + progress.from_origins, rest)
        stalled = bool(progress.stall)
        if now >= self._due or stalled != self._stalled or not rest:
            self._due, self._stalled = now + NOTE_PERIOD, stalled
            words = [f"{100 * progress.bytes_done // max(1, progress.bytes_total)} %"]
            if progress.bytes_total:
                words[0] += f" of {size(progress.bytes_total)}"
            if stalled:
                words.append(f"stalled: {progress.stall}")
            elif self._speed.left is not None and rest:
                words += [f"{size(self._speed.rate)}/s", f"{duration(self._speed.left)} left"]
            self._said = f"{self._what}: {', '.join(words)}"[:NOTE_MAX]
        return self._said


def _sources(sources: Mapping[str, Any]) -> str:
    """Where bytes came from, in so far as they did."""
    names = {"resumed": "here before", "local": "other disks here", "origins": "origin"}
    said = [f"{size(sources[key])} {name}" for key, name in names.items() if sources.get(key)]
    if sources.get("peers"):
        count = sources.get("connected", 0)
        said.insert(0, f"{size(sources['peers'])} from peers ({count} connected)")
    return " + ".join(said)
