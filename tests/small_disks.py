"""Make small disks and their objects in memory, as a putter would."""

from __future__ import annotations

import random
from collections.abc import Sequence

import attrs
from nacl.signing import SigningKey

from p2pgrid.dht.chunker import is_zero
from p2pgrid.dht.delta import BLOCK, encode_delta
from p2pgrid.dht.frame import compress
from p2pgrid.dht.manifest import (
    CHUNK_SIZE,
    PAGE_SPAN,
    Content,
    Delta,
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
    """By index; an empty one is taken from the parent."""

    @property
    def pack_objects(self) -> tuple[bytes, ...]:
        """The content, the pack, and their pages."""
        return self.objects[: [object_cid(data) for data in self.objects].index(self.pack) + 1]

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
    return _disk(chunks, key, frames, exact, None)


def small_delta(
    parent: SmallDisk,
    chunks: Sequence[bytes],
    key: SigningKey = KEY,
    frames: Sequence[bytes] = (),
    about: Delta | None = None,
) -> SmallDisk:
    """A raw disk of `chunks` in a delta on `parent`: what differs refers to the parent's same place.

    `about` replaces what the delta says of its parent.
    """
    return _disk(chunks, key, frames, True, parent, about)


def _disk(
    chunks: Sequence[bytes],
    key: SigningKey,
    frames: Sequence[bytes],
    exact: bool,
    parent: SmallDisk | None,
    about: Delta | None = None,
) -> SmallDisk:
    names: Names = [None if is_zero(c) else digest(c) for c in chunks]
    distinct: dict[bytes | None, tuple[int, bytes]] = {}
    for position, (name, plain) in enumerate(zip(names, chunks, strict=True)):
        distinct.setdefault(name, (position, plain))
    distinct.pop(None, None)
    if parent is None:
        made = tuple(frames) or tuple(compress(c) for _, c in distinct.values())
    else:
        made = tuple(frames) or tuple(_residue(parent.plain, *found) for found in distinct.values())
    objects: list[bytes] = []

    def put(data: bytes) -> Cid:
        objects.append(data)
        return object_cid(data)

    pages = [encode_page(names[i : i + PAGE_SPAN]) for i in range(0, len(names), PAGE_SPAN)]
    size = sum(map(len, chunks))
    content = put(Content(size, CHUNK_SIZE, tuple(None if p is None else put(p) for p in pages)).encode())
    spans = [made[i : i + PAGE_SPAN] for i in range(0, len(made), PAGE_SPAN)]
    lists = tuple(
        put(encode_frames([len(f) for f in s], [digest(f) if f else b"" for f in s])) for s in spans
    )
    if parent is None:
        pack = put(signed(Pack(content, len(made), lists, b""), key).encode())
    else:
        under = about or Delta(content, Disk.decode(parent.objects[-1]).content, parent.pack, 0, (), b"")
        pack = put(signed(Delta(content, under.parent, under.base, len(made), lists, b""), key).encode())
    segments = tuple(put(p) for p in paged_segments([Guest(0, size)])) if exact else ()
    recipe = put(Recipe("raw", exact, size, segments).encode())
    datum = put(signed(Disk(content, pack, recipe, b""), key).encode())
    return SmallDisk(datum, pack, b"".join(chunks), tuple(objects), made)


def _residue(parent: bytes, position: int, plain: bytes) -> bytes:
    """The delta frame of a chunk, by what the parent has at the same place; empty where it has it all."""
    cut = [parent[i : i + CHUNK_SIZE] for i in range(0, len(parent), CHUNK_SIZE)]
    if plain in cut:
        return b""
    dictionary = cut[position] if position < len(cut) else b""
    blocks = -(-len(dictionary) // BLOCK)
    ranges = [(position * CHUNK_SIZE // BLOCK, blocks)] if blocks else []
    return encode_delta(plain, ranges, dictionary.ljust(blocks * BLOCK, b"\0"))


def changed(plain: bytes, seed: int, count: int = 3) -> bytes:
    """`plain` with a few bytes changed."""
    chance, new = random.Random(seed), bytearray(plain)
    for _ in range(count):
        at = chance.randrange(len(new))
        new[at] = (new[at] + chance.randrange(1, 256)) % 256
    return bytes(new)
