"""Let others fetch a disk while it is being put, and follow what others put.

put:     press ──Grown──> our followers (exchange)      first one ──> coordinator, again and again
                                                        no disk comes of it ──> coordinator: over
worker:  ordered ──> follow ──> the disk is ordered: its pack takes over what came
                      └──> told to drop it, or ordered no more for `GRACE` s: gone
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable

import structlog
import trio

from p2pgrid.dht.drafting import Grown
from p2pgrid.dht.manifest import CHUNK_SIZE
from p2pgrid.errors import GridError, VerificationFailed
from p2pgrid.ids import Cid, PeerId
from p2pgrid.node.node import Node
from p2pgrid.scheduler import messages as m

log = structlog.get_logger()

TELL_PERIOD = 10.0
"""Seconds between two words to the coordinator, which forgets after a minute."""
GRACE = 60.0
"""Seconds for which a draft is kept that is ordered no more: the coordinator may have been restarted."""
FAREWELL = 5.0
"""Seconds to say that no disk comes of it."""


class Telling:
    """What a put tells of its drafts.  `told` may be called in any thread."""

    def __init__(self, node: Node, replica: int) -> None:
        self.series: Cid | None = None
        self._node = node
        self._replica = replica
        self._most = 0
        self._token = trio.lowlevel.current_trio_token()
        self._begun = trio.Event()

    def told(self, grown: Grown) -> None:
        self._token.run_sync_soon(self._grown, grown)

    def _grown(self, grown: Grown) -> None:
        self.series, self._most = grown.series, grown.most
        self._begun.set()
        self._node.exchange.tell(grown.series, list(grown.indices))
        self._node.exchange.grown(grown.series)

    @property
    def name(self) -> str | None:
        """Of the series; None where nothing was told."""
        return None if self.series is None else str(self.series)

    async def keep(self) -> None:
        """Tell the coordinator, for ever."""
        await self._begun.wait()
        while True:
            try:
                await self._node.coordinator.draft(str(self.series), self._most * CHUNK_SIZE, self._replica)
            except GridError as wrong:  # it is only seeded later, then
                log.info("nobody is told of the disk before it is put", why=str(wrong))
            await trio.sleep(TELL_PERIOD)

    async def withdraw(self) -> None:
        """No disk comes of it.  A coordinator that is away forgets by itself."""
        if self.series is not None:
            with trio.move_on_after(FAREWELL) as farewell, contextlib.suppress(GridError):
                farewell.shield = True
                await self._node.coordinator.draft(str(self.series), over=True)


@contextlib.asynccontextmanager
async def telling(node: Node, replica: int) -> AsyncIterator[Telling]:
    """Tell of drafts inside; whoever leaves by an error, or is cancelled, withdraws them."""
    told = Telling(node, replica)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(told.keep)
            yield told
            nursery.cancel_scope.cancel()
    except BaseException:
        await told.withdraw()
        raise


async def follow(node: Node, wanted: m.Wanted) -> None:
    """Follow what was ordered until it is here no more.  Raises what makes it impossible."""
    for provider in wanted.peers:
        node.exchange.learn(PeerId(provider.peer), provider.addresses)
    names = [PeerId(provider.peer) for provider in wanted.peers]
    try:
        node.received.update(await node.exchange.follow(Cid.parse(wanted.datum), names))
    except VerificationFailed:
        await node.drop(wanted.datum)
        raise


async def let_go(node: Node, hold: Iterable[m.Wanted]) -> None:
    """Drop the drafts that have been ordered no more for a while.

    Not while a disk that is ordered was not begun: it may be the one that takes a draft over.
    """
    now, ordered = trio.current_time(), {wanted.datum for wanted in hold}
    others = [Cid.parse(w.datum) for w in hold if w.kind == "disk"]
    awaited = not all(map(node.store.begun, others))
    followed = {str(series) for series in node.store.drafts.followed()} - ordered
    node.unordered = {series: node.unordered.get(series, now) for series in followed}
    for series, since in node.unordered.items():
        if not awaited and now - since > GRACE:
            await node.drop(series)
