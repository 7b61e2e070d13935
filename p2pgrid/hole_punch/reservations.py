"""Decide who may reserve at a circuit relay, and which circuits it carries.

Pure: no clock, no sockets.  Whom it serves it does not know, so it gives little to each: places for
an hour, few for one address, and circuits that end after two minutes or 128 KiB each way.  That is
enough to agree on something better, and of no use for anything else (the limits go-libp2p begins with).

    reserve ──> reserved, until it lapses or `forget`: its connection ended
    begin(source, target) ──> a circuit, which counts for both, until `end`
"""

from __future__ import annotations

from collections import Counter

import attrs

from p2pgrid.ids import PeerId


@attrs.frozen
class Limits:
    """What strangers are given."""

    reservations: int = 64
    """At a time; 0 offers no relay at all."""
    each_address: int = 8
    """Of them, to peers at one IP address."""
    circuits: int = 32
    """At a time."""
    circuits_each: int = 8
    """Of them, with one peer at either end."""
    data: int = 128 << 10
    """Bytes each way of one circuit."""
    duration: float = 120.0
    """Seconds of one circuit."""
    life: float = 3600.0
    """Seconds until a reservation has to be renewed."""


@attrs.frozen
class _Place:
    address: str
    until: float


@attrs.define
class Reservations:
    """What one relay has given away."""

    limits: Limits
    _places: dict[PeerId, _Place] = attrs.field(factory=dict)
    _ends: Counter[PeerId] = attrs.field(factory=Counter)
    """Circuits by the peers at their ends: each is here twice."""

    def reserve(self, peer: PeerId, address: str, now: float) -> bool:
        """Give `peer`, seen at `address`, a place or keep it the one it has; False: there is none."""
        self._places = {other: place for other, place in self._places.items() if place.until > now}
        others = [place for other, place in self._places.items() if other != peer]
        near = [place for place in others if place.address == address]
        if len(others) >= self.limits.reservations or len(near) >= self.limits.each_address:
            return False
        self._places[peer] = _Place(address, now + self.limits.life)
        return True

    def reserved(self, peer: PeerId, now: float) -> bool:
        place = self._places.get(peer)
        return place is not None and place.until > now

    def forget(self, peer: PeerId) -> None:
        self._places.pop(peer, None)

    def begin(self, source: PeerId, target: PeerId) -> bool:
        """Count a circuit; False: it would be one too many."""
        each = max(self._ends[source], self._ends[target])
        if self._ends.total() >= 2 * self.limits.circuits or each >= self.limits.circuits_each:
            return False
        self._ends.update([source, target])
        return True

    def end(self, source: PeerId, target: PeerId) -> None:
        """A circuit that had begun is no more."""
        self._ends.subtract([source, target])
        self._ends = +self._ends

    def check(self) -> None:
        """What holds at any time."""
        assert len(self._places) <= self.limits.reservations
        assert self._ends.total() <= 2 * self.limits.circuits
        at = Counter(place.address for place in self._places.values())
        assert max(at.values(), default=0) <= self.limits.each_address
        assert all(count > 0 for count in self._ends.values())
