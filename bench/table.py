"""Show rows to the person who watches: one line each, the same columns for all.  Pure."""

from __future__ import annotations

from typing import Any

MB = 1e6
COLUMNS = (  # key, title, width, decimals, what one unit is
    ("publish", "publish s", 10, 2, 1),
    ("first", "first s", 9, 2, 1),
    ("median", "median", 8, 2, 1),
    ("last", "last", 8, 2, 1),
    ("cpu", "CPU s/GiB", 10, 2, 1),
    ("received", "MB/worker", 10, 1, MB),
    ("sent_origin", "MB origin", 10, 1, MB),
    ("copies", "copies", 7, 2, 1),
    ("origin_idle", "idle", 6, 2, 1),
    ("rss_origin", "MiB orig.", 10, 0, 1),
    ("rss_worker", "worker", 7, 0, 1),
    ("to_file", "÷file", 7, 2, 1),
    ("to_wire", "÷copy", 7, 2, 1),
)


def head() -> str:
    return f"{'system':<20}{'N':>3}" + "".join(f"{title:>{width}}" for _, title, width, _, _ in COLUMNS)


def line(row: dict[str, Any]) -> str:
    begin = f"{row['system']:<20}{row.get('workers', ''):>3}"
    if lacking := _lacking(row):
        return f"{begin}  {lacking}"
    cells = (
        f"{row[key] / unit:>{width}.{decimals}f}" if key in row else " " * (width - 1) + "-"
        for key, _, width, decimals, unit in COLUMNS
    )
    return begin + "".join(cells) + _spread(row)


def _spread(row: dict[str, Any]) -> str:
    """From where to where the runs of a median went."""
    if row.get("runs", 1) == 1:
        return ""
    least, most = row["least"], row["most"]
    said = f"   last {least['last']:.2f} to {most['last']:.2f}, CPU {least['cpu']:.2f} to {most['cpu']:.2f}"
    return said + (f"; {row['runs_failed']} more failed" if "runs_failed" in row else "")


def _lacking(row: dict[str, Any]) -> str:
    """Why a row has no figures, on one line; empty where it has."""
    for why in ("skipped", "failed"):
        if why in row:
            said = row[why].splitlines()
            kept = f" (logs in {row['logs']})" if "logs" in row else ""
            return f"{why}: {said[0]}" + (f" … {said[-1].strip()}" if said[1:] else "") + kept
    return ""


def title(row: dict[str, Any]) -> str:
    """What the rows of one case have in common."""
    shape = f"{row['rate']:g} Mbit/s both ways" if "rate" in row else "unshaped"
    more = f", the first worker sends at {row['slow']:g}" if "slow" in row else ""
    more += f", the last worker {row['late']:g} s late" if "late" in row else ""
    return f"{row['bench']}: {row['disk']}, {row['bytes'] / MB:.1f} MB to {row['workers']}, {shape}{more}"


PUBLISH_HEAD = f"{'system':<20}{'what':<8}{'seconds':>9}{'CPU s':>8}{'MB/s':>8}"


def publish_line(row: dict[str, Any]) -> str:
    if lacking := _lacking(row):
        return f"{row['system']:<20}{lacking}"
    speed = row["bytes"] / MB / row["seconds"]
    return f"{row['system']:<20}{row['what']:<8}{row['seconds']:>9.2f}{row['cpu_seconds']:>8.2f}{speed:>8.0f}"
