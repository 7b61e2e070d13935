"""Build the realistic disk of the benchmarks: Debian with compilers, about 1 GiB of data as a VDI.

    python bench/disk_1g.py

It is built once, unattended, from the machine's own package sources (minutes), and kept in
the cache of templates; the path of the VDI goes to stdout.
"""

from __future__ import annotations

import sys
from pathlib import Path

from p2pgrid.vm.template import cached_template

PACKAGES = ("gcc", "g++", "gfortran", "libc6-dev", "make", "clang", "git", "vim", "python3-numpy")


def disk_1g() -> Path:
    """The VDI; telling on stderr what is being done while it is built."""
    return cached_template(
        "debian",
        packages=PACKAGES,
        progress=lambda what, done, total: print(f"disk: {done}/{total} {what}", file=sys.stderr),
    )


if __name__ == "__main__":
    print(disk_1g())
