"""Do workers at home, who come and go, get a disk nearly as fast as a liquid would?"""

from __future__ import annotations

from tests.sim.swarm_homes import Homes
from tests.sim.test_swarm_sim import each_seed


@each_seed
def test_many_at_home_come_near_the_fluid_limit(seed):
    times = Homes(seed, 80).play()
    print(f"seed {seed}: {times}")
    assert times.last < 1.3 * times.limit
    assert times.doubled < 0.02
