"""Know the disks that are being put just now: who may fetch what there is of them.

Pure, and volatile: a draft is told again and again while its disk is pressed, so a coordinator that was
restarted hears of it anew, and one whose putter fell silent is forgotten.  When the disk itself is put, it
takes its draft's place, and whoever was told to hold the one is told to hold the other.

    Draft ──> told ──Draft, again──> told ──> Put(…, draft) ──> placed ───────┐
                └── over, or silent for `TTL` ──────────────> withdrawn ──> forgotten, `TTL` later
"""

from __future__ import annotations

import attrs

from p2pgrid.errors import Conflict, Refused
from p2pgrid.ids import PeerId
from p2pgrid.scheduler.messages import Draft

TTL = 60.0
"""Seconds after which a draft that is not told of any more is withdrawn; and for which nodes that hold
some of one that was withdrawn are told to drop it."""
DRAFTS_MAX = 32
"""Disks that are put at once and told of: an answer tells a node to fetch 64 data in all."""


@attrs.define
class Drafted:
    """A disk that is being put."""

    draft: str
    submitter: PeerId
    size: int
    replica: int
    until: float


class Drafts:
    """By the name of the series."""

    def __init__(self) -> None:
        self.told: dict[str, Drafted] = {}
        self.withdrawn: dict[str, float] = {}
        """Until when nodes are told to drop it."""
        self._placed: dict[str, float] = {}
        """Those whose disk was put: a word about one may have been overtaken by that."""

    def tell(self, submitter: PeerId, request: Draft, now: float) -> bool:
        """Take in what a putter tells; whether that is news.  Raises `Conflict`, `Refused`."""
        known = self.told.get(request.draft)
        if known is not None and known.submitter != submitter:
            raise Conflict(what=f"{request.draft} is put by another submitter")
        if request.over:
            return self.withdraw(request.draft, now)
        if request.draft in self.withdrawn or request.draft in self._placed:
            return False
        if known is None and len(self.told) >= DRAFTS_MAX:
            raise Refused(why=f"{DRAFTS_MAX} disks are being put already")
        drafted = Drafted(request.draft, submitter, request.size, request.replica, now + TTL)
        self.told[request.draft] = drafted
        return known is None

    def withdraw(self, draft: str, now: float) -> bool:
        """Whether it was told of."""
        if self.told.pop(draft, None) is None:
            return False
        self.withdrawn[draft] = now + TTL
        return True

    def place(self, draft: str, submitter: PeerId, now: float) -> bool:
        """The disk of `draft` was put by `submitter`: whether it was told of."""
        known = self.told.get(draft)
        if known is None or known.submitter != submitter:
            return False
        del self.told[draft]
        self._placed[draft] = now + TTL
        return True

    def ring(self, draft: str, now: float) -> float | None:
        """Do what is due for a draft; when to look again."""
        known = self.told.get(draft)
        if known is not None and known.until <= now:
            self.withdraw(draft, now)
        elif known is not None:
            return known.until
        for ended in (self.withdrawn, self._placed):
            until = ended.get(draft)
            if until is not None and until > now:
                return until
            ended.pop(draft, None)
        return None

    def check(self) -> None:
        assert not self.told.keys() & (self.withdrawn.keys() | self._placed.keys())
        assert len(self.told) <= DRAFTS_MAX
