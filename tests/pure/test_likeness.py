"""Is what resembles a chunk found, wherever it went, and is what does not left alone?"""

from __future__ import annotations

import itertools
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pgrid.dht.delta import BLOCK, DICT_MAX, REFS_MAX, delta_refs, encode_delta, expand_delta, gather
from p2pgrid.dht.frame import compress
from p2pgrid.dht.likeness import COMMON, Likeness, _telling
from p2pgrid.dht.manifest import CHUNK_SIZE
from tests.small_disks import chunk

CHUNKS = 12
HOLE = range(5, 7)
"""Chunks of the parent that are zero."""
RNG = random.Random(1)
PARENT = (
    b"".join(bytes(CHUNK_SIZE) if i in HOLE else RNG.randbytes(CHUNK_SIZE) for i in range(CHUNKS)) + b"end"
)
SIZE = len(PARENT)


def pieces(disk: bytes) -> list[tuple[int, bytes]]:
    cut = [(at, disk[at : at + CHUNK_SIZE]) for at in range(0, len(disk), CHUNK_SIZE)]
    return [(at, plain) for at, plain in cut if any(plain)]


LIKENESS = Likeness.of(pieces(PARENT))


def told(plain: bytes, near: int = 0, likeness: Likeness = LIKENESS, parent: bytes = PARENT) -> bytes:
    """The delta frame of `plain`; it was checked that it gives `plain` back."""

    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset < offset + length <= len(parent), "outside of the parent"
        return parent[offset : offset + length]

    ranges = likeness.ranges(plain, near)
    assert len(ranges) <= REFS_MAX
    assert sum(blocks for _, blocks in ranges) * BLOCK <= DICT_MAX
    frame = encode_delta(plain, ranges, gather(ranges, len(parent), read))
    ranges, body = delta_refs(frame, len(parent))
    assert expand_delta(body, gather(ranges, len(parent), read), CHUNK_SIZE) == plain
    return frame


def block(number: int) -> bytes:
    return PARENT[number * BLOCK : (number + 1) * BLOCK]


def test_blocks_in_any_order_cost_their_refs():
    order = RNG.sample([n for n in range(SIZE // BLOCK) if any(block(n))], 64)
    plain = b"".join(map(block, order))
    assert LIKENESS.ranges(plain, 0) == [(n, 1) for n in order]
    assert len(told(plain)) == 3 + 6 * 64 + 35


def test_zero_blocks_between_them_are_a_hole_of_the_parent():
    plain = b"".join(map(block, range(20, 40))) + bytes(10 * BLOCK) + b"".join(map(block, range(100, 134)))
    assert len(LIKENESS.ranges(plain, 0)) == 3
    assert len(told(plain)) == 3 + 6 * 3 + 35
    without = Likeness.of(pieces(PARENT[: HOLE.start * CHUNK_SIZE]))
    assert without.ranges(plain, 0) == [(20, 20), (100, 34)]
    assert len(told(plain, 0, without)) < 100


@pytest.mark.parametrize("shift", [1, 7, 16, 1000, 4000])
def test_what_moved_by_some_bytes_is_found(shift):
    """A line that was put in front moves all that follows, in blocks that nobody had before."""
    start = 2 * CHUNK_SIZE + 5000
    plain = b"#" * shift + PARENT[start : start + CHUNK_SIZE - shift]
    assert len(told(plain)) < 600


def test_a_patched_file_is_found_between_its_marks():
    """An address every 200 bytes: those marks that are left speak for their neighbours."""
    plain = bytearray(PARENT[3 * CHUNK_SIZE : 4 * CHUNK_SIZE])
    for at in range(0, CHUNK_SIZE, 200):
        plain[at : at + 4] = RNG.randbytes(4)
    assert len(told(bytes(plain))) < CHUNK_SIZE // 200 * 10


def test_new_bytes_between_old_blocks():
    at = CHUNK_SIZE + 10 * BLOCK
    plain = bytearray(PARENT[at : at + CHUNK_SIZE])
    plain[50_000:50_100] = RNG.randbytes(100)
    frame = told(bytes(plain))
    assert len(frame) < 250
    assert delta_refs(frame, SIZE)[0] == [(64 + 10, 64)]


def test_what_is_not_alike_costs_three_bytes():
    strange = random.Random(9).randbytes(CHUNK_SIZE)
    for plain in (strange, chunk(3), bytes(CHUNK_SIZE - 1) + b"x", b"x"):
        assert LIKENESS.ranges(plain, 3 * CHUNK_SIZE) == []
        assert told(plain) == b"\1\0\0" + compress(plain)


def test_the_end_of_the_parent_is_a_block_like_any():
    assert LIKENESS.ranges(b"end", 0) == [(SIZE // BLOCK, 1)]
    told(b"end")
    told(PARENT[-CHUNK_SIZE:])
    told(PARENT[-30_000:] + bytes(5))


def test_of_equal_blocks_the_one_that_goes_on_is_taken():
    twice = PARENT[: 2 * CHUNK_SIZE] + PARENT[CHUNK_SIZE // 2 : 2 * CHUNK_SIZE]
    likeness = Likeness.of(pieces(twice))
    for first in (3, 40, 100, 130):
        plain = twice[first * BLOCK : first * BLOCK + 60 * BLOCK]
        ranges = likeness.ranges(plain, first * BLOCK)
        assert sum(blocks for _, blocks in ranges) == 60
        assert len(ranges) <= 2


def test_what_repeats_itself_is_bounded():
    """The same marks in every block: nothing is told by them, and nobody waits."""
    line = random.Random(4).randbytes(48)
    same = (line * (CHUNK_SIZE // 47))[:CHUNK_SIZE]
    likeness = Likeness.of([(i * CHUNK_SIZE, same) for i in range(8)])
    parent = same * 8
    told(same, 0, likeness, parent)
    told(same[5:] + same[:5], 0, likeness, parent)
    told((line * 6000)[7 : CHUNK_SIZE + 7], 0, likeness, parent)


def test_a_mark_that_is_rare_in_the_parent_and_common_in_the_chunk_is_bounded():
    """8 bytes over and over have the same mark at every 8th byte of the chunk."""
    words = [random.Random(n).randbytes(8) for n in range(400)]
    parent = b"".join(word * 34 + RNG.randbytes(BLOCK - 8 * 34) for word in words)
    likeness = Likeness.of(pieces(parent))
    marked = [word * (CHUNK_SIZE // 8) for word in words if likeness.ranges(word * 1000, 0)]
    assert marked
    for plain in marked:
        tracemalloc.start()
        try:
            likeness.ranges(plain, 0)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 8 << 20


def test_marks_that_are_common_are_left_out():
    times = {key: RNG.choice((1, 3, COMMON, COMMON + 1, 60)) for key in range(0, 2**32, 2**32 // 2000)}
    marks = [key << 32 | nth for key, count in times.items() for nth in range(count)]
    rare = [key << 32 | nth for key, count in times.items() if count <= COMMON for nth in range(count)]
    assert _telling(np.array(marks, np.uint64)).tolist() == rare
    for few in (0, 1, COMMON, COMMON + 1):
        assert len(_telling(np.arange(few, dtype=np.uint64))) == (few if few <= COMMON else 0)


def test_what_is_known_of_a_block_takes_24_bytes():
    """8 for its name, 8 for each of two marks; hardly more while it is made."""
    blocks = 4096
    chunks = [(at, RNG.randbytes(CHUNK_SIZE)) for at in range(0, blocks * BLOCK, CHUNK_SIZE)]
    tracemalloc.start()
    try:
        made = Likeness.of(chunks)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert made.ranges(chunks[9][1], 0) == [(9 * CHUNK_SIZE // BLOCK, CHUNK_SIZE // BLOCK)]
    assert kept < 30 * blocks
    assert most < kept + (1 << 20), "a chunk, and what is hashed at a time"


def test_an_empty_parent_resembles_nothing():
    nothing = Likeness.of([])
    assert nothing.ranges(PARENT[:CHUNK_SIZE], 0) == []
    assert nothing.resemblance([PARENT[:CHUNK_SIZE]]) == 0


def test_resemblance_tells_parents_apart():
    own = [plain for _, plain in pieces(PARENT)]
    assert LIKENESS.resemblance(own) == 1
    assert LIKENESS.resemblance([random.Random(i).randbytes(CHUNK_SIZE) for i in range(50, 55)]) == 0
    assert LIKENESS.resemblance([bytes(CHUNK_SIZE)]) == LIKENESS.resemblance([]) == 0
    half = own[0][: CHUNK_SIZE // 2] + random.Random(7).randbytes(CHUNK_SIZE // 2)
    assert LIKENESS.resemblance([half]) == 0.5
    shifted = b"#" + own[0][:-1]
    assert 0.3 < LIKENESS.resemblance([shifted]) <= 0.5


def test_it_is_kept(tmp_path):
    path = tmp_path / "likeness"
    assert Likeness.load(path) is None
    LIKENESS.save(path)
    again = Likeness.load(path)
    assert again is not None
    for plain in (PARENT[9000 : 9000 + CHUNK_SIZE], PARENT[BLOCK : BLOCK + CHUNK_SIZE], b"end", bytes(BLOCK)):
        assert again.ranges(plain, 0) == LIKENESS.ranges(plain, 0)
    assert again.ranges(b"", 0) == []
    assert [each.name for each in tmp_path.iterdir()] == ["likeness"]


def test_what_is_damaged_is_not_kept(tmp_path):
    path = tmp_path / "likeness"
    Likeness.of(pieces(PARENT[:CHUNK_SIZE])).save(path)
    whole = path.read_bytes()
    rng = random.Random(5)
    cuts = (0, 10, 40, 71, 72, len(whole) - 1)
    flips = [rng.randrange(len(whole)) for _ in range(20)]
    for data in itertools.chain(
        (whole[:cut] for cut in cuts),
        (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in flips),
        [whole + b"\0"],
    ):
        path.write_bytes(data)
        assert Likeness.load(path) is None


parts = st.lists(
    st.one_of(
        st.integers(0, CHUNKS * 64).map(block),
        st.tuples(st.integers(0, SIZE), st.integers(0, 20_000)).map(lambda at: PARENT[at[0] : sum(at)]),
        st.integers(1, 3).map(lambda n: bytes(n * BLOCK)),
        st.binary(max_size=40),
        st.integers(0, 9).map(lambda n: random.Random(n).randbytes(BLOCK)),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=60)
@given(parts.map(lambda p: b"".join(p)[:CHUNK_SIZE]), st.integers(0, 2**31).map(lambda n: n * CHUNK_SIZE))
def test_any_chunk_comes_back(plain, near):
    assert len(told(plain, near)) <= max(len(compress(plain)) + 3, len(plain) // 8)
