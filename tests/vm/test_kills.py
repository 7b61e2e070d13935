"""A short version of `bench/kills.py`: what is lost when daemons are killed with -9 is nothing."""

import shutil

import pytest

from bench.kills import kill_coordinators, kill_workers, losses

KILLS = 5


def test_a_fetching_worker_is_killed_at_random_moments():
    found = kill_workers(KILLS, seed=7, mib=128)
    assert losses(found) == {}
    assert found["kills"] == KILLS


@pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed")
def test_the_coordinator_is_killed_at_random_moments_of_jobs():
    found = kill_coordinators(KILLS, seed=7, tasks=8)
    assert losses(found) == {}
    assert found["tasks"] >= 8
