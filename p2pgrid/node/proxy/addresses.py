"""Decide whether an address may be connected to on behalf of others.

Pure.  Only what lies in the open Internet may: never this machine, its owner's networks, or what is set
aside.  What is checked is the address that is connected to, never a name or a way to write it: a name is
resolved once, each address that it has is checked, and the socket goes to one of those.

An IPv6 address that stands for an IPv4 one (mapped, NAT64, 6to4, Teredo) is as good as that one.
"""

from __future__ import annotations

import ipaddress
import re
from ipaddress import IPv4Address, IPv6Address

_CLOSED_V4 = [
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
        *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    )
]
_OPEN_V6 = ipaddress.ip_network("2000::/3")
_CLOSED_V6 = [ipaddress.ip_network(text) for text in ("2001:db8::/32", "2001::/23", "3fff::/20")]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+", re.IGNORECASE)


def closed(address: str) -> str:
    """Why `address`, in its usual form, is not to be connected to; empty: it may be."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return f"{address!r} is no address"
    if isinstance(found, IPv6Address):
        if found.scope_id is not None:
            return f"{address} is of one network only"
        inner = _inner(found)
        if inner is None:
            open_ = found in _OPEN_V6 and not any(found in network for network in _CLOSED_V6)
            return "" if open_ else f"{address} is not in the open Internet"
        found = inner
    if any(found in network for network in _CLOSED_V4):
        return f"{address} is not in the open Internet"
    return ""


def _inner(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that stands in it."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    return None


def odd_number(host: str) -> bool:
    """Whether some programs take `host` for an address though it is none in its usual form.

    Such as 127.1, 0x7f000001, 2130706433 or 0177.0.0.1 (inet_aton): nobody writes that in good faith.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        parts = host.removesuffix(".").split(".")
        return len(parts) <= 4 and all(_NUMBER.fullmatch(part) for part in parts)
    return False
