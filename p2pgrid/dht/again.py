"""Recognise a disk that was put before, at the price of naming its chunks.

A sample of it is looked for in the complete packs and deltas here that the same key signed.  Where
some have all of the sample, the disk is pressed as if its chunks needed no frames: the first chunk
that is in none of them ends the attempt, and nothing else was spent on it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import NoReturn

import attrs
from nacl.signing import SigningKey

from p2pgrid.dht.lineage import NotLike, sampled
from p2pgrid.dht.press import Coding, Read
from p2pgrid.dht.shelf import Shelf
from p2pgrid.dht.store import Store
from p2pgrid.ids import Cid, digest


def known_in(
    store: Store,
    key: SigningKey,
    size: int,
    positions: Sequence[int],
    read: Read,
    fits: Callable[[Shelf], bool],
) -> list[Shelf]:
    """The packs, of those that `fit`, which may be that of a space of `size` bytes; full ones first."""
    me = bytes(key.verify_key)
    own = [s for s in store.shelves() if s.signer == me and s.layout.content.size == size and fits(s)]
    own = sorted((s for s in own if s.complete), key=lambda s: (s.parent is not None, s.pack.digest))
    names = [digest(plain) for plain in sampled(size, positions, read)] if own else []
    return [s for s in own if all(name in s.layout.index for name in names)]


@attrs.frozen
class _AnyOf:
    """What is in one of `parts`."""

    parts: Sequence[Container[bytes]]

    def __contains__(self, name: object) -> bool:
        return any(name in part for part in self.parts)


def same_coding(shelves: Sequence[Shelf]) -> Coding:
    """No frames at all.  Raises `NotLike` as soon as the disk proves to be none of `shelves`."""

    def squeeze(position: int, plain: bytearray) -> NoReturn:
        raise NotLike

    def seal(content: Cid, lengths: Sequence[int], digests: Sequence[bytes]) -> Cid:
        for shelf in shelves:
            if shelf.layout.cid == content:
                return shelf.pack
        raise NotLike

    return Coding(squeeze, (), seal, _AnyOf([shelf.layout.index for shelf in shelves]))
