"""Do manifest objects survive the way there and back, and does nothing else pass for one?"""

from __future__ import annotations

import tracemalloc

import cbor2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from p2pgrid.dht import manifest
from p2pgrid.dht.dagcbor import decode, encode
from p2pgrid.dht.manifest import (
    CHUNK_SIZE,
    FORMATS,
    FRAME_MAX,
    LITERAL_MAX,
    OBJECT_MAX,
    PAGE_SPAN,
    SIZE_MAX,
    Content,
    Delta,
    Disk,
    File,
    Guest,
    Layout,
    Literal,
    Pack,
    Recipe,
    Tree,
    Zeros,
    decode_datum,
    decode_pack,
    decode_page,
    decode_segments,
    encode_frames,
    encode_page,
    encode_segments,
    paged_segments,
    read_frames,
    read_layout,
    safe_path,
    signed,
    verified,
)
from p2pgrid.errors import BadObject
from p2pgrid.ids import DAG_CBOR, RAW, Cid, digest, object_cid

KEY = SigningKey(bytes(range(32)))
digests = st.binary(min_size=32, max_size=32)
cids = st.builds(Cid, st.sampled_from([RAW, DAG_CBOR]), digests)
paths = st.lists(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="/\\"),
            min_size=1, max_size=20),
    min_size=1, max_size=4,
).map("/".join).filter(safe_path)  # fmt: skip

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text() | st.binary() | cids,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def contents(draw):
    size = draw(st.integers(1, 3 * PAGE_SPAN * CHUNK_SIZE))
    count = -(-size // (CHUNK_SIZE * PAGE_SPAN))
    return Content(size, CHUNK_SIZE, tuple(draw(st.none() | cids) for _ in range(count)))


@st.composite
def packs(draw):
    count = draw(st.integers(0, 2 * PAGE_SPAN))
    pages = tuple(draw(cids) for _ in range(-(-count // PAGE_SPAN)))
    return signed(Pack(draw(cids), count, pages, b""), KEY)


@st.composite
def deltas(draw):
    pack = draw(packs())
    parent = draw(cids.filter(lambda cid: cid != pack.content))
    return signed(Delta(pack.content, parent, draw(cids), pack.count, pack.pages, b""), KEY)


@st.composite
def trees(draw):
    names = draw(st.lists(paths, max_size=5, unique=True))
    folders = set(manifest._folders(names))
    sizes = st.integers(0, SIZE_MAX)
    files = tuple(File(n, draw(sizes), draw(st.booleans())) for n in names if n not in folders)
    content, pack = (draw(cids), draw(cids)) if sum(f.size for f in files) else (None, None)
    return signed(Tree(files, content, pack, b""), KEY)


@st.composite
def recipes(draw):
    exact = draw(st.booleans())
    pages = tuple(draw(st.lists(cids, max_size=4))) if exact else ()
    freed = 0 if exact else draw(st.integers(0, SIZE_MAX))
    return Recipe(draw(st.sampled_from(FORMATS)), exact, draw(st.integers(0, 2 * SIZE_MAX)), pages, freed)


disks = st.builds(lambda c, p, r: signed(Disk(c, p, r, b""), KEY), cids, cids, cids)
segments = st.lists(
    st.builds(Guest, st.integers(0, SIZE_MAX), st.integers(0, SIZE_MAX))
    | st.builds(Literal, st.binary(max_size=200))
    | st.builds(Zeros, st.integers(0, 2 * SIZE_MAX)),
    max_size=8,
)
objects = contents() | packs() | deltas() | trees() | recipes() | disks
KINDS = (Content, Pack, Delta, Tree, Recipe, Disk)


@given(st.dictionaries(st.text(), values, max_size=5).filter(lambda v: _depth(v) <= 7))
def test_any_value_of_the_data_model_comes_back(value):
    assert decode(encode(value)) == value


def _depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 1 if isinstance(value, Cid) else 0


@given(objects)
def test_every_object_comes_back(thing):
    data = thing.encode()
    assert type(thing).decode(data) == thing
    assert verified(object_cid(data), data) == data


@given(objects, st.data())
def test_a_changed_byte_never_passes(thing, data):
    """Signed objects fail by themselves; the others are caught by their name, and are never ambiguous."""
    whole = bytearray(thing.encode())
    name = object_cid(bytes(whole))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    changed = bytes(whole)
    with pytest.raises(BadObject):
        verified(name, changed)
    if isinstance(thing, Pack | Delta | Tree | Disk):
        with pytest.raises(BadObject):
            type(thing).decode(changed)
    else:
        _refused_or_the_one_encoding(type(thing), changed)


@pytest.mark.parametrize("wrong", [{"freed": 0}, {"freed": -1}, {"freed": True}, {"freed": SIZE_MAX + 1},
                                   {"freed": None}, {"freed": 1, "exact": True}])  # fmt: skip
def test_what_was_freed_is_told_in_one_way(wrong):
    fields = {"v": 1, "kind": "recipe", "format": "raw", "exact": False, "size": 5, "pages": [], "freed": 1}
    assert Recipe.decode(encode(fields)).freed == 1
    with pytest.raises(BadObject):
        Recipe.decode(encode({**fields, **wrong}))


@pytest.mark.parametrize("thing", [
    Content(CHUNK_SIZE + 1, CHUNK_SIZE, (Cid(DAG_CBOR, bytes(32)),)),
    signed(Pack(Cid(DAG_CBOR, bytes(32)), 1, (Cid(DAG_CBOR, bytes(32)),), b""), KEY),
    signed(Delta(*[Cid(DAG_CBOR, bytes([i] * 32)) for i in range(3)], 1, (Cid(RAW, bytes(32)),), b""), KEY),
    Recipe("vdi", True, 5, (Cid(DAG_CBOR, bytes(32)),)),
    Recipe("raw", False, 5, (), 4096),
    signed(Disk(*[Cid(DAG_CBOR, bytes([i] * 32)) for i in range(3)], b""), KEY),
    signed(Tree((File("a/b", 1, True), File("c", 0, False)), *[Cid(DAG_CBOR, bytes(32))] * 2, b""), KEY),
], ids=lambda thing: type(thing).__name__)  # fmt: skip
def test_every_single_bit(thing):
    """All flips of one whole object of each kind, not a sample."""
    whole = thing.encode()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        if hasattr(thing, "signature"):
            with pytest.raises(BadObject):
                type(thing).decode(bytes(changed))
        else:
            _refused_or_the_one_encoding(type(thing), bytes(changed))


def _refused_or_the_one_encoding(kind, data: bytes) -> None:
    try:
        thing = kind.decode(data)
    except BadObject:
        return
    assert thing.encode() == data


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xa1\x61v\xf9\x3c\x00")  # 1.0
@example(b"\x9b" + b"\xff" * 8)  # a list of 2^64-1
@example(b"\x5b\x00\x00\x7f\xff\xff\xff\xff\xff")  # 128 TiB of bytes
@example(b"\xbf\xff")  # an indefinite map
@example(b"\x81" * 100_000)  # depth
@example(b"\xd8\x23\x61(")  # a regular expression
@example(b"\xa1\x01\x02")  # a key that is not text
@example(b"\xa2\x61a\x01\x61a\x01")  # a key twice
@example(b"\xa2\x62aa\x01\x61b\x01")  # keys out of order
@example(b"\xa1\x61v\x18\x01")  # a number longer than it must be
@example(b"\xa0\xa0")  # something behind
@example(b"\xa1\x61v\xf7")  # undefined
@example(b"\xa1\x61v\xe0")  # a simple value
@example(b"\xa1\x61v\x61\xff")  # no UTF-8
def test_noise_is_refused(noise):
    try:
        value = decode(noise)
    except BadObject:
        value = None
    assert value is None or encode(value) == noise
    for kind in KINDS:
        with pytest.raises(BadObject):
            kind.decode(noise)
    for read in (decode_datum, decode_segments, lambda data: decode_page(data, 1)):
        with pytest.raises(BadObject):
            read(noise)


@pytest.mark.parametrize("tag", [0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 41, 43, 100, 256, 258, 260,
                                 261, 299, 300, 1004, 43000, 55799, 55800, 1 << 40])  # fmt: skip
@pytest.mark.parametrize("inside", [b"\x61(", b"\x43abc", b"\x81\x01", b"\x01", b"\xa0"])
def test_tags_other_than_links_are_refused(tag, inside):
    head = cbor2.dumps(cbor2.CBORTag(tag, None))[:-1]
    with pytest.raises(BadObject):
        decode(b"\xa1\x61v" + head + inside)


def test_noise_costs_no_memory():
    bombs = [
        b"\x9b" + b"\x00\x00\x00\x00\x7f" * 2,
        b"\xbb\x00\x00\x00\x0f" + b"\xff" * 4,
        b"\x5b\x00\x00\x00\x40\x00\x00\x00\x00",
        b"\x9a\xff\xff\xff\xff" + b"\x80" * 1000,
        b"\x81" * OBJECT_MAX,
    ]
    tracemalloc.start()
    try:
        for bomb in bombs:
            with pytest.raises(BadObject):
                decode(bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20


def test_an_object_longer_than_the_bound_is_refused():
    with pytest.raises(BadObject):
        decode(encode({"v": bytes(OBJECT_MAX)}))


def test_a_true_is_not_a_one():
    """CBOR's true is another byte than 1, but equal to it in Python: one object, two names."""
    content = Content(1, CHUNK_SIZE, (None,))
    assert Content.decode(content.encode()) == content
    with pytest.raises(BadObject):
        Content.decode(content.encode().replace(b"\x61v\x01", b"\x61v\xf5"))
    page = encode_segments([Guest(0, 1)])
    assert decode_segments(page) == [Guest(0, 1)]
    with pytest.raises(BadObject):
        decode_segments(page.replace(b"\x83\x00\x00\x01", b"\x83\xf4\x00\x01"))


@given(st.lists(st.none() | digests, min_size=1, max_size=50))
def test_pages_come_back(names):
    page = encode_page(names)
    if page is None:
        assert not any(names)
        return
    assert decode_page(page, len(names)) == names
    with pytest.raises(BadObject):
        decode_page(page, len(names) + 1)


@pytest.mark.parametrize(
    "runs", [[], [2], [0, 1, 0], [1, 0, 1], [0, 2], [1, 2], [-1, 3], [True, 1], [0, 1, 0, 1]]
)
def test_runs_have_one_spelling(runs):
    with pytest.raises(BadObject):
        decode_page(encode({"v": 1, "kind": "page", "runs": runs, "names": bytes(32)}), 2)


@given(st.data())
@settings(max_examples=40)
def test_a_content_of_many_pages_comes_back(data):
    """Positions at the edges of pages, holes elsewhere."""
    size = data.draw(st.integers(2 * PAGE_SPAN * CHUNK_SIZE + 1, 3 * PAGE_SPAN * CHUNK_SIZE))
    count = -(-size // CHUNK_SIZE)
    names = [None] * count
    edges = [0, 1, PAGE_SPAN - 1, PAGE_SPAN, 2 * PAGE_SPAN - 1, 2 * PAGE_SPAN, count - 1]
    for position in data.draw(st.lists(st.sampled_from(edges), unique=True)):
        names[position] = data.draw(digests)
    shelf = {}

    def put(page):
        if page is None:
            return None
        shelf[object_cid(page)] = page
        return object_cid(page)

    pages = tuple(put(encode_page(names[i : i + PAGE_SPAN])) for i in range(0, count, PAGE_SPAN))
    content = Content(size, CHUNK_SIZE, pages)
    cid = put(content.encode())
    layout = read_layout(cid, shelf.__getitem__)
    assert list(layout.names) == names
    assert list(layout.frames) == list(dict.fromkeys(n for n in names if n))
    assert layout.holes == names.count(None)
    assert sum(layout.length_at(p) for p in range(count)) == size


def test_frames_come_back_in_pages():
    count = PAGE_SPAN + 3
    lengths = [1 + i % FRAME_MAX for i in range(count)]
    names = [digest(i.to_bytes(4, "big")) for i in range(count)]
    pages = [encode_frames(lengths[i : i + PAGE_SPAN], names[i : i + PAGE_SPAN]) for i in (0, PAGE_SPAN)]
    shelf = {object_cid(page): page for page in pages}
    pack = Pack(Cid(DAG_CBOR, bytes(32)), count, tuple(shelf), b"")
    frames = read_frames(pack, shelf.__getitem__)
    assert list(frames.lengths) == lengths
    assert list(frames.digests) == names
    assert frames.offsets()[-1] == sum(lengths)
    for wrong in (0, FRAME_MAX + 1, (1 << 32) - 1):
        page = encode_frames([wrong], [bytes(32)])
        with pytest.raises(BadObject):
            read_frames(Pack(pack.content, 1, (object_cid(page),), b""), {object_cid(page): page}.__getitem__)


def test_a_delta_lists_digests_only_of_what_its_parent_lacks():
    lengths = [i % 3 * 7 for i in range(PAGE_SPAN + 3)]
    names = [digest(i.to_bytes(4, "big")) if n else b"" for i, n in enumerate(lengths)]
    pages = [encode_frames(lengths[i : i + PAGE_SPAN], names[i : i + PAGE_SPAN]) for i in (0, PAGE_SPAN)]
    shelf = {object_cid(page): page for page in pages}
    content, parent, base = (Cid(DAG_CBOR, bytes([i] * 32)) for i in range(3))
    delta = signed(Delta(content, parent, base, len(lengths), tuple(shelf), b""), KEY)
    assert decode_pack(delta.encode()) == delta
    frames = read_frames(delta, shelf.__getitem__)
    assert (list(frames.lengths), list(frames.digests)) == (lengths, names)
    assert frames.offsets()[-1] == sum(lengths)
    full = signed(Pack(content, len(lengths), tuple(shelf), b""), KEY)
    assert decode_pack(full.encode()) == full
    with pytest.raises(BadObject):  # a pack tells every frame
        read_frames(full, shelf.__getitem__)


def test_what_no_delta_is_is_refused():
    cid, other, base = (Cid(DAG_CBOR, bytes([i] * 32)) for i in range(3))
    delta = signed(Delta(cid, other, base, 1, (base,), b""), KEY)
    pack = signed(Pack(cid, 1, (base,), b""), KEY)
    for wrong in (
        signed(Delta(cid, cid, base, 1, (base,), b""), KEY),  # its own parent
        signed(Delta(cid, other, base, 1, (), b""), KEY),
        signed(Delta(cid, other, base, (1 << 45) // CHUNK_SIZE + 1, (base,), b""), KEY),
        Delta(cid, base, other, 1, (base,), delta.signer, delta.signature),
        Delta(cid, other, base, 1, (base,), pack.signer, pack.signature),
        pack,
    ):
        with pytest.raises(BadObject):
            Delta.decode(wrong.encode())
    with pytest.raises(BadObject):
        Pack.decode(delta.encode())
    for lengths, hashes in (([0, 5], 2), ([5, 5], 1), ([0, 0], 1), ([5, 0], 0)):
        packed = b"".join(n.to_bytes(4, "big") for n in lengths)
        page = encode({"v": 1, "kind": "frames", "lengths": packed, "digests": bytes(32 * hashes)})
        listed = signed(Delta(cid, other, base, 2, (object_cid(page),), b""), KEY)
        with pytest.raises(BadObject):
            read_frames(listed, {object_cid(page): page}.__getitem__)
    long = encode_frames([FRAME_MAX + 1], [bytes(32)])
    with pytest.raises(BadObject):
        read_frames(delta, lambda _: long)


@given(segments)
def test_segments_come_back(given):
    assert decode_segments(encode_segments(given)) == given
    assert [s for page in paged_segments(given) for s in decode_segments(page)] == given


def test_recipe_pages_stay_within_an_object():
    many = [Literal(bytes(LITERAL_MAX)), Guest(SIZE_MAX, SIZE_MAX)] * 40
    pages = list(paged_segments(many))
    assert len(pages) > 2
    assert all(len(page) <= OBJECT_MAX for page in pages)
    assert [s for page in pages for s in decode_segments(page)] == many
    with pytest.raises(BadObject):
        decode_segments(encode_segments([Literal(bytes(LITERAL_MAX + 1))]))


@pytest.mark.parametrize("size", [0, -1, SIZE_MAX + 1, 1 << 64, True, None, "1"])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises((BadObject, OverflowError)):
        Content.decode(
            encode({"v": 1, "kind": "content", "size": size, "chunk_size": CHUNK_SIZE, "pages": [None]})
        )


def test_a_signature_holds_for_one_kind_and_one_key():
    disk = signed(Disk(*[Cid(DAG_CBOR, bytes([i] * 32)) for i in range(3)], b""), KEY)
    assert Disk.decode(disk.encode()) == disk
    other = signed(disk, SigningKey(bytes(32)))
    for forged in (
        Disk(disk.content, disk.pack, disk.recipe, other.signer, disk.signature),
        Disk(disk.content, disk.pack, disk.content, disk.signer, disk.signature),
        Disk(disk.content, disk.pack, disk.recipe, disk.signer, bytes(64)),
        Disk(disk.content, disk.pack, disk.recipe, bytes(32), bytes(64)),
        Disk(disk.content, disk.pack, disk.recipe, disk.signer[:31], disk.signature),
        Disk(disk.content, disk.pack, disk.recipe, disk.signer, KEY.sign(encode(disk.fields())).signature),
    ):
        with pytest.raises(BadObject):
            Disk.decode(forged.encode())


@pytest.mark.parametrize(
    "names", [["a", "a"], ["a", "a/b"], ["a/b/c", "a/b"], ["../a"], ["/a"], [""], ["a//b"]]
)
def test_trees_whose_files_cannot_stand_beside_each_other_are_refused(names):
    tree = Tree(tuple(File(n, 0, False) for n in names), None, None, b"")
    with pytest.raises(BadObject):
        Tree.decode(signed(tree, KEY).encode())


def test_a_layout_names_each_chunk_once():
    a, b = digest(b"a"), digest(b"b")
    layout = Layout.of(
        Cid(DAG_CBOR, bytes(32)), Content(5 * CHUNK_SIZE, CHUNK_SIZE, (None,)), [b, None, a, b, a]
    )
    assert tuple(layout.frames) == (b, a)
    assert layout.index == {b: 0, a: 1}
    assert layout.holes == 1
