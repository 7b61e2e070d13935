"""Say what two peers tell each other on a link to complete a pack.

Pure.  Every message is the body of one link message (`hole_punch/framing.py`): a type byte
and its fields, integers big endian, CIDs in their 36-byte form:

    1 Open       topic u16, pack CID           I want this pack; `topic` is my number for it
    2 Bitfield   topic u16, first u32, bits    I have these, from index `first` (a multiple of 8) on
    3 Have       topic u16, index u32, …       I have these now, too
    4 Request    topic u16, index u32, …       send me these, in this order
    5 Frame      topic u16, index u32, bytes   here is one
    6 Refuse     topic u16, index u32          I cannot send it
    7 Cancel     topic u16, index u32, …       I need them no more; they may come all the same
    8 GetObject  CID                           send me this manifest object
    9 Object     CID, bytes                    here it is
    10 NoObject  CID                           I do not have it
    11 Peers     topic u16, MessagePack        others who want or have this pack: [[id, [multiaddr, …]], …]
    12 Close     topic u16                     I no longer want it
    13 Request   topic u16, index u32, …       send me these, whether I asked for them or not, before all else
    14 Grown     topic u16, draft CID          of a series of drafts: this is the newest that I have

Goals: whoever wants a pack opens it with everyone it meets, whoever has any part of it answers;
so each pack is one conversation a direction, numbered by who wants it, and many share a link.
A Bitfield is told again whenever it is worth it; it replaces what was told before.
Non-goals: trust.  A frame counts once its digest is the pack's, an object once its name is right.
Vectors: `docs/protocols/bulk.md`.  Noise only ever raises `BadFrame`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import attrs
import msgspec

from p2pgrid.dht.manifest import FRAME_MAX, OBJECT_MAX
from p2pgrid.errors import BadFrame, BadObject
from p2pgrid.ids import Cid, PeerId

BITS_MAX = 512 * 1024
"""Bytes of bitmap in one message: 1 TiB of disk."""
INDICES_MAX = 16384
"""Indices in one message."""
PEERS_MAX = 50
"""Peers in one message."""
ADDRESSES_MAX = 16
"""Multiaddrs of one peer, each at most `ADDRESS_MAX` long."""
ADDRESS_MAX = 256
CID_SIZE = 36


@attrs.frozen
class Open:
    topic: int
    pack: Cid


@attrs.frozen
class Bitfield:
    topic: int
    first: int
    bits: bytes


@attrs.frozen
class Have:
    topic: int
    indices: tuple[int, ...]


@attrs.frozen
class Request:
    topic: int
    indices: tuple[int, ...]
    urgent: bool = False


@attrs.frozen
class Frame:
    topic: int
    index: int
    data: bytes | memoryview
    """Decoded: a view into what was decoded."""


@attrs.frozen
class Refuse:
    topic: int
    index: int


@attrs.frozen
class Cancel:
    topic: int
    indices: tuple[int, ...]


@attrs.frozen
class GetObject:
    cid: Cid


@attrs.frozen
class Object:
    cid: Cid
    data: bytes


@attrs.frozen
class NoObject:
    cid: Cid


@attrs.frozen
class Peers:
    topic: int
    peers: tuple[tuple[PeerId, tuple[str, ...]], ...]


@attrs.frozen
class Close:
    topic: int


@attrs.frozen
class Grown:
    topic: int
    draft: Cid


Message = (
    Open | Bitfield | Have | Request | Frame | Refuse | Cancel | GetObject | Object | NoObject | Peers | Close
    | Grown
)  # fmt: skip

_TOPIC = struct.Struct(">BH")
_INDEX = struct.Struct(">BHI")
_rows = msgspec.msgpack.Decoder(list[tuple[str, list[str]]])


def encode(message: Message) -> tuple[bytes, ...]:
    """The buffers of one message; joined they are its body, long data stands alone, not copied."""
    match message:
        case Open(topic, pack):
            return (_TOPIC.pack(1, topic) + bytes(pack),)
        case Bitfield(topic, first, bits):
            assert first % 8 == 0
            assert 0 < len(bits) <= BITS_MAX
            return _INDEX.pack(2, topic, first), bits
        case Have(topic, indices):
            return (_TOPIC.pack(3, topic) + _packed(indices),)
        case Request(topic, indices, urgent):
            return (_TOPIC.pack(13 if urgent else 4, topic) + _packed(indices),)
        case Frame(topic, index, data):
            assert 0 < len(data) <= FRAME_MAX
            return _INDEX.pack(5, topic, index), bytes(data)
        case Refuse(topic, index):
            return (_INDEX.pack(6, topic, index),)
        case Cancel(topic, indices):
            return (_TOPIC.pack(7, topic) + _packed(indices),)
        case GetObject(cid):
            return (b"\x08" + bytes(cid),)
        case Object(cid, data):
            assert 0 < len(data) <= OBJECT_MAX
            return b"\x09" + bytes(cid), data
        case NoObject(cid):
            return (b"\x0a" + bytes(cid),)
        case Peers(topic, peers):
            assert len(peers) <= PEERS_MAX
            return (_TOPIC.pack(11, topic) + msgspec.msgpack.encode(peers),)
        case Close(topic):
            return (_TOPIC.pack(12, topic),)
        case Grown(topic, draft):
            return (_TOPIC.pack(14, topic) + bytes(draft),)


def _packed(indices: Sequence[int]) -> bytes:
    assert 0 < len(indices) <= INDICES_MAX
    return struct.pack(f">{len(indices)}I", *indices)


def decode(body: bytes | memoryview) -> Message:
    """The message in `body`.  Raises `BadFrame`; the data of a `Frame` is a view into `body`."""
    view = memoryview(body)
    if len(view) < 3:
        raise BadFrame(why="a message without fields")
    kind = view[0]
    try:
        if kind in (8, 9, 10):
            return _about_object(kind, view)
        return _about_topic(kind, int.from_bytes(view[1:3], "big"), view[3:])
    except (BadObject, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as broken:
        raise BadFrame(why=str(broken)) from None


def _about_topic(kind: int, topic: int, rest: memoryview) -> Message:
    match kind:
        case 5:
            _need(4 < len(rest) <= 4 + FRAME_MAX, "a frame of a length that none has")
            return Frame(topic, int.from_bytes(rest[:4], "big"), rest[4:])
        case 1:
            return Open(topic, Cid.from_bytes(bytes(rest)))
        case 2:
            _need(4 < len(rest) <= 4 + BITS_MAX, "a bitmap of a length that none has")
            first = int.from_bytes(rest[:4], "big")
            _need(first % 8 == 0, "a bitmap that starts inside a byte")
            return Bitfield(topic, first, bytes(rest[4:]))
        case 3:
            return Have(topic, _indices(rest))
        case 4 | 13:
            return Request(topic, _indices(rest), urgent=kind == 13)
        case 6:
            _need(len(rest) == 4, "not one index")
            return Refuse(topic, int.from_bytes(rest, "big"))
        case 7:
            return Cancel(topic, _indices(rest))
        case 11:
            return Peers(topic, _peers(rest))
        case 12:
            _need(len(rest) == 0, "more than a topic")
            return Close(topic)
        case 14:
            return Grown(topic, Cid.from_bytes(bytes(rest)))
        case _:
            raise BadFrame(why=f"a message of unknown type {kind}")


def _about_object(kind: int, view: memoryview) -> Message:
    cid = Cid.from_bytes(bytes(view[1 : 1 + CID_SIZE]))
    rest = view[1 + CID_SIZE :]
    if kind == 9:
        _need(0 < len(rest) <= OBJECT_MAX, "an object of a length that none has")
        return Object(cid, bytes(rest))
    _need(len(rest) == 0, "more than a name")
    return GetObject(cid) if kind == 8 else NoObject(cid)


def _indices(rest: memoryview) -> tuple[int, ...]:
    _need(len(rest) % 4 == 0 and 0 < len(rest) <= 4 * INDICES_MAX, "a number of indices that none has")
    return struct.unpack(f">{len(rest) // 4}I", rest)


def _peers(rest: memoryview) -> tuple[tuple[PeerId, tuple[str, ...]], ...]:
    rows = _rows.decode(rest)
    _need(len(rows) <= PEERS_MAX, "too many peers")
    for id_, addresses in rows:
        _need(0 < len(id_) <= 128 and len(addresses) <= ADDRESSES_MAX, "a peer that none is")
        _need(all(len(a) <= ADDRESS_MAX for a in addresses), "an address that is too long")
    return tuple((PeerId(id_), tuple(addresses)) for id_, addresses in rows)


def _need(ok: bool, why: str) -> None:
    if not ok:
        raise BadFrame(why=why)
