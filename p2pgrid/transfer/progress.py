"""Say how far a fetch is, and what it waits for when nothing comes.

Pure.  A stall has a reason that somebody can do something about: nobody was found, nobody
answers, or nobody has these chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from p2pgrid.ids import PeerId
from p2pgrid.transfer.ranges import is_origin

STALLED = 8.0
"""Seconds without anything after which the reason is named; whoever listens hears it within 10 s."""
LOST_MAX = 4
"""Stretches of chunks that are named."""


@attrs.frozen
class Progress:
    """How far a fetch is.  Bytes are those of frames, as they are stored and sent."""

    bytes_done: int
    bytes_total: int
    """0 until the pack is known."""
    bytes_by_peer: dict[PeerId, int]
    local: int
    """Bytes copied from other packs of this store."""
    resumed: int
    """Bytes that an earlier fetch had brought."""
    rate: float
    """Bytes per second, lately."""
    peers: int
    missing: int
    """Chunks not here."""
    unavailable: int
    """Missing chunks that no connected peer has."""
    stalled_for: float
    """Seconds since something came."""
    troubles: dict[str, str] = attrs.field(factory=dict)
    """Why origins help no more, by origin."""
    chunks: int = 0
    """In all, of the pack that is being fetched; 0 until it is known."""
    lost: tuple[tuple[int, int], ...] = ()
    """The first stretches (first, last) of chunks that no connected peer has."""
    silent: int = 0
    """Connected peers that do not answer."""
    heard: int = 0
    """Peers that may have something: told by the coordinator, found in the index, named by others."""
    looked: int = 0
    """Times that the index was asked."""

    @property
    def from_peers(self) -> int:
        return sum(count for peer, count in self.bytes_by_peer.items() if not is_origin(peer))

    @property
    def from_origins(self) -> int:
        return sum(count for peer, count in self.bytes_by_peer.items() if is_origin(peer))

    @property
    def stall(self) -> str:
        """What is waited for; empty while something comes."""
        if self.stalled_for < STALLED or (self.bytes_total and self.bytes_done >= self.bytes_total):
            return ""
        return "; ".join([self._waits_for(), *(f"{name}: {why}" for name, why in self.troubles.items())])

    def _waits_for(self) -> str:
        if not self.peers:
            index = "looked in the index" if self.looked else "the index has not answered yet"
            if not self.heard:
                return f"nobody found yet: {index}, and nobody is known to have it"
            return f"nobody can be reached: {index}, tried {_count(self.heard, 'peer')}"
        if not self.chunks:
            return f"{_count(self.peers, 'peer')} connected, none has what the disk is made of"
        if self.silent:
            all_of_them = "none answers" if self.silent >= self.peers else f"{self.silent} do not answer"
            return f"{_count(self.peers, 'peer')} connected, {all_of_them}"
        if self.unavailable:
            return f"no peer has {_chunks(self.lost, self.unavailable)} ({self.unavailable} of {self.chunks})"
        return f"{_count(self.peers, 'peer')} connected, nothing has come for {self.stalled_for:.0f} s"


def stretches(indices: Iterable[int], most: int = LOST_MAX) -> tuple[tuple[int, int], ...]:
    """The first `most` stretches (first, last) of ascending `indices`."""
    found: list[tuple[int, int]] = []
    for index in indices:
        if found and found[-1][1] == index - 1:
            found[-1] = found[-1][0], index
        elif len(found) == most:
            break
        else:
            found.append((index, index))
    return tuple(found)


def _chunks(some: Sequence[tuple[int, int]], count: int) -> str:
    named = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in some)
    rest = count > sum(last - first + 1 for first, last in some)
    return f"chunk{'s' if count > 1 else ''} {named}{', …' if rest else ''}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
