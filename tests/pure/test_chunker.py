"""Are all bytes of the extents cut, each once, and holes nothing?"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.dht.chunker import is_zero, length_at, positions
from p2pgrid.dht.manifest import CHUNK_SIZE


@st.composite
def spaces(draw):
    edges = sorted(draw(st.lists(st.integers(0, 40 * CHUNK_SIZE), min_size=2, max_size=12, unique=True)))
    size = draw(st.integers(max(edges[-1], 1), 41 * CHUNK_SIZE))
    extents = [(a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=False)]
    return size, extents


@given(spaces())
def test_positions_are_those_that_extents_touch(space):
    size, extents = space
    touched = {p for a, n in extents for p in range(a // CHUNK_SIZE, (a + n - 1) // CHUNK_SIZE + 1)}
    assert list(positions(size, extents)) == sorted(touched)
    assert all(0 < length_at(size, p) <= CHUNK_SIZE for p in touched)


@given(st.sampled_from([1, 2, 511, CHUNK_SIZE - 1, CHUNK_SIZE]), st.data())
def test_one_bit_is_not_zero(length, data):
    assert is_zero(bytes(length))
    plain = bytearray(length)
    plain[data.draw(st.integers(0, length - 1))] = 1 << data.draw(st.integers(0, 7))
    assert not is_zero(plain)
    assert not is_zero(memoryview(plain))
