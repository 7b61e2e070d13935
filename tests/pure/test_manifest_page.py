"""Do the vectors on `docs/protocols/manifest.md` say what the code does?  They are read from the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from p2pgrid.dht.delta import DICT_MAX, delta_refs, encode_delta, expand_delta, gather
from p2pgrid.dht.draft import LISTS_MAX, MOST_MAX, Draft, going_on, read_list
from p2pgrid.dht.frame import expand
from p2pgrid.dht.manifest import (
    CHUNK_SIZE,
    FRAME_MAX,
    LITERAL_MAX,
    OBJECT_MAX,
    PAGE_SPAN,
    Content,
    Delta,
    Disk,
    File,
    Guest,
    Literal,
    Pack,
    Recipe,
    Tree,
    Zeros,
    decode_page,
    decode_segments,
    encode_frames,
    encode_page,
    encode_segments,
    read_frames,
    read_layout,
    signed,
    verified,
)
from p2pgrid.errors import BadFrame, BadObject
from p2pgrid.ids import Cid, digest, object_cid

PAGE = (Path(__file__).parents[2] / "docs/protocols/manifest.md").read_text()
KEY = SigningKey(bytes(range(32)))
FIRST, LAST = b"A" * CHUNK_SIZE, b"p2pgrid\n"
SIZE = 2 * CHUNK_SIZE + len(LAST)


def blocks(kind: str) -> list[list[str]]:
    return [body.splitlines() for body in re.findall(rf"```{kind}\n(.*?)\n```", PAGE, re.DOTALL)]


VECTORS = {
    head.removeprefix("kind "): (Cid.parse(name.removeprefix("name ")), bytes.fromhex("".join(rest)))
    for head, name, *rest in blocks("vector")
}
OBJECTS = dict(VECTORS.values())
FRAMES = [bytes.fromhex("".join(rest)) for _, _, _, *rest in blocks("frame")]


def link(kind: str) -> Cid:
    return VECTORS[kind][0]


def parent() -> list[bytes]:
    """Page, content, frames and pack of the delta's parent."""
    page = encode_page([digest(FIRST)])
    assert page is not None
    content = Content(CHUNK_SIZE, CHUNK_SIZE, (object_cid(page),)).encode()
    frames = encode_frames([len(FRAMES[0])], [digest(FRAMES[0])])
    pack = signed(Pack(object_cid(content), 1, (object_cid(frames),), b""), KEY).encode()
    return [page, content, frames, pack]


PARENT = parent()
TOLD = bytes.fromhex("010000") + FRAMES[1]


def test_every_kind_has_a_vector_and_its_name_holds():
    kinds = {"content", "page", "pack", "frames", "delta", "recipe", "segments", "disk", "tree", "draft"}
    others = {"frames of the delta", "recipe of a disk without what was freed", "first draft"}
    assert VECTORS.keys() == kinds | others
    for cid, data in VECTORS.values():
        assert verified(cid, data) == data


def test_writing_gives_the_bytes_on_the_page():
    made = {
        "page": encode_page([digest(FIRST), None, digest(LAST)]),
        "content": Content(SIZE, CHUNK_SIZE, (link("page"),)).encode(),
        "frames": encode_frames([len(f) for f in FRAMES], [digest(f) for f in FRAMES]),
        "pack": signed(Pack(link("content"), 2, (link("frames"),), b""), KEY).encode(),
        "frames of the delta": encode_frames([0, len(TOLD)], [b"", digest(TOLD)]),
        "delta": signed(Delta(link("content"), object_cid(PARENT[1]), object_cid(PARENT[3]), 2,
                              (link("frames of the delta"),), b""), KEY).encode(),
        "segments": encode_segments([Literal(b"head"), Guest(0, SIZE), Zeros(500)]),
        "recipe": Recipe("vdi", True, SIZE + 504, (link("segments"),)).encode(),
        "recipe of a disk without what was freed": Recipe("vdi", False, 0x080200, (), 4096).encode(),
        "disk": signed(Disk(link("content"), link("pack"), link("recipe"), b""), KEY).encode(),
        "tree": signed(Tree((File("a/big", 2 * CHUNK_SIZE, False), File("run.sh", 8, True)),
                            link("content"), link("pack"), b""), KEY).encode(),
        "first draft": signed(Draft(None, bytes(range(32)), 3, 0, (), b""), KEY).encode(),
        "draft": signed(Draft(link("first draft"), b"", 3, 2, (link("frames"),), b""), KEY).encode(),
    }  # fmt: skip
    assert {kind: data.hex() for kind, data in made.items()} == {k: d.hex() for k, (_, d) in VECTORS.items()}


def test_reading_gives_what_the_page_says():
    disk = Disk.decode(OBJECTS[link("disk")])
    layout = read_layout(disk.content, OBJECTS.__getitem__)
    assert list(layout.names) == [digest(FIRST), None, digest(LAST)]
    assert list(layout.names) == decode_page(OBJECTS[link("page")], 3)
    pack = Pack.decode(OBJECTS[disk.pack])
    frames = read_frames(pack, OBJECTS.__getitem__)
    assert tuple(frames.digests) == tuple(digest(f) for f in FRAMES)
    assert tuple(frames.lengths) == tuple(map(len, FRAMES))
    delta = Delta.decode(OBJECTS[link("delta")])
    told = read_frames(delta, OBJECTS.__getitem__)
    assert tuple(told.lengths) == (0, len(TOLD))
    assert tuple(told.digests) == (b"", digest(TOLD))
    assert Pack.decode(PARENT[3]).content == delta.parent
    first = Draft.decode(OBJECTS[link("first draft")])
    draft = going_on(link("first draft"), first, OBJECTS[link("draft")])
    assert draft is not None
    lengths, digests = read_list(OBJECTS[draft.lists[0]])
    assert (lengths, digests) == (frames.lengths, b"".join(frames.digests))
    recipe = Recipe.decode(OBJECTS[disk.recipe])
    assert decode_segments(OBJECTS[recipe.pages[0]]) == [Literal(b"head"), Guest(0, SIZE), Zeros(500)]
    assert Tree.decode(OBJECTS[link("tree")]).files[1] == File("run.sh", 8, True)


def test_the_frames_on_the_page_are_the_chunks():
    heads = [(name.split()[1], digested.split()[1]) for _, name, digested, *_ in blocks("frame")]
    for (name, frame_digest), frame, plain in zip(heads, FRAMES, (FIRST, LAST), strict=True):
        assert expand(frame, CHUNK_SIZE) == plain
        assert Cid.parse(name).digest == digest(plain)
        assert frame_digest == digest(frame).hex()


NUMBERS = b"".join(b"%d\n" % n for n in range(100_000))
"""The parent of the delta frames on the page."""


def spelled(words: str) -> bytes:
    """`parent N M`, or hex."""
    if words.startswith("parent "):
        first, length = map(int, words.split()[1:])
        return NUMBERS[first : first + length]
    return bytes.fromhex(words)


def gathered(ranges: list[tuple[int, int]]) -> bytes:
    return gather(ranges, len(NUMBERS), lambda offset, length: NUMBERS[offset : offset + length])


def expanded(frame: bytes) -> bytes:
    ranges, body = delta_refs(frame, len(NUMBERS))
    return expand_delta(body, gathered(ranges), CHUNK_SIZE)


def test_the_delta_frames_on_the_page_are_what_it_says():
    frames = [
        (b"".join(map(spelled, plain.removeprefix("plain ").split(", "))), bytes.fromhex("".join(rest)))
        for plain, *rest in blocks("delta")
    ]
    assert len(frames) == 3
    for plain, frame in frames:
        assert expanded(frame) == plain
    plain, copied = frames[1]
    ranges, _ = delta_refs(copied, len(NUMBERS))
    assert encode_delta(plain, ranges, gathered(ranges)) == copied


REFUSED_DELTAS = [line.split("  ", 1) for lines in blocks("refused-delta") for line in lines]


@pytest.mark.parametrize(("data", "why"), REFUSED_DELTAS, ids=[why for _, why in REFUSED_DELTAS])
def test_what_the_page_refuses_is_no_frame_of_a_delta(data, why):
    with pytest.raises(BadFrame):
        expanded(bytes.fromhex(data))


REFUSED = [line.split("  ", 1) for (lines) in blocks("refused") for line in lines]


def test_there_are_objects_to_refuse():
    assert len(REFUSED) >= 14


@pytest.mark.parametrize(("data", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_the_page_refuses_is_refused(data, why):
    with pytest.raises(BadObject):
        Content.decode(bytes.fromhex(data))


@pytest.mark.parametrize(
    "bound", [CHUNK_SIZE, PAGE_SPAN, OBJECT_MAX, FRAME_MAX, LITERAL_MAX, DICT_MAX, MOST_MAX, LISTS_MAX]
)
def test_the_bounds_on_the_page_are_ours(bound):
    assert str(bound) in PAGE.replace(",", "")
