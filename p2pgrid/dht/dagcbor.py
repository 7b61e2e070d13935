"""Write and read the one canonical encoding of an object: DAG-CBOR and nothing else.

Pure.  Plain values (None, bool, int, text, bytes, lists, maps with text keys) and `Cid`s, which
are links (tag 42).  What was decoded is encoded again, and must be the very bytes that
came, so no object has two spellings; `OBJECT_MAX` and a depth of 8 bound the cost.
"""

from __future__ import annotations

from typing import Any

import cbor2

from p2pgrid.errors import BadObject
from p2pgrid.ids import Cid

OBJECT_MAX = 1 << 20
"""Bytes. No object is longer; a peer that sends a longer one is wrong."""
LINK = 42


def _deny(value: Any, immutable: bool) -> Any:
    raise ValueError("only tag 42 is allowed")


# cbor2 acts on tags before any hook sees them (35 compiles a peer's regex): deny each by number.
_DENIED = dict.fromkeys((*range(LINK), *range(LINK + 1, 300), 1004, 43000, 55799), _deny)


def encode(value: Any) -> bytes:
    """Canonical DAG-CBOR of plain values and `Cid`s."""
    return cbor2.dumps(_lower(value), canonical=True)


def _lower(value: Any) -> Any:
    if isinstance(value, Cid):
        return cbor2.CBORTag(LINK, b"\0" + bytes(value))
    if isinstance(value, dict):
        return {k: _lower(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_lower(v) for v in value]
    return value


def _raise(value: Any) -> Any:
    if isinstance(value, cbor2.CBORTag):
        if value.tag != LINK or not isinstance(value.value, bytes) or value.value[:1] != b"\0":
            raise BadObject(why="a tag that is not a link")
        return Cid.from_bytes(value.value[1:])
    if isinstance(value, dict):
        need(all(isinstance(k, str) for k in value), "a key that is not text")
        return {k: _raise(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_raise(v) for v in value]
    if value is None or isinstance(value, bool | int | str | bytes):
        return value
    raise BadObject(why=f"a value of type {type(value).__name__}")


def decode(data: bytes) -> dict[str, Any]:
    """The map in `data`.  Raises `BadObject` unless `data` is its one canonical encoding."""
    if len(data) > OBJECT_MAX:
        raise BadObject(why=f"{len(data)} bytes is longer than an object may be")
    try:
        raw = cbor2.loads(data, semantic_decoders=_DENIED, max_depth=8, allow_indefinite=False)
        value = _raise(raw)
        canonical = encode(value)
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError) as broken:
        raise BadObject(why=f"not DAG-CBOR: {broken}") from None
    if canonical != data:
        raise BadObject(why="not canonical DAG-CBOR")
    if not isinstance(value, dict):
        raise BadObject(why="not a map")
    return value


def need(ok: bool, why: str) -> None:
    """Raise `BadObject` unless `ok`."""
    if not ok:
        raise BadObject(why=why)


def take(value: dict[str, Any], kind: str, *fields: str) -> list[Any]:
    """The values of `fields` of an object of `kind` that has these and no others."""
    need(value.get("kind") == kind, f"not a {kind}")
    need(value.get("v") == 1 and value["v"] is not True, f"a {kind} of unknown version")
    need(value.keys() == {"v", "kind", *fields}, f"a {kind} with other fields than it has")
    return [value[f] for f in fields]


def bounded(value: Any, most: int, what: str) -> int:
    """`value` if it is an integer from 0 to `most`.  Raises `BadObject`."""
    need(isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most, what)
    return int(value)
