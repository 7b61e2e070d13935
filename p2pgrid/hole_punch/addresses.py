"""Decide which multiaddrs we dial and listen on: an IP address or a host name and a TCP port, or a circuit.

A circuit (libp2p's, see `circuit.py`) is written as its relay: `/ip4/H/tcp/P/p2p/RELAY/p2p-circuit`.
"""

from __future__ import annotations

import functools
import socket

from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from p2pgrid.errors import Misconfigured
from p2pgrid.ids import PeerId

_HOSTS = ("ip4", "ip6", "dns", "dns4", "dns6")


@functools.lru_cache(maxsize=1024)  # reading one takes 0.1 ms, and everybody tells of everybody
def bare(address: str) -> str:
    """`address` without the peer's own /p2p/…, or nothing if neither TCP nor a circuit leads there."""
    match _protocols(address):
        case [host, "tcp"] | [host, "tcp", "p2p"] if host in _HOSTS:
            return address.partition("/p2p/")[0]
        case [host, "tcp", "p2p", "p2p-circuit"] | [host, "tcp", "p2p", "p2p-circuit", "p2p"] if (
            host in _HOSTS
        ):
            return address.partition("/p2p-circuit")[0] + "/p2p-circuit"
    return ""


def relay_of(plain: str) -> tuple[str, PeerId] | None:
    """Where the relay of a bare address is dialled, and who it is; None if no circuit is meant."""
    where, _, relay = plain.partition("/p2p/")
    return (where, PeerId(relay.removesuffix("/p2p-circuit"))) if relay else None


def relay_at(address: str) -> PeerId:
    """Who listens at `address`, which leads to no circuit.  Raises `Misconfigured`."""
    plain = bare(address)
    if not plain or relay_of(plain) or not address.startswith(f"{plain}/p2p/"):
        raise Misconfigured(why=f"{address!r} is not a libp2p node, /ip4/ADDRESS/tcp/PORT/p2p/ID")
    return PeerId(address.removeprefix(f"{plain}/p2p/"))


def _protocols(address: str) -> list[str]:
    try:
        return [protocol.name for protocol in Multiaddr(address).protocols()]
    except (MultiaddrError, ValueError):
        return []


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
