"""Give a guest that has a LAN its way to the grid, and the grid its way to the guest.

    guest ── 8000.owner.grid, any port of a name ──> the name's own address in the LAN ──┐
    guest ── 10.77.0.1:1080, SOCKS5 without a password: only it is there ───────────────┼──> proxy
    proxy ──────────────────────────────────────────────────────────────────────────────┘──> guest's port

Names are resolved to addresses by the LAN's DNS (`hole_punch/lan/aliases.py`), so that programs need not be
told of a proxy at all.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Callable

import structlog
import trio

from p2pgrid.errors import GridError
from p2pgrid.hole_punch.lan.segment import SERVER_IP, Segment
from p2pgrid.hole_punch.streams.service import Declined
from p2pgrid.ids import PeerId
from p2pgrid.node.lan import Lans
from p2pgrid.node.proxy.listen import serve_socks
from p2pgrid.node.proxy.names import parse
from p2pgrid.node.proxy.proxy import Proxy
from p2pgrid.node.proxy.rules import HereGuest, Net, parse_accept
from p2pgrid.scheduler import messages as m
from p2pgrid.vm.guest import Cable

log = structlog.get_logger(__name__)

SOCKS_PORT = 1080


@contextlib.asynccontextmanager
async def open_guest(proxy: Proxy, lans: Lans, grant: m.Grant) -> AsyncIterator[Cable]:
    """The cable for the guest of `grant`; while inside it reaches, and is reached, as rules allow."""
    accepts = tuple(map(parse_accept, grant.spec.accept))
    here = HereGuest(grant.job, grant.index, PeerId(grant.submitter), accepts)
    async with trio.open_nursery() as nursery:
        door = _Door(proxy, lans, here, Segment(grant.job, grant.spec.array), nursery)
        try:
            async with lans.plug(grant, door.accepted) as cable:
                with proxy.guest(here, door.dial):
                    yield cable
        finally:
            door.closed = True
            nursery.cancel_scope.cancel()


class _Door:
    """One guest's connections, both ways."""

    def __init__(
        self, proxy: Proxy, lans: Lans, here: HereGuest, segment: Segment, nursery: trio.Nursery
    ) -> None:
        self.closed = False
        self._proxy = proxy
        self._lans = lans
        self._here = here
        self._segment = segment
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()

    def accepted(self, sock: socket.socket, ip: bytes, port: int) -> bool:
        """Take a connection of the guest's, in a reactor's thread."""
        name = self._lans.lan.name_of(self._here.job, ip)
        if name is None and (ip, port) != (SERVER_IP, SOCKS_PORT):
            return False
        self._soon(lambda: self._begin(sock, name, port))
        return True

    def _begin(self, sock: socket.socket, name: str | None, port: int) -> None:
        if self.closed:
            sock.close()
        else:
            self._nursery.start_soon(self._serve, sock, name, port)

    async def _serve(self, sock: socket.socket, name: str | None, port: int) -> None:
        who = f"task {self._here.index} of {self._here.job}"
        if name is None:
            return await serve_socks(self._proxy, sock, None, self._here, who)
        try:
            reached = await self._proxy.reach(parse(name, port), self._here, who)
        except GridError as failed:
            sock.close()
            log.info("a guest was not connected", name=name, port=port, why=str(failed))
        except BaseException:
            sock.close()
            raise
        else:
            await reached.carry(sock)
        return None

    async def dial(self, port: int, net: Net) -> socket.socket:
        """A connection to the guest's `port`.  Raises `Declined`, `OSError`."""
        if net == "udp":
            raise Declined(code=1, why="guests are reached by TCP only, but for their LAN")
        place = self._segment.place(self._here.index)
        assert place is not None, "it is in its own job"
        said: list[str] = []
        heard = trio.Event()

        def opened(why: str) -> None:
            said.append(why)
            self._soon(heard.set)

        sock = self._lans.lan.uplink(self._here.job, place).dial(port, opened)
        try:
            await heard.wait()
            if said[0]:
                refused = "broke it off" in said[0]
                raise OSError(errno.ECONNREFUSED if refused else errno.EHOSTUNREACH, said[0])
        except BaseException:
            sock.close()
            raise
        return sock

    def _soon(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(call)
