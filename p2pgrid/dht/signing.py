"""Sign objects, and say whether a signature holds.

Pure.  Ed25519 over a domain prefix, which no other kind of object has, and the canonical
encoding of the object without its signature.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, TypeVar, cast

import attrs
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from p2pgrid.dht.dagcbor import encode, need
from p2pgrid.errors import BadObject


class Signable(Protocol):
    """An object that tells who made it."""

    DOMAIN: ClassVar[bytes]

    def fields(self) -> dict[str, Any]:
        """All that is signed: the object without `signature`."""
        ...


S = TypeVar("S", bound=Signable)


def signed(thing: S, key: SigningKey) -> S:
    """`thing` with `key` as signer and its signature."""
    named: Any = attrs.evolve(cast(Any, thing), signer=bytes(key.verify_key))
    signature = key.sign(named.DOMAIN + encode(named.fields())).signature
    return cast(S, attrs.evolve(named, signature=signature))


def check_signature(thing: Signable, signer: Any, signature: Any) -> None:
    """Raise `BadObject` unless `signature` is `signer`'s over `thing`."""
    need(isinstance(signer, bytes) and len(signer) == 32, "the signer")
    need(isinstance(signature, bytes) and len(signature) == 64, "the signature's length")
    try:
        VerifyKey(signer).verify(thing.DOMAIN + encode(thing.fields()), signature)
    except (BadSignatureError, ValueError):
        raise BadObject(why="the signature does not hold") from None
