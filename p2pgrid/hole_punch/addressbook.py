"""Remember where peers take links: at which addresses, and through which relays.

Pure.  What was heard last counts; of too many peers those are forgotten of whom nothing was heard for
longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from p2pgrid.hole_punch.path import (
    ADDRESSES_MAX,
    Address,
    Circuit,
    Way,
    candidates,
    circuit_from_multiaddr,
    circuit_to_multiaddr,
    from_multiaddr,
    to_multiaddr,
)
from p2pgrid.ids import PeerId

KNOWN_MAX = 4096
"""Peers whose addresses are remembered."""
CIRCUITS_MAX = 4
"""Relays tried for one peer."""


@attrs.define
class Known:
    """Where one peer takes links, best first."""

    addresses: list[Address] = attrs.field(factory=list)
    circuits: list[Circuit] = attrs.field(factory=list)
    relayed: int = 0
    """How often in a row a relay was what worked."""


class AddressBook:
    """Where peers of `me` take links."""

    def __init__(self, me: PeerId) -> None:
        self._me = me
        self._known: dict[PeerId, Known] = {}

    def of(self, peer: PeerId) -> Known:
        return self._known.get(peer, Known())

    def told(self, peer: PeerId) -> list[str]:
        """The same as multiaddrs."""
        known = self.of(peer)
        return [*map(to_multiaddr, known.addresses), *map(circuit_to_multiaddr, known.circuits)]

    def learn(self, peer: PeerId, multiaddrs: Iterable[str]) -> None:
        """Remember those of `multiaddrs` at which a link is made."""
        multiaddrs = list(multiaddrs)
        addresses = [address for text in multiaddrs if (address := from_multiaddr(text))]
        self.note(peer, addresses, [c for text in multiaddrs if (c := circuit_from_multiaddr(text))])

    def hear(self, peer: PeerId, told: Sequence[str], seen: Iterable[str]) -> None:
        """Remember what `peer` tells itself, `host:port` or circuits, of somebody `seen` at multiaddrs."""
        told = told[: 2 * ADDRESSES_MAX]
        addresses = candidates([text for text in told if not text.startswith("/")], seen)
        self.note(peer, addresses, [c for text in told if (c := circuit_from_multiaddr(text))])

    def note(self, peer: PeerId, addresses: Sequence[Address], circuits: Sequence[Circuit] = ()) -> None:
        known = self._known.pop(peer, Known())
        if addresses:
            known.addresses = list(addresses[:ADDRESSES_MAX])
        if circuits:
            known.circuits = [c for c in circuits if c.relay not in (peer, self._me)][:CIRCUITS_MAX]
        if known.addresses or known.circuits:
            self._known[peer] = known
            while len(self._known) > KNOWN_MAX:
                del self._known[next(iter(self._known))]

    def won(self, peer: PeerId, way: Way) -> None:
        """A connection came about in this way."""
        if (known := self._known.get(peer)) is not None:
            known.relayed = known.relayed + 1 if way is Way.RELAYED else 0

    def forget(self, peer: PeerId) -> None:
        self._known.pop(peer, None)
