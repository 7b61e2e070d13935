"""Answer what a guest asks for by name: the others of its LAN, by DNS.

Pure.  RFC 1035: one question, one answer.  Names are told by `Segment`, so every guest of the job has
one whether it runs or not; of other names it is said that there are none, at once, so that no
program waits.  A library that knows all of DNS takes 14 MB and 0.1 s to load: for this it is not worth that.
"""

from __future__ import annotations

import struct

from p2pgrid.hole_punch.lan.aliases import Aliases, is_name
from p2pgrid.hole_punch.lan.packets import Datagram
from p2pgrid.hole_punch.lan.segment import SERVER_IP, Segment

PORT = 53
HEADER = struct.Struct("!HHHHHH")
A, PTR, ANY, IN = 1, 12, 255, 1
RESPONSE, AUTHORITATIVE, WISHED, OPCODE = 0x8000, 0x0400, 0x0100, 0x7800
NO_ERROR, NO_SUCH_NAME, NOT_IMPLEMENTED = 0, 3, 4
TTL = 60
NAME_MAX = 255
REVERSE = ".in-addr.arpa"
QUESTION = b"\xc0\x0c"
"""The name in the question, by its place in the message."""


def answer(segment: Segment, asked: Datagram, aliases: Aliases | None = None) -> Datagram | None:
    """The reply to a query; None where it is none that could be replied to."""
    data = asked.data
    if len(data) < HEADER.size:
        return None
    number, flags, questions, *_ = HEADER.unpack_from(data)
    if flags & RESPONSE or questions != 1:
        return None
    read = _read_question(data)
    if read is None:
        return None
    name, kind, class_, end = read
    code, records = NOT_IMPLEMENTED, b""
    count = 0
    if not flags & OPCODE:
        code, found = _find(segment, name, kind if class_ in (IN, ANY) else 0, aliases)
        if found is not None:
            real, value = found
            records = QUESTION + struct.pack("!HHIH", real, IN, TTL, len(value)) + value
            count = 1
    header = HEADER.pack(number, RESPONSE | AUTHORITATIVE | flags & (WISHED | OPCODE) | code, 1, count, 0, 0)
    reply = header + data[HEADER.size : end] + records
    return Datagram(SERVER_IP, PORT, asked.source, asked.source_port, reply)


def _find(
    segment: Segment, name: str, kind: int, aliases: Aliases | None
) -> tuple[int, tuple[int, bytes] | None]:
    """The response code, and the kind and value of the one record there is."""
    if name.endswith(REVERSE):
        parts = name.removesuffix(REVERSE).split(".")
        if len(parts) != 4 or not all(p.isascii() and p.isdigit() and int(p) < 256 for p in parts):
            return NO_SUCH_NAME, None
        of = segment.name(bytes(int(part) for part in reversed(parts)))
        if of is None:
            return NO_SUCH_NAME, None
        return NO_ERROR, (PTR, _labels(of)) if kind in (PTR, ANY) else None
    ip = segment.address(name) if name.endswith("." + segment.domain) else None
    if ip is None and aliases is not None and kind == A and not name.startswith("task"):
        ip = aliases.ip_of(name)  # beyond the LAN, or a port of one of its guests
    if ip is None and aliases is not None and is_name(name) and not name.startswith("task"):
        return NO_ERROR, None  # it is asked for a kind of address that it has not
    if ip is None:
        return (NO_ERROR if name == segment.domain else NO_SUCH_NAME), None
    return NO_ERROR, (A, ip) if kind in (A, ANY) else None


def _read_question(data: bytes) -> tuple[str, int, int, int] | None:
    """The name asked for, in lower case, what kind and class of record, and where the question ends."""
    labels: list[str] = []
    at = HEADER.size
    while at < len(data) and data[at]:
        length = data[at]
        if length > 63 or at + length > HEADER.size + NAME_MAX:
            return None  # a pointer: there is nothing before a question that it could point to
        labels.append(data[at + 1 : at + 1 + length].decode("latin-1"))
        at += 1 + length
    if at + 5 > len(data):
        return None
    kind, class_ = struct.unpack_from("!HH", data, at + 1)
    return ".".join(labels).lower(), kind, class_, at + 5


def _labels(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"
