"""Tell a chunk by parts of another disk and what is new: the frames of a delta.

Pure: it is handed what lies in the *parent*, the content a delta is built on, and reads
nothing itself.

    u8 version = 1 │ u16 refs │ refs x (u32 first block, u16 blocks) │ one zstd frame

Numbers are big endian, blocks are `BLOCK` bytes of the parent's guest space.  What the
refs name, one after the other, is the zstd frame's dictionary (raw content): zstd finds
what the chunk has in common with it, wherever it lies, so a ref only has to hit roughly.
No refs: a plain frame.

A delta frame from a peer is hostile until its chunk's name was checked.  So `delta_refs`
bounds what is read of the parent before anything is read, and `expand_delta` what is
written before anything is written, as `expand` does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import zstandard

from p2pgrid.dht.frame import compress, expand
from p2pgrid.dht.manifest import CHUNK_SIZE, FRAME_MAX
from p2pgrid.errors import BadFrame

BLOCK = 4096
"""Bytes of the parent's guest space: what file systems align files to."""
REFS_MAX = 256
DICT_MAX = 1 << 20
"""Bytes that all refs of a frame name together."""
LEVEL = 6
COPY = bytes.fromhex("28b52ffda000000400 540000000100fdff0300e40808 550000000100fdff0300e40808")
"""The zstd frame that is its dictionary of `CHUNK_SIZE` bytes: in each of its two blocks of 128 KiB, 131072
bytes from 262144 bytes ago.  Most chunks of a disk that was laid out afresh are nothing else."""

Plain = bytes | bytearray | memoryview
Range = tuple[int, int]
"""(first block, blocks) of the parent."""

_HEAD = struct.Struct(">BH")
_REF = struct.Struct(">IH")
_VERSION = 1


def gather(ranges: Sequence[Range], size: int, read: Callable[[int, int], bytes]) -> bytes:
    """The dictionary that `ranges` name: `read(offset, length)` gives bytes of a parent of `size` bytes.

    Behind the parent's end, in the last block, are zeros.
    """
    parts: list[bytes] = []
    for first, blocks in ranges:
        length = blocks * BLOCK
        here = min(length, size - first * BLOCK)
        parts.append(read(first * BLOCK, here))
        parts.append(bytes(length - here))
    return b"".join(parts)


def encode_delta(plain: Plain, ranges: Sequence[Range], dictionary: bytes) -> bytes:
    """The delta frame of `plain` by `dictionary`, which `gather` made of `ranges`.

    Not longer than a plain frame and three bytes, unless it is shorter than an eighth of the chunk.
    """
    assert len(ranges) <= REFS_MAX, "more refs than a frame may have"
    assert sum(blocks for _, blocks in ranges) * BLOCK == len(dictionary) <= DICT_MAX, "another dictionary"
    head = _HEAD.pack(_VERSION, len(ranges)) + b"".join(_REF.pack(*found) for found in ranges)
    if plain == dictionary and len(plain) == CHUNK_SIZE:
        return head + COPY
    if ranges:
        raw = zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        packer = zstandard.ZstdCompressor(
            level=LEVEL, dict_data=raw, write_checksum=False, write_content_size=True, write_dict_id=False
        )
        alike = head + packer.compress(plain)
        if len(alike) < len(plain) // 8:
            return alike
        return min(alike, encode_delta(plain, [], b""), key=len)
    return head + compress(plain)


def delta_refs(frame: bytes | memoryview, size: int) -> tuple[list[Range], memoryview]:
    """What `frame` takes from a parent of `size` bytes, and its zstd frame.

    Raises `BadFrame` for anything outside of the parent or beyond the bounds.
    """
    view = memoryview(frame)
    if not _HEAD.size <= len(view) <= FRAME_MAX:
        raise BadFrame(why=f"{len(view)} bytes are no delta frame")
    version, count = _HEAD.unpack_from(view)
    if version != _VERSION:
        raise BadFrame(why=f"a delta frame of version {version}")
    body = _HEAD.size + count * _REF.size
    if count > REFS_MAX or body > len(view):
        raise BadFrame(why=f"a delta frame of {len(view)} bytes with {count} refs")
    ranges = list(_REF.iter_unpack(view[_HEAD.size : body]))
    most = -(-size // BLOCK)
    if not all(blocks and first + blocks <= most for first, blocks in ranges):
        raise BadFrame(why="a delta frame that refers to nothing, or behind the end of its parent")
    if sum(blocks for _, blocks in ranges) * BLOCK > DICT_MAX:
        raise BadFrame(why=f"a delta frame that refers to more than {DICT_MAX} bytes")
    return ranges, view[body:]


def expand_delta(frame: bytes | memoryview, dictionary: bytes, most: int) -> bytes:
    """The plain bytes of the zstd `frame` that `delta_refs` gave, at most `most` of them.

    Raises `BadFrame` for anything else, before more than `most` bytes were allocated.
    """
    return expand(frame, most, dictionary)
