"""Give tests the tiny template, built once and kept in the user's cache."""

from pathlib import Path

import pytest

from p2pgrid.errors import Misconfigured
from p2pgrid.vm.template import cached_template


def tiny_disk() -> Path:
    """The VDI; skips the test, with the reason, where packages cannot be had."""
    try:
        return cached_template("tiny")
    except Misconfigured as missing:
        pytest.skip(str(missing))
