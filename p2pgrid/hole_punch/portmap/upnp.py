"""Have a gateway's UPnP service map a port: the calls of `igd.py`, over real sockets.

Written here on h11 and not with miniupnpc (which libp2p brings along) because its calls cannot be
cancelled, take whatever length a gateway announces, and fail with a bare `Exception`.
"""

from __future__ import annotations

import contextlib
import socket

import attrs
import h11
import structlog
import trio

from p2pgrid import __version__
from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.portmap import igd
from p2pgrid.hole_punch.portmap.mapper import AskUpnp, Place, UpnpFailed, UpnpMapped

log = structlog.get_logger(__name__)

PATIENCE = 10.0
"""Seconds for all of it; `mapper.UPNP_PATIENCE` is longer."""
SEARCH_PATIENCE = 2.5
"""Seconds to be found: a gateway may take MX = 1 of them before it answers."""
BODY_MAX = 64 << 10
"""Bytes of a description or an answer; real ones have 2 to 20 KiB."""
NAME = "p2pgrid"
"""What a gateway shows its owner."""


@attrs.define
class Upnp:
    """The UPnP service of the gateway, for one port of ours."""

    port: int
    _place: Place | None = None
    _service: igd.Service | None = None
    """Of `_place`'s gateway; found anew after a failure."""

    async def map(self, ask: AskUpnp) -> UpnpMapped | UpnpFailed:
        """Map it, or say why that cannot be."""
        why = f"no answer within {PATIENCE:.0f} s"
        with trio.move_on_after(PATIENCE):
            try:
                service = await self._found(ask.place)
                return await self._map(service, ask)
            except igd.Fault as fault:
                conflict = fault.code in (igd.CONFLICT, igd.CONFLICT_ELSEWHERE)
                return UpnpFailed(str(fault), conflict)
            except BadFrame as broken:
                why = broken.why
            except (OSError, h11.RemoteProtocolError) as broken:
                why = str(broken)
        self._service = None
        return UpnpFailed(why)

    async def release(self, external: int) -> None:
        """Take the mapping back, as far as the gateway lets us; the caller bounds the time."""
        if self._service is None:
            return
        try:
            await _call(self._service, "DeletePortMapping", **_key(external))
        except (igd.Fault, BadFrame, OSError, h11.RemoteProtocolError) as wrong:
            log.debug("a mapping could not be taken back", port=external, why=str(wrong))

    async def _found(self, place: Place) -> igd.Service:
        if self._service is None or place != self._place:
            url = await _search(place)
            host, port, target = igd.place_of(url, place.gateway)
            status, body = await _fetch(host, port, "GET", target, {}, b"")
            if status != 200:
                raise BadFrame(why=f"its description answers with status {status}")
            self._service, self._place = igd.service_of(body, url, place.gateway), place
        return self._service

    async def _map(self, service: igd.Service, ask: AskUpnp) -> UpnpMapped | UpnpFailed:
        if await _owner(service, ask.external) not in (ask.place.own, ""):
            return UpnpFailed("the port is mapped to another computer", conflict=True)
        wish = {
            **_key(ask.external),
            "NewInternalPort": str(self.port),
            "NewInternalClient": ask.place.own,
            "NewEnabled": "1",
            "NewPortMappingDescription": NAME,
        }
        try:
            await _call(service, "AddPortMapping", **wish, NewLeaseDuration=str(ask.lifetime))
        except igd.Fault as fault:
            if fault.code != igd.ONLY_PERMANENT:
                raise
            await _call(service, "AddPortMapping", **wish, NewLeaseDuration="0")
        told = await _call(service, "GetExternalIPAddress")
        return UpnpMapped((told.get("NewExternalIPAddress", ""), ask.external), ask.lifetime)


def _key(external: int) -> dict[str, str]:
    return {"NewRemoteHost": "", "NewExternalPort": str(external), "NewProtocol": "TCP"}


async def _owner(service: igd.Service, external: int) -> str:
    """Whom the port is mapped to; nobody: empty.  Some gateways would give it to us all the same."""
    try:
        return (await _call(service, "GetSpecificPortMappingEntry", **_key(external))).get(
            "NewInternalClient", ""
        )
    except igd.Fault:
        return ""


async def _search(place: Place) -> str:
    """Where the gateway's description is.  Raises `BadFrame`."""
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(place.own))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 2)
        await sock.bind((place.own, 0))
        for device in igd.DEVICES:
            await sock.sendto(igd.search(device), (igd.GROUP, igd.PORT))
        with trio.move_on_after(SEARCH_PATIENCE):
            while True:
                data, (host, *_) = await sock.recvfrom(4096)
                if host == place.gateway:  # whoever else answers is not asked
                    with contextlib.suppress(BadFrame):
                        return igd.found(data, place.gateway)
    raise BadFrame(why="no such service")


async def _call(service: igd.Service, action: str, **args: str) -> dict[str, str]:
    headers, body = igd.request(service, action, args)
    status, said = await _fetch(service.host, service.port, "POST", service.target, headers, body)
    return igd.answer(status, said)


async def _fetch(
    host: str, port: int, method: str, target: str, headers: dict[str, str], body: bytes
) -> tuple[int, bytes]:
    """One request, one answer.  Raises `BadFrame` for a longer one, `OSError`, `h11.RemoteProtocolError`."""
    fields = {
        "Host": f"{host}:{port}",
        "User-Agent": f"p2pgrid/{__version__}",
        "Connection": "close",
        "Content-Length": str(len(body)),
        **headers,
    }
    talk = h11.Connection(h11.CLIENT)
    with trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        await sock.connect((host, port))
        line = trio.SocketStream(sock)
        request = h11.Request(method=method, target=target, headers=list(fields.items()))
        events = (request, h11.Data(data=body), h11.EndOfMessage())
        try:
            await line.send_all(b"".join(talk.send(event) or b"" for event in events))
            return await _answer(talk, line)
        except trio.BrokenResourceError as broken:
            raise OSError(str(broken)) from None


async def _answer(talk: h11.Connection, line: trio.SocketStream) -> tuple[int, bytes]:
    status, body = 0, bytearray()
    while True:
        match talk.next_event():
            case h11.NEED_DATA:
                talk.receive_data(await line.receive_some(16384))
            case h11.Response() as response:
                status = response.status_code
            case h11.Data() as data:
                body += data.data
                if len(body) > BODY_MAX:
                    raise BadFrame(why=f"an answer of more than {BODY_MAX} bytes")
            case h11.EndOfMessage():
                return status, bytes(body)
            case h11.ConnectionClosed() | h11.PAUSED:
                raise BadFrame(why="its service hung up")
