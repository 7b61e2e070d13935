"""Connect to what an owner exposes: a port of this machine, or one host in the open Internet.

A name is resolved once, every address that it has is checked, and the socket goes to one of them: a name that
is another one the next time gains nothing.
"""

from __future__ import annotations

import socket

import trio

from p2pgrid.errors import Misused
from p2pgrid.hole_punch.streams.service import Declined
from p2pgrid.node.proxy.addresses import closed, odd_number
from p2pgrid.node.proxy.rules import Exposure, Net

LOOPBACK = "127.0.0.1"


def check_host(host: str) -> None:
    """Whether `host` may be exposed.  Raises `Misused`."""
    if odd_number(host):
        raise Misused(why=f"{host!r} is neither a name nor an address in its usual form")
    if not host or any(c.isspace() for c in host) or len(host) > 253:
        raise Misused(why=f"{host!r} is no name of a host")
    try:
        why = closed(host) if ":" in host or host.replace(".", "").isdigit() else ""
    except ValueError:
        why = "no address"
    if why:
        raise Misused(why=f"{why}; only ports of this machine itself and hosts there are can be exposed")


async def connect_exposed(exposure: Exposure, net: Net) -> socket.socket:
    """A connected socket, non-blocking.  Raises `Declined`, `OSError`."""
    port = exposure.at or exposure.port
    if not exposure.host:
        return await connect([(LOOPBACK, port)], net)
    return await connect([(address, port) for address in await _open_addresses(exposure.host)], net)


async def _open_addresses(host: str) -> list[str]:
    if odd_number(host):
        raise Declined(code=2, why=f"{host!r} is neither a name nor an address")
    try:
        found = await trio.socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as unknown:
        raise Declined(code=4, why=f"{host} was not found: {unknown.strerror}") from None
    addresses = [str(row[4][0]) for row in found]
    wrong = [why for address in addresses if (why := closed(address))]
    if wrong:  # a name with one such address is not to be trusted with the others
        raise Declined(code=2, why=f"{host}: {wrong[0]}")
    return addresses


async def connect(places: list[tuple[str, int]], net: Net) -> socket.socket:
    """The first of `places`, which are addresses, that answers."""
    failed: OSError | None = None
    for host, port in places:
        kind = socket.SOCK_DGRAM if net == "udp" else socket.SOCK_STREAM
        sock = trio.socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
        try:
            if kind == socket.SOCK_STREAM:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await sock.connect((host, port))
            return socket.socket(fileno=sock.detach())
        except OSError as broken:
            failed = failed or broken
        finally:
            sock.close()  # where it was handed on it is detached: nothing happens
    assert failed is not None, "there is a place at least"
    raise failed
