"""Say by which way a link came about, and where a peer's bulk port may be tried.

Pure.  A peer tells `host:port` pairs on the control channel; the hosts at which libp2p
reaches it are tried with its bulk port too, because what a node believes about its own
address and what others see of it may differ.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterable

import attrs

from p2pgrid.ids import PeerId

Address = tuple[str, int]
"""An IP address in text, and a TCP port."""

ADDRESSES_MAX = 16
"""Addresses tried of one peer: a machine has a few; a longer list is a mistake or an attack."""
PORT_DIGITS = 5
PEER_ID_MAX = 128
"""Characters: ours have 52."""


class Way(enum.Enum):
    """How a link's present path came about; the better, the earlier."""

    DIRECT = "direct"
    """The side that wanted it dialled."""
    REVERSE = "reverse"
    """The other side was asked to dial."""
    PUNCHED = "punched"
    """Both dialled at once, through what stood between."""
    RELAYED = "relayed"
    """A third node passes sealed bytes on."""

    @property
    def rank(self) -> int:
        """0 is the best; a path is left for one of a smaller rank only, while it works."""
        return _RANKS[self]


_RANKS = {Way.DIRECT: 0, Way.REVERSE: 0, Way.PUNCHED: 1, Way.RELAYED: 2}


@attrs.frozen
class Circuit:
    """A way to a peer through a relay."""

    relay: PeerId
    address: Address
    """Where the relay takes links."""


def parse_address(text: str) -> Address | None:
    """`"10.0.0.1:7"` or `"[::1]:7"`; None for anything that is not an IP address and a port.

    Nor for a host with a zone ("%eth0"): it means something to whoever says it only.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if "%" in host or len(port) > PORT_DIGITS:  # a longer one may be too long to be read at all
        return None
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return None
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        return None
    if ip.is_unspecified or ip.is_multicast:
        return None
    return str(ip), int(port)


def format_address(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_near(far: str, own: str) -> bool:
    """Whether a connection between these hosts stays in the house, by its addresses.

    IPv6 gives neighbours addresses of the whole internet's, but all of one network (/64).
    """
    there, here = (ipaddress.ip_address(host.partition("%")[0]) for host in (far, own))
    if isinstance(there, ipaddress.IPv6Address) and there.ipv4_mapped is not None:
        there = there.ipv4_mapped
    if not there.is_global:
        return True
    return there.version == here.version == 6 and int(there) >> 64 == int(here) >> 64


def to_multiaddr(address: Address) -> str:
    """`/ip4/10.0.0.1/tcp/7/tls`: where a link is made by dialling, unlike what libp2p listens on."""
    host, port = address
    return f"/ip{6 if ':' in host else 4}/{host}/tcp/{port}/tls"


def from_multiaddr(text: str) -> Address | None:
    """The address in such a multiaddr; None for any other."""
    match text.split("/"):
        case ["", "ip4" | "ip6", host, "tcp", port, "tls"]:
            return parse_address(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    return None


def circuit_to_multiaddr(circuit: Circuit) -> str:
    """`/ip4/192.0.2.1/tcp/7/tls/p2p/RELAY/p2p-circuit`."""
    return f"{to_multiaddr(circuit.address)}/p2p/{circuit.relay}/p2p-circuit"


def circuit_from_multiaddr(text: str) -> Circuit | None:
    """The circuit in such a multiaddr; None for any other."""
    base, p2p, rest = text.partition("/p2p/")
    relay, _, last = rest.partition("/")
    address = from_multiaddr(base)
    if not p2p or not 0 < len(relay) <= PEER_ID_MAX or last != "p2p-circuit" or address is None:
        return None
    return Circuit(PeerId(relay), address)


def hosts_of(multiaddrs: Iterable[str]) -> list[str]:
    """The IP hosts at the head of multiaddrs, each once, wildcards and relayed ones left out."""
    hosts: dict[str, None] = {}
    for multiaddr in multiaddrs:
        match multiaddr.split("/"):
            case ["", "ip4" | "ip6", host, *rest] if "p2p-circuit" not in rest:
                try:
                    ip = ipaddress.ip_address(host)
                except ValueError:
                    continue
                if not ip.is_unspecified:
                    hosts[str(ip)] = None
    return list(hosts)


def candidates(told: Iterable[str], multiaddrs: Iterable[str]) -> list[Address]:
    """Where to dial a peer that told `told` and is known to libp2p at `multiaddrs`, best first."""
    addresses = dict.fromkeys(a for a in map(parse_address, told) if a is not None)
    ports = dict.fromkeys(port for _, port in addresses)
    addresses.update(dict.fromkeys((host, port) for host in hosts_of(multiaddrs) for port in ports))
    return list(addresses)[:ADDRESSES_MAX]


def own_addresses(bound: Iterable[Address], multiaddrs: Iterable[str]) -> list[str]:
    """What to tell a peer: each bound port at its own host, or at libp2p's hosts where it is a wildcard."""
    told: dict[str, None] = {}
    for host, port in bound:
        ip = ipaddress.ip_address(host)
        hosts = [host]
        if ip.is_unspecified:
            known = (ipaddress.ip_address(h) for h in hosts_of(multiaddrs))
            hosts = [str(h) for h in known if ip.version == 6 or h.version == 4]
        told.update(dict.fromkeys(format_address((h, port)) for h in hosts))
    return list(told)[:ADDRESSES_MAX]
