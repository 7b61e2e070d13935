"""Make one node out of real rooms and two scripted ones: what peers bring, what the coordinator says.

The store, the results and the trees are real; nothing listens, and no daemon runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import trio

from p2pgrid.dht.store import Store
from p2pgrid.ids import Cid, PeerId
from p2pgrid.node.config import Config
from p2pgrid.node.identity import Identity
from p2pgrid.node.node import Node
from p2pgrid.node.worker import sweep
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.job import Outcome
from p2pgrid.transfer.exchange import Fetched
from tests.memory_network import MemoryWorld, open_world


@attrs.define
class Peers:
    """What would be an exchange: `bring` has a datum complete in the store, or raises, or waits."""

    bring: Callable[[Cid], Any] | None = None
    asked: list[Cid] = attrs.field(factory=list)
    most: int | None = None
    """The bound of the last fetch."""
    links: Any = attrs.field(factory=lambda: SimpleNamespace(addresses=[]))

    async def fetch(
        self,
        datum: Cid,
        peers: Iterable[PeerId],
        progress: Any,
        most: int | None,
        origins: Sequence[str] = (),
    ) -> Fetched:
        self.asked.append(datum)
        self.most = most
        if self.bring is None:
            await trio.sleep_forever()
        else:
            self.bring(datum)
        return Fetched({}, 0, 0, 0.0)

    def learn(self, peer: PeerId, addresses: Iterable[str]) -> None:
        """Nobody is dialled."""

    def settle(self) -> None:
        """Nothing is followed here."""


@attrs.define
class Calls:
    """What would be the coordinator: grants what lies in `grants`, and answers reports with `answer`."""

    grants: list[m.Grant] = attrs.field(factory=list)
    answer: Callable[[], Any] = lambda: None
    reports: list[Outcome] = attrs.field(factory=list)
    collected: list[str] = attrs.field(factory=list)
    renewed: Callable[[], Any] = lambda: None
    known: list[m.DatumRecord] = attrs.field(factory=list)
    put_too: Callable[[m.DatumRecord], Any] = lambda record: None

    async def pull(self, free: m.Capacity, working: tuple[str, ...], patience: float) -> m.Grant | None:
        if not self.grants:
            await trio.sleep_forever()
        return self.grants.pop(0)

    async def renew(self, task: str, epoch: int, note: str) -> None:
        await trio.lowlevel.checkpoint()
        self.renewed()

    async def report(self, task: str, epoch: int, outcome: Outcome) -> None:
        await trio.lowlevel.checkpoint()
        self.reports.append(outcome)
        self.answer()

    async def collect(self, task: str, epoch: int) -> None:
        await trio.lowlevel.checkpoint()
        self.collected.append(task)

    async def put(self, record: m.DatumRecord, draft: str | None = None) -> None:
        await trio.lowlevel.checkpoint()
        self.known.append(record)
        self.put_too(record)

    async def providers(self, datum: str) -> tuple[m.Provider, ...]:
        await trio.lowlevel.checkpoint()
        return ()


@attrs.frozen
class Lone:
    node: Node
    peers: Peers
    calls: Calls
    world: MemoryWorld


@contextlib.asynccontextmanager
async def open_lone(home: Path) -> AsyncIterator[Lone]:
    """A worker and submitter of nobody's grid."""
    sweep(home)
    config = Config(roles=("worker", "submitter"), name="lone")
    peers, calls = Peers(), Calls()
    async with open_world() as world:
        network = world.join("lone")
        with Store(home / "store") as store:
            exchange: Any = peers
            coordinator: Any = calls
            index: Any = network.index
            node = Node(
                home, config, Identity.load_or_create(home), network, index, store, exchange, coordinator,
                PeerId("grid"), config.roles, trio.Event(),
            )  # fmt: skip
            yield Lone(node, peers, calls, world)
