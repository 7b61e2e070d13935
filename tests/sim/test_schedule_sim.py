"""Does a grid of 200 volunteers that come, go and die finish its job, each task recorded once?"""

from __future__ import annotations

import pytest

from p2pgrid.scheduler.job import FINAL
from tests.sim.grid_world import GridWorld

HOURS = 3600.0


@pytest.mark.parametrize(("seed", "tasks"), [(1, 1200), (2, 600)])
def test_200_volunteers_with_churn(seed, tasks):
    world = GridWorld(seed, volunteers=200, tasks=tasks, restarts=1)
    world.run(3 * HOURS)
    tasks = world.history.schedule.work.tasks
    assert world.finished, {t.state for t in tasks.values()}
    assert {t.state for t in tasks.values()} == {"completed"} <= FINAL
    assert set(world.recorded) == set(tasks), "a result was lost"
    assert world.seen["recorded twice"] == 0
    for id_, (epoch, datum) in world.recorded.items():
        assert (tasks[id_].epoch, tasks[id_].tree.datum) == (epoch, datum)
    # The weather was bad enough to mean something.
    assert world.seen["lapsed"] > 20
    assert world.seen["fenced"] > 5
    assert world.seen["restarts"] == 1
    world.history.schedule.check()


def test_the_same_seed_gives_the_same_trace():
    traces = []
    for seed in (7, 7, 8):
        world = GridWorld(seed, volunteers=30, tasks=100, restarts=1)
        world.run(HOURS)
        assert world.finished
        traces.append(world.trace.hexdigest())
    assert traces[0] == traces[1] != traces[2]
