"""Does the bench of two NATs punch, measure something sane, and leave nothing?"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.netns.lab import PREFIX, needs_namespaces
from tests.netns.spaces import SPACES

pytestmark = [
    needs_namespaces,
    pytest.mark.skipif(
        not shutil.which("iperf3"), reason="the bench compares with iperf3, which is not installed"
    ),
]

RATE = 100
"""Mbit/s: little, so that a busy machine keeps up."""


def bench(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench", "nat", *map(str, words)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left(process: subprocess.Popen[str]) -> list[str]:
    return [space.name for space in SPACES.glob(f"{PREFIX}{process.pid}-*")]


def test_figures_are_sane_and_nothing_remains():
    process = bench("--rates", RATE, "--seconds", 0.3, "--runs", 1)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    row, late = map(json.loads, out.splitlines())
    for key in ("public_mbit", "nat_mbit", "public_iperf3", "nat_iperf3"):
        assert 0 < row[key] < RATE * 1.1, "a line carries no more than it can"
    assert row["public_cpu"] > 0
    assert row["nat_cpu"] > 0
    assert (late["first_way"], late["way"]) == ("RELAYED", "PUNCHED")
    assert 2 * late["delay"] < late["first"] < late["direct"]
    assert left(process) == []


def test_an_interrupted_one_leaves_nothing():
    process = bench("--rates", RATE, "--seconds", 60)
    assert process.stderr is not None
    assert "public_mbit" in process.stderr.readline()  # it has begun
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert left(process) == []
