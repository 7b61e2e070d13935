"""Choose the relays of a node: the nearest of those that answer, and others when one fails.

Pure.  Of many that are known, every node looks at some only, each node at others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs

from p2pgrid.ids import PeerId, digest

WANTED = 2
"""Relays that a node holds, so that one can die."""
SURVEY = 6
"""Relays that are looked at to find these."""
REST_MIN, REST_MAX = 2.0, 300.0
"""Seconds until a relay that failed is looked at again, doubled from the one to the other."""


@attrs.define
class _Rest:
    tries: int
    until: float


@attrs.define
class Choice:
    """What is known of relays by one node."""

    me: PeerId
    wanted: int = WANTED
    known: tuple[PeerId, ...] = ()
    held: dict[PeerId, None] = attrs.field(factory=dict)
    """Those in use, or being asked."""
    _rests: dict[PeerId, _Rest] = attrs.field(factory=dict)

    def learn(self, relays: Iterable[PeerId]) -> None:
        """These there are, and no others."""
        self.known = tuple(dict.fromkeys(relay for relay in relays if relay != self.me))
        self._rests = {relay: rest for relay, rest in self._rests.items() if relay in self.known}

    def survey(self, now: float) -> list[PeerId]:
        """Whom to look at now to have as many as are wanted."""
        if len(self.held) >= self.wanted:
            return []
        able = [r for r in self.known if r not in self.held and self._until(r) <= now]
        able.sort(key=lambda relay: digest(f"{self.me} {relay}".encode()))
        return able[:SURVEY]

    def choose(self, delays: Mapping[PeerId, float]) -> list[PeerId]:
        """Whom to take of those that answered after these seconds; they are held from now on."""
        missing = max(0, self.wanted - len(self.held))
        chosen = sorted((r for r in delays if r not in self.held), key=lambda relay: (delays[relay], relay))
        self.held.update(dict.fromkeys(chosen[:missing]))
        return chosen[:missing]

    def worked(self, relay: PeerId) -> None:
        self._rests.pop(relay, None)

    def let_go(self, relay: PeerId) -> None:
        """It is not used any more, and did nothing wrong."""
        self.held.pop(relay, None)

    def failed(self, relay: PeerId, now: float) -> None:
        """It did not answer, said no, or is gone."""
        self.held.pop(relay, None)
        if relay in self.known:
            tries = self._rests[relay].tries + 1 if relay in self._rests else 1
            self._rests[relay] = _Rest(tries, now + min(REST_MAX, REST_MIN * 2.0 ** min(tries - 1, 16)))

    def again(self, now: float) -> float | None:
        """Seconds until another look is worth it; None: not before there is news."""
        if len(self.held) >= self.wanted:
            return None
        return min((self._until(r) - now for r in self.known if r not in self.held), default=None)

    def _until(self, relay: PeerId) -> float:
        return self._rests[relay].until if relay in self._rests else 0.0
