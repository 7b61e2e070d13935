"""Frame what the two ends of a byte stream tell each other over a link: kinds 64 to 71.

Pure.  Many streams share one link.  A message is the body of one of the link's frames:

    offset  size  meaning
    0       1     kind
    1       4     stream, big endian; the top bit says that whoever gets this message has opened it
    5       n     by kind:

    64 Open      4 bytes credit, then the target: 1 to 1024 bytes, which only those above understand
    65 Opened    4 bytes credit, then an answer of at most 1024 bytes
    66 Refused   1 byte code, then why: UTF-8, at most 512 bytes
    67 Data      1 to 262144 bytes of the stream
    68 Credit    4 bytes: so many more may be sent, at least 1
    69 Fin       nothing: no more data comes this way
    70 Reset     why: UTF-8, at most 512 bytes; the stream is over, both ways
    71 Datagram  at most 65535 bytes, which may be lost

Each side numbers the streams that it opens, and never twice.  Who opens may send `INITIAL` bytes
before it is answered; everything beyond needs credit.  What comes for a stream that is not known is
passed over: it was sent before its sender heard that the stream is over.  Vectors:
`docs/protocols/streams.md`.
"""

from __future__ import annotations

import struct

import attrs

from p2pgrid.errors import BadFrame

KINDS = range(64, 80)
OPEN, OPENED, REFUSED, DATA, CREDIT, FIN, RESET, DATAGRAM = range(64, 72)
HEADER = 5
OPENER = 1 << 31
"""The bit of a stream's number that says: you have opened it."""
TARGET_MAX = 1024
WHY_MAX = 512
DATA_MAX = 256 << 10
DATAGRAM_MAX = 65535
CREDIT_MAX = 1 << 30
"""Bytes that anybody may be allowed to send at once."""

_head = struct.Struct(">BI")
_u32 = struct.Struct(">I")


@attrs.frozen
class Open:
    stream: int
    credit: int
    target: bytes


@attrs.frozen
class Opened:
    stream: int
    credit: int
    answer: bytes


@attrs.frozen
class Refused:
    stream: int
    code: int
    why: str


@attrs.frozen
class Data:
    stream: int
    body: bytes | memoryview


@attrs.frozen
class Credit:
    stream: int
    count: int


@attrs.frozen
class Fin:
    stream: int


@attrs.frozen
class Reset:
    stream: int
    why: str


@attrs.frozen
class Datagram:
    stream: int
    body: bytes | memoryview


Message = Open | Opened | Refused | Data | Credit | Fin | Reset | Datagram


def head(kind: int, stream: int) -> bytes:
    """What goes before the bytes of `Data` and `Datagram`."""
    return _head.pack(kind, stream)


def encode(message: Message) -> bytes:
    match message:
        case Open(stream, credit, target):
            assert 0 < len(target) <= TARGET_MAX
            return head(OPEN, stream) + _u32.pack(credit) + target
        case Opened(stream, credit, answer):
            assert len(answer) <= TARGET_MAX
            return head(OPENED, stream) + _u32.pack(credit) + answer
        case Refused(stream, code, why):
            return head(REFUSED, stream) + bytes((code,)) + _cut(why)
        case Data(stream, body):
            assert 0 < len(body) <= DATA_MAX
            return head(DATA, stream) + bytes(body)
        case Credit(stream, count):
            assert 0 < count <= CREDIT_MAX
            return head(CREDIT, stream) + _u32.pack(count)
        case Fin(stream):
            return head(FIN, stream)
        case Reset(stream, why):
            return head(RESET, stream) + _cut(why)
        case Datagram(stream, body):
            assert len(body) <= DATAGRAM_MAX
            return head(DATAGRAM, stream) + bytes(body)


def decode(message: memoryview) -> Message | None:
    """None where its kind is not known yet.  Bodies are views of `message`.  Raises `BadFrame`."""
    if len(message) < HEADER:
        raise BadFrame(why="a stream's message is shorter than its header")
    kind, stream = _head.unpack_from(message)
    rest = message[HEADER:]
    match kind:
        case 67:
            return Data(stream, _sized(rest, 1, DATA_MAX))
        case 68:
            count: int = _u32.unpack(_sized(rest, 4, 4))[0]
            return Credit(stream, _credit(count, 1))
        case 64:
            return Open(stream, _number(rest), bytes(_sized(rest[4:], 1, TARGET_MAX)))
        case 65:
            return Opened(stream, _number(rest), bytes(_sized(rest[4:], 0, TARGET_MAX)))
        case 66:
            return Refused(stream, _sized(rest, 1, 1 + WHY_MAX)[0], _text(rest[1:]))
        case 69:
            _sized(rest, 0, 0)
            return Fin(stream)
        case 70:
            return Reset(stream, _text(_sized(rest, 0, WHY_MAX)))
        case 71:
            return Datagram(stream, _sized(rest, 0, DATAGRAM_MAX))
        case _:
            return None


def _sized(rest: memoryview, least: int, most: int) -> memoryview:
    if not least <= len(rest) <= most:
        raise BadFrame(why=f"{len(rest)} bytes of a stream's message where {least} to {most} belong")
    return rest


def _number(rest: memoryview) -> int:
    count: int = _u32.unpack(_sized(rest[:4], 4, 4))[0]
    return _credit(count, 0)


def _credit(count: int, least: int) -> int:
    if not least <= count <= CREDIT_MAX:
        raise BadFrame(why=f"a credit of {count} bytes")
    return count


def _text(raw: memoryview) -> str:
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError:
        raise BadFrame(why="a reason that is not UTF-8") from None


def _cut(why: str) -> bytes:
    return why.encode("utf-8", "replace")[:WHY_MAX].decode("utf-8", "ignore").encode()
