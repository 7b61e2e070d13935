"""Say what the two ends of a link tell each other about the link itself.

Pure.  Bodies of link messages, integers big endian:

    32 Ack     count u64          so many messages I have taken since the session began
    33 Bye     text, ≤ 200 bytes  I end the session, and why
    34 Resume  count u64          I have taken so many: go on with the next, on this other connection
    35 Probe   number u64         answer at once
    36 Echo    number u64         the answer

They are neither counted nor sent again.  Vectors: `docs/protocols/bulk.md`.  Noise only ever raises
`BadFrame`.
"""

from __future__ import annotations

import struct

from p2pgrid.errors import BadFrame

ACK, BYE, RESUME, PROBE, ECHO = range(32, 37)
KINDS = range(32, 40)
WHY_MAX = 200
_COUNT = struct.Struct(">BQ")


def encode(kind: int, count: int) -> bytes:
    """An Ack, Resume, Probe or Echo."""
    return _COUNT.pack(kind, count)


def bye(why: str) -> bytes:
    return bytes([BYE]) + why.encode()[:WHY_MAX]


def decode(body: bytes | memoryview) -> tuple[int, int, str]:
    """The kind, and its number or text.  Raises `BadFrame`."""
    kind = body[0]
    if kind == BYE and len(body) <= 1 + WHY_MAX:
        return kind, 0, bytes(body[1:]).decode(errors="replace")
    if kind not in (ACK, RESUME, PROBE, ECHO) or len(body) != _COUNT.size:
        raise BadFrame(why=f"a message of kind {kind} that no link sends")
    return kind, _COUNT.unpack(body)[1], ""
