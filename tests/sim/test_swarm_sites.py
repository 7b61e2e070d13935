"""Do bytes cross the line of a home or a lab once, and spread inside?"""

from __future__ import annotations

import pytest

from tests.sim.swarm_sites import LAN, Sites
from tests.sim.swarm_world import MBIT, Nature
from tests.sim.test_swarm_sim import each_seed

SIZE = 60 << 20

LINES = {
    "homes": {"origin": 100 * MBIT, "up": 10 * MBIT, "down": 50 * MBIT},
    "equal-lines": {"origin": 20 * MBIT, "up": 20 * MBIT, "down": 20 * MBIT},
    "labs-of-a-fast-origin": {"origin": 1000 * MBIT, "up": 5 * MBIT, "down": 50 * MBIT, "sites": 3},
}


@each_seed
@pytest.mark.parametrize("lines", LINES.values(), ids=LINES)
def test_a_site_has_about_one_copy_across_its_line(seed, lines):
    world = Sites(seed, SIZE, **lines)
    last = world.play()
    print(f"seed {seed}: {world}")
    size = sum(world.lengths)
    assert last < 1.2 * world.ideal()
    assert all(site.came < 1.15 * size for site in world.sites)
    assert all(site.went < 1.15 * size for site in world.sites)


@each_seed
def test_a_slow_lan_holds_nobody_up(seed):
    """Network cards of 4 Mbit/s among themselves, and a line of 200: neighbours are clearly slower."""
    times = [
        Sites(seed, 20 << 20, origin=200 * MBIT, down=200 * MBIT, lan=4 * MBIT, sites=1, knows=knows).play()
        for knows in (False, True)
    ]
    print(f"seed {seed}: {times[0]:.1f} s without, {times[1]:.1f} s with knowing who is near")
    assert times[1] < 1.3 * times[0] + 1


@each_seed
def test_neighbours_who_claim_all_and_never_answer_hold_nobody_up(seed):
    world = Sites(seed, 20 << 20)
    for number in range(4):
        mute = world.add(f"mute{number}", Nature(answers=False, claims_all=True))
        world.site_of[mute] = world.sites[number % 2]
        world.at(0.0, world.arrive, mute, world.origin)
    last = world.play()
    print(f"seed {seed}: {world}")
    assert last < 2.5 * world.ideal() + 2


@each_seed
def test_neighbours_who_fetch_nothing_are_not_waited_for(seed):
    """They have a little, and bring no more: their share is asked by the others."""
    world = Sites(seed, 20 << 20)
    for number in range(4):
        idle = world.add(f"idle{number}", LAN)
        idle.swarm = None
        idle.have[number] = 1
        world.site_of[idle] = world.sites[number % 2]
        world.at(0.0, world.arrive, idle, world.origin)
    last = world.play()
    print(f"seed {seed}: {world}")
    assert last < 2 * world.ideal() + 12, "the time that they are counted on"
