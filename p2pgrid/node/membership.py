"""Stay a member as others see it: renew in time, keep it on disk, end the links of who is out.

Stories; what they decide by is `standing.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import attrs
import structlog
import trio

from p2pgrid.errors import BadFrame, GridError
from p2pgrid.hole_punch.bulk import Link, Links
from p2pgrid.hole_punch.membership import MEMBERSHIP_MAX
from p2pgrid.hole_punch.switchboard import MEMBERSHIP
from p2pgrid.node.node import Node
from p2pgrid.node.standing import Standing
from p2pgrid.scheduler import messages as m

log = structlog.get_logger()

SHOWN = MEMBERSHIP.start
"""The message: here is my membership from now on."""
AGAIN_MIN, AGAIN_MAX = 1.0, 300.0
"""Seconds before a renewal is tried once more: doubled from the one to the other."""
SWEEP = 60.0
"""Seconds between looks at whether a live link's peer has shown a membership that is over."""


async def keep_membership(node: Node) -> None:
    """Ask for the next membership when half of this one's life is over; for ever."""
    standing, failures = node.standing, 0
    while True:
        seen = standing.changes
        wait = max(standing.renewal - standing.now(), 0.0)
        with trio.move_on_after(wait):  # without end where this is the coordinator
            await standing.beyond(seen)
            continue
        try:
            welcome = await node.coordinator.join("", node.config.name, node.config.shares, node.addresses)
        except GridError as away:
            log.info("the membership could not be renewed", why=str(away), ends=_ends(node))
            pause = min(AGAIN_MAX, AGAIN_MIN * 2.0**failures)
            failures += 1
        else:
            standing.welcome(welcome)
            pause, failures = AGAIN_MIN, 0
        seen = standing.changes
        with trio.move_on_after(pause):  # or as soon as the coordinator is heard again
            await standing.beyond(seen)


def _ends(node: Node) -> float | None:
    return node.standing.mine.ends if node.standing.mine is not None else None


async def keep_standing(node: Node) -> None:
    """Write down what was learned, and end links with who is no member any more; for ever."""
    standing = node.standing
    told = standing.shown
    while True:
        seen = standing.changes
        if standing.shown != told:
            told = standing.shown
            for link in node.exchange.links.live():
                link.send(bytes([SHOWN]), told)
        for peer, why in standing.over():
            for bar in standing.bars:
                bar(peer, why)
            for link in node.exchange.links.live():
                if link.peer == peer:
                    link.close(why)
        if standing.unsaved:
            try:
                await trio.to_thread.run_sync(standing.save)
            except OSError as full:
                log.warning("the membership could not be written down", why=str(full))
        with trio.move_on_after(SWEEP):
            await standing.beyond(seen)


def hear_renewals(links: Links, standing: Standing) -> None:
    """Take what peers show on live links in the place of what they showed first."""
    token = trio.lowlevel.current_trio_token()

    def heard(link: Link, shown: bytes) -> None:
        why = standing.allow(link.peer, shown)
        if why:
            link.close(why)

    links.serve(MEMBERSHIP, lambda link: _Renewals(link, heard, token))


@attrs.frozen
class _Renewals:
    """Takes a peer's new membership, in the links' thread; it is judged in trio's."""

    link: Link
    heard: Callable[[Link, bytes], None]
    token: trio.lowlevel.TrioToken

    def received(self, message: memoryview) -> None:
        if message[0] != SHOWN or len(message) > 1 + MEMBERSHIP_MAX:
            raise BadFrame(why="no membership")
        with contextlib.suppress(trio.RunFinishedError):
            self.token.run_sync_soon(self.heard, self.link, bytes(message[1:]))

    def drained(self) -> float | None:
        """Nothing waits here."""
        return None

    def left(self, why: str) -> None:
        """What it showed is remembered."""


async def heed(node: Node, orders: m.Orders) -> None:
    """Take the time and the revocations from `orders`; a list that does not come is asked for again."""
    node.standing.tell(orders.now)
    if orders.revocations != node.standing.revision:
        try:
            node.standing.revoke(await node.coordinator.revocations())
        except GridError as away:
            log.info("the revocations did not come", why=str(away))
