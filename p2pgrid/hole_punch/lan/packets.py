"""Take apart, and put together, the few kinds of packets that a switch answers itself.

Pure.  Ethernet (IEEE 802.3), ARP (RFC 826), IPv4 (RFC 791) and UDP (RFC 768), as far as they are
needed: what is cut, fragmented or has options is not for us, and `None`.
"""

from __future__ import annotations

import struct

import attrs

ARP, IPV4, IPV6 = 0x0806, 0x0800, 0x86DD
BROADCAST = b"\xff" * 6
ETHERNET = struct.Struct("!6s6sH")
ARP_BODY = struct.Struct("!HHBBH6s4s6s4s")
ARP_START = (1, IPV4, 6, 4)
"""Ethernet, IPv4, and the lengths of their addresses."""
REQUEST, REPLY = 1, 2
IP_HEADER = struct.Struct("!BBHHHBBH4s4s")
UDP_HEADER = struct.Struct("!HHHH")
UDP = 17
TTL = 64


def ethernet(to: bytes, source: bytes, kind: int, body: bytes) -> bytes:
    return ETHERNET.pack(to, source, kind) + body


@attrs.frozen
class Arp:
    """Who has `wanted_ip`?  Or, as a reply: `ip` is at `mac`."""

    operation: int
    mac: bytes
    ip: bytes
    wanted_mac: bytes
    wanted_ip: bytes

    def encode(self) -> bytes:
        return ARP_BODY.pack(*ARP_START, self.operation, self.mac, self.ip, self.wanted_mac, self.wanted_ip)


def read_arp(body: bytes) -> Arp | None:
    if len(body) < ARP_BODY.size:
        return None
    fields = ARP_BODY.unpack_from(body)
    return Arp(*fields[4:]) if fields[:4] == ARP_START else None


@attrs.frozen
class Datagram:
    """A UDP datagram in an IPv4 packet."""

    source: bytes
    source_port: int
    to: bytes
    port: int
    data: bytes

    def encode(self) -> bytes:
        length = UDP_HEADER.size + len(self.data)
        header = UDP_HEADER.pack(self.source_port, self.port, length, 0)
        pseudo = struct.pack("!4s4sBBH", self.source, self.to, 0, UDP, length)
        sum_ = checksum(pseudo + header + self.data) or 0xFFFF  # 0 would mean that there is none
        udp = UDP_HEADER.pack(self.source_port, self.port, length, sum_) + self.data
        fields = (0x45, 0, IP_HEADER.size + length, 0, 0x4000, TTL, UDP)
        ip = IP_HEADER.pack(*fields, checksum(IP_HEADER.pack(*fields, 0, self.source, self.to)),
                            self.source, self.to)  # fmt: skip
        return ip + udp


def read_datagram(body: bytes) -> Datagram | None:
    """Checksums are not looked at: the frame came through memory or an authenticated link."""
    if len(body) < IP_HEADER.size + UDP_HEADER.size:
        return None
    start, _, length, _, fragment, _, protocol, _, source, to = IP_HEADER.unpack_from(body)
    if start != 0x45 or protocol != UDP or fragment & 0x3FFF or not 28 <= length <= len(body):
        return None
    source_port, port, size, _ = UDP_HEADER.unpack_from(body, IP_HEADER.size)
    if not UDP_HEADER.size <= size <= length - IP_HEADER.size:
        return None
    start = IP_HEADER.size + UDP_HEADER.size
    return Datagram(source, source_port, to, port, body[start : IP_HEADER.size + size])


def checksum(data: bytes) -> int:
    """The Internet's (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) & ~1]))
    if len(data) & 1:
        total += data[-1] << 8
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
