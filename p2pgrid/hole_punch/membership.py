"""Show that one belongs to a grid, and judge who shows it: no coordinator is asked, so none need be there.

Pure: times are arguments, in seconds since 1970 by the coordinator's clock.  At join, and again when half
its life is over, the coordinator signs for each node:

    offset  size  meaning
    0       1     version, 1
    1       2     length n of the statement, unsigned, big endian
    3       n     the statement, a MessagePack array: grid, peer, roles, issued, expires
    3+n     64    Ed25519 signature, by the key of the peer id `grid`, of DOMAIN and all that precedes

It is good for the one peer whose key it names, so it is no secret: a greeting (`greeting.py`) proves the
key.  It holds until it expires, with an allowance for clocks, or until one hears that it was *revoked*.
Spec with vectors: `docs/protocols/membership.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import attrs
import msgspec
from msgspec import Meta

from p2pgrid.errors import BadFrame
from p2pgrid.ids import PeerId
from p2pgrid.wire import decode

Sign = Callable[[bytes], bytes]
Verify = Callable[[PeerId, bytes, bytes], bool]
"""Whether a peer signed a statement: `Network.verify`."""

DOMAIN = b"p2pgrid membership\0"
VERSION = 1
LENGTH = 2
MEMBERSHIP_MAX = 1024
"""Bytes; ours have about 210."""
ALLOWANCE_MAX = 600.0
"""Seconds that a membership is taken beyond its end, at most: a quartz is off by less in two months."""
ALLOWANCE = 0.1
"""Of a membership's life: the allowance where that is less."""

_Peer = Annotated[str, Meta(pattern="^[!-~]+$", max_length=128)]
_Role = Annotated[str, Meta(pattern="^[a-z]+$", max_length=16)]
_Time = Annotated[int, Meta(ge=0, lt=1 << 53)]


class _Statement(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    grid: _Peer
    peer: _Peer
    roles: Annotated[tuple[_Role, ...], Meta(max_length=8)]
    issued: _Time
    """Milliseconds, as the next: a time is told in whole numbers, so that there is one way to write it."""
    expires: _Time


@attrs.frozen
class Membership:
    """That `peer` is a member of `grid`, with these roles, from one time to another."""

    grid: PeerId
    peer: PeerId
    roles: tuple[str, ...]
    issued: float
    expires: float

    @property
    def renewal(self) -> float:
        """When to ask for the next one."""
        return (self.issued + self.expires) / 2

    @property
    def ends(self) -> float:
        """When it is taken no more."""
        return self.expires + min(ALLOWANCE_MAX, ALLOWANCE * (self.expires - self.issued))


def issue(membership: Membership, sign: Sign) -> bytes:
    """What the member shows; `sign` is the coordinator's."""
    told = _Statement(
        membership.grid,
        membership.peer,
        membership.roles,
        int(membership.issued * 1000),
        int(membership.expires * 1000),
    )
    statement = msgspec.msgpack.encode(told)
    head = bytes([VERSION]) + len(statement).to_bytes(LENGTH, "big") + statement
    return head + sign(DOMAIN + head)


def read(shown: bytes, grid: PeerId, verify: Verify) -> Membership:
    """The membership that was shown.  Raises `BadFrame` unless the coordinator `grid` signed it."""
    if not 1 + LENGTH < len(shown) <= MEMBERSHIP_MAX or shown[0] != VERSION:
        raise BadFrame(why="not a membership that this version knows")
    end = 1 + LENGTH + int.from_bytes(shown[1 : 1 + LENGTH], "big")
    told: _Statement = decode(shown[1 + LENGTH : end], _Statement)
    if told.grid != grid:
        raise BadFrame(why="a membership of another grid")
    if not verify(grid, DOMAIN + shown[:end], shown[end:]):
        raise BadFrame(why="a membership that the grid's coordinator did not sign")
    return Membership(grid, PeerId(told.peer), told.roles, told.issued / 1000, told.expires / 1000)


def refusal(
    shown: bytes, peer: PeerId, grid: PeerId, now: float, revoked: Mapping[PeerId, float], verify: Verify
) -> str:
    """Why `peer`, who has proved its key and showed that, is not taken as a member of `grid`; empty: it is.

    `revoked` tells until when what was issued to a peer is void.  The coordinator is a member by its key.
    """
    if peer == grid:
        return ""
    if not shown:
        return "it shows no membership of this grid"
    try:
        membership = read(shown, grid, verify)
    except BadFrame as bad:
        return bad.why
    if membership.peer != peer:
        return "it shows somebody else's membership"
    if membership.issued <= revoked.get(peer, -1.0):
        return "its membership was revoked"
    if now >= membership.ends:
        return "its membership has expired"
    return ""
