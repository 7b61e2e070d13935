"""Say what a fetch needs of the exchange it runs in, and what it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import attrs

from p2pgrid.dht.shelf import Shelf
from p2pgrid.dht.store import Store
from p2pgrid.hole_punch.bulk import Links
from p2pgrid.ids import Cid, PeerId
from p2pgrid.transfer.company import Searching


@attrs.frozen
class Fetched:
    """A fetch that is complete."""

    bytes_by_peer: dict[PeerId, int]
    local_bytes: int
    resumed_bytes: int
    seconds: float


class Peering(Searching, Protocol):
    """What a fetch needs of the exchange."""

    store: Store
    me: PeerId
    links: Links
    origins: Sequence[str]
    """Where to ask when no peer helps."""

    def show(self, shelf: Shelf) -> None:
        """Tell who has opened the shelf's pack what is here."""
        ...

    def tell(self, pack: Cid, indices: list[int]) -> None:
        """Tell who has opened `pack`, and whoever here wants it, that these are here."""
        ...

    def grown(self, series: Cid) -> None:
        """Tell who follows `series` that it has grown."""
        ...

    def settle(self) -> None:
        """Have no series followed that is not here any more: it became a pack, or was dropped."""
        ...
