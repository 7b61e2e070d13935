"""Does a delta frame give back its chunk, and can nobody's frame cost more than its bounds?"""

from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.dht.delta import (
    BLOCK,
    COPY,
    DICT_MAX,
    REFS_MAX,
    delta_refs,
    encode_delta,
    expand_delta,
    gather,
)
from p2pgrid.dht.frame import compress
from p2pgrid.dht.manifest import CHUNK_SIZE, FRAME_MAX
from p2pgrid.errors import BadFrame
from tests.small_disks import chunk

SIZE = (2 << 20) + 1000
PARENT = random.Random(1).randbytes(SIZE)
BLOCKS = -(-SIZE // BLOCK)
PLAIN = PARENT[5000:90_000] + b"what is new" + PARENT[1_500_001:1_600_000]
RANGES = [(1, 22), (366, 26)]


def read(offset: int, length: int) -> bytes:
    assert 0 <= offset < offset + length <= SIZE, "outside of the parent"
    return PARENT[offset : offset + length]


def told(plain: bytes, ranges: list[tuple[int, int]]) -> bytes:
    return encode_delta(plain, ranges, gather(ranges, SIZE, read))


def back(frame: bytes | memoryview, most: int = CHUNK_SIZE) -> bytes:
    ranges, rest = delta_refs(frame, SIZE)
    return expand_delta(rest, gather(ranges, SIZE, read), most)


def refs(*ranges: tuple[int, int], rest: bytes = compress(PLAIN), version: int = 1) -> bytes:
    return struct.pack(">BH", version, len(ranges)) + b"".join(struct.pack(">IH", *r) for r in ranges) + rest


ranges_inside = st.lists(
    st.integers(0, BLOCKS - 1).flatmap(
        lambda first: st.tuples(st.just(first), st.integers(1, min(60, BLOCKS - first)))
    ),
    max_size=4,
)
pieces = st.lists(
    st.binary(max_size=300)
    | st.tuples(st.integers(0, SIZE - 1), st.integers(0, 50_000)).map(lambda at: PARENT[at[0] : sum(at)]),
    max_size=4,
)


@given(pieces.map(b"".join), ranges_inside)
def test_a_chunk_comes_back_whatever_it_was_told_by(plain, ranges):
    frame = told(plain, ranges)
    assert back(frame) == back(memoryview(frame), len(plain)) == plain
    assert len(frame) <= max(len(compress(plain)) + 3, len(plain) // 8)
    if plain:
        with pytest.raises(BadFrame):
            back(frame, len(plain) - 1)


def test_what_the_parent_has_costs_next_to_nothing():
    frame = told(PLAIN, RANGES)
    assert delta_refs(frame, SIZE)[0] == RANGES
    assert len(frame) < 120 < len(compress(PLAIN)) // 1000


def test_what_the_parent_does_not_have_costs_three_bytes():
    noise = random.Random(2).randbytes(CHUNK_SIZE)
    assert told(noise, []) == told(noise, RANGES) == b"\1\0\0" + compress(noise)
    assert CHUNK_SIZE < len(told(noise, RANGES)) <= FRAME_MAX
    assert told(chunk(1), []) == b"\1\0\0" + compress(chunk(1))


def test_a_chunk_of_known_blocks_is_told_without_zstd():
    """Its frame is always the same one."""
    ranges = [(40, 30), (3, 33), (400, 1)]
    plain = gather(ranges, SIZE, read)
    assert len(plain) == CHUNK_SIZE
    frame = told(plain, ranges)
    assert frame == refs(*ranges, rest=COPY)
    assert back(frame) == plain
    assert expand_delta(COPY, PARENT[:CHUNK_SIZE], CHUNK_SIZE) == PARENT[:CHUNK_SIZE]
    with pytest.raises(BadFrame):
        expand_delta(COPY, PARENT[: CHUNK_SIZE - 1], CHUNK_SIZE)
    short = told(plain[:-5], ranges)
    assert back(short) == plain[:-5]


def test_the_last_block_of_the_parent_ends_in_zeros():
    last = gather([(BLOCKS - 1, 1)], SIZE, read)
    assert last == PARENT[-(SIZE % BLOCK) :] + bytes(BLOCK - SIZE % BLOCK)
    assert gather([(BLOCKS - 2, 2), (0, 1)], SIZE, read) == PARENT[(BLOCKS - 2) * BLOCK :] + bytes(
        BLOCK - SIZE % BLOCK
    ) + read(0, BLOCK)
    whole = 2 * BLOCK
    assert gather([(1, 1)], whole, read) == read(BLOCK, BLOCK)


def test_parts_of_the_parent_are_never_taken_for_a_zstd_dictionary():
    dictionary = bytes.fromhex("37a430ec") + PARENT[4:BLOCK]
    frame = encode_delta(PARENT[8:4000], [(0, 1)], dictionary)
    assert len(frame) < 60
    assert expand_delta(delta_refs(frame, SIZE)[1], dictionary, CHUNK_SIZE) == PARENT[8:4000]


REFUSED = {
    "nothing": b"",
    "a head cut short": b"\1\0",
    "another version": refs(version=2),
    "version 0": refs(version=0),
    "refs cut short": refs((0, 1), (1, 1))[:14],
    "a count beyond the bytes": b"\1\0\7" + compress(b"x"),
    "a ref to no block": refs((5, 0)),
    "a ref behind the end": refs((BLOCKS, 1)),
    "a ref across the end": refs((BLOCKS - 1, 2)),
    "a ref far behind the end": refs((2**32 - 1, 2**16 - 1)),
    "a dictionary of one block too many": refs((0, 200), (0, DICT_MAX // BLOCK - 199)),
    "one ref too many": refs(*[(0, 1)] * (REFS_MAX + 1)),
    "as many refs as can be told": refs(*[(0, 1)] * 65535),
    "a byte too long": b"\1\0\0" + bytes(FRAME_MAX - 2),
    "no frame": refs((0, 1), rest=b""),
    "not a zstd frame": refs((0, 1), rest=PLAIN[:100]),
    "two frames": refs((0, 1), rest=compress(PLAIN) * 2),
    "something behind": refs((0, 1), rest=compress(PLAIN) + b"\0"),
    "a checksum": refs((0, 1), rest=zstandard.ZstdCompressor(write_checksum=True).compress(PLAIN)),
    "no content size": refs((0, 1), rest=zstandard.ZstdCompressor(write_content_size=False).compress(PLAIN)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_delta_frame_is_refused(kind):
    with pytest.raises(BadFrame):
        back(REFUSED[kind])


def test_the_bounds_themselves_are_allowed():
    most = refs(*[(i, 1) for i in range(REFS_MAX)])
    assert back(most) == PLAIN
    assert len(gather(delta_refs(most, SIZE)[0], SIZE, read)) == DICT_MAX
    assert back(refs((BLOCKS - 1, 1))) == PLAIN


@pytest.mark.parametrize("dictionary", [b"", PARENT[:BLOCK]])
def test_a_bomb_costs_at_most_a_chunk(dictionary):
    def bomb(declared: int, blocks: int) -> bytes:
        body = ((128 << 10) << 3 | 0b010).to_bytes(3, "little") + b"\0"
        last = ((128 << 10) << 3 | 0b011).to_bytes(3, "little") + b"\0"
        return b"\x28\xb5\x2f\xfd\xa0" + declared.to_bytes(4, "little") + body * (blocks - 1) + last

    assert expand_delta(bomb(CHUNK_SIZE, 2), dictionary, CHUNK_SIZE) == bytes(CHUNK_SIZE)
    for declared, blocks in [
        (256 << 20, 2048),
        (CHUNK_SIZE, 60_000),
        (CHUNK_SIZE, 3),
        (10, 1),
        (CHUNK_SIZE, 1),
    ]:
        hostile = bomb(declared, blocks)
        tracemalloc.start()
        try:
            with pytest.raises(BadFrame):
                expand_delta(hostile, dictionary, CHUNK_SIZE)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 4 * CHUNK_SIZE


FRAME = told(PLAIN, RANGES)


@given(st.binary(max_size=2000))
def test_noise_is_refused_or_a_chunk(noise):
    with contextlib.suppress(BadFrame):
        assert len(back(noise)) <= CHUNK_SIZE


@given(st.data())
def test_a_damaged_frame_is_refused_or_another_chunk(data):
    """What is read of the parent, and what comes out, stays within the bounds; the name decides the rest."""
    frame = bytearray(FRAME)
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([0, 0, 0, 1, 8]))
    with contextlib.suppress(BadFrame):
        ranges, rest = delta_refs(bytes(frame[cut:]), SIZE)
        dictionary = gather(ranges, SIZE, read)
        assert len(dictionary) <= DICT_MAX
        assert len(expand_delta(rest, dictionary, CHUNK_SIZE)) <= CHUNK_SIZE
