"""Do digests in one buffer behave as a list and a dict would, and take no more room than they must?"""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.dht.flat import Digests, Index, Sparse, digests_of
from p2pgrid.dht.manifest import (
    CHUNK_SIZE,
    PAGE_SPAN,
    Content,
    Delta,
    Pack,
    encode_frames,
    encode_page,
    read_frames,
    read_layout,
)
from p2pgrid.ids import DIGEST_SIZE, digest, object_cid

NAMES = [digest(bytes([i])) for i in range(40)]
names = st.lists(st.sampled_from(NAMES), max_size=80)


@given(names, st.slices(80))
def test_digests_are_a_sequence(told, some):
    flat = Digests(b"".join(told))
    assert list(flat) == told
    assert flat[some] == told[some]
    assert [flat[-i] for i in range(1, len(told) + 1)] == told[::-1]
    assert all((name in flat) == (name in told) for name in NAMES)
    with pytest.raises(IndexError):
        flat[len(told)]


@given(st.lists(st.sampled_from([b"", *NAMES]), max_size=80), st.slices(80))
def test_what_is_empty_takes_no_place(told, some):
    flat = digests_of([len(name) for name in told], b"".join(told))
    assert isinstance(flat, Sparse if b"" in told else Digests)
    assert list(flat) == told
    assert flat[some] == told[some]
    find = flat.finder()
    assert [find(name) for name in NAMES] == [told.index(name) if name in told else None for name in NAMES]
    assert find(b"") is None


@given(st.lists(names))
def test_an_index_is_a_dict_of_places(parts):
    index, model = Index(), {}
    for part in parts:
        places = index.add_all(b"".join(part))
        assert list(places) == [model.setdefault(name, len(model)) for name in part]
        assert [index.get(name) for name in NAMES] == [model.get(name) for name in NAMES]
    assert index == model
    assert list(index) == list(index.digests) == list(model)
    assert [name in index for name in NAMES] == [name in model for name in NAMES]
    for absent in (b"", NAMES[0][:31], NAMES[0] + b"\0", digest(b"absent")):
        assert absent not in index
        assert index.get(absent, 7) == 7
        with pytest.raises(KeyError):
            index[absent]


@given(names)
def test_an_index_of_what_is_there_finds_the_first_of_equal_ones(told):
    find = Digests(b"".join(told)).finder()
    assert [find(name) for name in NAMES] == [told.index(name) if name in told else None for name in NAMES]


# --- memory ----------------------------------------------------------------------------

CHUNKS = 3 * PAGE_SPAN
PASSING = 2 << 20
"""Bytes: a page as it is read, a few times over, and what grows."""


def spent(make):
    """What `make` gives, the bytes a chunk that it keeps, and those that it had besides, meanwhile."""
    tracemalloc.start()
    try:
        made = make()
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return made, kept / CHUNKS, most - kept


def a_content():
    names = [digest(b"%d" % i) for i in range(CHUNKS)]
    pages = [encode_page(names[first : first + PAGE_SPAN]) for first in range(0, CHUNKS, PAGE_SPAN)]
    content = Content(CHUNKS * CHUNK_SIZE, CHUNK_SIZE, tuple(map(object_cid, pages))).encode()
    return object_cid(content), {object_cid(data): data for data in (content, *pages)}


def frames_of(told):
    """A page in which every `told`th frame is told, as often as it takes."""
    lengths = [70_000 + i if i % told == 0 else 0 for i in range(PAGE_SPAN)]
    digests = [digest(b"frame %d" % i) if length else b"" for i, length in enumerate(lengths)]
    page = encode_frames(lengths, digests)
    return (object_cid(page),) * (CHUNKS // PAGE_SPAN), {object_cid(page): page}


def test_a_layout_takes_50_bytes_a_chunk():
    """32 for the name, 4 for which chunk stands where, 8 to 16 to find it; a dict of `bytes` took 190."""
    cid, objects = a_content()
    layout, kept, passing = spent(lambda: read_layout(cid, objects.__getitem__))
    assert len(layout.frames) == CHUNKS
    assert layout.index[digest(b"%d" % (CHUNKS - 1))] == CHUNKS - 1
    assert kept < DIGEST_SIZE * 1.125 + 4 * 1.125 + 16
    assert passing < PASSING


def test_frames_take_50_bytes_a_chunk():
    pages, objects = frames_of(1)
    pack = Pack(object_cid(b""), CHUNKS, pages, b"")
    frames, kept, passing = spent(lambda: read_frames(pack, objects.__getitem__))
    assert frames.offsets()[-1] == sum(frames.lengths)
    assert kept < (DIGEST_SIZE + 4 + 8) * 1.125
    assert passing < PASSING


def test_what_a_delta_takes_from_its_parent_costs_two_numbers():
    pages, objects = frames_of(1024)
    delta = Delta(object_cid(b""), object_cid(b"parent"), object_cid(b"base"), CHUNKS, pages, b"")
    frames, kept, passing = spent(lambda: read_frames(delta, objects.__getitem__))
    assert sum(map(bool, frames.digests)) == CHUNKS // 1024
    assert kept < (4 + 8) * 1.125 + 1
    assert passing < PASSING
