"""Make small disks and their objects in memory, as a putter would."""

from __future__ import annotations

import random
from collections.abc import Sequence

import attrs
from nacl.signing import SigningKey

from p2pgrid.dht.chunker import is_zero
from p2pgrid.dht.frame import compress
from p2pgrid.dht.manifest import (
    CHUNK_SIZE,
    PAGE_SPAN,
    Content,
    Disk,
    Guest,
    Names,
    Pack,
    Recipe,
    encode_frames,
    encode_page,
    paged_segments,
    signed,
)
from p2pgrid.dht.store import Store
from p2pgrid.ids import Cid, digest, object_cid

KEY = SigningKey(bytes(range(32)))


@attrs.frozen
class SmallDisk:
    """A raw disk, its signed objects and its frames."""

    datum: Cid
    pack: Cid
    plain: bytes
    objects: tuple[bytes, ...]
    frames: tuple[bytes, ...]

    def put_objects(self, store: Store) -> None:
        for data in self.objects:
            store.put_object(data)


def chunk(seed: int, length: int = CHUNK_SIZE) -> bytes:
    """Some bytes: seed 0 is a hole, a negative one does not compress, others do as a disk's would."""
    if seed == 0:
        return bytes(length)
    if seed < 0:
        return random.Random(seed).randbytes(length)
    words = [random.Random(f"{seed}/{i}").randbytes(16) for i in range(64)]
    return b"".join(random.Random(seed).choices(words, k=-(-length // 16)))[:length]


def small_disk(
    seeds: Sequence[int],
    tail: int = CHUNK_SIZE,
    key: SigningKey = KEY,
    frames: Sequence[bytes] = (),
    exact: bool = True,
) -> SmallDisk:
    """A raw disk whose chunks are `chunk(seed)`, the last one `tail` bytes long.

    `frames` replaces the frames that an honest putter would make; without `exact` it is
    another datum with the same content and pack.
    """
    chunks = [chunk(seed, tail if i == len(seeds) - 1 else CHUNK_SIZE) for i, seed in enumerate(seeds)]
    names: Names = [None if is_zero(c) else digest(c) for c in chunks]
    distinct = dict(zip(names, chunks, strict=True))
    distinct.pop(None, None)
    made = tuple(frames) or tuple(compress(c) for c in distinct.values())
    objects: list[bytes] = []

    def put(data: bytes) -> Cid:
        objects.append(data)
        return object_cid(data)

    pages = [encode_page(names[i : i + PAGE_SPAN]) for i in range(0, len(names), PAGE_SPAN)]
    size = sum(map(len, chunks))
    content = put(Content(size, CHUNK_SIZE, tuple(p and put(p) for p in pages)).encode())
    spans = [made[i : i + PAGE_SPAN] for i in range(0, len(made), PAGE_SPAN)]
    lists = tuple(put(encode_frames([len(f) for f in s], [digest(f) for f in s])) for s in spans)
    pack = put(signed(Pack(content, len(made), lists, b""), key).encode())
    segments = tuple(put(p) for p in paged_segments([Guest(0, size)])) if exact else ()
    recipe = put(Recipe("raw", exact, size, segments).encode())
    datum = put(signed(Disk(content, pack, recipe, b""), key).encode())
    return SmallDisk(datum, pack, b"".join(chunks), tuple(objects), made)
