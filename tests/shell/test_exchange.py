"""Do exchanges complete, wait, cancel and tidy up?  Real loopback sockets, control plane in memory."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest
import trio

from p2pgrid.dht.manifest import Disk, Recipe, signed
from p2pgrid.dht.store import Store
from p2pgrid.errors import BadFrame, NoSpace, NotFound, Refused
from p2pgrid.hole_punch.bulk import Link, open_links
from p2pgrid.hole_punch.rates import Limits
from p2pgrid.ids import DAG_CBOR, Cid, PeerId
from p2pgrid.transfer import messages
from p2pgrid.transfer.exchange import Exchange, Progress, open_exchange
from p2pgrid.transfer.messages import (
    Bitfield,
    Frame,
    GetObject,
    Have,
    NoObject,
    Object,
    Open,
    Refuse,
    Request,
)
from p2pgrid.transfer.seed import REQUESTS_MAX, Audience, Seeding
from tests.memory_network import MemoryNetwork, MemoryWorld, open_world
from tests.small_disks import KEY, SmallDisk, small_disk

LOOPBACK = (("127.0.0.1", 0),)


@attrs.frozen
class Node:
    network: MemoryNetwork
    store: Store
    exchange: Exchange

    @property
    def me(self) -> PeerId:
        return self.network.me


@contextlib.asynccontextmanager
async def open_node(world: MemoryWorld, name: str, root: Path) -> AsyncIterator[Node]:
    network = world.join(name)
    with Store(root / name, min_free=0) as store:
        async with open_exchange(
            network, network.index, store, LOOPBACK, rng=random.Random(name)
        ) as exchange:
            yield Node(network, store, exchange)


@contextlib.asynccontextmanager
async def open_nodes(root: Path, *names: str) -> AsyncIterator[list[Node]]:
    with trio.fail_after(30):
        async with open_world() as world, contextlib.AsyncExitStack() as stack:
            yield [await stack.enter_async_context(open_node(world, name, root)) for name in names]


def know(node: Node, *others: Node) -> list[PeerId]:
    for other in others:
        node.network.learn(other.me, other.network.addresses)
    return [other.me for other in others]


def hold(node: Node, disk: SmallDisk, indices: range | None = None) -> None:
    """Have `node` hold the disk, or some of its frames."""
    disk.put_objects(node.store)
    shelf = node.store.begin(disk.datum)
    for index in indices if indices is not None else range(len(disk.frames)):
        shelf.put_frame(index, disk.frames[index])


def is_whole(node: Node, disk: SmallDisk) -> bool:
    shelf = node.store.shelf(disk.pack)
    return shelf is not None and shelf.complete and shelf.read(0, len(disk.plain)) == disk.plain


def link_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("run from link")]


def sockets() -> int:
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    return count


async def test_two_exchanges(tmp_path: Path) -> None:
    disk = small_disk([1, 0, 2, 3, 1, 0, *range(4, 40)], tail=1000)
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        hold(putter, disk)
        reports: list[Progress] = []
        fetched = await worker.exchange.fetch(disk.datum, know(worker, putter), reports.append)
        assert is_whole(worker, disk)
        total = sum(map(len, disk.frames))
        assert fetched.bytes_by_peer == {putter.me: total}
        assert (fetched.local_bytes, fetched.resumed_bytes) == (0, 0)
        assert putter.exchange.served[worker.me] >= total
        assert reports[-1].bytes_done == reports[-1].bytes_total == total
        again = await worker.exchange.fetch(disk.datum, ())
        assert again.bytes_by_peer == {}
        assert again.resumed_bytes == total


async def test_what_is_larger_than_allowed_is_refused_before_its_pages_come(tmp_path: Path) -> None:
    disk = small_disk([1, 2, 3])
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        hold(putter, disk)
        peers, size = know(worker, putter), len(disk.plain)
        with pytest.raises(Refused, match=f"{size} bytes; {size - 1} are allowed"):
            await worker.exchange.fetch(disk.datum, peers, most=size - 1)
        assert worker.store.held() == []
        about = Disk.decode(disk.objects[-1])
        pages = Recipe.decode(worker.store.get_object(about.recipe)).pages
        assert not any(worker.store.has_object(page) for page in pages)
        await worker.exchange.fetch(disk.datum, peers, most=size)
        with pytest.raises(Refused):  # it is here, and yet more than this caller takes
            await worker.exchange.fetch(disk.datum, peers, most=size - 1)


async def test_a_fetch_whose_objects_do_not_fit_ends(tmp_path: Path) -> None:
    disk = small_disk([1, 2, 3])
    async with open_nodes(tmp_path, "putter") as (putter,):
        hold(putter, disk)
        network = putter.network.world.join("worker")
        network.learn(putter.me, putter.network.addresses)
        with Store(tmp_path / "worker", quota=len(disk.objects[-1]) + 100, min_free=0) as store:
            async with open_exchange(network, network.index, store, LOOPBACK) as exchange:
                with pytest.raises(NoSpace):
                    await exchange.fetch(disk.datum, [putter.me])
            assert store.used() <= len(disk.objects[-1]) + 100


async def test_five_fetch_from_each_other_though_told_of_the_putter_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The putter gives each chunk away once: who lacks it must get it from another worker."""
    disk = small_disk(range(1, 121))
    async with open_nodes(tmp_path, "putter", "a", "b", "c", "d") as (putter, *workers):
        hold(putter, disk)
        shelf = putter.store.shelf(disk.pack)
        get_frame, given = shelf.get_frame, set()
        lock = threading.Lock()

        def once(index: int) -> bytes:
            with lock:
                if index in given:
                    raise_not_here(index)
                given.add(index)
            return get_frame(index)

        monkeypatch.setattr(shelf, "get_frame", once)
        fetched = {}

        async def fetch(worker: Node) -> None:
            fetched[worker.me] = await worker.exchange.fetch(disk.datum, know(worker, putter))

        async with trio.open_nursery() as nursery:
            for worker in workers:
                nursery.start_soon(fetch, worker)
        assert all(is_whole(worker, disk) for worker in workers)
        copy = sum(map(len, disk.frames))
        assert sum(f.bytes_by_peer.get(putter.me, 0) for f in fetched.values()) == copy
        assert sum(sum(f.bytes_by_peer.values()) for f in fetched.values()) == 4 * copy


async def test_peers_are_found_in_the_index(tmp_path: Path) -> None:
    disk = small_disk(range(1, 10))
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        hold(putter, disk)
        await putter.network.index.provide(bytes(disk.datum))
        await worker.exchange.fetch(disk.datum)
        assert is_whole(worker, disk)


async def test_what_another_was_just_sent_comes_a_moment_later(tmp_path: Path) -> None:
    """Nothing happens on the link meanwhile: its thread has to look again by itself."""
    disk = small_disk(range(1, 20))
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        hold(putter, disk)
        audience = putter.exchange._audience
        other = audience.turns(disk.pack, len(disk.frames)).join(PeerId("other"))
        other.ask(range(len(disk.frames)))
        while other.next(audience.now()) is not None:
            pass
        fetched = await worker.exchange.fetch(disk.datum, know(worker, putter))
        assert is_whole(worker, disk)
        assert fetched.bytes_by_peer == {putter.me: sum(map(len, disk.frames))}


async def test_what_is_urgent_comes_next(tmp_path: Path) -> None:
    """The sender is slow, and has more in its link than it can take back; three chunks are needed now."""
    disk = small_disk([-seed for seed in range(1, 25)])
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        hold(putter, disk)
        putter.exchange.links.rates.set(Limits(up=4e6))
        came: list[int] = []
        needed: list[int] = []
        before = 0

        def watch(progress: Progress) -> None:
            nonlocal before
            shelf = worker.store.shelf(disk.pack)
            if shelf is None or not shelf.count:
                return
            came.extend(i for i in range(len(disk.frames)) if shelf.holds(i) and i not in came)
            if not needed:
                before = len(came)
                needed.extend([i for i in range(len(disk.frames)) if i not in came][:3])
                worker.exchange.urge(disk.datum, needed)

        await worker.exchange.fetch(disk.datum, know(worker, putter), watch)
        assert is_whole(worker, disk)
        assert putter.exchange.served[worker.me] == sum(map(len, disk.frames)), "and nothing comes twice"
        assert max(map(came.index, needed)) < before + 9, (
            "they come with the next reports, of some chunks each"
        )
        worker.exchange.urge(disk.datum, needed)  # of what is not being fetched: nothing happens


async def test_several_datums_and_two_fetches_of_one_over_one_link(tmp_path: Path) -> None:
    disks = [small_disk(range(i, i + 20)) for i in (1, 101, 201)]
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        for disk in disks:
            hold(putter, disk)
        peers = know(worker, putter)
        async with trio.open_nursery() as nursery:
            for disk in (*disks, disks[0]):
                nursery.start_soon(worker.exchange.fetch, disk.datum, peers)
        assert all(is_whole(worker, disk) for disk in disks)
        assert len(worker.exchange.links.live()) == 1
        assert putter.exchange.served[worker.me] == sum(len(f) for d in disks for f in d.frames)


async def test_two_data_with_one_pack_bring_it_once(tmp_path: Path) -> None:
    """The same disk in another container: two names, one pack, fetched at the same time."""
    disk = small_disk(range(1, 100))
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        hold(putter, disk)
        first = Disk.decode(putter.store.get_object(disk.datum))
        recipe = putter.store.put_object(Recipe("vmdk", False, 1000, ()).encode())
        twin = putter.store.put_object(signed(attrs.evolve(first, recipe=recipe), KEY).encode())
        peers = know(worker, putter)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.exchange.fetch, disk.datum, peers)
            nursery.start_soon(worker.exchange.fetch, twin, peers)
        assert is_whole(worker, disk)
        assert {held.datum for held in worker.store.held()} == {disk.datum, twin}


async def test_a_liar_is_shunned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = small_disk(range(1, 60))
    async with open_nodes(tmp_path, "honest", "liar", "worker") as (honest, liar, worker):
        hold(honest, disk)
        hold(liar, disk)
        token = trio.lowlevel.current_trio_token()
        lied = trio.Event()

        def lie(index: int) -> bytes:
            token.run_sync_soon(lied.set)
            return bytes(len(disk.frames[index]))

        monkeypatch.setattr(liar.store.shelf(disk.pack), "get_frame", lie)
        fetched = []

        async def fetch(peers: list[PeerId]) -> None:
            fetched.append(await worker.exchange.fetch(disk.datum, peers))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, know(worker, liar))
            await lied.wait()
            while any(link.peer == liar.me for link in worker.exchange.links.live()):
                assert worker.store.shelf(disk.pack).count == 0  # alone with a liar, nothing is believed
                await trio.sleep(0.001)
            nursery.start_soon(fetch, know(worker, honest))  # joins the one under way
        assert is_whole(worker, disk)
        assert {peer for f in fetched for peer in f.bytes_by_peer} == {honest.me}
        assert [link.peer for link in worker.exchange.links.live()] == [honest.me]


async def test_a_link_that_is_cut_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = small_disk(range(1, 60))
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        hold(putter, disk)
        shelf = putter.store.shelf(disk.pack)
        get_frame, sent = shelf.get_frame, []

        def cut(index: int) -> bytes:
            sent.append(index)
            if len(sent) in (10, 30):
                for link in putter.exchange.links.live():
                    link.close("cut by the test")
            return get_frame(index)

        monkeypatch.setattr(shelf, "get_frame", cut)
        await worker.exchange.fetch(disk.datum, know(worker, putter))
        assert is_whole(worker, disk)
        assert len(sent) >= 30


async def test_cancelling_leaves_what_came_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(range(1, 60))
    before = sockets()
    token = trio.lowlevel.current_trio_token()
    with trio.CancelScope() as scope:
        async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
            hold(putter, disk)
            shelf = putter.store.shelf(disk.pack)
            get_frame, sent = shelf.get_frame, []

            def slow(index: int) -> bytes:
                sent.append(index)
                if len(sent) == 20:
                    assert link_threads()
                    token.run_sync_soon(scope.cancel)
                if len(sent) >= 20:
                    raise_not_here(index)
                return get_frame(index)

            monkeypatch.setattr(shelf, "get_frame", slow)
            await worker.exchange.fetch(disk.datum, know(worker, putter))
    assert scope.cancelled_caught
    assert link_threads() == []
    assert sockets() == before
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        fetched = await worker.exchange.fetch(disk.datum, know(worker, putter))
        assert is_whole(worker, disk)
        assert fetched.resumed_bytes > 0
        assert fetched.resumed_bytes + sum(fetched.bytes_by_peer.values()) == sum(map(len, disk.frames))


def raise_not_here(index: int) -> None:
    raise NotFound(what=f"chunk {index}")


async def test_a_rotten_chunk_is_fetched_again_and_only_that(tmp_path: Path) -> None:
    disk = small_disk(range(1, 20))
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        hold(putter, disk)
        hold(worker, disk)
        [file] = (tmp_path / "worker").glob("packs/*/frames")
        with file.open("r+b") as frames:
            frames.seek(len(disk.frames[0]) + 5)
            frames.write(b"rot")
        assert worker.store.shelf(disk.pack).verify() == [1]
        fetched = await worker.exchange.fetch(disk.datum, know(worker, putter))
        assert is_whole(worker, disk)
        assert fetched.bytes_by_peer == {putter.me: len(disk.frames[1])}


async def test_a_stall_is_named_while_it_lasts(tmp_path: Path) -> None:
    disk = small_disk(range(1, 20))
    async with open_nodes(tmp_path, "half", "worker") as (half, worker):
        hold(half, disk, range(12))
        named = trio.Event()

        def look(progress: Progress) -> None:
            if progress.unavailable == progress.missing == 7 and progress.stalled_for > 0.2:
                named.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.exchange.fetch, disk.datum, know(worker, half), look)
            with trio.fail_after(10):
                await named.wait()
            for index in range(12, 19):  # the rest turns up at the same peer, unannounced
                half.store.shelf(disk.pack).put_frame(index, disk.frames[index])
            half.exchange.tell(disk.pack, list(range(12, 19)))
        assert is_whole(worker, disk)


async def test_a_full_disk_ends_the_fetch_with_what_the_store_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(range(1, 20))
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        hold(putter, disk)
        hold(worker, disk, range(3))

        def full(index: int, frame: bytes, *, sync: bool) -> None:
            raise NoSpace(wanted=1, free=0, where="here")

        monkeypatch.setattr(worker.store.shelf(disk.pack), "put_frame", full)
        with pytest.raises(NoSpace):
            await worker.exchange.fetch(disk.datum, know(worker, putter))


class Rogue:
    """A member that says what it likes; a receiver."""

    def __init__(self) -> None:
        self.token = trio.lowlevel.current_trio_token()
        self.heard, self.messages = trio.open_memory_channel[messages.Message | str](100_000)

    def __call__(self, link: Link) -> Rogue:
        return self

    def received(self, message: memoryview) -> None:
        self.token.run_sync_soon(self.heard.send_nowait, messages.decode(bytes(message)))

    def drained(self) -> None:
        pass

    def left(self, why: str) -> None:
        self.token.run_sync_soon(self.heard.send_nowait, why)


async def test_what_a_rogue_says_is_refused_or_ends_its_link_only(tmp_path: Path) -> None:
    disk = small_disk(range(1, 20))
    with trio.fail_after(30):
        async with open_world() as world, open_node(world, "node", tmp_path) as node:
            hold(node, disk)
            network, rogue = world.join("rogue"), Rogue()
            network.learn(node.me, node.network.addresses)
            async with open_links(network, LOOPBACK, rogue) as links:

                async def say(*said: messages.Message | bytes) -> messages.Message | str:
                    link = await links.link(node.me)
                    for one in said:
                        link.send(*(messages.encode(one) if not isinstance(one, bytes) else (one,)))
                    return await rogue.messages.receive()

                nothing = Cid(DAG_CBOR, bytes(32))
                assert await say(Request(7, (3,))) == Refuse(7, 3)
                assert await say(GetObject(nothing)) == NoObject(nothing)
                assert isinstance(await say(Open(1, disk.pack)), Bitfield)
                assert await say(Request(1, (2**32 - 1,))) == Refuse(1, 2**32 - 1)
                assert await say(Open(2, nothing), Request(2, (0,))) == Refuse(2, 0)
                frame = await say(
                    Frame(3, 0, b"unasked"), Bitfield(3, 0, b"x"), Have(3, (1,)), Request(1, (0,))
                )
                assert frame == Frame(1, 0, disk.frames[0])
                assert isinstance(await say(Open(1, nothing)), str)  # the link ended
                assert isinstance(await say(b"\x63noise"), str)
                assert await say(GetObject(disk.datum)) == Object(disk.datum, disk.objects[-1])


def test_more_requests_than_anyone_needs_are_a_bad_frame(tmp_path: Path) -> None:
    with Store(tmp_path, min_free=0) as store:
        link: Link = object()  # type: ignore[assignment]  # nothing is sent before the link has room
        seeding = Seeding(link, store, Audience(), lambda *opened: None, lambda sent: None)
        for topic in range(REQUESTS_MAX // messages.INDICES_MAX):
            seeding.take(Request(topic, tuple(range(messages.INDICES_MAX))))
        seeding.take(Request(0, (5,)))  # asked for already
        with pytest.raises(BadFrame):
            seeding.take(Request(9, (5,)))
