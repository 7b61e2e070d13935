"""Put the relaying of one node together: the relay that it may be, and the relays that it uses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs
import structlog
import trio

from p2pgrid.hole_punch.bulk import Links
from p2pgrid.hole_punch.link import Link
from p2pgrid.hole_punch.relay.client import Relays
from p2pgrid.hole_punch.relay.messages import KINDS, MAGIC, Connect, Decline, Release, Reserve, decode
from p2pgrid.hole_punch.relay.service import RelayService
from p2pgrid.ids import PeerId

log = structlog.get_logger(__name__)


@attrs.frozen
class Relaying:
    """Both sides of one node."""

    service: RelayService
    """The relay that this node is, once it is opened."""
    relays: Relays
    """Those it uses."""


@attrs.frozen
class _Receiver:
    """What one link brings of it."""

    link: Link
    both: Relaying

    def received(self, message: memoryview) -> None:
        match decode(message):
            case None:
                log.debug("a message of a later version", peer=self.link.peer, kind=message[0])
            case Reserve() | Release() | Connect() | Decline() as asked:
                self.both.service.said(self.link, asked)
            case told:
                self.both.relays.told(self.link, told)

    def drained(self) -> None:
        return None

    def left(self, why: str) -> None:
        self.both.service.left(self.link)
        self.both.relays.left(self.link, why)


@asynccontextmanager
async def open_relaying(
    links: Links, me: PeerId, allow: Callable[[PeerId], str] = lambda peer: ""
) -> AsyncIterator[Relaying]:
    """Use relays while inside, and be one once `service.open` was called.

    `allow` says why a peer is no member, empty where it is; any thread may call it.
    """
    async with trio.open_nursery() as nursery:
        service = RelayService(allow, (links.rates.up, links.rates.down))
        relays = Relays(links, me, nursery)
        both = Relaying(service, relays)
        nursery.start_soon(_be_thread, service)
        try:
            links.serve(KINDS, lambda link: _Receiver(link, both))
            links.admit(MAGIC, service.admit)
            links.dial_circuit = relays.dial
            nursery.start_soon(relays.keep)
            yield both
        finally:
            relays.over = True
            links.dial_circuit = None
            links.circuits.clear()
            service.stop()
            nursery.cancel_scope.cancel()


async def _be_thread(service: RelayService) -> None:
    """Have the relay's thread until it is stopped."""
    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(service.run, limiter=trio.CapacityLimiter(1))
