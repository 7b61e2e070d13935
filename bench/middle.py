"""Take the middle of several runs of one case: the medians, and from where to where figures went.  Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
CASE = ("bench", "disk", "workers", "rate", "slow", "late")
"""What rows have in common that may be put beside each other."""
FACTS = frozenset((*CASE, "bytes", "run", "compared"))
"""Numbers that are no measurements."""


def cases(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """The rows that came to an end, by case and system, in the order in which they were measured."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if "last" in row:
            key = " ".join(f"{k}={row[k]}" for k in CASE if row.get(k) is not None)
            found.setdefault(key, {}).setdefault(row["system"], []).append(row)
    return found


def middle(rows: Sequence[Row]) -> Row:
    """One row for `rows` of one system in one case: medians, and their least and most.

    Of runs that failed only their number is told, unless none came to an end: then it is the last of them.
    """
    ended = [row for row in rows if "last" in row]
    if not ended:
        return {**rows[-1], "runs": len(rows)}
    found = {**ended[-1], "runs": len(ended), "least": {}, "most": {}}
    if len(rows) > len(ended):
        found["runs_failed"] = len(rows) - len(ended)
    for key in ended[-1].keys() - FACTS:
        values = [row[key] for row in ended if isinstance(row.get(key), int | float)]
        if values:
            found[key] = statistics.median(values)
            found["least"][key], found["most"][key] = min(values), max(values)
    return found


# --- beside each other -------------------------------------------------------------------

RATIOS = ("last", "cpu", "received", "sent_origin", "rss_worker")


def ratios(rows: Iterable[Row]) -> list[Row]:
    """p2pgrid's medians over each other system's of the same case.

    `least` and `most` are those of single runs, each over the other's run of the same number.
    """
    return [
        {"bench": "ratio", "case": case, "system": ours, "to": other, **_ratio(systems[ours], systems[other])}
        for case, systems in cases(rows).items()
        for ours in systems
        if ours.startswith("p2pgrid")
        for other in systems
        if not other.startswith("p2pgrid")
    ]


def _ratio(ours: Sequence[Row], theirs: Sequence[Row]) -> Row:
    mine, other = middle(ours), middle(theirs)
    found: Row = {k: round(mine[k] / other[k], 3) for k in RATIOS if other[k]}
    beside = {row.get("run"): row for row in theirs}
    pairs = [(row, beside[row.get("run")]) for row in ours if row.get("run") in beside]
    if len(pairs) > 1:
        spread = {k: [round(a[k] / b[k], 3) for a, b in pairs if b[k]] for k in found}
        found |= {"runs": len(pairs), "least": {k: min(v) for k, v in spread.items() if v}}
        found["most"] = {k: max(v) for k, v in spread.items() if v}
    return found
