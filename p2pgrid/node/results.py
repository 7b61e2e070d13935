"""Say whether a folder can take a job's results, before they are made."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from p2pgrid.errors import Conflict


def check_free(folder: Path, indices: Iterable[int]) -> None:
    """Raise `Conflict` where `folder` is no folder, or has something where a task's result belongs."""
    advice = "name another folder with -o"
    if folder.exists() and not folder.is_dir():
        raise Conflict(what=f"{folder}, which is no folder; {advice}")
    if folder.exists():
        there = {entry.name for entry in folder.iterdir()}
        for index in indices:
            if str(index) in there:
                raise Conflict(what=f"{folder / str(index)}; {advice}")
