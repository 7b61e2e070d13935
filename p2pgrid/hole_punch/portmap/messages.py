"""Write and read the datagrams of NAT-PMP (RFC 6886) and PCP (RFC 6887), as far as one TCP port needs them.

Pure.  Both are spoken with port 5351 of the gateway; big endian; the first byte is the version, 0 or 2.

    NAT-PMP   address?   version 0, opcode 0
              answer     0, 128, result u16, epoch u32, address 4
              map        0, 2, 0 u16, internal port u16, external port u16, lifetime u32
              answer     0, 130, result u16, epoch u32, internal u16, external u16, lifetime u32
    PCP       map        2, 1, 0 u16, lifetime u32, our address 16, then the mapping
              answer     2, 129, 0 u8, result u8, lifetime u32, epoch u32, 0 12, then the mapping
              announce   2, 128, 0 u8, result u8, lifetime u32, epoch u32, 0 12
              mapping    nonce 12, protocol u8, 0 u24, internal u16, external u16, external address 16

A lifetime of 0 removes the mapping.  IPv4 addresses of PCP are IPv4-mapped IPv6 ones.  The epoch is in
seconds since the gateway lost its state; what it announces by itself comes to port 5350 of 224.0.0.1.
"""

from __future__ import annotations

import ipaddress
import struct

import attrs

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.path import Address

PORT, ANNOUNCE_PORT, ANNOUNCE_GROUP = 5351, 5350, "224.0.0.1"
DATAGRAM_MAX = 1100
"""Bytes of the longest datagram of PCP."""
NONCE = 12
TCP = 6
OK, UNSUPPORTED_VERSION = 0, 1

PMP_RESULTS = {
    1: "version not supported",
    2: "refused, or switched off in the gateway",
    3: "the gateway has no network",
    4: "out of resources",
    5: "opcode not supported",
}
PCP_RESULTS = {
    1: "version not supported",
    2: "not authorized",
    3: "malformed request",
    4: "opcode not supported",
    5: "option not supported",
    6: "malformed option",
    7: "the gateway has no network",
    8: "out of resources",
    9: "protocol not supported",
    10: "too many mappings",
    11: "external address not available",
    12: "there is another NAT before the gateway that answers",
    13: "too many peers",
}

_PMP_MAP = struct.Struct(">BBHHHI")
_PMP_ANSWER = struct.Struct(">BBHI")
_PMP_MAPPED = struct.Struct(">HHI")
_PCP_REQUEST = struct.Struct(">BBHI16s")
_PCP_ANSWER = struct.Struct(">BBBBII12x")
_PCP_MAP = struct.Struct(">12sB3xHH16s")


@attrs.frozen
class PmpAddress:
    """The gateway's external address."""

    result: int
    epoch: int
    host: str


@attrs.frozen
class PmpMapped:
    """The answer to a NAT-PMP mapping request; after a refusal only `result` and `epoch` count."""

    result: int
    epoch: int
    internal: int
    external: int
    lifetime: int


@attrs.frozen
class PcpMapped:
    """The answer to a PCP mapping request; after a refusal `external` does not count."""

    result: int
    epoch: int
    lifetime: int
    nonce: bytes
    internal: int
    external: Address


@attrs.frozen
class PcpAnnounced:
    """The gateway tells its epoch, or a result that fits no request of ours."""

    result: int
    epoch: int


Answer = PmpAddress | PmpMapped | PcpMapped | PcpAnnounced


def pmp_ask_address() -> bytes:
    return b"\0\0"


def pmp_map(internal: int, external: int, lifetime: int) -> bytes:
    return _PMP_MAP.pack(0, 2, 0, internal, external, lifetime)


def pcp_map(own: str, nonce: bytes, internal: int, external: Address, lifetime: int) -> bytes:
    """`own` is the address that the datagram is sent from; `external` what is wished for."""
    head = _PCP_REQUEST.pack(2, 1, 0, lifetime, _to16(own))
    return head + _PCP_MAP.pack(nonce, TCP, internal, external[1], _to16(external[0]))


def decode(data: bytes) -> Answer:
    """What a gateway said.  Raises `BadFrame`."""
    if len(data) > DATAGRAM_MAX:
        raise BadFrame(why=f"a datagram of {len(data)} bytes")
    match data[:2]:
        case b"\x02\x81" | b"\x02\x80":
            return _decode_pcp(data)
        case head if len(head) == 2 and head[0] == 0 and head[1] >= 128:
            return _decode_pmp(data)
    raise BadFrame(why="neither NAT-PMP nor PCP")


def _decode_pmp(data: bytes) -> Answer:
    if len(data) < _PMP_ANSWER.size:
        raise BadFrame(why="a NAT-PMP answer that was cut off")
    _, opcode, result, epoch = _PMP_ANSWER.unpack_from(data)
    rest = data[_PMP_ANSWER.size :]
    if opcode == 128 and (result or len(rest) == 4):
        return PmpAddress(result, epoch, "" if result else str(ipaddress.IPv4Address(rest)))
    if opcode == 130 and not result and len(rest) == _PMP_MAPPED.size:
        return PmpMapped(result, epoch, *_PMP_MAPPED.unpack(rest))
    if result:
        # Refusals may come without the rest, and to a request of PCP's with any opcode.
        return PmpMapped(result, epoch, 0, 0, 0)
    raise BadFrame(why=f"a NAT-PMP answer of opcode {opcode} and {len(data)} bytes")


def _decode_pcp(data: bytes) -> Answer:
    if len(data) < _PCP_ANSWER.size:
        raise BadFrame(why="a PCP answer that was cut off")
    _, opcode, _, result, lifetime, epoch = _PCP_ANSWER.unpack_from(data)
    if opcode == 0x80:
        return PcpAnnounced(result, epoch)
    if len(data) < _PCP_ANSWER.size + _PCP_MAP.size:
        if result:  # by a gateway that did not understand what it would have to repeat
            return PcpAnnounced(result, epoch)
        raise BadFrame(why="a PCP answer without its mapping")
    nonce, protocol, internal, port, host = _PCP_MAP.unpack_from(data, _PCP_ANSWER.size)
    if protocol != TCP:
        raise BadFrame(why=f"a PCP mapping of protocol {protocol}")
    return PcpMapped(result, epoch, lifetime, nonce, internal, (_from16(host), port))


def _to16(host: str) -> bytes:
    ip = ipaddress.ip_address(host)
    return ip.packed if ip.version == 6 else ipaddress.IPv6Address(f"::ffff:{host}").packed


def _from16(packed: bytes) -> str:
    ip = ipaddress.IPv6Address(packed)
    return str(ip.ipv4_mapped or ip)
