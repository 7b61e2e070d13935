"""Say what went wrong, why, and what to do: one family tree of errors.

The docstring of a class is its message, its fields are the facts:

    ChunkCorrupt(peer="ann", wanted="ab")
        -> "A peer sent bytes that do not match the chunk's name (peer=ann, wanted=ab)"

Three families, as in h11.  *Ours*: an `assert` fails, we crash.  *Theirs*
(`PeerError`): that peer loses its link, nothing else.  *The world's*
(`WorldError`): retried, or told to the person.  `exit_code` follows the table
in `docs/reference/exit-codes.md`; `advice` says what to do about it.
"""

from __future__ import annotations

from typing import ClassVar

import attrs


@attrs.frozen(kw_only=True, slots=False)
class GridError(Exception):
    """Something went wrong."""

    exit_code: ClassVar[int] = 1
    advice: ClassVar[str] = ""

    def __str__(self) -> str:
        doc = " ".join((type(self).__doc__ or type(self).__name__).split())
        facts = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in attrs.fields(type(self)))
        return f"{doc.rstrip('.')} ({facts})" if facts else doc


# --- theirs: the peer loses its link -------------------------------------------------


@attrs.frozen(kw_only=True, slots=False)
class PeerError(GridError):
    """A peer broke the protocol."""

    exit_code: ClassVar[int] = 7


@attrs.frozen(kw_only=True, slots=False)
class BadFrame(PeerError):
    """A peer sent a message that does not decode."""

    why: str


@attrs.frozen(kw_only=True, slots=False)
class BadObject(PeerError):
    """A manifest object is not what its name or its kind promises."""

    why: str


@attrs.frozen(kw_only=True, slots=False)
class ChunkCorrupt(PeerError):
    """Bytes do not match the chunk's name."""

    wanted: str
    got: str


# --- the world's: retried, or told to the person --------------------------------------


@attrs.frozen(kw_only=True, slots=False)
class WorldError(GridError):
    """The world is not as it should be."""


@attrs.frozen(kw_only=True, slots=False)
class Misused(WorldError):
    """The command was not understood."""

    exit_code: ClassVar[int] = 2
    why: str


@attrs.frozen(kw_only=True, slots=False)
class NotFound(WorldError):
    """There is no such thing."""

    exit_code: ClassVar[int] = 3
    what: str


@attrs.frozen(kw_only=True, slots=False)
class NotAuthorised(WorldError):
    """That is not allowed with this ticket or this key."""

    exit_code: ClassVar[int] = 4
    why: str


@attrs.frozen(kw_only=True, slots=False)
class TimedOut(WorldError):
    """Waiting took too long; the work itself goes on."""

    exit_code: ClassVar[int] = 5
    what: str


@attrs.frozen(kw_only=True, slots=False)
class Unreachable(WorldError):
    """Nobody answered."""

    exit_code: ClassVar[int] = 6
    who: str
    why: str


@attrs.frozen(kw_only=True, slots=False)
class ImageRefused(WorldError):
    """The disk image cannot be used."""

    exit_code: ClassVar[int] = 7
    path: str
    why: str


@attrs.frozen(kw_only=True, slots=False)
class VerificationFailed(WorldError):
    """Data did not verify."""

    exit_code: ClassVar[int] = 7
    what: str
    why: str


@attrs.frozen(kw_only=True, slots=False)
class NoSpace(WorldError):
    """There is not enough room for it."""

    exit_code: ClassVar[int] = 8
    wanted: int
    free: int
    where: str


@attrs.frozen(kw_only=True, slots=False)
class Refused(WorldError):
    """The owner's limits refuse it."""

    exit_code: ClassVar[int] = 9
    why: str


@attrs.frozen(kw_only=True, slots=False)
class Conflict(WorldError):
    """It exists already, with another content."""

    exit_code: ClassVar[int] = 10
    what: str


@attrs.frozen(kw_only=True, slots=False)
class Temporary(WorldError):
    """It cannot be done just now; try again."""

    exit_code: ClassVar[int] = 75
    why: str


@attrs.frozen(kw_only=True, slots=False)
class Misconfigured(WorldError):
    """The configuration or an installed program is not usable."""

    exit_code: ClassVar[int] = 78
    why: str
