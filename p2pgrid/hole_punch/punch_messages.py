"""Say what two peers tell each other, over a relay, to meet without it.

Pure.  Every message is the body of one link message (`hole_punch/framing.py`): a type byte and its
fields, integers big endian:

    40 Offer    token 16, stance            dial me there, when I say; I show this token
    41 Answer   round 16, token 16, stance  I am ready, and show this one; `round` is the Offer's token
    42 Go       round 16                    now
    43 Decline  round 16, why               not now; why in UTF-8, to the end of the body

    stance      mapping u8, count u8, then so many of: source u8, family u8 (4, 6), port u16, host 4 or 16

Whoever gets a connection says `MAGIC` and its token on it, and wants to hear `MAGIC` and the other's: then it
is none of a stranger's, and not its own come back.  TLS and greeting follow (`docs/protocols/bulk.md`).
Goals: one round trip to the moment at which both dial; clocks need not agree.  Non-goals: trust.
Vectors: `docs/protocols/punch.md`.  Noise only ever raises `BadFrame`.
"""

from __future__ import annotations

import ipaddress

import attrs

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.nat import CANDIDATES_MAX, Candidate, Mapping, Source, Stance

MAGIC = b"p2pgpnch"
TOKEN = 16
"""Bytes of a token: nobody guesses one within the seconds it is good for."""
WHY_MAX = 200
"""Bytes of a reason."""


@attrs.frozen
class Offer:
    token: bytes
    stance: Stance


@attrs.frozen
class Answer:
    round: bytes
    token: bytes
    stance: Stance


@attrs.frozen
class Go:
    round: bytes


@attrs.frozen
class Decline:
    round: bytes
    why: str


Message = Offer | Answer | Go | Decline


def encode(message: Message) -> bytes:
    match message:
        case Offer(token, stance):
            return b"\x28" + token + _encode_stance(stance)
        case Answer(name, token, stance):
            return b"\x29" + name + token + _encode_stance(stance)
        case Go(name):
            return b"\x2a" + name
        case Decline(name, why):
            return b"\x2b" + name + why.encode()[:WHY_MAX].decode(errors="ignore").encode()


def decode(body: bytes) -> Message:
    """The message in `body`.  Raises `BadFrame`."""
    name, rest = body[1 : 1 + TOKEN], body[1 + TOKEN :]
    if len(name) != TOKEN:
        raise BadFrame(why=f"{len(body)} bytes are no message of punching")
    match body[0]:
        case 40:
            return Offer(name, _decode_stance(rest))
        case 41 if len(rest) >= TOKEN:
            return Answer(name, rest[:TOKEN], _decode_stance(rest[TOKEN:]))
        case 42 if not rest:
            return Go(name)
        case 43 if len(rest) <= WHY_MAX:
            try:
                return Decline(name, rest.decode())
            except UnicodeDecodeError:
                raise BadFrame(why="a reason that is not UTF-8") from None
    raise BadFrame(why=f"no message of punching: kind {body[0]}, {len(body)} bytes")


def _encode_stance(stance: Stance) -> bytes:
    parts = [bytes((stance.mapping, len(stance.candidates)))]
    for candidate in stance.candidates:
        host, port = candidate.address
        ip = ipaddress.ip_address(host)
        parts.append(bytes((candidate.source, ip.version)) + port.to_bytes(2, "big") + ip.packed)
    return b"".join(parts)


def _decode_stance(data: bytes) -> Stance:
    try:
        mapping, count, at = Mapping(data[0]), data[1], 2
        candidates = []
        for _ in range(count):
            source, size = Source(data[at]), {4: 4, 6: 16}[data[at + 1]]
            port, packed = int.from_bytes(data[at + 2 : at + 4], "big"), data[at + 4 : at + 4 + size]
            host = str(ipaddress.ip_address(packed))
            at += 4 + size
            candidates.append(Candidate(source, (host, port)))
    except (ValueError, KeyError, IndexError):
        raise BadFrame(why="a stance that does not decode") from None
    if at != len(data) or count > CANDIDATES_MAX or not all(c.address[1] for c in candidates):
        raise BadFrame(why="a stance of a wrong length, or without a port")
    return Stance(mapping, tuple(candidates))
