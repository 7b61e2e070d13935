"""Say what a guest sees: so many bytes, cut into chunks, each at its place and under its name.

Pure.  A *content* is the same whatever container a disk came in: `size` bytes of guest address
space, cut every `chunk_size`; each page tells `PAGE_SPAN` positions as alternating runs
of holes and chunks plus the chunks' 32-byte names; a page of nothing but holes is null.
The last chunk may be short.

*frames* of a content are its distinct chunk names in the order of their first position;
that position in the list is a chunk's **index**, the only thing the swarm reasons about.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import attrs

from p2pgrid.dht.dagcbor import bounded, decode, encode, need, take
from p2pgrid.dht.flat import Digests, Index
from p2pgrid.dht.places import Places
from p2pgrid.ids import DIGEST_SIZE, Cid

CHUNK_SIZE = 256 * 1024
"""Bytes of guest space in a chunk; `docs/decisions/0002-chunks.md` has the measurements."""
PAGE_SPAN = 8192
"""Positions (or frames) a page tells: at most 256 KiB of names."""
SIZE_MAX = 1 << 45
"""Bytes (32 TiB): beyond it a size is an overflow, not a disk."""


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


def page_runs(data: bytes, positions: int) -> Iterator[int | bytes]:
    """The runs of a page that must tell exactly `positions` positions: so many holes, or names in a row."""
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
            yield packed[at : at + run * DIGEST_SIZE]
            at += run * DIGEST_SIZE


def decode_page(data: bytes, positions: int) -> Names:
    """The names of a page, position by position."""
    names: Names = []
    for run in page_runs(data, positions):
        names += [None] * run if isinstance(run, int) else Digests(run)
    return names


@attrs.frozen(eq=False)
class Layout:
    """A content with all its pages read: names by position, frames by index."""

    cid: Cid
    content: Content
    names: Places
    frames: Digests
    """Distinct names; a chunk's index is its place here."""
    index: Index
    """Name to index."""

    @classmethod
    def of(cls, cid: Cid, content: Content, names: Iterable[bytes | None]) -> Layout:
        places = names if isinstance(names, Places) else Places(names)
        return cls(cid, content, places, places.by_name.digests, places.by_name)

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
                names.fill(run)
        left -= span
    return Layout.of(cid, content, names)
