"""Write and read tickets: a line of text that lets its bearer join a grid in one role.

Pure: the time is passed in.  The text says where the coordinator is and carries a token, which
only the coordinator's root key can sign and only the coordinator judges:

    "p2pgrid1" | base32, lower case, no padding, of
        offset  size  meaning
        0       2     length of the body, big endian
        2       4     first bytes of the body's BLAKE3-256 digest, against slips of the pen
        6       n     the body: MessagePack map c (peer id), a (multiaddrs), t (biscuit token)

The token is a biscuit (Ed25519): facts role, grid, uses and expires in the authority block.  Its
bearer may narrow it, never widen it.  Vectors: `docs/protocols/ticket.md`.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, get_args

import attrs
import biscuit_auth
import msgspec

from p2pgrid.errors import Misused, NotAuthorised
from p2pgrid.ids import PeerId, digest

PREFIX = "p2pgrid1"
LENGTH_SIZE, CHECK_SIZE = 2, 4
ADDRESSES_MAX = 16
TOKEN_MAX = 4096
"""Bytes; a token of ours has about 300, a narrowed one some more."""

JUDGING = timedelta(seconds=5)
"""For running the token's rules; biscuit's own limit of 1 ms refuses good tokens on a busy machine."""

Role = Literal["worker", "submitter"]

_biscuit: Any = biscuit_auth  # its type stubs are those of an older version


@attrs.frozen
class Ticket:
    """What a ticket tells its bearer."""

    coordinator: PeerId
    addresses: tuple[str, ...]
    token: str = attrs.field(repr=False)
    """For the coordinator, in base64."""


@attrs.frozen
class Grant:
    """What a token grants, by the word of the grid's root key."""

    role: Role
    token_id: str
    """The same for every narrowed copy: uses are counted and revoked by it."""
    uses: int | None
    """How many nodes may join with it; None for any number."""
    expires: float
    """Seconds since 1970; `inf` for never."""


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    c: Annotated[str, msgspec.Meta(pattern="^12D3KooW[1-9A-HJ-NP-Za-km-z]{44}$")]
    a: Annotated[list[Annotated[str, msgspec.Meta(max_length=256)]], msgspec.Meta(max_length=ADDRESSES_MAX)]
    t: Annotated[bytes, msgspec.Meta(max_length=TOKEN_MAX)]


def create_ticket(
    root: bytes,
    coordinator: PeerId,
    addresses: Sequence[str],
    role: str,
    uses: int | None,
    expires_s: float | None,
    now: float,
) -> str:
    """A ticket signed with the 32-byte seed `root`; `expires_s` seconds from `now`.  Raises `Misused`."""
    if role not in get_args(Role):
        raise Misused(why=f"there is no role {role!r}; a ticket is for a {' or a '.join(get_args(Role))}")
    if uses is not None and not 1 <= uses < 1 << 62:
        raise Misused(why="a ticket is good for at least one use")
    token = _biscuit.BiscuitBuilder("role({role}); grid({grid});", {"role": role, "grid": coordinator})
    if uses is not None:
        token.add_code("uses({uses});", {"uses": uses})
    if expires_s is not None:
        if expires_s <= 0:
            raise Misused(why="a ticket expires after it was made")
        try:
            until = datetime.fromtimestamp(now + expires_s, UTC)
        except (OverflowError, ValueError, OSError):
            raise Misused(why="that is too long for a ticket; leave the expiry out") from None
        token.add_code("expires({until}); check if time($now), $now < {until};", {"until": until})
    body = msgspec.msgpack.encode(
        _Body(coordinator, list(addresses)[:ADDRESSES_MAX], token.build(_keys(root).private_key).to_bytes())
    )
    data = len(body).to_bytes(LENGTH_SIZE, "big") + digest(body)[:CHECK_SIZE] + body
    return PREFIX + base64.b32encode(data).decode().rstrip("=").lower()


def read_ticket(text: str) -> Ticket:
    """What `text` says, however it was wrapped.  Raises `Misused`; the token is not judged here."""
    text = "".join(text.split()).lower()
    if not text.startswith(PREFIX):
        raise Misused(why=f"that is not a ticket: it would begin with {PREFIX}")
    coded = text.removeprefix(PREFIX).upper()
    while True:  # a cut may leave characters that make no whole byte
        try:
            data = base64.b32decode(coded + "=" * (-len(coded) % 8))
            break
        except binascii.Error:
            if len(coded) % 8 in (1, 3, 6):
                coded = coded[:-1]
                continue
            raise Misused(why="the ticket has characters that no ticket has") from None
    length = int.from_bytes(data[:LENGTH_SIZE], "big")
    start = LENGTH_SIZE + CHECK_SIZE
    body = data[start:]
    if len(data) < start or len(body) < length:
        raise Misused(why="the ticket is cut off; copy all of it")
    if len(body) > length:
        raise Misused(why="something was added at the ticket's end")
    if digest(body)[:CHECK_SIZE] != data[LENGTH_SIZE:start]:
        raise Misused(why="the ticket was changed on its way; copy it again")
    try:
        read = msgspec.msgpack.decode(body, type=_Body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise Misused(why="the ticket is of a kind that this version does not know") from None
    return Ticket(PeerId(read.c), tuple(read.a), base64.urlsafe_b64encode(read.t).decode())


def public_key(root: bytes) -> bytes:
    """The 32-byte public half of the root key, for `verify`."""
    return bytes(_keys(root).public_key.to_bytes())


def verify(token: str, root_public: bytes, grid: PeerId, now: float) -> Grant:
    """What `token` grants at `now` in the grid of coordinator `grid`.  Raises `NotAuthorised`."""
    biscuit = _signed(token, root_public)
    builder = _biscuit.AuthorizerBuilder(
        "time({now}); allow if grid({grid});", {"now": datetime.fromtimestamp(now, UTC), "grid": grid}
    )
    limits = builder.limits()
    limits.max_time = JUDGING
    builder.set_limits(limits)
    try:
        judge = builder.build(biscuit)
        role, uses, until = (_only(judge, name) for name in ("role", "uses", "expires"))
        expires = until.timestamp() if until is not None else math.inf
        if now >= expires:
            raise NotAuthorised(why=f"the ticket expired on {until:%Y-%m-%d %H:%M} UTC")
        judge.authorize()
    except (_biscuit.AuthorizationError, _biscuit.DataLogError):
        raise NotAuthorised(why="the ticket is for another grid, or was narrowed to less than this") from None
    if role not in get_args(Role):
        raise NotAuthorised(why="the ticket is for a role that this version does not know")
    return Grant(role, _id(biscuit), uses, expires)


def token_id(token: str, root_public: bytes) -> str:
    """By which a token is counted and revoked, also one that has expired.  Raises `NotAuthorised`."""
    return _id(_signed(token, root_public))


def _signed(token: str, root_public: bytes) -> Any:
    if len(token) > 2 * TOKEN_MAX:
        raise NotAuthorised(why="the ticket's token is too long")
    try:
        key = _biscuit.PublicKey.from_bytes(root_public, _biscuit.Algorithm.Ed25519)
        return _biscuit.Biscuit.from_base64(token, key)
    except (_biscuit.BiscuitValidationError, ValueError):
        raise NotAuthorised(why="this grid's coordinator did not make that ticket") from None


def _id(biscuit: Any) -> str:
    return digest(bytes.fromhex(biscuit.revocation_ids[0]))[:16].hex()


def _only(judge: Any, name: str) -> Any:
    """The value of the one fact `name` that the root key signed, or None."""
    facts = judge.query(_biscuit.Rule(f"found($value) <- {name}($value)"))
    return facts[0].terms[0] if facts else None


def _keys(root: bytes) -> Any:
    return _biscuit.KeyPair.from_private_key(_biscuit.PrivateKey.from_bytes(root, _biscuit.Algorithm.Ed25519))
