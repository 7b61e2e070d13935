"""Do the names come back position by position, and do holes cost nothing?"""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.dht.chunker import length_at, positions
from p2pgrid.dht.manifest import CHUNK_SIZE, PAGE_SPAN, SIZE_MAX, Content, Layout, encode_page, read_layout
from p2pgrid.dht.places import Places
from p2pgrid.ids import Cid, digest, object_cid

NAMES = [digest(bytes([i])) for i in range(4)]
ANY = Cid(0x71, bytes(32))


@given(st.lists(st.lists(st.sampled_from([None, None, *NAMES])) | st.integers(0, 20), max_size=6))
def test_names_come_back(parts):
    """Given in parts: some names, or a number of holes."""
    places, names = Places(), []
    for part in parts:
        if isinstance(part, int):
            places.skip(part)
            names += [None] * part
        else:
            places.extend(part)
            names += part
    assert list(places) == places[:] == names
    assert len(places) == len(names)
    assert [places[i : i + 7] for i in range(len(names))] == [names[i : i + 7] for i in range(len(names))]
    assert (places[::-2], places[3:1]) == (names[::-2], [])
    assert places.holes == names.count(None)
    distinct = list(dict.fromkeys(name for name in names if name is not None))
    assert list(places.by_name) == distinct
    assert [places.index_at(i) for i in range(len(names))] == [n and distinct.index(n) for n in names]
    assert [i for first, count in places.runs() for i in range(first, first + count)] == [
        i for i, name in enumerate(names) if name is not None
    ]
    for i in range(len(names)):
        rest = (at for at in range(i, len(names)) if names[at] is not None)
        assert places.next_chunk(i) == next(rest, len(names))


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, CHUNK_SIZE))
def test_extents_are_the_positions_again(held, tail):
    size = (len(held) - 1) * CHUNK_SIZE + tail
    layout = Layout.of(ANY, Content(size, CHUNK_SIZE, (None,)), [NAMES[0] if h else None for h in held])
    found = list(layout.extents())
    assert list(positions(size, found)) == [i for i, h in enumerate(held) if h]
    assert sum(n for _, n in found) == sum(length_at(size, i) for i, h in enumerate(held) if h)


def test_the_largest_space_costs_what_is_in_it():
    """One chunk at each end of every page of 32 TiB, and holes between."""
    page = encode_page([NAMES[0], *[None] * (PAGE_SPAN - 2), NAMES[1]])
    pages = (object_cid(page),) * (SIZE_MAX // CHUNK_SIZE // PAGE_SPAN)
    content = Content(SIZE_MAX, CHUNK_SIZE, pages)
    objects = {object_cid(page): page, ANY: content.encode()}
    tracemalloc.start()
    layout = read_layout(ANY, objects.__getitem__)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 32 << 20
    assert layout.holes == SIZE_MAX // CHUNK_SIZE - 2 * len(pages)
    assert layout.names.next_chunk(1) == PAGE_SPAN - 1
