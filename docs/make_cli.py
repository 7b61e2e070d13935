"""Write `docs/reference/cli.md`, or another file, from the commands: python docs/make_cli.py [FILE]"""

from __future__ import annotations

import sys
from pathlib import Path

from p2pgrid.cli.commands import app
from p2pgrid.node.commands import app as node

PAGE = Path(__file__).parent / "reference" / "cli.md"
OPENING = """# Commands

*Made by `python docs/make_cli.py` from the commands themselves; a test compares.*

`--data-dir` (or `P2PGRID_HOME`) holds everything of one daemon; without either it is `p2pgrid` in your
data folder (`$XDG_DATA_HOME`, `~/.local/share`). `put`, `get` and `run` start the daemon of that folder
if none runs, an embedded grid where nothing was set up. Sizes are `4096`, `512M`, `1.5GiB` (powers of
1024), durations `90s`, `15m`, `2h`, `1d`. What a program may want to read goes to stdout, everything else
to stderr. Exit codes: [exit-codes.md](exit-codes.md); `--json`: [json.md](json.md).

The lease of a grid (`p2pgrid coordinator --lease`) sets its other times: nodes tell the coordinator that
they are there six times in a lease, and one that is silent for two thirds of it counts as away.
"""


def page() -> str:
    """The whole page."""
    parts = [OPENING, *(a.generate_docs(output_format="markdown", heading_level=2) for a in (app, node))]
    lines = "\n".join(part.strip() + "\n" for part in parts).split("\n")
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    (Path(sys.argv[1]) if sys.argv[1:] else PAGE).write_text(page())
