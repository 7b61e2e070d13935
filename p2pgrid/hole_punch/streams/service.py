"""Open streams to peers, and serve those that they open.

    async with open_streams(links, serve) as streams:
        flow = await streams.open(peer, target)      # Refused, Unreachable
        flow.attach(sock)                            # from now on its bytes are the other side's

`serve` is called for each stream that a peer opens: it returns the socket at which the target is, or raises
`Declined`.  What targets mean is for those above to say.  The bytes move in the links' threads (`flow.py`):
trio's hears of a stream's beginning only.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import ClassVar

import attrs
import structlog
import trio

from p2pgrid.errors import Unreachable, WorldError
from p2pgrid.hole_punch.bulk import Link, Links, Receiver
from p2pgrid.hole_punch.streams import mux
from p2pgrid.hole_punch.streams.carrier import Carrier
from p2pgrid.hole_punch.streams.flow import Flow
from p2pgrid.hole_punch.streams.messages import KINDS
from p2pgrid.hole_punch.streams.window import Pool
from p2pgrid.ids import PeerId

log = structlog.get_logger(__name__)

DIALS_MAX = 256
"""Targets being dialled at once for all peers."""
DIAL_PATIENCE = 15.0
"""Seconds to reach a target."""


@attrs.frozen(kw_only=True, slots=False)
class Declined(WorldError):
    """The other side does not connect this."""

    exit_code: ClassVar[int] = 9
    code: int
    """As SOCKS counts them: 1 failure, 2 not allowed, 3, 4 unreachable, 5 refused."""
    why: str


@attrs.frozen
class Request:
    """What a peer asks for."""

    peer: PeerId
    target: bytes
    flow: Flow


Serve = Callable[[Request], Awaitable[tuple[socket.socket, bytes]]]
"""The connected socket, non-blocking, and what the peer is answered.  Raises `Declined`, `OSError`."""


class Streams:
    """The streams of one node."""

    def __init__(
        self, links: Links, serve: Serve, datagrams: Callable[[bytes], bool], nursery: trio.Nursery
    ) -> None:
        self.links = links
        self.pool = Pool()
        self.lock = threading.Lock()
        self.datagrams = datagrams
        self._serve = serve
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._carriers: dict[Link, Carrier] = {}
        self._answers: dict[Flow, tuple[trio.Event, list[mux.Answered | mux.Declined | None]]] = {}
        self._dials = 0
        self._over = False

    def flows(self) -> list[Flow]:
        """Those under way, oldest first."""
        found = [flow for carrier in list(self._carriers.values()) for flow in list(carrier.flows.values())]
        return sorted(found, key=lambda flow: flow.since)

    async def open(self, peer: PeerId, target: bytes, who: str = "") -> Flow:
        """A stream to what `peer` knows as `target`; the caller bounds the wait, and gives it a socket.

        Raises `Declined`, `Unreachable`.
        """
        link = await self.links.link(peer)
        carrier = self._carrier(link)
        flow = carrier.open(target)
        flow.who = who
        heard = self._answers[flow] = trio.Event(), []
        try:
            if carrier.gone or not link.live:  # before it could hear of it
                self.left(link)
                raise Unreachable(who=peer, why=carrier.gone or "the link has just ended")
            await heard[0].wait()
        except BaseException:
            carrier.give_up(flow, "not wanted any more")
            raise
        finally:
            del self._answers[flow]
        match heard[1][0]:
            case mux.Declined(_, code, why):
                carrier.forget(flow)
                raise Declined(code=code, why=why)
            case None:
                raise Unreachable(who=peer, why=flow.why)
        return flow

    def close(self, flow: Flow, why: str) -> None:
        """End it, both ways."""
        flow.carrier.give_up(flow, why)

    # --- in the reactor's thread ----------------------------------------------------------

    def receive(self, link: Link) -> Receiver:
        return self._carrier(link)

    def _carrier(self, link: Link) -> Carrier:
        return self._carriers.get(link) or self._carriers.setdefault(link, Carrier(link, self))

    def left(self, link: Link) -> None:
        self._carriers.pop(link, None)

    def asked(self, flow: Flow) -> None:
        def begin() -> None:
            if not self._over:
                self._nursery.start_soon(self._answer, flow)

        self._soon(begin)

    def answered(self, flow: Flow, answer: mux.Answered | mux.Declined | None) -> None:
        def hear() -> None:
            if (heard := self._answers.get(flow)) is not None:
                heard[1].append(answer)
                heard[0].set()

        if flow.ours:
            self._soon(hear)

    def _soon(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(call)

    # --- the side that is asked -----------------------------------------------------------

    async def _answer(self, flow: Flow) -> None:
        carrier = flow.carrier
        if self._dials >= DIALS_MAX:
            return carrier.refuse(flow, 1, "too many connections are being made here")
        self._dials += 1
        try:
            with trio.fail_after(DIAL_PATIENCE):
                sock, answer = await self._serve(Request(carrier.link.peer, flow.target, flow))
        except Declined as no:
            log.info("a stream was refused", peer=carrier.link.peer, why=no.why)
            return carrier.refuse(flow, no.code, no.why)
        except trio.TooSlowError:
            return carrier.refuse(flow, 4, "it did not answer in time")
        except OSError as broken:
            code = 5 if isinstance(broken, ConnectionRefusedError) else 4
            return carrier.refuse(flow, code, broken.strerror or str(broken))
        finally:
            self._dials -= 1
        carrier.accept(flow, answer)
        flow.attach(sock)
        return None


@contextlib.asynccontextmanager
async def open_streams(
    links: Links, serve: Serve, datagrams: Callable[[bytes], bool] = lambda target: False
) -> AsyncIterator[Streams]:
    """Serve the streams that peers open, and open some, while inside; on leaving all of them are reset."""
    async with trio.open_nursery() as nursery:
        streams = Streams(links, serve, datagrams, nursery)
        links.serve(KINDS, streams.receive)
        try:
            yield streams
        finally:
            streams._over = True
            for flow in streams.flows():
                streams.close(flow, "the node stops")
            nursery.cancel_scope.cancel()
