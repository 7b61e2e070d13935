"""Write and read what is said to be dialled by a peer; `docs/protocols/calling.md`.

Pure.  Big endian:

    104 CALL   id u32, port u16, token 16
    105 TOLD   id u32, result u8: 0 refused, 1 connected, 2 failed
"""

from __future__ import annotations

import struct

import attrs

from p2pgrid.errors import BadFrame

CALL, TOLD = 104, 105
MAGIC = b"p2pgcall"
TOKEN = 16
REFUSED, CONNECTED, FAILED = 0, 1, 2

_CALL, _TOLD = struct.Struct(">BIH16s"), struct.Struct(">BIB")


@attrs.frozen
class Call:
    """Dial me at this port, and say the token."""

    number: int
    port: int
    token: bytes


@attrs.frozen
class Told:
    """What came of the call of that number."""

    number: int
    result: int


def encode(message: Call | Told) -> bytes:
    if isinstance(message, Call):
        return _CALL.pack(CALL, message.number, message.port, message.token)
    return _TOLD.pack(TOLD, message.number, message.result)


def decode(data: bytes) -> Call | Told | None:
    """The message; None for one of a later version.  Raises `BadFrame`."""
    if data[:1] not in (bytes([CALL]), bytes([TOLD])):
        return None
    form = _CALL if data[0] == CALL else _TOLD
    if len(data) != form.size:
        raise BadFrame(why=f"a message of kind {data[0]} and {len(data)} bytes")
    facts = form.unpack(data)[1:]
    return Call(*facts) if data[0] == CALL else Told(*facts)
