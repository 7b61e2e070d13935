"""Say what a disk is: objects in canonical DAG-CBOR, each named by its CID.

Pure: bytes in, bytes out.  Nothing here is believed before its name was checked,
and nothing is decoded twice in two ways: an object whose canonical encoding is
not the very bytes that came is a `BadObject`.

    disk ──> content ──> page, page, …     which chunk stands where in the guest's space
      │  └─> recipe ───> page, page, …     how the container file is put together again
      └────> pack ─────> page, page, …     how long each frame is, and its digest

*content* is the same whatever container a disk came in: `size` bytes of guest address
space, cut every `chunk_size`; each page tells `PAGE_SPAN` positions as alternating runs
of holes and chunks plus the chunks' 32-byte names; a page of nothing but holes is null.
The last chunk may be short.

*frames* of a content are its distinct chunk names in the order of their first position;
that position in the list is a chunk's **index**, the only thing the swarm reasons about.
*pack* holds one zstd frame per index; `pack.pages` list lengths (u32 big endian) and
digests (32 bytes), `PAGE_SPAN` frames a page.  Offsets in the pack file are the running
sum of the lengths.

*recipe* is the container file as a run of segments: guest bytes, literal bytes, zeros.

disk, tree and pack are signed (Ed25519) by the putter over a domain prefix and the canonical
encoding without the signature.  Spec with vectors: `docs/protocols/manifest.md`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import attrs
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from p2pgrid.dht.dagcbor import OBJECT_MAX as OBJECT_MAX
from p2pgrid.dht.dagcbor import bounded, decode, encode, need, take
from p2pgrid.dht.places import Places
from p2pgrid.errors import BadObject
from p2pgrid.ids import DIGEST_SIZE, Cid, object_cid

CHUNK_SIZE = 256 * 1024
"""Bytes of guest space in a chunk; `docs/decisions/0002-chunks.md` has the measurements."""
PAGE_SPAN = 8192
"""Positions (or frames) a page tells: at most 256 KiB of names."""
SIZE_MAX = 1 << 45
"""Bytes (32 TiB): beyond it a size is an overflow, not a disk."""
LITERAL_MAX = 64 * 1024
"""Bytes of one literal segment."""
FRAME_MAX = CHUNK_SIZE + 1024
"""Bytes. zstd never needs more for an incompressible chunk."""


# --- content ---------------------------------------------------------------------------


@attrs.frozen
class Content:
    """The guest's bytes: how many, how they are cut, and the pages of chunk names."""

    size: int
    chunk_size: int
    pages: tuple[Cid | None, ...]

    @property
    def positions(self) -> int:
        return -(-self.size // self.chunk_size)

    def encode(self) -> bytes:
        return encode({"v": 1, "kind": "content", "size": self.size,
                       "chunk_size": self.chunk_size, "pages": list(self.pages)})  # fmt: skip

    @classmethod
    def decode(cls, data: bytes) -> Content:
        size, chunk_size, pages = take(decode(data), "content", "size", "chunk_size", "pages")
        need(chunk_size == CHUNK_SIZE, "a chunk size we do not know")
        size = bounded(size, SIZE_MAX, "size")
        need(size > 0, "an empty content")
        need(isinstance(pages, list) and all(p is None or isinstance(p, Cid) for p in pages), "pages")
        content = cls(size, chunk_size, tuple(pages))
        need(len(pages) == -(-content.positions // PAGE_SPAN), "the number of pages")
        return content


Names = list[bytes | None]
"""One entry per position: a chunk's 32-byte name, or None for a hole."""


def encode_page(names: Sequence[bytes | None]) -> bytes | None:
    """One content page; None when every position is a hole."""
    assert 0 < len(names) <= PAGE_SPAN
    runs: list[int] = []
    for held, group in itertools.groupby(names, key=lambda name: name is not None):
        if not runs and held:
            runs.append(0)
        runs.append(sum(1 for _ in group))
    if len(runs) == 1:
        return None
    return encode(
        {"v": 1, "kind": "page", "runs": runs, "names": b"".join(n for n in names if n is not None)}
    )


def page_runs(data: bytes, positions: int) -> Iterator[int | list[bytes]]:
    """The runs of a page that must tell exactly `positions` positions: so many holes, or names."""
    runs, packed = take(decode(data), "page", "runs", "names")
    need(isinstance(runs, list) and isinstance(packed, bytes), "page")
    runs = [bounded(r, PAGE_SPAN, "run") for r in runs]
    need(sum(runs) == positions and sum(runs[1::2]) * DIGEST_SIZE == len(packed), "runs")
    need(all(r > 0 for r in runs[1:]) and len(runs) > 1, "an empty run")
    at = 0
    for i, run in enumerate(runs):
        if i % 2 == 0:
            yield run
        else:
            yield [packed[j : j + DIGEST_SIZE] for j in range(at, at + run * DIGEST_SIZE, DIGEST_SIZE)]
            at += run * DIGEST_SIZE


def decode_page(data: bytes, positions: int) -> Names:
    """The names of a page, position by position."""
    names: Names = []
    for run in page_runs(data, positions):
        names += [None] * run if isinstance(run, int) else run
    return names


@attrs.frozen(eq=False)
class Layout:
    """A content with all its pages read: names by position, frames by index."""

    cid: Cid
    content: Content
    names: Places
    frames: tuple[bytes, ...]
    """Distinct names; a chunk's index is its place here."""
    index: dict[bytes, int]
    """Name to index."""

    @classmethod
    def of(cls, cid: Cid, content: Content, names: Iterable[bytes | None]) -> Layout:
        places = names if isinstance(names, Places) else Places(names)
        return cls(cid, content, places, tuple(places.by_name), places.by_name)

    @property
    def holes(self) -> int:
        return self.names.holes

    def extents(self) -> Iterator[tuple[int, int]]:
        """The stretches (offset, length) of the guest's space that are not holes."""
        size, chunk_size = self.content.size, self.content.chunk_size
        for first, count in self.names.runs():
            yield first * chunk_size, min(count * chunk_size, size - first * chunk_size)

    def length_at(self, position: int) -> int:
        """Plain bytes of the chunk at `position` (the last one may be short)."""
        return min(self.content.chunk_size, self.content.size - position * self.content.chunk_size)


def read_layout(cid: Cid, get: Callable[[Cid], bytes]) -> Layout:
    """Read a content and its pages through `get` (which has verified names)."""
    content = Content.decode(get(cid))
    names = Places()
    left = content.positions
    for page in content.pages:
        span = min(PAGE_SPAN, left)
        for run in page_runs(get(page), span) if page is not None else (span,):
            if isinstance(run, int):
                names.skip(run)
            else:
                names.extend(run)
        left -= span
    return Layout.of(cid, content, names)


# --- pack ------------------------------------------------------------------------------


@attrs.frozen
class Pack:
    """One encoding of a content: a frame per index, signed by who made it."""

    content: Cid
    count: int
    pages: tuple[Cid, ...]
    signer: bytes
    signature: bytes = b""

    DOMAIN = b"p2pgrid pack v1\0"

    def _fields(self) -> dict[str, Any]:
        return {"v": 1, "kind": "pack", "content": self.content, "count": self.count,
                "pages": list(self.pages), "signer": self.signer}  # fmt: skip

    def encode(self) -> bytes:
        return encode({**self._fields(), "signature": self.signature})

    @classmethod
    def decode(cls, data: bytes) -> Pack:
        """Raises `BadObject` when the signature does not hold, too."""
        content, count, pages, signer, signature = take(
            decode(data), "pack", "content", "count", "pages", "signer", "signature"
        )
        count = bounded(count, SIZE_MAX // CHUNK_SIZE, "count")
        need(isinstance(content, Cid) and isinstance(pages, list), "pack")
        need(all(isinstance(p, Cid) for p in pages) and len(pages) == -(-count // PAGE_SPAN), "pages")
        pack = cls(content, count, tuple(pages), signer, signature)
        _verify(pack.DOMAIN, pack._fields(), signer, signature)
        return pack


@attrs.frozen
class Frames:
    """The frames of a pack, all pages read: lengths (bytes) and digests by index."""

    lengths: tuple[int, ...]
    digests: tuple[bytes, ...]

    def offsets(self) -> list[int]:
        """Where each frame starts in the pack file, and at the end the file's size."""
        return [0, *itertools.accumulate(self.lengths)]


def encode_frames(lengths: Sequence[int], digests: Sequence[bytes]) -> bytes:
    """One pack page."""
    assert 0 < len(lengths) == len(digests) <= PAGE_SPAN
    packed = b"".join(n.to_bytes(4, "big") for n in lengths)
    return encode({"v": 1, "kind": "frames", "lengths": packed, "digests": b"".join(digests)})


def read_frames(pack: Pack, get: Callable[[Cid], bytes]) -> Frames:
    """Read a pack's pages through `get`."""
    lengths: list[int] = []
    digests: list[bytes] = []
    left = pack.count
    for page in pack.pages:
        span = min(PAGE_SPAN, left)
        packed, hashes = take(decode(get(page)), "frames", "lengths", "digests")
        need(isinstance(packed, bytes) and isinstance(hashes, bytes), "frames")
        need(len(packed) == 4 * span and len(hashes) == DIGEST_SIZE * span, "the number of frames")
        lengths += [int.from_bytes(packed[i : i + 4], "big") for i in range(0, len(packed), 4)]
        digests += [hashes[i : i + DIGEST_SIZE] for i in range(0, len(hashes), DIGEST_SIZE)]
        left -= span
    need(all(0 < n <= FRAME_MAX for n in lengths), "the length of a frame")
    return Frames(tuple(lengths), tuple(digests))


# --- recipe ----------------------------------------------------------------------------


@attrs.frozen
class Guest:
    """`length` bytes of the guest's space from `offset` on."""

    offset: int
    length: int


@attrs.frozen
class Literal:
    """Bytes outside the guest's space: headers, maps, what lies between and behind."""

    data: bytes


@attrs.frozen
class Zeros:
    """`length` zero bytes outside the guest's space."""

    length: int


Segment = Guest | Literal | Zeros

FORMATS = ("raw", "vdi", "qcow2", "vmdk")


@attrs.frozen
class Recipe:
    """How the container file is put together.

    `exact` is False where the container's own compressor cannot be repeated; then there
    are no pages, and `get` writes a fresh file of that format with the same guest content.
    """

    format: str
    exact: bool
    size: int
    """Bytes of the container file."""
    pages: tuple[Cid, ...]

    def encode(self) -> bytes:
        return encode({"v": 1, "kind": "recipe", "format": self.format, "exact": self.exact,
                       "size": self.size, "pages": list(self.pages)})  # fmt: skip

    @classmethod
    def decode(cls, data: bytes) -> Recipe:
        form, exact, size, pages = take(decode(data), "recipe", "format", "exact", "size", "pages")
        need(form in FORMATS and isinstance(exact, bool), "a format we do not know")
        need(isinstance(pages, list) and all(isinstance(p, Cid) for p in pages), "pages")
        need(exact or not pages, "pages of a recipe that is not exact")
        return cls(form, exact, bounded(size, 2 * SIZE_MAX, "size"), tuple(pages))


def encode_segments(segments: Iterable[Segment]) -> bytes:
    """One recipe page: [0, offset, length] guest, [1, bytes] literal, [2, length] zeros."""
    packed: list[list[Any]] = []
    for segment in segments:
        match segment:
            case Guest(offset, length):
                packed.append([0, offset, length])
            case Literal(data):
                packed.append([1, data])
            case Zeros(length):
                packed.append([2, length])
    return encode({"v": 1, "kind": "segments", "segments": packed})


def decode_segments(data: bytes) -> list[Segment]:
    (packed,) = take(decode(data), "segments", "segments")
    need(isinstance(packed, list), "segments")
    segments: list[Segment] = []
    for item in packed:
        match item:
            case [0, int(offset), int(length)]:
                segments.append(
                    Guest(bounded(offset, SIZE_MAX, "offset"), bounded(length, SIZE_MAX, "length"))
                )
            case [1, bytes(literal)] if len(literal) <= LITERAL_MAX:
                segments.append(Literal(literal))
            case [2, int(length)]:
                segments.append(Zeros(bounded(length, 2 * SIZE_MAX, "length")))
            case _:
                raise BadObject(why="a segment of unknown kind")
    need(encode_segments(segments) == data, "segments spelled in another way")
    return segments


def paged_segments(segments: Iterable[Segment]) -> Iterator[bytes]:
    """Recipe pages, each well under `OBJECT_MAX`, in order."""
    page: list[Segment] = []
    weight = 0
    for segment in segments:
        cost = len(segment.data) + 8 if isinstance(segment, Literal) else 24
        if page and weight + cost > OBJECT_MAX // 4:
            yield encode_segments(page)
            page, weight = [], 0
        page.append(segment)
        weight += cost
    if page:
        yield encode_segments(page)


# --- disk ------------------------------------------------------------------------------


@attrs.frozen
class Disk:
    """What a user put: a content, the container it came in, and a first pack; signed."""

    content: Cid
    pack: Cid
    recipe: Cid
    signer: bytes
    signature: bytes = b""

    DOMAIN = b"p2pgrid disk v1\0"

    def _fields(self) -> dict[str, Any]:
        return {"v": 1, "kind": "disk", "content": self.content, "pack": self.pack,
                "recipe": self.recipe, "signer": self.signer}  # fmt: skip

    def encode(self) -> bytes:
        return encode({**self._fields(), "signature": self.signature})

    @classmethod
    def decode(cls, data: bytes) -> Disk:
        """Raises `BadObject` when the signature does not hold, too."""
        content, pack, recipe, signer, signature = take(
            decode(data), "disk", "content", "pack", "recipe", "signer", "signature"
        )
        need(all(isinstance(c, Cid) for c in (content, pack, recipe)), "links")
        disk = cls(content, pack, recipe, signer, signature)
        _verify(disk.DOMAIN, disk._fields(), signer, signature)
        return disk


# --- tree ------------------------------------------------------------------------------


@attrs.frozen
class File:
    """One regular file of a tree: relative POSIX path, bytes, and whether it may be executed."""

    path: str
    size: int
    executable: bool


@attrs.frozen
class Tree:
    """Files that travel together (results, inputs): their bytes one after the other are a content.

    `content` and `pack` are None where all files are empty.  Signed like a disk.
    """

    files: tuple[File, ...]
    content: Cid | None
    pack: Cid | None
    signer: bytes
    signature: bytes = b""

    DOMAIN = b"p2pgrid tree v1\0"

    def _fields(self) -> dict[str, Any]:
        files = [[f.path, f.size, f.executable] for f in self.files]
        return {"v": 1, "kind": "tree", "files": files, "content": self.content,
                "pack": self.pack, "signer": self.signer}  # fmt: skip

    def encode(self) -> bytes:
        return encode({**self._fields(), "signature": self.signature})

    @classmethod
    def decode(cls, data: bytes) -> Tree:
        """Raises `BadObject` for a path that could leave its folder, and for a bad signature."""
        rows, content, pack, signer, signature = take(
            decode(data), "tree", "files", "content", "pack", "signer", "signature"
        )
        need(isinstance(rows, list), "files")
        files: list[File] = []
        for row in rows:
            match row:
                case [str(path), int(size), bool(executable)] if safe_path(path):
                    files.append(File(path, bounded(size, SIZE_MAX, "size"), executable))
                case _:
                    raise BadObject(why="a file with an unsafe path or other fields than it has")
        paths = {f.path for f in files}
        need(len(paths) == len(files), "a path twice")
        need(paths.isdisjoint(_folders(paths)), "a file that is a folder, too")
        need(all(c is None or isinstance(c, Cid) for c in (content, pack)), "links")
        empty = sum(f.size for f in files) == 0
        need((content is None) == empty and (pack is None) == empty, "links")
        tree = cls(tuple(files), content, pack, signer, signature)
        _verify(tree.DOMAIN, tree._fields(), signer, signature)
        return tree


def _folders(paths: Iterable[str]) -> Iterator[str]:
    """Every folder above one of `paths`."""
    for path in paths:
        while "/" in path:
            path = path.rpartition("/")[0]
            yield path


def safe_path(path: str) -> bool:
    """Whether `path` is relative, stays inside, and is spelled in the one plain way."""
    parts = path.split("/")
    return (
        0 < len(path) <= 1024
        and len(parts) <= 32
        and all(0 < len(part.encode("utf-8", "replace")) <= 255 and part not in (".", "..") for part in parts)
        # Control characters would reach somebody's terminal; lone surrogates are no text.
        and not any(c < " " or c == "\\" or "\x7f" <= c <= "\x9f" or "\ud800" <= c <= "\udfff" for c in path)
    )


Datum = Disk | Tree
"""What can be fetched: it names a content and a pack."""


def decode_datum(data: bytes) -> Datum:
    """A disk or a tree, by its kind."""
    return Tree.decode(data) if decode(data).get("kind") == "tree" else Disk.decode(data)


def signed(thing: Pack | Disk | Tree, key: SigningKey) -> Any:
    """`thing` with `key` as signer and its signature."""
    thing = attrs.evolve(thing, signer=bytes(key.verify_key))
    return attrs.evolve(thing, signature=key.sign(thing.DOMAIN + encode(thing._fields())).signature)


def _verify(domain: bytes, fields: dict[str, Any], signer: Any, signature: Any) -> None:
    need(isinstance(signer, bytes) and len(signer) == 32, "the signer")
    need(isinstance(signature, bytes) and len(signature) == 64, "the signature's length")
    try:
        VerifyKey(signer).verify(domain + encode(fields), signature)
    except (BadSignatureError, ValueError):
        raise BadObject(why="the signature does not hold") from None


def verified(cid: Cid, data: bytes) -> bytes:
    """`data` if it is what `cid` names.  Raises `BadObject`."""
    if object_cid(data) != cid:
        raise BadObject(why=f"the bytes are not {cid}")
    return data
