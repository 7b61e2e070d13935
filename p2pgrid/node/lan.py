"""Plug the guest of a lease into its job's LAN, and keep up who else is in it.

The coordinator says which nodes run tasks of the job, and nobody else is heard (`hole_punch/lan`).
It is asked when a guest is plugged in, again when a stranger speaks, for that one may just have been
granted a task, and now and then, for others may have ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

import attrs
import structlog
import trio

from p2pgrid.errors import GridError
from p2pgrid.hole_punch.lan.lan import Lan, Roads, open_lan
from p2pgrid.hole_punch.lan.segment import MTU, Segment, mac_of, text_of_mac
from p2pgrid.hole_punch.lan.uplink import Accepted
from p2pgrid.ids import PeerId
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.client import Calls
from p2pgrid.vm.guest import Cable

log = structlog.get_logger(__name__)

CURIOUS = 1.0
"""Seconds between two questions who is in a group, however many strangers speak."""
PERIOD = 10.0
"""Seconds after which it is asked again anyway, in a small group;"""
PERIOD_EACH = 0.2
"""and for each node of the group so many more, so that the coordinator has no more to tell in a large one."""

Learn = Callable[[PeerId, Sequence[str]], None]


@attrs.define(eq=False)
class Lans:
    """The LANs in which this node has guests; see `open_lans`."""

    _me: PeerId
    _calls: Calls
    _learn: Learn
    lan: Lan = attrs.field(init=False)
    _strange: dict[str, trio.Event] = attrs.field(factory=dict)
    """By job that has a guest here: set when a stranger speaks."""

    def wonder(self, group: str) -> None:
        if group in self._strange:
            self._strange[group].set()

    @contextlib.asynccontextmanager
    async def plug(self, grant: m.Grant, accepted: Accepted | None = None) -> AsyncIterator[Cable]:
        """The cable for the guest of `grant`, while inside; `accepted` takes its connections to this node."""
        segment = Segment(grant.job, grant.spec.array)
        place = segment.place(grant.index)
        assert place is not None
        try:
            async with self.lan.plug(segment, place, accepted) as far, trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_members, segment)
                yield Cable(socket=far, mac=text_of_mac(mac_of(place)), mtu=MTU)
                nursery.cancel_scope.cancel()
                log.info("unplugged from a LAN", task=grant.task, frames=dict(self.lan.counts(grant.job)))
        finally:
            if segment.group not in self.lan.groups:
                self._strange.pop(segment.group, None)

    async def _keep_members(self, segment: Segment) -> None:
        """Tell the switch who is in the group, for ever."""
        nodes = 0
        while True:
            strange = self._strange[segment.group] = trio.Event()
            try:
                nodes = self._introduce(segment, await self._calls.neighbours(segment.group))
            except GridError as away:
                log.debug("who is in a LAN was not told", job=segment.group, why=str(away))
            await trio.sleep(CURIOUS)
            with trio.move_on_after(PERIOD + PERIOD_EACH * nodes):
                await strange.wait()

    def _introduce(self, segment: Segment, neighbours: Sequence[m.Neighbour]) -> int:
        members: dict[PeerId, list[int]] = {}
        for neighbour in neighbours:
            peer = PeerId(neighbour.peer)
            if peer != self._me:
                self._learn(peer, neighbour.addresses)
                places = map(segment.place, neighbour.indices)
                members[peer] = [place for place in places if place is not None]
        self.lan.set_members(segment.group, members)
        return len(members)


@contextlib.asynccontextmanager
async def open_lans(me: PeerId, links: Roads, calls: Calls, learn: Learn) -> AsyncIterator[Lans]:
    """LANs over `links` while inside; every guest is unplugged before."""
    lans = Lans(me, calls, learn)
    async with open_lan(links, lans.wonder) as lans.lan:
        yield lans
