"""Does kill -9 at any moment cost at most what was in flight?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("what", ["put", "put a delta", "publish", "publish a delta", "promote"])
def test_nothing_is_lost_and_nothing_is_half(what, tmp_path):
    command = [sys.executable, "-m", "tests.shell.killed_store", what, str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
