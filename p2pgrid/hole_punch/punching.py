"""Have relayed links of a node punched: hear of their paths, and signal over them.

Links.paths ──a link's new path──> relayed | settled ──> Puncher
Links.serve ──messages 40 to 47──> heard, gone       ──>
Links.admit ──connections────────> admit             ──>
Links.bring <───────────────────── what was punched
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Sequence

import attrs
import structlog
import trio

from p2pgrid.errors import Unreachable
from p2pgrid.hole_punch.bulk import Links
from p2pgrid.hole_punch.link import Link
from p2pgrid.hole_punch.path import Address, Way
from p2pgrid.hole_punch.punch_messages import MAGIC, decode
from p2pgrid.hole_punch.puncher import Puncher, open_puncher
from p2pgrid.hole_punch.switchboard import PUNCHING
from p2pgrid.ids import PeerId

log = structlog.get_logger(__name__)


@attrs.frozen
class _Node:
    """The `Ground` that a node's links are."""

    me: PeerId
    links: Links

    @property
    def bound(self) -> Sequence[Address]:
        return self.links.bound

    def observed(self) -> Sequence[Address]:
        return [seen for peer, seen in self.links.observed.items() if peer in self.links.observers]

    def mapped(self) -> Sequence[Address]:
        return self.links.mapped

    def tell(self, peer: PeerId, message: bytes) -> None:
        for link in self.links.live():
            if link.peer == peer:
                link.send(message)

    async def bring(self, sock: socket.socket, peer: PeerId, *, accepts: bool) -> bool:
        try:
            await self.links.bring(sock, peer, Way.PUNCHED, accepts=accepts)
        except (Unreachable, OSError) as wrong:
            log.debug("a punched connection came to nothing", peer=peer, why=str(wrong))
            return False
        return True


@attrs.frozen(eq=False)
class _Ear:
    """What one link's peer says of punching; a `Receiver`, so in a reactor's thread."""

    link: Link
    puncher: Puncher
    gone: Callable[[Link], None]
    token: trio.lowlevel.TrioToken

    def received(self, message: memoryview) -> None:
        self.token.run_sync_soon(self.puncher.heard, self.link.peer, decode(bytes(message)))

    def drained(self) -> float | None:
        return None

    def left(self, why: str) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self.token.run_sync_soon(self.gone, self.link)


@contextlib.asynccontextmanager
async def open_punching(links: Links, me: PeerId) -> AsyncIterator[Puncher]:
    """Have links of `me` that are relayed punched while inside; once for an object of `Links`."""
    token = trio.lowlevel.current_trio_token()
    async with open_puncher(_Node(me, links)) as puncher:

        def moved(link: Link) -> None:
            if link.peer in links.observers:
                puncher.look()  # it has told where it sees us
            (puncher.relayed if link.way is Way.RELAYED else puncher.settled)(link.peer)

        def left(link: Link) -> None:
            if all(other.peer != link.peer for other in links.live()):
                puncher.gone(link.peer)

        def receive(link: Link) -> _Ear:
            return _Ear(link, puncher, left, token)

        links.admit(MAGIC, puncher.admit)
        links.serve(PUNCHING, receive)
        links.paths.append(moved)
        for link in links.live():
            moved(link)
        try:
            yield puncher
        finally:
            links.paths.remove(moved)
