"""Give a guest its address: a DHCP server that has one answer for each asker.

Pure.  RFC 2131 and 2132.  Nothing is kept: a guest's address follows from its place (`segment.py`), so
every offer holds for ever and a server that starts anew says the same.  Each switch answers its own
guests only, and no question ever leaves the node.

    DISCOVER -> OFFER      REQUEST for that address -> ACK, for another -> NAK      INFORM -> ACK
"""

from __future__ import annotations

import struct

from p2pgrid.hole_punch.lan.packets import Datagram
from p2pgrid.hole_punch.lan.segment import BROADCAST_IP, MASK, MTU, SERVER_IP, Segment, ip_of, mac_of

SERVER_PORT, CLIENT_PORT = 67, 68
HEADER = struct.Struct("!BBBBIHH4s4s4s4s16s64x128x4s")
COOKIE = b"\x63\x82\x53\x63"
SIZE_MIN = 300
"""Bytes of a message below which some old clients take it for broken (RFC 1542, 2.1)."""
BROADCAST_FLAG = 0x8000
NOWHERE, EVERYBODY = bytes(4), b"\xff" * 4
LEASE = 24 * 3600

ASK, ANSWER = 1, 2
DISCOVER, OFFER, REQUEST, ACK, NAK, INFORM = 1, 2, 3, 5, 6, 8
OPTION_MASK, OPTION_DNS, OPTION_HOST, OPTION_DOMAIN, OPTION_MTU, OPTION_BROADCAST = 1, 6, 12, 15, 26, 28
OPTION_ADDRESS, OPTION_LEASE, OPTION_KIND, OPTION_SERVER = 50, 51, 53, 54
PAD, END = 0, 255
OPTION_MAX = 255


def answer(segment: Segment, place: int, asked: Datagram) -> Datagram | None:
    """What the guest at `place` is told; None where nothing is to be said to it."""
    data = asked.data
    if len(data) < HEADER.size:
        return None
    operation, hardware, length, _, number, _, flags, own, _, _, _, chaddr, cookie = HEADER.unpack_from(data)
    if (operation, hardware, length, cookie) != (ASK, 1, 6, COOKIE) or chaddr[:6] != mac_of(place):
        return None
    options = read_options(data[HEADER.size :])
    if options.get(OPTION_SERVER, SERVER_IP) != SERVER_IP:
        return None  # it has chosen another server's offer
    address = ip_of(place)
    wanted = options.get(OPTION_ADDRESS, own)
    match options.get(OPTION_KIND):
        case b"\x01":
            kind, given = OFFER, address
        case b"\x03":
            kind, given = (ACK, address) if wanted == address else (NAK, NOWHERE)
        case b"\x08":
            kind, given = ACK, NOWHERE
        case _:
            return None
    told = [(OPTION_KIND, bytes([kind])), (OPTION_SERVER, SERVER_IP)]
    if kind != NAK:
        told += about(segment, place, lease=given != NOWHERE)
    header = HEADER.pack(ANSWER, 1, 6, 0, number, 0, flags, own if kind != NAK else NOWHERE, given,
                         NOWHERE, NOWHERE, chaddr, COOKIE)  # fmt: skip
    message = (header + write_options(told)).ljust(SIZE_MIN, b"\0")
    return Datagram(SERVER_IP, SERVER_PORT, _back_to(kind, own, flags, given), CLIENT_PORT, message)


def _back_to(kind: int, own: bytes, flags: int, given: bytes) -> bytes:
    """To which address an answer goes (RFC 2131, 4.1)."""
    if kind == NAK:
        return EVERYBODY
    if own != NOWHERE:
        return own
    return EVERYBODY if flags & BROADCAST_FLAG or given == NOWHERE else given


def about(segment: Segment, place: int, *, lease: bool) -> list[tuple[int, bytes]]:
    """What every guest is told of its network.  There is no router: it leads nowhere."""
    told = [
        (OPTION_MASK, MASK),
        (OPTION_BROADCAST, BROADCAST_IP),
        (OPTION_MTU, struct.pack("!H", MTU)),
        (OPTION_DNS, SERVER_IP),
        (OPTION_HOST, segment.host(place).encode()),
        (OPTION_DOMAIN, segment.domain.encode()),
    ]
    return [(OPTION_LEASE, struct.pack("!I", LEASE)), *told] if lease else told


def read_options(data: bytes) -> dict[int, bytes]:
    """Options by number; the parts of one are joined (RFC 3396), and what is cut off is left out."""
    options: dict[int, bytes] = {}
    at = 0
    while at < len(data) and data[at] != END:
        if data[at] == PAD:
            at += 1
            continue
        end = at + 2 + (data[at + 1] if at + 1 < len(data) else len(data))
        if end > len(data):
            break
        options[data[at]] = options.get(data[at], b"") + data[at + 2 : end]
        at = end
    return options


def write_options(options: list[tuple[int, bytes]]) -> bytes:
    parts = [bytes([number, len(value)]) + value for number, value in options if len(value) <= OPTION_MAX]
    return b"".join(parts) + bytes([END])
