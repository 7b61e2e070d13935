"""Know who belongs to this node's grid: its own membership, whose are void, and what time it is.

What the greeting of a link asks is answered from here, at once, whether the coordinator is there or not; so
all of it is kept in the node's home.

    welcome, orders, revocations ──> Standing ──> what we show, and why somebody is not welcome
                                        └──> membership.json, at each change that counts

The grid's time is the coordinator's: as it last told, and counted on by a clock that neither steps nor
stops while the machine sleeps.  A new life begins with the own wall clock and the difference it last had,
and never before the time last written down, until the coordinator is heard.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import msgspec
import structlog
import trio

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.membership import Membership, Verify, read, refusal
from p2pgrid.ids import PeerId
from p2pgrid.node.config import MEMBERSHIP
from p2pgrid.scheduler import messages as m

log = structlog.get_logger()

STEP = 30.0
"""Seconds by which the wall clock may come to differ otherwise before that is written down."""
NOTED = 3600.0
"""Seconds after which the time is written down in any case."""
HEARD_MAX = 8192
"""Peers whose memberships are remembered: many more than there can be links."""


class _Kept(msgspec.Struct):
    grid: str
    membership: bytes = b""
    revision: str = ""
    revoked: dict[str, float] = {}
    now: float = 0.0
    ahead: float = 0.0
    """The grid's time less the wall clock's."""


def _steady() -> float:
    """Seconds since some moment, those included for which the machine slept."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


@attrs.define(eq=False)
class Standing:
    """See above; made anew or from what `home` keeps by `load`."""

    home: Path
    me: PeerId
    grid: PeerId
    verify: Verify
    steady: Callable[[], float] = _steady
    wall: Callable[[], float] = time.time
    shown: bytes = b""
    """What we show."""
    mine: Membership | None = None
    revision: str = ""
    """Of `revoked`, as the coordinator names it."""
    revoked: dict[PeerId, float] = attrs.field(factory=dict)
    changes: int = 0
    """How often something was learned; see `beyond`."""
    bars: list[Callable[[PeerId, str], None]] = attrs.field(factory=list)
    """Called with each peer that is no member any more, and why; in trio's thread."""
    _learned: bool = False
    """What is not kept yet."""
    _kept: _Kept = attrs.field(factory=lambda: _Kept(""))
    _told: tuple[float, float] = (0.0, 0.0)
    """The grid's time, and when that was by the steady clock."""
    _heard: dict[PeerId, Membership] = attrs.field(factory=dict)
    _changed: trio.Event = attrs.field(factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        self._told = self.wall(), self.steady()

    @classmethod
    def load(
        cls,
        home: Path,
        me: PeerId,
        grid: PeerId,
        verify: Verify,
        steady: Callable[[], float] = _steady,
        wall: Callable[[], float] = time.time,
    ) -> Standing:
        """As it was kept; what cannot be read, or is of another grid, is asked for anew."""
        standing = cls(home, me, grid, verify, steady, wall)
        try:
            kept = msgspec.json.decode((home / MEMBERSHIP).read_bytes(), type=_Kept)
        except FileNotFoundError:
            return standing
        except (OSError, msgspec.MsgspecError, ValueError) as broken:
            log.warning("what was kept of the membership cannot be read", why=str(broken))
            return standing
        if kept.grid == grid:
            standing._kept = kept
            standing._told = max(kept.now, wall() + kept.ahead), steady()
            standing.revision = kept.revision
            standing.revoked = {PeerId(peer): at for peer, at in kept.revoked.items()}
            standing._take(kept.membership)
        return standing

    def save(self) -> None:
        """Keep all of it, whole or not at all.  Raises `OSError`."""
        self._learned, now = False, self.now()
        revoked: dict[str, float] = dict(self.revoked.items())
        kept = _Kept(self.grid, self.shown, self.revision, revoked, now, now - self.wall())
        draft = self.home / f"{MEMBERSHIP}.tmp"
        try:
            with draft.open("wb") as file:
                file.write(msgspec.json.encode(kept))
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, self.home / MEMBERSHIP)
        except OSError:
            self._learned = True
            raise
        self._kept = kept

    # --- the time ---------------------------------------------------------------------------

    def now(self) -> float:
        """The grid's time, as far as we know."""
        told, at = self._told
        return told + self.steady() - at

    def tell(self, now: float) -> None:
        """The coordinator says what time it is."""
        if now <= 0.0:
            return
        self._told = now, self.steady()
        self._change()

    @property
    def unsaved(self) -> bool:
        """Whether what is kept would mislead a new life."""
        now = self.now()
        stepped = abs(now - self.wall() - self._kept.ahead) > STEP
        return self._learned or stepped or abs(now - self._kept.now) > NOTED

    # --- what the coordinator grants and takes ------------------------------------------------

    def welcome(self, welcome: m.Welcome) -> None:
        """We are a member, and can show it from now on."""
        self.tell(welcome.now)
        if welcome.membership and self.me != self.grid:
            self._take(welcome.membership)
            self._learned = True
        self._change()

    def revoke(self, listed: m.RevocationList) -> None:
        """Whose memberships are void: these and no others."""
        self.revision = listed.revision
        self.revoked = {PeerId(row.peer): row.at for row in listed.revocations}
        self._learned = True
        self._change()

    def _take(self, shown: bytes) -> None:
        try:
            mine = read(shown, self.grid, self.verify)
        except BadFrame as bad:
            log.warning("the membership is of no use", why=bad.why)
            return
        if mine.peer == self.me:
            self.shown, self.mine = shown, mine

    @property
    def renewal(self) -> float:
        """When to ask for the next membership, in the grid's time."""
        if self.me == self.grid:
            return math.inf
        if self.mine is None or self.mine.issued <= self.revoked.get(self.me, -1.0):
            return -math.inf
        return self.mine.renewal

    # --- others -------------------------------------------------------------------------------

    def allow(self, peer: PeerId, shown: bytes) -> str:
        """Why there is no link with `peer`, which has proved its key; empty: it is welcome."""
        why = refusal(shown, peer, self.grid, self.now(), self.revoked, self.verify)
        if not why and peer != self.grid:
            self._heard.pop(peer, None)
            self._heard[peer] = read(shown, self.grid, self.verify)
            while len(self._heard) > HEARD_MAX:
                del self._heard[next(iter(self._heard))]
        return why

    def barred(self, peer: PeerId) -> str:
        """Why `peer` is no member by what it last showed; empty: it is one.  Any thread may ask."""
        heard = self._heard.get(peer)
        if peer == self.grid:
            return ""
        if heard is None:
            return "it has shown no membership"
        if heard.issued <= self.revoked.get(peer, -1.0):
            return "its membership was revoked"
        return "its membership has expired" if self.now() >= heard.ends else ""

    def over(self) -> list[tuple[PeerId, str]]:
        """Whose membership is over since the last look, and why; they have shown none from now on."""
        over = [(peer, why) for peer in self._heard if (why := self.barred(peer))]
        for peer, _ in over:
            del self._heard[peer]
        return over

    # --- who waits for news -------------------------------------------------------------------

    async def beyond(self, changes: int) -> None:
        """Wait until there were more changes than that."""
        while self.changes <= changes:
            await self._changed.wait()

    def _change(self) -> None:
        self.changes += 1
        self._changed.set()
        self._changed = trio.Event()
