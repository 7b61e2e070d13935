"""Say what the frames of a content are: a pack tells them all, a delta only what a parent lacks.

Pure.  A *pack* holds one zstd frame per index; its pages list lengths (u32 big endian) and
digests (32 bytes), `PAGE_SPAN` frames a page.  Offsets in the pack file are the running
sum of the lengths.

A *delta* is a pack that builds on a *parent*, another content that has a full pack (never on
a delta: reading costs two steps at most).  A frame of length 0 says that the chunk is one of the
parent's, under the same name; it has no digest, is never asked for and always here.  The other
frames are told by parts of the parent and what is new (`delta.py`).  The parent is found by its
content, whoever signed a pack of it; `base` is only for who has none.
"""

from __future__ import annotations

import itertools
import sys
from array import array
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import attrs

from p2pgrid.dht.content import CHUNK_SIZE, PAGE_SPAN, SIZE_MAX
from p2pgrid.dht.dagcbor import bounded, decode, encode, need, take
from p2pgrid.dht.flat import Digests, Flat, digests_of
from p2pgrid.dht.signing import check_signature
from p2pgrid.ids import DIGEST_SIZE, Cid

FRAME_MAX = CHUNK_SIZE + 1024
"""Bytes. zstd never needs more for an incompressible chunk, nor does a frame of a delta."""


@attrs.frozen
class Pack:
    """One encoding of a content: a frame per index, signed by who made it."""

    content: Cid
    count: int
    pages: tuple[Cid, ...]
    signer: bytes
    signature: bytes = b""

    DOMAIN: ClassVar[bytes] = b"p2pgrid pack v1\0"

    def fields(self) -> dict[str, Any]:
        return {"v": 1, "kind": "pack", "content": self.content, "count": self.count,
                "pages": list(self.pages), "signer": self.signer}  # fmt: skip

    def encode(self) -> bytes:
        return encode({**self.fields(), "signature": self.signature})

    @classmethod
    def decode(cls, data: bytes) -> Pack:
        """Raises `BadObject` when the signature does not hold, too."""
        content, count, pages, signer, signature = take(
            decode(data), "pack", "content", "count", "pages", "signer", "signature"
        )
        need(isinstance(content, Cid), "pack")
        pack = cls(content, *_listed(count, pages), signer, signature)
        check_signature(pack, signer, signature)
        return pack


@attrs.frozen
class Delta:
    """What a content has that its parent lacks: a frame for some indices; signed like a pack."""

    content: Cid
    parent: Cid
    """A content that has a full pack."""
    base: Cid
    """A full pack of the parent, for who has none."""
    count: int
    pages: tuple[Cid, ...]
    signer: bytes
    signature: bytes = b""

    DOMAIN: ClassVar[bytes] = b"p2pgrid delta v1\0"

    def fields(self) -> dict[str, Any]:
        return {"v": 1, "kind": "delta", "content": self.content, "parent": self.parent, "base": self.base,
                "count": self.count, "pages": list(self.pages), "signer": self.signer}  # fmt: skip

    def encode(self) -> bytes:
        return encode({**self.fields(), "signature": self.signature})

    @classmethod
    def decode(cls, data: bytes) -> Delta:
        """Raises `BadObject` when the signature does not hold, too."""
        content, parent, base, count, pages, signer, signature = take(
            decode(data), "delta", "content", "parent", "base", "count", "pages", "signer", "signature"
        )
        need(all(isinstance(c, Cid) for c in (content, parent, base)), "delta")
        need(content != parent, "a content that builds on itself")
        delta = cls(content, parent, base, *_listed(count, pages), signer, signature)
        check_signature(delta, signer, signature)
        return delta


def _listed(count: Any, pages: Any) -> tuple[int, tuple[Cid, ...]]:
    count = bounded(count, SIZE_MAX // CHUNK_SIZE, "count")
    need(isinstance(pages, list) and all(isinstance(p, Cid) for p in pages), "pages")
    need(len(pages) == -(-count // PAGE_SPAN), "the number of pages")
    return count, tuple(pages)


def decode_pack(data: bytes) -> Pack | Delta:
    """A pack or a delta, by its kind."""
    return Delta.decode(data) if decode(data).get("kind") == "delta" else Pack.decode(data)


@attrs.frozen(eq=False)
class Frames:
    """The frames of a pack, all pages read: lengths (bytes) and digests by index.

    In a delta a chunk of the parent has the length 0 and an empty digest.
    """

    lengths: array[int] = attrs.field(factory=lambda: array("I"))
    digests: Flat = attrs.field(factory=Digests)
    _offsets: array[int] = attrs.field(init=False)

    @_offsets.default
    def _summed(self) -> array[int]:
        return array("Q", itertools.accumulate(self.lengths, initial=0))

    def offsets(self) -> Sequence[int]:
        """Where each frame starts in the pack file, and at the end the file's size."""
        return self._offsets

    def extend(self, lengths: array[int], digests: bytes) -> None:
        """There are more, of a pack that is still being pressed; others may read meanwhile."""
        assert isinstance(self.digests, Digests)
        ends = itertools.accumulate(lengths, initial=self._offsets[-1])
        next(ends)
        self._offsets.extend(ends)
        self.digests.packed += digests
        self.lengths.extend(lengths)  # last: it says how many there are


def encode_frames(lengths: Sequence[int], digests: Sequence[bytes]) -> bytes:
    """One page of a pack; of a delta, with an empty digest for each length 0."""
    assert 0 < len(lengths) == len(digests) <= PAGE_SPAN
    packed = b"".join(n.to_bytes(4, "big") for n in lengths)
    return encode({"v": 1, "kind": "frames", "lengths": packed, "digests": b"".join(digests)})


def read_frames(pack: Pack | Delta, get: Callable[[Cid], bytes]) -> Frames:
    """Read the pages of a pack or a delta through `get`."""
    lengths, digests = array("I"), bytearray()
    left = pack.count
    for page in pack.pages:
        span = min(PAGE_SPAN, left)
        packed, hashes = take(decode(get(page)), "frames", "lengths", "digests")
        need(isinstance(packed, bytes) and isinstance(hashes, bytes), "frames")
        need(len(packed) == 4 * span, "the number of frames")
        some = array("I", packed)
        if sys.byteorder == "little":
            some.byteswap()
        need(len(hashes) == DIGEST_SIZE * (span - some.count(0)), "the number of digests")
        lengths += some
        digests += hashes
        left -= span
    least = 0 if isinstance(pack, Delta) else 1
    need(least <= min(lengths, default=1) <= max(lengths, default=1) <= FRAME_MAX, "the length of a frame")
    return Frames(lengths, digests_of(lengths, digests))
