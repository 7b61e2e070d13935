"""Say what a node and a relay tell each other about circuits.

Pure.  Every message is the body of one link message (`hole_punch/framing.py`): a type byte and its
fields, integers big endian, peer ids and reasons in UTF-8 to the end of the body:

    48 Reserve                                   let others reach me through you, from now on or still
    49 Reserved  seconds u32, circuits u16,      they can, for so long; what you may have here (0: no
                 quota u64, window u32, rate u64 limit): circuits, bytes in so many s, bytes/s a circuit
    50 Release                                   nobody needs to reach me through you any more
    51 Connect   request u32, peer               a circuit to that peer; `request` is my number for it, not 0
    52 Connected request u32, token 16           dial me and show this
    53 Refused   request u32, reason u8, why     no; `request` 0: no reservation, or no longer
    54 Incoming  token 16, peer                  that peer wants a circuit to you: dial me and show this
    55 Decline   token 16, why                   I do not want it
    56 Ended     token 16, reason u8, why        the circuit of that token is over, or does not come about

A circuit's ends are TCP connections to the relay's link port that begin with `MAGIC` and a token.
Goals: one round trip to a circuit, a reason for every no.  Non-goals: trust; what a circuit carries
is sealed end to end, and both ends greet each other as on any link.
Vectors: `docs/protocols/relay.md`.  Noise only ever raises `BadFrame`.
"""

from __future__ import annotations

import enum
import re
import struct

import attrs

from p2pgrid.errors import BadFrame
from p2pgrid.ids import PeerId

KINDS = range(48, 64)
MAGIC = b"p2pgcirc"
TOKEN = 16
"""Bytes of a token: nobody guesses one within the seconds it is good for."""
WHY_MAX = 200
"""Bytes of a reason."""
U16, U32, U64 = (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1

_PEER = re.compile(rb"[!-~]{1,128}")


class Reason(enum.IntEnum):
    """Why there is no circuit, as a program may want to know; other numbers may come."""

    OTHER = 0
    NO_RELAY = 1
    """This node relays nothing, or nothing now."""
    BARRED = 2
    """One of the two is no member of the grid."""
    NOT_HERE = 3
    """The peer has no reservation here."""
    FULL = 4
    """The relay has as much as it takes."""
    TOO_MANY = 5
    """One of the two has as many circuits as it may."""
    QUOTA = 6
    """The bytes of one of the two, or of the relay, are used up for now."""
    DECLINED = 7
    """The peer does not want it."""
    NOT_COME = 8
    """One of the two did not dial in time."""
    BROKEN = 9
    """The connection to the other end broke."""


@attrs.frozen
class Reserve:
    pass


@attrs.frozen
class Reserved:
    seconds: int
    circuits: int = 0
    quota: int = 0
    window: int = 0
    rate: int = 0


@attrs.frozen
class Release:
    pass


@attrs.frozen
class Connect:
    request: int
    peer: PeerId


@attrs.frozen
class Connected:
    request: int
    token: bytes


@attrs.frozen
class Refused:
    request: int
    reason: Reason
    why: str


@attrs.frozen
class Incoming:
    token: bytes
    peer: PeerId


@attrs.frozen
class Decline:
    token: bytes
    why: str


@attrs.frozen
class Ended:
    token: bytes
    reason: Reason
    why: str


Asked = Reserve | Release | Connect | Decline
"""What a relay is told."""
Told = Reserved | Connected | Refused | Incoming | Ended
"""What a relay tells."""
Message = Asked | Told

_RESERVED = struct.Struct(">BIHQIQ")
_REQUEST = struct.Struct(">BI")
_REFUSED = struct.Struct(">BIB")


def encode(message: Message) -> bytes:
    """The body of one link message."""
    match message:
        case Reserve():
            return b"\x30"
        case Reserved(seconds, circuits, quota, window, rate):
            return _RESERVED.pack(
                49, min(seconds, U32), min(circuits, U16), min(quota, U64), min(window, U32), min(rate, U64)
            )
        case Release():
            return b"\x32"
        case Connect(request, peer):
            return _REQUEST.pack(51, request) + peer.encode()
        case Connected(request, token):
            assert len(token) == TOKEN
            return _REQUEST.pack(52, request) + token
        case Refused(request, reason, why):
            return _REFUSED.pack(53, request, reason) + _cut(why)
        case Incoming(token, peer):
            assert len(token) == TOKEN
            return b"\x36" + token + peer.encode()
        case Decline(token, why):
            assert len(token) == TOKEN
            return b"\x37" + token + _cut(why)
        case Ended(token, reason, why):
            assert len(token) == TOKEN
            return b"\x38" + token + bytes((reason,)) + _cut(why)


def decode(body: bytes | memoryview) -> Message | None:
    """The message in `body`; None for a type that a later version may have.  Raises `BadFrame`."""
    body = bytes(body)
    try:
        return _decoded(body)
    except (struct.error, UnicodeDecodeError) as broken:
        raise BadFrame(why=f"a message of type {body[:1].hex()} to or from a relay: {broken}") from None


def _decoded(body: bytes) -> Message | None:
    match body[0] if body else -1:
        case 48:
            _exactly(body, 1)
            return Reserve()
        case 49:
            _, seconds, circuits, quota, window, rate = _RESERVED.unpack(body)
            return Reserved(seconds, circuits, quota, window, rate)
        case 50:
            _exactly(body, 1)
            return Release()
        case 51:
            _, request = _REQUEST.unpack_from(body)
            return Connect(_numbered(request), _peer(body[5:]))
        case 52:
            _exactly(body, 5 + TOKEN)
            _, request = _REQUEST.unpack_from(body)
            return Connected(_numbered(request), body[5:])
        case 53:
            _, request, reason = _REFUSED.unpack_from(body)
            return Refused(request, _reason(reason), _why(body[6:]))
        case 54:
            return Incoming(body[1:17], _peer(body[17:]))
        case 55:
            _at_least(body, 1 + TOKEN)
            return Decline(body[1:17], _why(body[17:]))
        case 56:
            _at_least(body, 2 + TOKEN)
            return Ended(body[1:17], _reason(body[17]), _why(body[18:]))
        case kind if kind in KINDS:
            return None
        case kind:
            raise BadFrame(why=f"type {kind} is no message to or from a relay")


def _exactly(body: bytes, size: int) -> None:
    if len(body) != size:
        raise BadFrame(why=f"a message of type {body[0]} has {len(body)} bytes, not {size}")


def _at_least(body: bytes, size: int) -> None:
    if len(body) < size:
        raise BadFrame(why=f"a message of type {body[0]} has {len(body)} bytes, less than {size}")


def _numbered(request: int) -> int:
    if not request:
        raise BadFrame(why="request 0 is that for a reservation")
    return request


def _peer(text: bytes) -> PeerId:
    if not _PEER.fullmatch(text):
        raise BadFrame(why=f"no peer id: {text[:40]!r}")
    return PeerId(text.decode())


def _reason(number: int) -> Reason:
    return Reason(number) if number in Reason.__members__.values() else Reason.OTHER


def _why(text: bytes) -> str:
    if len(text) > WHY_MAX:
        raise BadFrame(why=f"a reason of {len(text)} bytes")
    return text.decode()


def _cut(why: str) -> bytes:
    """`why`, as much as fits, without half a character."""
    return why.encode()[:WHY_MAX].decode(errors="ignore").encode()
