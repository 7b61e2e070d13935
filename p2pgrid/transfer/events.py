"""Name what a swarm is told, and what it says to do.

Pure.  Events are what peers and links report, effects what `fetch.py` does about it; `swarm.py` decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from p2pgrid.ids import PeerId
from p2pgrid.machine import Tick


@attrs.frozen
class Joined:
    """`peer` is here and has the indices in `have` (bitmap, LSB first).  Again: it has these now."""

    peer: PeerId
    have: bytes
    near: bool = False
    """Whether it is reached without passing the line that this node shares with its neighbours."""


@attrs.frozen
class Told:
    """`peer` has these indices, too."""

    peer: PeerId
    indices: Sequence[int]


@attrs.frozen
class Left:
    """The link to `peer` ended."""

    peer: PeerId


@attrs.frozen
class Arrived:
    """`peer` brought chunk `index`, `size` bytes; it is verified and stored."""

    peer: PeerId
    index: int
    size: int


@attrs.frozen
class Rejected:
    """`peer` brought bytes for `index` that did not verify."""

    peer: PeerId
    index: int


@attrs.frozen
class Refused:
    """`peer` does not have `index` after all."""

    peer: PeerId
    index: int


@attrs.frozen
class Held:
    """These indices came in another way."""

    indices: Sequence[int]


@attrs.frozen
class Urgent:
    """These are needed before all others.  Again: these, too."""

    indices: Sequence[int]


@attrs.frozen
class Extended:
    """There are more chunks than was known: their lengths; everybody tells anew what it has."""

    lengths: Sequence[int]


Event = Joined | Told | Left | Arrived | Rejected | Refused | Held | Urgent | Extended | Tick


@attrs.frozen
class Ask:
    """Ask `peer` for these chunks, in this order; urgent ones first, whether it was asked for them or not."""

    peer: PeerId
    indices: tuple[int, ...]
    urgent: bool = False


@attrs.frozen
class Withdraw:
    """Tell `peer` that `index` need not be sent any more; it may come all the same."""

    peer: PeerId
    index: int


@attrs.frozen
class Shun:
    """`peer` is asked for nothing any more in this swarm."""

    peer: PeerId
    why: str


@attrs.frozen
class Completed:
    """Every chunk is held."""


Effect = Ask | Withdraw | Shun | Completed
