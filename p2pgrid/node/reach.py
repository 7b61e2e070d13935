"""Decide whether a node serves the index or only asks it.

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


def index_mode(mine: Sequence[str], coordinator: Sequence[str]) -> Literal["server", "client"]:
    """The index mode of a node with addresses `mine` (multiaddrs) in the grid of `coordinator`."""
    if any(_public(address) for address in coordinator):
        return "server" if any(_public(address) for address in mine) else "client"
    return "server"


def _public(address: str) -> bool:
    parts = address.split("/")
    try:
        return ipaddress.ip_address(parts[2]).is_global if parts[1] in ("ip4", "ip6") else False
    except (IndexError, ValueError):
        return False
