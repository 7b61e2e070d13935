"""Decide what others are told of where this node is, and whether it serves the index or only asks it.

Pure.  A server that others cannot reach loses the keys it is given (Petals, PR #195), so a
node behind a NAT is a client.  Until a node can have its reachability tried by others, its
addresses must tell: where the coordinator can be reached only at loopback or private
addresses, the grid is one machine's or one site's and everybody there can be reached; where
the coordinator has a public address, so must a server.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Literal

from p2pgrid.scheduler.messages import ADDRESSES_MAX


def index_mode(mine: Sequence[str], coordinator: Sequence[str]) -> Literal["server", "client"]:
    """The index mode of a node with addresses `mine` (multiaddrs) in the grid of `coordinator`."""
    if any(_public(address) for address in coordinator):
        return "server" if any(_public(address) for address in mine) else "client"
    return "server"


def told(links: Sequence[str], network: Sequence[str]) -> tuple[str, ...]:
    """What members are told of where links are taken, and of the control plane's addresses: of each
    the first half, or as many as the other leaves room for."""
    half = max(ADDRESSES_MAX // 2, ADDRESSES_MAX - len(network))
    first = tuple(links[:half])
    return (*first, *network[: ADDRESSES_MAX - len(first)])


# Not `is_global`: that counts the documentation networks, which test networks use, as private.
_LOCAL = tuple(
    ipaddress.ip_network(network)
    for network in (
        "127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "100.64.0.0/10",
        "::1/128", "fc00::/7", "fe80::/10",
    )
)  # fmt: skip
"""Loopback, private, link-local and carrier NAT (RFC 1918, 4193, 6598)."""


def _public(address: str) -> bool:
    parts = address.split("/")
    try:
        ip = ipaddress.ip_address(parts[2])
    except (IndexError, ValueError):
        return False
    return parts[1] in ("ip4", "ip6") and not any(ip in network for network in _LOCAL)
