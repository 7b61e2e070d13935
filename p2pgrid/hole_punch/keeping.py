"""Notice paths that nothing comes through any more, and have links go on over others.

    a link's path is quiet ──> a probe ──no echo──> another connection is looked for, the old one watched on
    a link's path ends ──────────────────────────> the same
    nobody is found, and nobody comes ──────────> the link ends
    a link is silent for `GONE` seconds ────────> the link ends: whoever uses it is told that the peer is dead

A peer that cannot be dialled by us may dial us: so a link that has no path waits a moment before it is given
up.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs
import trio

from p2pgrid.errors import Unreachable
from p2pgrid.hole_punch.link import Link
from p2pgrid.ids import PeerId

LOOK = 1.0
"""Seconds between two looks at all links."""
QUIET = 3.0
"""Seconds without a byte after which a path is probed."""
QUIET_IDLE = 15.0
"""The same where nothing was sent or received for `IDLE` seconds."""
IDLE = 60.0
ECHO = 3.0
"""Seconds until a probe's echo, after which a path is a black hole: with what comes before less than ten."""
AGAIN = 8.0
"""Seconds until another way is looked for again."""
GONE = 26.0
"""Seconds without a byte after which the peer is dead: its streams are reset within half a minute, and there
was time to look for another way."""
COME_BACK = 5.0
"""Seconds that a link without a path waits for its peer, which may know a way to us."""


@attrs.define
class Vigil:
    """What one link's path has shown lately.  Pure."""

    path: object = None
    heard: int = -1
    sent: int = -1
    heard_at: float = 0.0
    moved_at: float = 0.0
    """When more than probes and echoes came or went."""
    probed_at: float | None = None
    looked_at: float | None = None
    at: float = 0.0
    """When it was asked last."""

    def look(self, heard: int, sent: int, now: float) -> str:
        """What is to be done at `now`: "probe", "regain", "give up", or nothing.

        `heard` and `sent` are bytes in all.
        """
        if now - self.at > QUIET:  # we stood still ourselves: that is not the peer's silence
            self.heard_at = max(self.heard_at, now - QUIET_IDLE)
            self.probed_at = self.looked_at = None
        self.at = now
        if heard - self.heard > 64 or sent - self.sent > 64 or self.heard < 0:
            self.moved_at = now
        self.sent = sent
        if heard != self.heard:
            self.heard, self.heard_at = heard, now
            self.probed_at = self.looked_at = None
            return ""
        if self.probed_at is None:
            quiet = QUIET_IDLE if now - self.moved_at > IDLE else QUIET
            if now - self.heard_at < quiet:
                return ""
            self.probed_at = now
            return "probe"
        if self.looked_at is not None and now - self.heard_at >= GONE:
            return "give up"
        if now - self.probed_at < ECHO or (self.looked_at is not None and now - self.looked_at < AGAIN):
            return ""
        self.looked_at = now
        return "regain"


class Keeping:
    """Looks after the paths of one node's links."""

    def __init__(
        self,
        links: Callable[[], list[Link]],
        regain: Callable[[Link], Awaitable[None]],
        arrival: Callable[[PeerId], Awaitable[object]],
        nursery: trio.Nursery,
    ) -> None:
        """`regain` makes a connection for a link, or raises `Unreachable`; `arrival` waits for the peer's."""
        self._links = links
        self._arrival = arrival
        self._regain = regain
        self._nursery = nursery
        self._vigils: dict[Link, Vigil] = {}
        self._at_it: set[Link] = set()

    async def watch(self) -> None:
        while True:
            await trio.sleep(LOOK)
            now, links = trio.current_time(), self._links()
            self._vigils = {link: self._vigil(link) for link in links if link.live}
            for link, vigil in self._vigils.items():
                if link.connected:
                    match vigil.look(link.heard, link.sent, now):
                        case "probe":
                            link.probe()
                        case "regain":
                            self.regain(link)
                        case "give up":
                            link.close(f"nothing came from the peer for {GONE:.0f} s")

    def _vigil(self, link: Link) -> Vigil:
        """Of its connection: another one is looked at anew, as the peer was there to make it."""
        vigil = self._vigils.get(link)
        return vigil if vigil is not None and vigil.path is link.path else Vigil(link.path)

    def doubt(self) -> None:
        """Have every path show now whether it still works: the network may have changed."""
        for link, vigil in self._vigils.items():
            if link.live and link.connected and vigil.probed_at is None:
                vigil.probed_at = trio.current_time()
                link.probe()

    def regain(self, link: Link) -> None:
        """Look for another connection for `link`."""
        if link.live and link not in self._at_it:
            self._at_it.add(link)
            self._nursery.start_soon(self._look_for, link)

    async def _look_for(self, link: Link) -> None:
        try:
            path = None
            while link.path is not path:  # one that came meanwhile may be lost by now, too
                path, why = link.path, await self._try(link)
                if link.live and not link.connected:
                    with trio.move_on_after(COME_BACK):
                        await self._arrival(link.peer)
                if not link.live or link.connected:
                    return
            link.close(why or "its connection was lost")
        finally:
            self._at_it.discard(link)

    async def _try(self, link: Link) -> str:
        """Look once; why there is no connection."""
        try:
            await self._regain(link)
        except Unreachable as gone:
            return gone.why
        return ""
