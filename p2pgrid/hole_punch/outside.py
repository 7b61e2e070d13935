"""Say whether an address is good everywhere, or only within some network.

Pure.  Not `ipaddress.is_global`: that counts the documentation networks, which laboratories use, as private.
"""

from __future__ import annotations

import ipaddress

_INSIDE = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
        "192.0.0.0/24", "192.168.0.0/16", "224.0.0.0/3",
        "::/127", "fc00::/7", "fe80::/10", "ff00::/8",
    )
)  # fmt: skip
"""This host, private, carriers' NATs (RFC 6598), link-local, protocol assignments, multicast and reserved."""


def is_outside(host: str) -> bool:
    """Whether `host`, an IP address in text, can be an address of the whole internet's."""
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return not any(ip in network for network in _INSIDE if network.version == ip.version)
