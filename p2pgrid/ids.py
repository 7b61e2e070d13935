"""Name things: chunks and objects by their bytes, peers by their key, jobs by chance.

Pure.  A name of bytes is a CIDv1 with a BLAKE3-256 multihash (code 0x1e), written in
base32 lower case ("b…"); its binary form is 36 bytes:

    0x01 | codec | 0x1e | 0x20 | digest (32 bytes)

Codec 0x55 (raw) names a chunk's plain bytes, 0x71 (dag-cbor) a manifest object.
Inside lists a chunk is its bare 32-byte digest.  Source: multiformats CID spec v1.
"""

from __future__ import annotations

import base64
import binascii
from typing import NewType

import attrs
from blake3 import blake3

from p2pgrid.errors import BadObject

RAW = 0x55
DAG_CBOR = 0x71
BLAKE3_256 = 0x1E
DIGEST_SIZE = 32

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58, "12D3Koo…": the hash of the node's Ed25519 public key."""


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """The BLAKE3-256 digest (32 bytes) of `data`."""
    return blake3(data).digest()


@attrs.frozen(order=True)
class Cid:
    """The name of some bytes: what kind they are, and their BLAKE3-256 digest."""

    codec: int
    digest: bytes

    def __bytes__(self) -> bytes:
        return bytes((1, self.codec, BLAKE3_256, DIGEST_SIZE)) + self.digest

    def __str__(self) -> str:
        return "b" + base64.b32encode(bytes(self)).decode().rstrip("=").lower()

    @classmethod
    def from_bytes(cls, data: bytes) -> Cid:
        """Read the 36-byte binary form.  Raises `BadObject` for anything else."""
        if len(data) != 4 + DIGEST_SIZE or data[0] != 1 or data[1] not in (RAW, DAG_CBOR):
            raise BadObject(why="not a CIDv1 of a chunk or an object")
        if data[2:4] != bytes((BLAKE3_256, DIGEST_SIZE)):
            raise BadObject(why="the CID's hash is not BLAKE3-256")
        return cls(data[1], bytes(data[4:]))

    @classmethod
    def parse(cls, text: str) -> Cid:
        """Read the base32 text form.  Raises `BadObject`; only the canonical spelling passes."""
        body = text[1:].upper()
        try:
            cid = cls.from_bytes(base64.b32decode(body + "=" * (-len(body) % 8)))
        except (binascii.Error, ValueError):
            raise BadObject(why=f"not a CID: {text[:80]!r}") from None
        if str(cid) != text:
            raise BadObject(why=f"not a canonical CID: {text[:80]!r}")
        return cid


def object_cid(data: bytes) -> Cid:
    """The name of a DAG-CBOR object's bytes."""
    return Cid(DAG_CBOR, digest(data))


def readable_id(entropy: bytes) -> str:
    """A short id for people to type: 10 base32 characters from at least 7 random bytes."""
    assert len(entropy) >= 7
    return base64.b32encode(entropy[:7]).decode().lower()[:10]
