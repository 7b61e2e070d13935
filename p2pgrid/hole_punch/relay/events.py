"""Name what happens to a relay, and what it does: the two sides of `circuits.py`.

Pure.  Events are past, effects imperative.
"""

from __future__ import annotations

import attrs

from p2pgrid.hole_punch.relay.limits import Limits
from p2pgrid.hole_punch.relay.messages import Asked, Told
from p2pgrid.ids import PeerId

# --- events -------------------------------------------------------------------------------


@attrs.frozen
class Said:
    """A peer's link brought a message; `barred` says why it, or whom it names, is no member."""

    peer: PeerId
    message: Asked
    chance: bytes = b""
    """With Connect: 2 * TOKEN random bytes."""
    barred: str = ""


@attrs.frozen
class Left:
    """A peer's link is gone."""

    peer: PeerId


@attrs.frozen
class Dialled:
    """A connection that shows `token`; `line` is the caller's number for it."""

    line: int
    token: bytes


@attrs.frozen
class Spent:
    """`room` was asked for and there is none, but bytes wait to be carried."""

    circuit: int


@attrs.frozen
class Gone:
    """Both ends of a circuit are closed; `broken` says why, unless both had finished."""

    circuit: int
    broken: str = ""


@attrs.frozen
class Barred:
    """A peer is no member any more."""

    peer: PeerId
    why: str


@attrs.frozen
class Opened:
    """Relay, within these limits."""

    limits: Limits


@attrs.frozen
class Closed:
    """Relay nothing until `Opened`."""

    why: str


@attrs.frozen
class Tick:
    """The deadline has passed."""


Event = Said | Left | Dialled | Spent | Gone | Barred | Opened | Closed | Tick


# --- effects ------------------------------------------------------------------------------


@attrs.frozen
class Tell:
    """Send a message down a peer's link, if it has one."""

    peer: PeerId
    message: Told


@attrs.frozen
class Join:
    """Carry bytes between two lines until `Gone` or `Cut`."""

    circuit: int
    lines: tuple[int, int]


@attrs.frozen
class Cut:
    """Close both ends of a circuit; no `Gone` is wanted."""

    circuit: int


@attrs.frozen
class Drop:
    """Close a line that belongs to no circuit."""

    line: int


Effect = Tell | Join | Cut | Drop
