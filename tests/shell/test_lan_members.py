"""Is the coordinator asked who is in a LAN as often as is needed, and not more?"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

import trio

from p2pgrid.errors import NotFound
from p2pgrid.hole_punch.lan.segment import MTU
from p2pgrid.hole_punch.link import Link, Receive
from p2pgrid.hole_punch.reactor import Reactor
from p2pgrid.ids import Cid, PeerId
from p2pgrid.node.lan import CURIOUS, PERIOD, PERIOD_EACH, Lans, open_lans
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.client import Calls
from p2pgrid.scheduler.job import JobSpec

ME, ANN = PeerId("me"), PeerId("ann")
DISK = str(Cid(0x71, bytes(32)))


class Told(Calls):
    """A coordinator that tells what it is set to tell, and notes when it was asked."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.neighbourhood: tuple[m.Neighbour, ...] | None = ()

    async def _call(self, request: m.Request) -> m.Reply:
        assert request == m.Neighbours("job1")
        await trio.lowlevel.checkpoint()
        self.asked.append(trio.current_time())
        if self.neighbourhood is None:
            return m.failure(NotFound(what="job1"))
        return m.NeighbourList(self.neighbourhood)


class Nowhere:
    """Links that lead nowhere, with a real reactor."""

    def __init__(self) -> None:
        self._reactor = Reactor()

    def serve(self, kinds: range, receive: Receive) -> None:
        pass

    async def link(self, peer: PeerId) -> Link:
        await trio.sleep_forever()
        raise AssertionError

    def reactor(self) -> Reactor:
        return self._reactor


def grant(index: int) -> m.Grant:
    spec = JobSpec(DISK, array=(4, 7, 9), lan=True)
    disk = m.Wanted(DISK, "disk", None, 1, "job")
    return m.Grant(f"job1.{index}", 1, "job1", index, spec, "sub", 30.0, disk)


@contextlib.asynccontextmanager
async def open_scene(told: Told) -> AsyncIterator[tuple[Lans, dict[PeerId, Sequence[str]]]]:
    roads, learned = Nowhere(), dict[PeerId, Sequence[str]]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, roads.reactor().run)
        async with open_lans(ME, roads, told, learned.__setitem__) as lans:
            yield lans, learned
        roads.reactor().stop()


async def test_members_are_asked_for_at_once_and_then_now_and_then(autojump_clock):
    told = Told()
    told.neighbourhood = (m.Neighbour("ann", ("/a",), (7, 9, 8)), m.Neighbour("me", (), (4,)))
    async with open_scene(told) as (lans, learned), lans.plug(grant(4)) as cable:
        assert (cable.mac, cable.mtu) == ("02:70:32:00:00:00", MTU)
        began = trio.current_time()
        await trio.sleep(3 * (CURIOUS + PERIOD + PERIOD_EACH))
        gaps = [round(at - began, 3) for at in told.asked]
        assert gaps == [0.0, *(round(n * (CURIOUS + PERIOD + PERIOD_EACH), 3) for n in (1, 2))]
        assert learned == {ANN: ("/a",)}, "of itself it learns nothing"
        switch = lans.lan._groups["job1"].switch
        assert switch.nodes == (ANN,)
        assert switch._nodes[ANN] == {1, 2}, "places, of the tasks that the job has"


async def test_a_stranger_has_it_asked_soon_and_no_storm_of_them_more_often(autojump_clock):
    told = Told()
    async with open_scene(told) as (lans, _), lans.plug(grant(4)):
        await trio.sleep(5)
        for _ in range(50):
            lans.wonder("job1")
            await trio.sleep(CURIOUS / 10)
        assert 5 <= len(told.asked) - 1 <= 6
        lans.wonder("another")


async def test_where_nobody_tells_it_stays_as_it_was(autojump_clock):
    told = Told()
    told.neighbourhood = (m.Neighbour("ann", (), (7,)),)
    async with open_scene(told) as (lans, _), lans.plug(grant(4)):
        await trio.sleep(1)
        told.neighbourhood = None
        await trio.sleep(3 * PERIOD)
        assert len(told.asked) >= 3
        assert lans.lan._groups["job1"].switch.nodes == (ANN,)


async def test_nothing_is_left_when_the_last_guest_is_unplugged(autojump_clock):
    told = Told()
    async with open_scene(told) as (lans, _):
        async with lans.plug(grant(4)), lans.plug(grant(7)):
            await trio.sleep(1)
        assert lans.lan.groups == ()
        assert not lans._strange
        asked = len(told.asked)
        await trio.sleep(5 * PERIOD)
        assert len(told.asked) == asked
