"""Cut a byte stream into control messages and back.

Pure.  A control message is one frame:

    offset  size  meaning
    0       4     length of the body, unsigned, big endian, at most `BODY_MAX`
    4       n     the body: one msgspec Struct in MessagePack, validated as it is decoded

`Frames` takes any cut of the bytes and yields the same bodies; noise only ever
raises `BadFrame`.  Vectors: `docs/protocols/control.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from p2pgrid.errors import BadFrame

HEADER = 4
BODY_MAX = 1 << 20
"""Bytes. Manifests and chunks do not travel here, so a megabyte is already generous."""

T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """One whole frame around `message`."""
    body = _encoder.encode(message)
    assert len(body) <= BODY_MAX, f"our own message is too long: {type(message).__name__}"
    return len(body).to_bytes(HEADER, "big") + body


def decode(body: bytes, kind: Any) -> Any:
    """The message of type `kind` (a Struct or a tagged union of them) in `body`."""
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, RecursionError, ValueError) as broken:
        raise BadFrame(why=str(broken)) from None


def body_length(header: bytes) -> int:
    """The length that a 4-byte header announces.  Raises `BadFrame` above `BODY_MAX`."""
    length = int.from_bytes(header, "big")
    if length > BODY_MAX:
        raise BadFrame(why=f"a body of {length} bytes is longer than {BODY_MAX}")
    return length


class Frames:
    """Collect bytes as they come; iterate over the bodies that are whole."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._buffer += data
        while len(self._buffer) >= HEADER:
            end = HEADER + body_length(bytes(self._buffer[:HEADER]))
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[HEADER:end])
            del self._buffer[:end]
            yield body
