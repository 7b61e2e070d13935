"""Speak with a person at a terminal: bars, tables, JSON, errors, and the exit code.

Rules: what a program may want to read goes to stdout, everything else to stderr.  With
`--json` stdout holds one JSON document and nothing more.  Without a terminal a bar is a
line every five seconds, with `--json` one JSON object a second.  What others wrote is made
plain (`plain.py`).  Exit codes: `docs/reference/exit-codes.md`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import attrs

from p2pgrid.errors import GridError, Misused, NotFound
from p2pgrid.node.api import Told
from p2pgrid.node.plain import cleaned, plain
from p2pgrid.node.speed import facts
from p2pgrid.node.speed import size as size

if TYPE_CHECKING:
    from cyclopts import App

SCHEMA = 1
TASKS_MAX = 10_000
"""Tasks of one array: what the scheduler takes (`job.ARRAY_MAX`), said before anything is published."""
LINE_PERIOD = 5.0
"""Seconds between progress lines where stderr is not a terminal."""
JSON_PERIOD = 1.0
"""The same with `--json`."""


def default_home() -> Path:
    """`P2PGRID_HOME`, or `p2pgrid` in the user's data folder (XDG)."""
    named = os.environ.get("P2PGRID_HOME")
    if named:
        return Path(named).absolute()
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(data).absolute() / "p2pgrid"


def run_app(app: App, name: str) -> int:
    """Run the command that `sys.argv` names; errors become one sentence and an exit code."""
    from cyclopts import CycloptsError

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM cleans up as Ctrl-C does
    app.suppress_keyboard_interrupt = False
    try:
        result = app(exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        complain(" ".join(str(error).split()), f"see `{name} --help`")
        return 2
    except Told as told:
        complain(str(told), told.hint)
        return told.code
    except GridError as error:
        complain(str(error), error.advice)
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except BrokenPipeError:  # who read our words has heard enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as refused:
        complain(str(refused))
        return 1
    return result if isinstance(result, int) else 0


def complain(what: str, advice: str = "") -> None:
    """One sentence on stderr, and what to do about it."""
    print(f"error: {plain(what)}" + (f"\n  {plain(advice)}" if advice else ""), file=sys.stderr)


def say(text: str) -> None:
    """A remark for people: stderr."""
    print(text, file=sys.stderr, flush=True)


def emit(value: dict[str, Any], as_json: bool, human: Callable[[dict[str, Any]], str]) -> None:
    """`value` on stdout: as versioned JSON, or as `human` puts it."""
    said = json.dumps({"schema": SCHEMA, **value}, indent=2) if as_json else human(cleaned(value))
    print(said, flush=True)


def table(rows: Sequence[Sequence[Any]], *headings: str) -> str:
    """Left-aligned columns under their headings."""
    cells = [headings, *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)


_NUMBER = r"(\d{1,15}(?:\.\d{1,15})?)\s*"
_SIZE = re.compile(_NUMBER + r"([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(_NUMBER + r"(s|m|h|d|)", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """'512M', '1.5GiB', '4096' in bytes; units are powers of 1024.  Raises `Misused`."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise Misused(why=f"{text!r} is not a size; write 512M or 1.5GiB")
    return int(
        float(match[1]) * 1024 ** "KMGT".find(match[2].upper()) * 1024 if match[2] else float(match[1])
    )


def parse_duration(text: str) -> float:
    """'90s', '2h', '1.5d', '30' in seconds.  Raises `Misused`."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise Misused(why=f"{text!r} is not a duration; write 90s, 15m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2].lower()]


def ticket_text(given: str) -> str:
    """The ticket itself, where "file:PATH" says in which file it is, too.  Raises `NotFound`."""
    if not given.startswith("file:"):
        return given
    try:
        return Path(given.removeprefix("file:")).read_text().strip()
    except OSError as gone:
        raise NotFound(what=f"the ticket in {given}: {gone.strerror}") from None


def parse_indices(text: str) -> list[int]:
    """'0-99', '3' or '1,4-6' as task indices.  Raises `Misused`."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not _number(first) or (dash and not _number(last)):
            raise Misused(why=f"--array {text!r}: write 0-99 or 1,4-6")
        span = range(int(first), int(last if dash else first) + 1)
        if not 0 < len(span) <= TASKS_MAX - len(found):
            raise Misused(why=f"--array {text!r}: between 1 and {TASKS_MAX} tasks are possible")
        found += span
    return sorted(set(found))


def _number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


class Bars:
    """Progress of named things: bars on a terminal, a line every few seconds elsewhere, JSON where asked.

    Why something stalls is said at once.
    """

    def __init__(self, quiet: bool = False, as_json: bool = False) -> None:
        self._quiet = quiet
        self._as_json = as_json
        self._rich: Any = None
        self._tasks: dict[str, Any] = {}
        self._said: dict[str, _Said] = {}

    def __enter__(self) -> Self:
        if not self._quiet and not self._as_json and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._rich = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.percentage:>3.0f} %  {task.fields[note]}", markup=False),
                console=Console(stderr=True),
                transient=False,
            )
            self._rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._rich:
            self._rich.stop()

    def event(self, news: dict[str, Any]) -> None:
        """What a daemon tells of its progress."""
        what, done, total = news["phase"], news["done"], news["total"]
        if news.get("unit") == "bytes" and not total:
            total = 1  # it is not known yet
        if self._as_json:
            if not self._quiet and self._due(what, done, total, news.get("stall", ""), JSON_PERIOD):
                say(json.dumps({"schema": SCHEMA, "event": "progress", **news}))
        else:
            self.show(what, done, total, facts(news), news.get("stall", ""))

    def show(self, what: str, done: float, total: float, note: str = "", stall: str = "") -> None:
        """`what` stands at `done` of `total`."""
        what, note = plain(what), plain(note)
        if self._rich:
            if what not in self._tasks:
                self._tasks[what] = self._rich.add_task(what, total=total or 1, note=note)
            self._rich.update(self._tasks[what], completed=done if total else 1, total=total or 1, note=note)
        elif not self._quiet and self._due(what, done, total, stall, LINE_PERIOD):
            share = 100 * done / total if total else 100
            say(f"{what}: {share:.0f} % {note}".rstrip())

    def _due(self, what: str, done: float, total: float, stall: str, period: float) -> bool:
        """Whether it is time for a line: after a while, at the end, and when a stall begins or ends."""
        now, said = time.monotonic(), self._said.get(what)
        finished = done >= total
        if said is not None and said.finished:
            return False
        if said is None or finished or now - said.at >= period or bool(stall) != said.stalled:
            self._said[what] = _Said(now, bool(stall), finished)
            return True
        return False


@attrs.frozen
class _Said:
    """The last line about something."""

    at: float
    stalled: bool
    finished: bool


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C and SIGTERM until the block is left.  Main thread only."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt
