"""Does a grid have a disk nearly whole before its put ends, and nothing of one that came to nothing?

A real coordinator, real stores and exchanges over loopback; control plane in memory.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from p2pgrid.dht import drafting
from p2pgrid.dht.manifest import CHUNK_SIZE
from p2pgrid.dht.store import Store
from p2pgrid.errors import NotAuthorised
from p2pgrid.ids import Cid
from p2pgrid.node import disks, drafts, holdings
from p2pgrid.node.config import Config
from p2pgrid.node.identity import Identity
from p2pgrid.node.node import Node
from p2pgrid.node.worker import sweep
from p2pgrid.scheduler import drafts as drafts_module
from p2pgrid.scheduler import schedule
from p2pgrid.scheduler.client import Calls, Coordinator
from p2pgrid.scheduler.coordinator import Desk, serve_coordinator
from p2pgrid.scheduler.events import Rules
from p2pgrid.transfer.exchange import open_exchange
from tests.memory_ledger import MemoryLedger
from tests.memory_network import MemoryNetwork, MemoryWorld, open_world
from tests.shell.test_coordinator import verify
from tests.small_disks import chunk

POSITIONS = 10 * 16
PLAIN = b"".join(chunk(-1 - at) for at in range(POSITIONS))
LAST = POSITIONS - 16
"""Frames that are told of before the press is held up."""


@attrs.define
class Gate:
    """Holds the press up once `LAST` frames were told of."""

    go_on: threading.Event = attrs.field(factory=threading.Event)
    reached: threading.Event = attrs.field(factory=threading.Event)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate, wrote = Gate(), drafting.Drafting.wrote

    def held(self: drafting.Drafting, folder: Path, lengths: Any, *about: Any) -> None:
        wrote(self, folder, lengths, *about)
        if len(lengths) >= LAST and not gate.go_on.is_set():
            gate.reached.set()
            gate.go_on.wait()

    monkeypatch.setattr(drafting, "PERIOD", 0.0)
    monkeypatch.setattr(drafting, "STEP", 1 << 20)
    monkeypatch.setattr(drafting.Drafting, "wrote", held)
    return gate


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "disk.raw"
    path.write_bytes(PLAIN)
    return path


@attrs.define
class Grid:
    world: MemoryWorld
    root: Path
    stack: contextlib.AsyncExitStack
    putter: Node = attrs.field(init=False)

    async def node(self, name: str, calls: Callable[[MemoryNetwork], Calls], *roles: str) -> Node:
        home, network = self.root / name, self.world.nodes.get(name) or self.world.join(name)  # type: ignore[call-overload]
        sweep(home)
        store = self.stack.enter_context(Store(home / "store", min_free=0))
        exchange = await self.stack.enter_async_context(
            open_exchange(network, network.index, store, [("127.0.0.1", 0)])
        )
        identity: Any = Identity.load_or_create(home)
        some: Any = network
        return Node(home, Config(roles=roles, name=name), identity, some, some.index, store, exchange,
                    calls(network), self.world.nodes["owner"].me, roles, trio.Event())  # type: ignore[index]  # fmt: skip

    async def worker(self, name: str) -> Node:
        owner = self.world.nodes["owner"]  # type: ignore[index]

        def calls(network: MemoryNetwork) -> Calls:
            network.learn(owner.me, owner.addresses)
            return Coordinator(network, owner.me)

        node = await self.node(name, calls, "worker")
        await node.coordinator.join(f"worker:{name}:", name, (), tuple(node.network.addresses))
        return node

    async def put(self, image: Path, replica: int) -> dict[str, Any]:
        async def quiet(event: dict[str, Any]) -> None:
            await trio.lowlevel.checkpoint()

        made: dict[str, Any] = await disks.put(self.putter, {"path": str(image), "replica": replica}, quiet)
        return made


@contextlib.asynccontextmanager
async def open_grid(root: Path) -> AsyncIterator[Grid]:
    with trio.fail_after(60):
        async with open_world() as world, contextlib.AsyncExitStack() as stack:
            owner = world.join("owner")
            serve = partial(serve_coordinator, owner, MemoryLedger(), verify, owner=owner.me, rules=Rules())
            desk: Desk = await world.nursery.start(serve)
            grid = Grid(world, root, stack)
            grid.putter = await grid.node("owner", lambda _: desk.local(owner.me), "submitter")
            yield grid


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  (links bring it, in threads of their own)
        await trio.sleep(0.005)


def followed(node: Node) -> int:
    """Frames that are here of the one series that is followed."""
    series = node.store.drafts.followed()
    shelf = node.store.drafts.get(series[0]) if series else None
    return 0 if shelf is None else shelf.count


def left(node: Node) -> list[str]:
    folders = (node.store.root / "tmp", node.store.root / "packs", node.store.root / "datums")
    return [path.name for folder in folders for path in folder.iterdir()]


async def test_workers_have_nearly_all_when_the_put_ends_and_the_rest_at_once(
    gate: Gate, image: Path, tmp_path: Path
) -> None:
    async with open_grid(tmp_path) as grid:
        workers = [await grid.worker(name) for name in ("ann", "bob")]
        async with trio.open_nursery() as nursery:
            for node in (grid.putter, *workers):
                nursery.start_soon(holdings.keep_holding, node)
            made: dict[str, Any] = {}

            async def put() -> None:
                made.update(await grid.put(image, -1))

            nursery.start_soon(put)
            await until(lambda: all(followed(worker) == LAST for worker in workers))
            assert gate.reached.is_set()
            assert not made
            gate.go_on.set()
            await until(lambda: bool(made) and all(worker.complete(made["disk"]) for worker in workers))
            for worker in workers:
                shelf = worker.store.begin(Cid.parse(made["disk"]))
                assert shelf.read(0, POSITIONS * CHUNK_SIZE) == PLAIN
                assert worker.store.drafts.followed() == []
                assert worker.store.used() == grid.putter.store.used()
                assert list((worker.store.root / "tmp").iterdir()) == []
                assert worker.troubles == {}
            await until(lambda: all(worker.fetching == set() for worker in workers))
            brought = sum(sum(worker.received.values()) for worker in workers)
            assert brought == 2 * made["wire_bytes"], "nothing came twice"
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("dies", [False, True])
async def test_nothing_is_left_of_a_put_that_came_to_nothing(
    dies: bool, gate: Gate, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was interrupted, or its daemon died and never said a word again."""
    if dies:
        for module in (drafts_module, schedule):
            monkeypatch.setattr(module, "TTL", 0.5)

        async def mute(self: drafts.Telling) -> None:
            await trio.lowlevel.checkpoint()

        monkeypatch.setattr(drafts.Telling, "withdraw", mute)
        monkeypatch.setattr(drafts, "TELL_PERIOD", 0.1)
    async with open_grid(tmp_path) as grid:
        worker = await grid.worker("ann")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(holdings.keep_holding, worker)
            putting = trio.CancelScope()

            async def put() -> None:
                with putting:
                    await grid.put(image, -1)

            nursery.start_soon(put)
            await until(lambda: followed(worker) == LAST)
            putting.cancel()
            gate.go_on.set()
            await until(lambda: left(worker) == [] and left(grid.putter) == [])
            await until(lambda: worker.fetching == set())
            assert worker.store.drafts.followed() == []
            assert worker.store.used() == 0
            nursery.cancel_scope.cancel()


async def test_a_worker_that_slept_while_the_put_ended_keeps_what_it_has(
    gate: Gate, image: Path, tmp_path: Path
) -> None:
    async with open_grid(tmp_path) as grid:
        worker = await grid.worker("ann")
        async with trio.open_nursery() as nursery:
            asleep = trio.CancelScope()

            async def hold() -> None:
                with asleep:
                    await holdings.keep_holding(worker)
                worker.fetching.clear()

            nursery.start_soon(hold)
            made: dict[str, Any] = {}

            async def put() -> None:
                made.update(await grid.put(image, 2))

            nursery.start_soon(put)
            await until(lambda: followed(worker) == LAST)
            growing = worker.store.drafts.get(worker.store.drafts.followed()[0])
            assert growing is not None
            had = growing.held_bytes()
            asleep.cancel()
            gate.go_on.set()
            await until(lambda: bool(made))
            assert followed(worker) == LAST
            worker.received.clear()
            nursery.start_soon(holdings.keep_holding, worker)
            await until(lambda: worker.complete(made["disk"]))
            await until(lambda: bool(worker.received))
            assert sum(worker.received.values()) == made["wire_bytes"] - had
            assert worker.store.drafts.followed() == []
            nursery.cancel_scope.cancel()


async def test_a_stranger_is_not_heard(image: Path, tmp_path: Path) -> None:
    async with open_grid(tmp_path) as grid:
        worker = await grid.worker("ann")
        with pytest.raises(NotAuthorised):
            await worker.coordinator.draft(str(Cid(0x71, bytes(32))), 1, 1)
