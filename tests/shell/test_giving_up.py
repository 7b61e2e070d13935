"""Is every link that has no connection either given another one or given up, whatever happens meanwhile?"""

from __future__ import annotations

from typing import cast

import pytest
import trio
from trio.testing import MockClock

from p2pgrid.errors import Unreachable
from p2pgrid.hole_punch.keeping import COME_BACK, Keeping
from p2pgrid.hole_punch.link import Link
from p2pgrid.ids import PeerId


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


class Lost:
    """What `Keeping` needs of a link; its connections are numbers."""

    peer = PeerId("b")

    def __init__(self) -> None:
        self.path, self.connected, self.why = 1, False, ""

    @property
    def live(self) -> bool:
        return not self.why

    def close(self, why: str) -> None:
        self.why = why


@pytest.mark.parametrize("lost_again", [False, True])
async def test_a_connection_that_came_and_went_while_others_are_dialled(
    lost_again: bool, autojump_clock: MockClock
) -> None:
    """The peer brings one while we dial in vain; where it is lost, too, nobody else would look for one."""
    link, dialled = Lost(), 0

    async def regain(_: Link) -> None:
        nonlocal dialled
        dialled += 1
        await trio.sleep(1)
        if dialled == 1:  # meanwhile the peer's came
            link.path, link.connected = 2, not lost_again
            keeping.regain(cast(Link, link))  # as is told when it is lost
        await trio.sleep(1)
        raise Unreachable(who=link.peer, why="nobody there")

    async def arrival(_: PeerId) -> None:
        await trio.sleep_forever()

    with trio.fail_after(10 * COME_BACK):
        async with trio.open_nursery() as nursery:
            keeping = Keeping(list, regain, arrival, nursery)
            keeping.regain(cast(Link, link))
    assert link.why == ("nobody there" if lost_again else "")
    assert dialled == 1 + lost_again
