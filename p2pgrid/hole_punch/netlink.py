"""Read what Linux tells of its network: addresses, routes, and that something has changed (rtnetlink(7)).

Pure: bytes in native order to facts.  A message is

    length u32, kind u16, flags u16, sequence u32, port u32 │ body │ attributes
    attribute: length u16, kind u16, bytes

all padded to 4 bytes.  What is not needed here is skipped.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator

import attrs

from p2pgrid.errors import BadFrame

REQUEST, DUMP = 0x1, 0x300
DONE, ERROR = 3, 2
NEW_ADDRESS, GET_ADDRESS, NEW_ROUTE, GET_ROUTE = 20, 22, 24, 26
GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
"""What to be told of: links, addresses and routes of IPv4 and IPv6."""
V4, V6 = 2, 10
ANYWHERE = {V4: "198.41.0.4", V6: "2001:503:ba3e::2:30"}
"""Where the way to the internet leads: a root name server.  Nothing is sent there."""

_HEAD = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")

_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_RTA_DESTINATION, _RTA_INTERFACE, _RTA_GATEWAY, _RTA_SOURCE = 1, 4, 5, 7
_UNUSABLE = 0x08 | 0x20 | 0x40
"""Flags of addresses: duplicate, deprecated, tentative."""
_UNIVERSE = 0
"""The scope of addresses that are not of this host or this link only."""


@attrs.frozen
class Route:
    """The way to somewhere."""

    gateway: str
    """The next host on it; empty where there is none, as on a line from point to point."""
    own: str
    """The address that we have on it; may be empty."""
    interface: int


def ask_addresses() -> bytes:
    return _message(GET_ADDRESS, REQUEST | DUMP, _ADDRESS.pack(0, 0, 0, 0, 0))


def ask_route(family: int) -> bytes:
    """Ask for the way to the internet."""
    host = ipaddress.ip_address(ANYWHERE[family]).packed
    body = _ROUTE.pack(family, len(host) * 8, 0, 0, 0, 0, 0, 0, 0)
    return _message(GET_ROUTE, REQUEST, body + _ATTRIBUTE.pack(4 + len(host), _RTA_DESTINATION) + host)


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and body of each message in a datagram.  Raises `BadFrame`."""
    while data:
        if len(data) < _HEAD.size:
            raise BadFrame(why="a netlink message that was cut off")
        length, kind, *_ = _HEAD.unpack_from(data)
        if not _HEAD.size <= length <= len(data):
            raise BadFrame(why=f"a netlink message of {length} bytes in {len(data)}")
        yield kind, data[_HEAD.size : length]
        data = data[_padded(length) :]


def read_address(body: bytes) -> str | None:
    """The address in a message of `NEW_ADDRESS`; None: others cannot use it.  Raises `BadFrame`."""
    if len(body) < _ADDRESS.size:
        raise BadFrame(why="an address that was cut off")
    _, _, flags, scope, _ = _ADDRESS.unpack_from(body)
    facts = _attributes(body[_ADDRESS.size :])
    if _IFA_FLAGS in facts:
        flags = _number(facts[_IFA_FLAGS])
    packed = facts.get(_IFA_LOCAL, facts.get(_IFA_ADDRESS))
    if packed is None or scope != _UNIVERSE or flags & _UNUSABLE:
        return None
    return _host(packed)


def read_route(body: bytes) -> Route:
    """The way in an answer to `ask_route`.  Raises `BadFrame`."""
    if len(body) < _ROUTE.size:
        raise BadFrame(why="a route that was cut off")
    facts = _attributes(body[_ROUTE.size :])
    gateway, own, interface = (facts.get(k, b"") for k in (_RTA_GATEWAY, _RTA_SOURCE, _RTA_INTERFACE))
    return Route(
        _host(gateway) if gateway else "",
        _host(own) if own else "",
        _number(interface) if interface else 0,
    )


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return _HEAD.pack(_HEAD.size + len(body), kind, flags, 1, 0) + body


def _attributes(data: bytes) -> dict[int, bytes]:
    facts: dict[int, bytes] = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= length <= len(data):
            raise BadFrame(why=f"a netlink attribute of {length} bytes in {len(data)}")
        facts[kind & 0x3FFF] = data[_ATTRIBUTE.size : length]
        data = data[_padded(length) :]
    return facts


def _padded(length: int) -> int:
    return (length + 3) & ~3


def _number(data: bytes) -> int:
    if len(data) != 4:
        raise BadFrame(why=f"a number of {len(data)} bytes")
    return int(struct.unpack("=I", data)[0])


def _host(packed: bytes) -> str:
    if len(packed) not in (4, 16):
        raise BadFrame(why=f"an address of {len(packed)} bytes")
    return str(ipaddress.ip_address(packed))
