"""Say what the switches of one segment tell each other on a link.

Pure.  Every message is the body of one link message (`hole_punch/framing.py`), integers big endian:

    80 Frames    segment (8), then for each frame: length u32, frame      pass these on to your guests
    81 Knock     segment (8)                                             I run a task of this group, too

A segment is named by the first 8 bytes of BLAKE3 of "p2pgrid lan 1", a zero byte and the group's name.
Frames are Ethernet's, from the address on and without checksum.  A Knock is sent by a node that is new in
the group, so that those who do not know it ask the coordinator at once instead of at their next turn.
Goals: a frame costs no more than its copy.  Non-goals: that frames arrive; it is Ethernet.
Vectors: `docs/protocols/lan.md`.  Noise only ever raises `BadFrame`.
"""

from __future__ import annotations

import attrs

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.lan.segment import NUMBER

KINDS = range(80, 96)
"""Of link messages."""
FRAMES, KNOCK = 80, 81
FRAMES_MAX = 256 * 1024
"""Bytes of frames in one message: a few hundred of them."""


@attrs.frozen
class Frames:
    segment: bytes
    data: bytes


@attrs.frozen
class Knock:
    segment: bytes


Message = Frames | Knock


def head(message: type[Message], segment: bytes) -> bytes:
    """What goes before the frames, or all of it."""
    assert len(segment) == NUMBER
    return bytes([FRAMES if message is Frames else KNOCK]) + segment


def decode(body: bytes | memoryview) -> Message:
    kind, segment, rest = body[0], bytes(body[1 : 1 + NUMBER]), bytes(body[1 + NUMBER :])
    if len(segment) < NUMBER:
        raise BadFrame(why="a message of the LAN ends in its head")
    if kind == FRAMES and 0 < len(rest) <= FRAMES_MAX:
        return Frames(segment, rest)
    if kind == KNOCK and not rest:
        return Knock(segment)
    raise BadFrame(why=f"a message of the LAN of kind {kind} with {len(rest)} bytes")
