"""Say what the reader of a scratch disk tells `results.py`, one `wire` frame each.

Pure, and light: the reader starts once for every guest.

    Begin Bytes* Begin Bytes* … Done | Failed
"""

from __future__ import annotations

import msgspec

PIECE = 256 * 1024
"""Bytes of a file told at once."""


class Begin(msgspec.Struct, tag="begin"):
    """A file comes: relative POSIX path, bytes, and whether it may be executed."""

    path: str
    size: int
    executable: bool


class Bytes(msgspec.Struct, tag="bytes"):
    """Part of the file that came last."""

    offset: int
    data: bytes


class Done(msgspec.Struct, tag="done"):
    """That was all."""


class Failed(msgspec.Struct, tag="failed"):
    """The disk cannot be read."""

    why: str


Told = Begin | Bytes | Done | Failed
