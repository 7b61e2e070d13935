"""Put links, and pings of one, the way a person reads them.

Pure; the shapes are those of `docs/reference/json.md`.
"""

from __future__ import annotations

from typing import Any

from p2pgrid.node.console import size, table
from p2pgrid.node.speed import duration

Answer = dict[str, Any]


def path(v: Answer) -> str:
    """By which way a link goes."""
    via = f" via {short(v['via'])}" if v["via"] else ""
    return f"{v['way']}{via}{', near' if v['near'] else ''}"


def short(peer: str) -> str:
    """Enough of a peer id to tell it from others at hand: all begin in the same way."""
    return f"…{peer[-8:]}"


def delay(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"


def links(rows: list[Answer]) -> list[str]:
    """A table of all links, if there are any."""
    if not rows:
        return []
    cells = [
        (
            row["peer"],
            path(row) if row["connected"] else f"lost ({path(row)}), looking for another",
            duration(row["since"]),
            size(row["sent"]),
            size(row["received"]),
            delay(row["delay"]),
        )
        for row in rows
    ]
    return table(cells, "LINK", "WAY", "FOR", "SENT", "RECEIVED", "DELAY").split("\n")


def pinged(row: Answer, before: Answer | None) -> str:
    """One ping; `before` is the last one that was answered."""
    if row["seconds"] is None:
        return f"{row['number']:>3}  no answer: {row['why']}"
    line = f"{row['number']:>3}  {path(row)}  {delay(row['seconds'])}"
    if before is not None and path(before) != path(row):
        line += f"  (was {path(before)}, {row['after']:.1f} s after the start)"
    return line


def ping(v: Answer) -> str:
    """The end of it."""
    sent = len(v["pings"])
    if not v["answered"]:
        return f"none of {sent} answered"
    spread = " / ".join(map(delay, (v["min"], v["median"], v["max"])))
    return f"{v['answered']} of {sent} answered; least / median / most {spread}; {path(v | {'near': False})}"
