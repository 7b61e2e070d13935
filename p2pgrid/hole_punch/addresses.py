"""Decide which multiaddrs we dial and listen on: an IP address or a host name, and a TCP port."""

from __future__ import annotations

import socket

from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from p2pgrid.errors import Misconfigured


def bare(address: str) -> str:
    """`address` without /p2p/…, or nothing if TCP cannot dial it."""
    plain = address.partition("/p2p/")[0]
    try:
        protocols = [protocol.name for protocol in Multiaddr(plain).protocols()]
    except (MultiaddrError, ValueError):
        return ""
    usable = (
        len(protocols) == 2
        and protocols[1] == "tcp"
        and protocols[0] in ("ip4", "ip6", "dns", "dns4", "dns6")
    )
    return plain if usable else ""


def is_loopback(address: str) -> bool:
    return address.startswith(("/ip4/127.", "/ip6/::1/"))


def listening(address: str) -> Multiaddr:
    """`address`, free for us alone: libp2p would share a port with another daemon of ours."""
    try:
        parsed = Multiaddr(address)
        family, port = (p.name for p in parsed.protocols())
        host, number = parsed.value_for_protocol(family), int(parsed.value_for_protocol(port))
    except (MultiaddrError, ValueError):
        raise Misconfigured(why=f"{address!r} is not of the form /ip4/ADDRESS/tcp/PORT") from None
    if family not in ("ip4", "ip6") or port != "tcp":
        raise Misconfigured(why=f"{address!r} is not of the form /ip4/ADDRESS/tcp/PORT")
    with socket.socket(socket.AF_INET if family == "ip4" else socket.AF_INET6) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
        except OSError as taken:
            raise Misconfigured(why=f"cannot listen on {address}: {taken.strerror}") from None
    return parsed
