"""Does a frame give back its chunk, and can nobody's frame cost more than a chunk?"""

from __future__ import annotations

import contextlib
import random
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.dht.frame import WINDOW_MAX, compress, expand
from p2pgrid.dht.manifest import CHUNK_SIZE, FRAME_MAX
from p2pgrid.errors import BadFrame
from tests.small_disks import chunk

PLAIN = chunk(1, 5000)
RLE = 0b010


def _block(kind: int, size: int, data: bytes, last: bool = False) -> bytes:
    return (size << 3 | kind | last).to_bytes(3, "little") + data


def _liar(declared: int, blocks: int) -> bytes:
    """A single-segment frame that declares some bytes and holds `blocks` * 128 KiB of zeros."""
    body = _block(RLE, 128 << 10, b"\0") * (blocks - 1) + _block(RLE, 128 << 10, b"\0", last=True)
    return b"\x28\xb5\x2f\xfd" + bytes((0b10100000,)) + declared.to_bytes(4, "little") + body


@given(st.binary(min_size=1, max_size=3000) | st.integers(1, CHUNK_SIZE).map(lambda n: chunk(n, n)))
def test_a_chunk_comes_back(plain):
    frame = compress(plain)
    assert expand(frame, CHUNK_SIZE) == plain
    assert expand(memoryview(frame), len(plain)) == plain
    assert compress(plain) == frame
    with pytest.raises(BadFrame):
        expand(frame, len(plain) - 1)


def test_what_does_not_compress_still_fits_a_frame():
    frame = compress(random.Random(1).randbytes(CHUNK_SIZE))
    assert CHUNK_SIZE < len(frame) <= FRAME_MAX


@pytest.mark.parametrize(
    ("declared", "blocks"), [(256 << 20, 2048), (CHUNK_SIZE, 60_000), (CHUNK_SIZE, 3), (10, 1)]
)
def test_a_bomb_costs_at_most_a_chunk(declared, blocks):
    bomb = _liar(declared, blocks)
    tracemalloc.start()
    try:
        with pytest.raises(BadFrame):
            expand(bomb, CHUNK_SIZE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * CHUNK_SIZE


def test_the_bomb_is_a_frame_but_for_its_size():
    """Or the test above would prove nothing."""
    assert expand(_liar(CHUNK_SIZE, 2), CHUNK_SIZE) == bytes(CHUNK_SIZE)


def _other(**parameters) -> bytes:
    return zstandard.ZstdCompressor(**parameters).compress(PLAIN)


def _windowed(window_log: int) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, write_content_size=False)
    streamed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return streamed.compress(PLAIN) + streamed.flush()


SKIPPABLE = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
FOREIGN = {
    "nothing": b"",
    "not zstd": PLAIN,
    "a header cut short": compress(PLAIN)[:5],
    "a frame cut short": compress(PLAIN)[:-1],
    "something behind": compress(PLAIN) + b"\0",
    "two frames": compress(PLAIN) * 2,
    "a skippable frame in front": SKIPPABLE + compress(PLAIN),
    "a skippable frame behind": compress(PLAIN) + SKIPPABLE,
    "a skippable frame": SKIPPABLE,
    "no content size": _other(write_content_size=False),
    "a checksum": _other(write_checksum=True),
    "a large window": _windowed(23),
    "fewer bytes than declared": _liar(200_000, 1),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_only_the_one_kind_of_frame_passes(kind):
    with pytest.raises(BadFrame):
        expand(FOREIGN[kind], CHUNK_SIZE)


def test_a_window_within_the_bound_is_no_reason():
    parameters = zstandard.ZstdCompressionParameters(window_log=18, write_content_size=True)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compress(PLAIN)
    assert zstandard.get_frame_parameters(frame).window_size <= WINDOW_MAX
    assert expand(frame, CHUNK_SIZE) == PLAIN


@given(st.data())
def test_a_damaged_frame_is_refused_or_another_chunk(data):
    """Without a checksum some damage decodes; the chunk's name catches that, memory is what counts here."""
    frame = bytearray(compress(PLAIN))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadFrame):
        assert len(expand(bytes(frame), CHUNK_SIZE)) <= CHUNK_SIZE
