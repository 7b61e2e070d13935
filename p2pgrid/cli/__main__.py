"""Run `p2pgrid` as `python -m p2pgrid.cli`."""

import sys

from p2pgrid.cli import main

if __name__ == "__main__":
    sys.exit(main())
