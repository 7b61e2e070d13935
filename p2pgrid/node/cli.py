"""`p2pnode`: lend this computer to a grid, and keep the say over it."""

from __future__ import annotations

import sys

from p2pgrid.node.door import enter


def main() -> int:
    """The console script."""
    return enter("p2pnode", "p2pgrid.node.commands")


if __name__ == "__main__":
    sys.exit(main())
