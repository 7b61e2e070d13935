"""Say what a disk is: objects in canonical DAG-CBOR, each named by its CID.

Pure: bytes in, bytes out.  Nothing here is believed before its name was checked,
and nothing is decoded twice in two ways: an object whose canonical encoding is
not the very bytes that came is a `BadObject`.

    disk ──> content ──> page, page, …     which chunk stands where in the guest's space
      │  └─> recipe ───> page, page, …     how the container file is put together again
      └────> pack ─────> page, page, …     how long each frame is, and its digest
          or delta ────> page, page, …     … of the frames that the parent's pack does not give

Contents and their pages are in `content.py`, packs and deltas in `pack.py`, signatures in
`signing.py`; whoever reads a datum finds all of it here.

*recipe* is the container file as a run of segments: guest bytes, literal bytes, zeros.

disk, tree and pack are signed (Ed25519) by the putter over a domain prefix and the canonical
encoding without the signature.  Spec with vectors: `docs/protocols/manifest.md`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import attrs

from p2pgrid.dht.content import CHUNK_SIZE as CHUNK_SIZE
from p2pgrid.dht.content import PAGE_SPAN as PAGE_SPAN
from p2pgrid.dht.content import SIZE_MAX as SIZE_MAX
from p2pgrid.dht.content import Content as Content
from p2pgrid.dht.content import Layout as Layout
from p2pgrid.dht.content import Names as Names
from p2pgrid.dht.content import decode_page as decode_page
from p2pgrid.dht.content import encode_page as encode_page
from p2pgrid.dht.content import page_runs as page_runs
from p2pgrid.dht.content import read_layout as read_layout
from p2pgrid.dht.dagcbor import OBJECT_MAX as OBJECT_MAX
from p2pgrid.dht.dagcbor import bounded, decode, encode, need, take
from p2pgrid.dht.pack import FRAME_MAX as FRAME_MAX
from p2pgrid.dht.pack import Delta as Delta
from p2pgrid.dht.pack import Frames as Frames
from p2pgrid.dht.pack import Pack as Pack
from p2pgrid.dht.pack import decode_pack as decode_pack
from p2pgrid.dht.pack import encode_frames as encode_frames
from p2pgrid.dht.pack import read_frames as read_frames
from p2pgrid.dht.signing import check_signature
from p2pgrid.dht.signing import signed as signed
from p2pgrid.errors import BadObject
from p2pgrid.ids import Cid, object_cid

LITERAL_MAX = 64 * 1024
"""Bytes of one literal segment."""


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

    `exact` is False where the container's own compressor cannot be repeated, or where blocks that
    the guest's file systems had freed were left out; then there are no pages, and `get` writes a
    fresh file of that format with the same guest content, and zeros in those blocks.
    """

    format: str
    exact: bool
    size: int
    """Bytes of the container file."""
    pages: tuple[Cid, ...]
    freed: int = 0
    """Bytes of the blocks that were left out because nobody in the guest uses them."""

    def encode(self) -> bytes:
        fields = {"v": 1, "kind": "recipe", "format": self.format, "exact": self.exact,
                  "size": self.size, "pages": list(self.pages)}  # fmt: skip
        return encode({**fields, "freed": self.freed} if self.freed else fields)

    @classmethod
    def decode(cls, data: bytes) -> Recipe:
        fields = decode(data)
        freed = bounded(fields.get("freed", 1), SIZE_MAX, "freed")
        need(freed > 0, "nothing freed, which goes without saying")
        names = ("format", "exact", "size", "pages", *(["freed"] if "freed" in fields else ()))
        form, exact, size, pages, *_ = take(fields, "recipe", *names)
        need(form in FORMATS and isinstance(exact, bool), "a format we do not know")
        need(isinstance(pages, list) and all(isinstance(p, Cid) for p in pages), "pages")
        need(exact or not pages, "pages of a recipe that is not exact")
        need(not exact or "freed" not in fields, "an exact recipe without what was freed")
        size = bounded(size, 2 * SIZE_MAX, "size")
        return cls(form, exact, size, tuple(pages), freed if "freed" in fields else 0)


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
    """What a user put: a content, the container it came in, and a first pack or delta; signed."""

    content: Cid
    pack: Cid
    recipe: Cid
    signer: bytes
    signature: bytes = b""

    DOMAIN: ClassVar[bytes] = b"p2pgrid disk v1\0"

    def fields(self) -> dict[str, Any]:
        return {"v": 1, "kind": "disk", "content": self.content, "pack": self.pack,
                "recipe": self.recipe, "signer": self.signer}  # fmt: skip

    def encode(self) -> bytes:
        return encode({**self.fields(), "signature": self.signature})

    @classmethod
    def decode(cls, data: bytes) -> Disk:
        """Raises `BadObject` when the signature does not hold, too."""
        content, pack, recipe, signer, signature = take(
            decode(data), "disk", "content", "pack", "recipe", "signer", "signature"
        )
        need(all(isinstance(c, Cid) for c in (content, pack, recipe)), "links")
        disk = cls(content, pack, recipe, signer, signature)
        check_signature(disk, signer, signature)
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

    DOMAIN: ClassVar[bytes] = b"p2pgrid tree v1\0"

    def fields(self) -> dict[str, Any]:
        files = [[f.path, f.size, f.executable] for f in self.files]
        return {"v": 1, "kind": "tree", "files": files, "content": self.content,
                "pack": self.pack, "signer": self.signer}  # fmt: skip

    def encode(self) -> bytes:
        return encode({**self.fields(), "signature": self.signature})

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
        check_signature(tree, signer, signature)
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


def verified(cid: Cid, data: bytes) -> bytes:
    """`data` if it is what `cid` names.  Raises `BadObject`."""
    if object_cid(data) != cid:
        raise BadObject(why=f"the bytes are not {cid}")
    return data
