"""Bring the manifest objects of a datum, each by its name, from whoever has them.

missing ──ask a peer──came──> kept ──> those that it names are missing next, until none are
   ^         └─ not there, nothing in time, or another's bytes ─┐
   └── another peer; when all were asked: an origin, or wait for news of a peer ──┘
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import trio

from p2pgrid.dht.manifest import Content, decode_datum
from p2pgrid.dht.store import Store
from p2pgrid.errors import BadObject, GridError, NotFound, Refused, WorldError
from p2pgrid.ids import Cid
from p2pgrid.transfer.company import SEARCH, Company
from p2pgrid.transfer.lastresort import LastResort
from p2pgrid.transfer.session import Session

OBJECTS_AT_ONCE = 8
OBJECT_PATIENCE = 15.0
"""Seconds for an object (at most 1 MiB) before it is asked of another peer."""


class Objects:
    """The objects of one datum.  `came` hears of each one, `fail` what the store says when it is full."""

    def __init__(
        self,
        datum: Cid,
        most: int | None,
        store: Store,
        company: Company,
        resort: LastResort,
        rng: random.Random,
        came: Callable[[], None],
        fail: Callable[[GridError], None],
    ) -> None:
        self._datum = datum
        self._most = most
        self._store = store
        self._company = company
        self._resort = resort
        self._rng = rng
        self._came = came
        self._fail = fail

    async def missing(self) -> list[Cid]:
        """The objects to ask for next.  Raises `Refused` as soon as the size is known and too large."""
        return await trio.to_thread.run_sync(self._missing)

    async def bring(self) -> None:
        """Until none is missing.  Raises `BadObject` where they do not fit together, and `Refused`."""
        limit = trio.CapacityLimiter(OBJECTS_AT_ONCE)
        while missing := await self.missing():
            async with trio.open_nursery() as nursery:
                for cid in missing:
                    nursery.start_soon(self._bring, cid, limit)

    def _missing(self) -> list[Cid]:
        missing = self._store.missing_objects(self._datum)
        if self._most is not None:
            with contextlib.suppress(NotFound):
                top = decode_datum(self._store.get_object(self._datum))
                size = Content.decode(self._store.get_object(top.content)).size if top.content else 0
                if size > self._most:
                    raise Refused(why=f"{self._datum} is {size} bytes; {self._most} are allowed here")
        return missing

    async def _bring(self, cid: Cid, limit: trio.CapacityLimiter) -> None:
        tried: set[Session] = set()
        while True:
            sessions = [s for s in self._company.sessions() if s not in tried]
            if not sessions:
                tried.clear()
                if (data := await self._resort.get_object(cid)) is not None:
                    return await self._keep(data)
                with trio.move_on_after(self._resort.wait(SEARCH)):
                    await self._company.news.wait()
                continue
            session = self._rng.choice(sessions)
            tried.add(session)
            async with limit:
                with trio.move_on_after(OBJECT_PATIENCE):
                    try:
                        data = await session.get_object(cid)
                    except BadObject:
                        self._company.shun(session.peer)
                        continue
                    if data is not None:
                        return await self._keep(data)

    async def _keep(self, data: bytes) -> None:
        try:
            await trio.to_thread.run_sync(self._store.put_object, data)
        except WorldError as full:
            self._fail(full)
        self._came()
