"""Is a sleep noticed after it, and are changes that nobody took yet told as one?"""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2pgrid.hole_punch.netlink import Route
from p2pgrid.hole_punch.netwatch import LOOK, Net, open_netwatch

HOME = Net(frozenset(["10.0.0.7"]), Route("10.0.0.1", "10.0.0.7", 2))
CAFE = Net(frozenset(["10.9.0.7"]), Route("10.9.0.1", "10.9.0.7", 2))


class World:
    """What the operating system says."""

    def __init__(self) -> None:
        self.net, self.asleep = HOME, 0.0

    def clocks(self) -> tuple[float, float]:
        return trio.current_time(), trio.current_time() + self.asleep

    def look(self) -> Net:
        return self.net


async def test_a_computer_that_slept_says_so(autojump_clock: trio.testing.MockClock) -> None:
    world = World()
    async with open_netwatch(world.clocks, world.look) as changes:
        await trio.sleep(100)
        with pytest.raises(trio.WouldBlock):
            changes.receive_nowait()
        world.asleep, at = 3600.0, trio.current_time()
        change = await changes.receive()
        assert (change.before, change.after) == (HOME, HOME)
        assert change.slept == pytest.approx(3600)
        assert trio.current_time() - at <= LOOK


async def test_changes_that_nobody_took_are_told_as_one(autojump_clock: trio.testing.MockClock) -> None:
    world = World()
    async with open_netwatch(world.clocks, world.look) as changes:
        world.asleep, world.net = 60.0, Net()
        await trio.sleep(2 * LOOK)
        world.net = CAFE
        await trio.sleep(2 * LOOK)
        change = changes.receive_nowait()
        assert (change.before, change.after) == (HOME, CAFE)
        assert change.slept == pytest.approx(60)
        with pytest.raises(trio.WouldBlock):
            changes.receive_nowait()
