"""Draw what `python -m bench` measured: one picture for each case, as PNG and SVG.

    python -m bench.plot [FILE.jsonl …] [--to DIR]     [the figures in docs/, drawn anew into docs/]

Rows of the same case and system are one bar, the median of them, with a line from the least to the most; a
system that was skipped or failed keeps its line, and says so.  What the figures mean: `bench/scenario.py`.

    tables.md              the same figures as tables
    swarm-DISK[-rateR…]    time to the last, CPU, bytes, memory; shaped: time to a whole copy's, copies sent
    update[-rateR…]        bytes each worker received, time, CPU: a bar for each new disk and N
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs

from bench.middle import middle
from bench.peers import PEERS

FIGURES = Path(__file__).parents[1] / "docs" / "explanation" / "figures"
OURS, OTHERS = ("#b2182b", "#ef8a62", "#fddbc7", "#f7d5c4"), ("#2166ac", "#67a9cf", "#b8d8ea", "#d5e6f0")
"""Colours of p2pgrid's bars and of everybody else's, for the first bar of a system, the second …"""
GAP = 3
Row = dict[str, Any]


@attrs.frozen
class Panel:
    """One quantity."""

    key: str
    title: str
    unit: float = 1.0
    ideal: float | None = None
    """Where a line is drawn: what nobody who sends the file as it is gets below."""


LAST = Panel("last", "seconds to the last")
CPU = Panel("cpu", "CPU s per delivered GiB")
RECEIVED = Panel("received", "MB received, each", 1e6)
MEMORY = Panel("rss_worker", "MiB at the peak, a worker")
COPIES = Panel("copies", "copies sent by the origin")
TO_FILE = Panel("to_file", "time to last ÷ (file ÷ rate)", ideal=1.0)


@attrs.define
class Picture:
    """The rows of one file that is drawn."""

    name: str
    title: str
    panels: Sequence[Panel]
    rows: list[tuple[str, Row]] = attrs.field(factory=list)
    """(what the bar is called among those of its system, row)"""


def pictures(rows: Iterable[Row]) -> list[Picture]:
    """What is to be drawn, in the order in which it was measured."""
    found: dict[str, Picture] = {}
    for row in rows:
        made = _picture(row)
        if made:
            picture, bar = made
            found.setdefault(picture.name, picture).rows.append((bar, row))
    return list(found.values())


def _picture(row: Row) -> tuple[Picture, str] | None:
    """The picture in which `row` is a bar, and the bar's name; None if it is in none."""
    if row.get("bench") not in ("swarm", "update"):
        return None
    shape = [f"{row[key]:g} {unit}" for key, unit in SHAPE if row.get(key)]
    suffix = "".join(f"-{key}{row[key]:g}" for key, _ in SHAPE if row.get(key))
    where = ", ".join(shape) or "unshaped"
    if row["bench"] == "update":
        bar = f"{Path(row['disk']).stem}, N = {row['workers']}"
        return Picture(f"update{suffix}", f"Update, {where}", (RECEIVED, LAST, CPU)), bar
    panels = (TO_FILE, COPIES, CPU) if row.get("rate") else (LAST, CPU, RECEIVED, MEMORY)
    size = f"{row['bytes'] / 1e6:.0f} MB"
    name = f"swarm-{Path(row['disk']).stem}{suffix}"
    return Picture(name, f"{size} to N workers, {where}", panels), f"N = {row['workers']}"


SHAPE = (
    ("rate", "Mbit/s both ways"),
    ("slow", "Mbit/s up for the first worker"),
    ("late", "s later the last worker"),
)


def plot(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Write NAME.png and NAME.svg of every picture into `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "p2pgrid"  # the same rows, the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for picture in pictures(rows):
        drawn = _draw(picture)
        for form in ("png", "svg"):
            out = folder / f"{picture.name}.{form}"
            drawn.savefig(out, dpi=110, metadata={"Date": None} if form == "svg" else {"Software": None})
            written.append(out)
        matplotlib.pyplot.close(drawn)
    return written


def _draw(picture: Picture) -> Any:
    from matplotlib import pyplot

    systems = sorted({row["system"] for _, row in picture.rows}, key=_place)
    bars = sorted({bar for bar, _ in picture.rows}, key=_natural)
    found = _medians(picture)
    height = 0.8 / len(bars)
    size = (3.4 * len(picture.panels) + 1.4, 1.1 + (0.2 * len(bars) + 0.16) * len(systems))
    figure, axes = pyplot.subplots(1, len(picture.panels), sharey=True, figsize=size, layout="constrained")
    for axis, panel in zip(axes, picture.panels, strict=True):
        most = _most([row[panel.key] / panel.unit for row in found.values() if panel.key in row])
        for line, system in enumerate(systems):
            for place, bar in enumerate(bars):
                if row := found.get((system, bar)):
                    at = line + (place - (len(bars) - 1) / 2) * height
                    _bar(axis, panel, row, at, height, most, place)
        if panel.ideal:
            axis.axvline(panel.ideal, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(panel.title, fontsize=9)
        axis.set_xlim(0, most * 1.2)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(systems)), systems)
    axes[0].invert_yaxis()
    figure.suptitle(f"{picture.title}   (bars from the top: {'; '.join(bars)})", fontsize=10)
    return figure


def _most(values: list[float]) -> float:
    """Where the axis ends: bars more than `GAP` times longer than all others are cut off, for their sake."""
    ranked = sorted(values)
    for shorter, longer in itertools.pairwise(ranked[len(ranked) // 2 :]):
        if longer > GAP * shorter > 0:
            return shorter
    return (ranked or [0])[-1] or 1.0


def _bar(axis: Any, panel: Panel, row: Row, at: float, height: float, most: float, place: int) -> None:
    value = row.get(panel.key)
    if value is None:
        why = "failed" if "failed" in row else "skipped" if "skipped" in row else "not counted"
        axis.text(most * 0.01, at, why, va="center", fontsize=6, color="grey")
        return
    colours = OURS if row["system"].startswith("p2pgrid") else OTHERS
    value /= panel.unit
    end = most * 1.08
    shown = min(value, end)
    axis.barh(at, shown, height * 0.92, color=colours[min(place, len(colours) - 1)])
    text = f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
    if row["runs"] > 1:
        least, farthest = (min(row[way][panel.key] / panel.unit, end) for way in ("least", "most"))
        axis.plot([least, farthest], [at, at], color="black", linewidth=0.8, marker="|", markersize=4)
        shown = max(shown, farthest)
    cut = "… " if end < value else ""
    axis.text(shown + most * 0.015, at, cut + text, va="center", fontsize=6.5)


def _medians(picture: Picture) -> dict[tuple[str, str], Row]:
    """One row for each (system, bar): the medians of those that came to an end, if any did."""
    every: dict[tuple[str, str], list[Row]] = {}
    for bar, row in picture.rows:
        every.setdefault((row["system"], bar), []).append(row)
    return {key: middle(rows) for key, rows in every.items()}


def _place(system: str) -> tuple[int, str]:
    """Systems stand in the order of the tables."""
    names = list(PEERS)
    return (names.index(system) if system in names else len(names), system)


def _natural(bar: str) -> tuple[str, int]:
    name, _, count = bar.rpartition("N = ")
    return name, int(count)


COLUMNS = (  # key, title, decimals, what one unit is
    ("publish", "publish s", 1, 1),
    ("last", "last s", 1, 1),
    ("cpu", "CPU s/GiB", 2, 1),
    ("received", "MB received", 1, 1e6),
    ("sent_origin", "MB origin sent", 1, 1e6),
    ("copies", "copies", 2, 1),
    ("rss_worker", "worker's peak MiB", 0, 1),
    ("to_file", "÷ file", 2, 1),
    ("to_wire", "÷ copy", 2, 1),
    ("load", "load", 0, 1),
)


def tables(rows: Iterable[Row]) -> str:
    """The same figures as a page of Markdown: medians, and how far apart the runs were."""
    page = ["# Tables\n\nWritten by `python -m bench.plot`; what they mean: [figures](../figures.md).\n"]
    for picture in pictures(rows):
        columns = [c for c in COLUMNS if any(c[0] in row for _, row in picture.rows)]
        page += [f"\n## {picture.title}\n", f"![]({picture.name}.svg)\n"]
        page.append("| | |" + "".join(f" {title} |" for _, title, _, _ in columns))
        page.append("|---|---|" + "---|" * len(columns))
        for (system, bar), row in _medians(picture).items():
            cells = [_cell(row, *column) for column in columns]
            why = row.get("skipped") or row.get("failed")
            cells = [f"{'skipped' if 'skipped' in row else 'failed'}: {_first(why)}"] if why else cells
            page.append(f"| {system} | {bar} | " + " | ".join(cells) + " |")
    return "\n".join(page) + "\n"


def _cell(row: Row, key: str, _: str, decimals: int, unit: float) -> str:
    """The figure, and behind it from where to where it went where there were several runs."""
    if key not in row:
        return ""
    said = f"{row[key] / unit:.{decimals}f}"
    if row["runs"] > 1 and key in row["least"]:
        least, most = (f"{row[way][key] / unit:.{decimals}f}" for way in ("least", "most"))
        said += f" ({least} to {most})" if least != most else ""
    return said


def _first(text: str) -> str:
    return text.splitlines()[0].replace("|", "/") if text else ""


def read(files: Iterable[Path]) -> list[Row]:
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line.strip()]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument(
        "files", type=Path, nargs="*", help="JSON lines [docs/explanation/figures/*.jsonl]"
    )
    arguments.add_argument("--to", type=Path, default=FIGURES, help="folder of the pictures")
    given = arguments.parse_args()
    rows = read(given.files or sorted(FIGURES.glob("*.jsonl")))
    for out in plot(rows, given.to):
        print(out)
    (given.to / "tables.md").write_text(tables(rows))


if __name__ == "__main__":
    main()
