"""`p2pgrid`: put disks on the grid, run them, bring results home.

A thin client of the daemon behind `--data-dir`: it imports neither trio nor libp2p.
With no daemon there, the commands that need one start an embedded grid and say so.
"""

from __future__ import annotations

from p2pgrid.node.door import enter


def main() -> int:
    """The console script."""
    return enter("p2pgrid", "p2pgrid.cli.commands")
