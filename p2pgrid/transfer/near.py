"""Decide what to ask of peers that are not near, so that bytes cross a site's line once.

Pure.  Near peers are reached within the home or the lab; all others across a line that all of the site
share.  What a near peer has is asked there.  What none has, one of the site asks across the line and
the others have it from that one, without a word about who:

    index        0-7   8-15  16-23  24-31  32-39 …     in runs of a byte of a bitmap
    ann draws     71    15     33     80      9        they follow from the name, so that all know them
    bob draws     20    62     41     12     50
    asked by     ann   bob    bob    ann    bob        whoever drew the highest, of those who bring something

(Thaler and Ravishankar, 1998.)  Where two know not quite the same neighbours they still agree on nearly all
runs; on the others a chunk comes twice, or waits.  So that nobody waits for ever, who
brings no news for `NEWS`, or nothing of what it is asked for within `QUIET`, does not count, nor does who
has more to do than it can and is slower than a `SLOWER`th of the fastest across the line; and who has
nothing left of its own share helps with that of the others, one chunk at a time.
"""

from __future__ import annotations

import functools
import hashlib
import math
import struct
from collections.abc import Collection

from p2pgrid.ids import PeerId
from p2pgrid.transfer.partner import Partner
from p2pgrid.transfer.rarity import BLOCK, Blocks

NEWS = 10.0
"""Seconds without news of a chunk we lack after which a near peer is not counted on."""
SLOWER = 4
QUIET = 1.0
"""Seconds without a chunk after which a near peer that is asked for some does not count."""
LOOK = 1.0
"""Seconds between two looks at who counts."""


RUNS = 1024
"""Runs that are divided; more than that go round."""
NONE = (0,) * RUNS


class Near:
    """What the site has, and what of the rest is for this node to bring."""

    def __init__(self, me: PeerId, count: int) -> None:
        self._me = me
        self._count = count
        self._counted: list[Partner] = []
        self._site: list[PeerId] = []
        self._look_at = -math.inf
        self.share: Blocks | None = None
        """What this node may ask of peers that are not near; None: everything."""
        self.lacking: Blocks = []
        """What nobody near has; only where there is a share."""

    def told(self, peer: Partner, block: int, bits: int) -> None:
        """`peer` has these, too."""
        if self.share is not None and peer in self._counted:
            self.share[block] &= ~bits
            self.lacking[block] &= ~bits

    def may(self, peer: Partner, index: int) -> bool:
        """Whether `index` may be asked of `peer`: across the line only what nobody near has."""
        return peer.near or self.share is None or bool(self.lacking[index // BLOCK] >> index % BLOCK & 1)

    def asked_all(self, wanted: Blocks) -> bool:
        """Whether nothing that is `wanted` is left of this node's share."""
        return self.share is not None and not any(a & b for a, b in zip(self.share, wanted, strict=True))

    def changed(self) -> None:
        """Somebody joined, left, or does not answer any more."""
        self._look_at = -math.inf

    def look(self, peers: Collection[Partner], now: float) -> bool:
        """See who counts; whether there may be more to ask across the line than before."""
        if now < self._look_at:
            return False
        self._look_at = now + LOOK
        fastest = max((peer.pace.rate for peer in peers if not peer.near), default=-1.0)
        counted = [] if fastest < 0 else [p for p in peers if _counts(p, fastest, now)]
        site = [peer.id for peer in counted if peer.news > now - NEWS and not peer.whole]
        if counted == self._counted and site == self._site:
            return False
        self._counted, self._site = counted, site
        self._divide()
        return True

    def _divide(self) -> None:
        if not self._counted:
            self.share, self.lacking = None, []
            return
        size = -(-self._count // BLOCK)
        have = [0] * size
        for peer in self._counted:
            have = [a | b for a, b in zip(have, peer.have, strict=True)]
        self.lacking = [((1 << BLOCK) - 1) & ~bits for bits in have]
        runs = bytes(
            255 if mine > most else 0
            for mine, most in zip(draws(self._me), map(max, NONE, NONE, *map(draws, self._site)), strict=True)
        )
        mine = int.from_bytes(runs * -(-size * BLOCK // 8 // RUNS), "little")
        self.share = [
            mine >> block * BLOCK & ((1 << BLOCK) - 1) & bits for block, bits in enumerate(self.lacking)
        ]


@functools.lru_cache(maxsize=1024)
def draws(peer: PeerId) -> tuple[int, ...]:
    """A number for each run, by which `peer` has it if nobody draws a higher one."""
    return struct.unpack(f">{RUNS}I", hashlib.shake_128(peer.encode()).digest(4 * RUNS))


def _counts(peer: Partner, fastest: float, now: float) -> bool:
    """Whether it answers, and keeps up: with room for more, it brings all that it is asked for."""
    if not peer.near or peer.stalls or peer.rests_until > now or (peer.asks and now - peer.since > QUIET):
        return False
    return peer.room or not peer.pace.rate or peer.pace.rate * SLOWER >= fastest
