"""Do workers that have a disk's parent fetch what is new, and the others all of it, from each other?"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio
from nacl.signing import SigningKey

from p2pgrid.errors import NotFound, VerificationFailed
from p2pgrid.transfer.exchange import Progress
from tests.shell.test_exchange import Node, know, open_nodes
from tests.small_disks import SmallDisk, changed, chunk, small_delta, small_disk

SEEDS = [*range(1, 30), 0, 0, *range(30, 60)]
OLD = small_disk(SEEDS)
NEW = small_delta(OLD, [chunk(0) if s == 0 else changed(chunk(s), s) if s % 3 else chunk(s) for s in SEEDS])
NEXT = small_delta(OLD, [changed(chunk(s), 100 + s) if s in (5, 9) else chunk(s) for s in SEEDS])
OTHER = SigningKey(bytes(32))


def size(disk: SmallDisk) -> int:
    return sum(map(len, disk.frames))


def hold(node: Node, *disks: SmallDisk) -> None:
    """Have `node` hold the disks, parents first."""
    for disk in disks:
        disk.put_objects(node.store)
        shelf = node.store.begin(disk.datum)
        for index, frame in enumerate(disk.frames):
            if frame and not shelf.holds(index):
                shelf.put_frame(index, frame)


def is_whole(node: Node, disk: SmallDisk) -> bool:
    shelf = node.store.shelf(disk.pack)
    return shelf is not None and shelf.complete and shelf.read(0, len(disk.plain)) == disk.plain


async def test_who_has_the_parent_gets_what_is_new(tmp_path: Path) -> None:
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        hold(putter, OLD, NEW)
        hold(worker, OLD)
        reports: list[Progress] = []
        fetched = await worker.exchange.fetch(NEW.datum, know(worker, putter), reports.append)
        assert is_whole(worker, NEW)
        assert fetched.bytes_by_peer == {putter.me: size(NEW)}
        assert (fetched.local_bytes, fetched.resumed_bytes) == (0, 0)
        assert reports[-1].bytes_done == reports[-1].bytes_total == size(NEW)


async def test_who_has_nothing_gets_the_parent_first(tmp_path: Path) -> None:
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        hold(putter, OLD, NEW)
        reports: list[Progress] = []
        fetched = await worker.exchange.fetch(NEW.datum, know(worker, putter), reports.append)
        assert is_whole(worker, NEW)
        assert is_whole(worker, OLD)
        assert [held.datum for held in worker.store.held()] == [NEW.datum]
        both = size(OLD) + size(NEW)
        assert fetched.bytes_by_peer == {putter.me: both}
        assert reports[-1].bytes_done == reports[-1].bytes_total == both
        assert reports[-1].missing == 0
        again = await worker.exchange.fetch(OLD.datum, [putter.me])  # its recipe and itself
        assert again.bytes_by_peer == {}


async def test_the_same_parent_of_another_signer_will_do(tmp_path: Path) -> None:
    async with open_nodes(tmp_path, "putter", "worker", "last") as (putter, worker, last):
        hold(putter, OLD, NEW)
        hold(worker, small_disk(SEEDS, key=OTHER))
        fetched = await worker.exchange.fetch(NEW.datum, know(worker, putter))
        assert fetched.bytes_by_peer == {putter.me: size(NEW)}
        assert is_whole(worker, NEW)
        hold(last, OLD)  # and what came is passed on
        fetched = await last.exchange.fetch(NEW.datum, know(last, worker))
        assert fetched.bytes_by_peer == {worker.me: size(NEW)}
        assert is_whole(last, NEW)


@pytest.mark.parametrize("have", ["all", "none", "some"])
async def test_workers_that_update_at_once_serve_each_other(
    have: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The putter gives each frame away once: who lacks it must get it from another worker."""
    async with open_nodes(tmp_path, "putter", "a", "b", "c") as (putter, *workers):
        hold(putter, OLD, NEW)
        top = putter.store.shelf(NEW.pack)
        assert top is not None
        lock = threading.Lock()
        for shelf in top.parts:
            get_frame, given = shelf.get_frame, set()

            def once(index: int, get_frame=get_frame, given=given, shelf=shelf) -> bytes:
                with lock:
                    if index in given:
                        raise NotFound(what=f"chunk {index} of pack {shelf.pack}")
                    given.add(index)
                return get_frame(index)

            monkeypatch.setattr(shelf, "get_frame", once)
        holders = {"all": workers, "none": [], "some": workers[:1]}[have]
        for worker in holders:
            hold(worker, OLD)
        fetched = {}

        async def fetch(worker: Node) -> None:
            # Who is done has closed the pack, and only the index still tells of it.
            peers = know(worker, putter, *(other for other in workers if other is not worker))
            fetched[worker.me] = await worker.exchange.fetch(NEW.datum, peers)

        async with trio.open_nursery() as nursery:
            for worker in workers:
                nursery.start_soon(fetch, worker)
        assert all(is_whole(worker, NEW) for worker in workers)
        for worker in workers:
            wanted = size(NEW) + (0 if worker in holders else size(OLD))
            assert sum(fetched[worker.me].bytes_by_peer.values()) == wanted
        given = sum(f.bytes_by_peer.get(putter.me, 0) for f in fetched.values())
        assert given <= size(NEW) + (size(OLD) if len(holders) < 3 else 0)


@pytest.mark.parametrize("part", [0, 1])
async def test_a_fetch_goes_on_where_it_was_left(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled amid the parent, and amid the delta."""
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        hold(putter, OLD, NEW)
        peers, enough = know(worker, putter), trio.Event()
        top = putter.store.shelf(NEW.pack)
        assert top is not None
        shelf = top.parts[part]
        get_frame, sent = shelf.get_frame, []

        def few(index: int) -> bytes:
            if len(sent) == 4:
                raise NotFound(what=f"chunk {index}")
            sent.append(index)
            return get_frame(index)

        monkeypatch.setattr(shelf, "get_frame", few)

        def look(progress: Progress) -> None:
            begun = worker.store.shelf(NEW.pack)
            if begun is not None and sum(begun.parts[part].holds(i) for i in sent) == 4:
                enough.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.exchange.fetch, NEW.datum, peers, look)
            await enough.wait()
            nursery.cancel_scope.cancel()
        begun = worker.store.shelf(NEW.pack)
        assert begun is not None
        monkeypatch.setattr(shelf, "get_frame", get_frame)
        here = sum(len(f) for i, f in enumerate((OLD, NEW)[part].frames) if begun.parts[part].holds(i))
        fetched = await worker.exchange.fetch(NEW.datum, peers)
        assert is_whole(worker, NEW)
        rest = size(NEW) - here if part else size(OLD) + size(NEW) - here
        assert fetched.bytes_by_peer == {putter.me: rest}
        assert fetched.resumed_bytes == here


async def test_three_data_on_one_parent_come_at_once(tmp_path: Path) -> None:
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        hold(putter, OLD, NEW, NEXT)
        peers = know(worker, putter)
        async with trio.open_nursery() as nursery:
            for disk in (NEW, NEXT, OLD):
                nursery.start_soon(worker.exchange.fetch, disk.datum, peers)
        assert all(is_whole(worker, disk) for disk in (OLD, NEW, NEXT))


async def test_a_chunk_of_the_parent_that_rotted_comes_again(tmp_path: Path) -> None:
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        hold(putter, OLD, NEW)
        hold(worker, OLD, NEW)
        shelf = worker.store.shelf(OLD.pack)
        assert shelf is not None
        path = worker.store.root / "packs" / str(OLD.pack) / "frames"
        with path.open("r+b") as file:
            file.seek(shelf.frames.offsets()[7] + 30)
            file.write(b"rot")
        assert shelf.verify() == [7]
        assert not worker.store.complete(NEW.datum)
        fetched = await worker.exchange.fetch(NEW.datum, know(worker, putter))
        assert fetched.bytes_by_peer == {putter.me: len(OLD.frames[7])}
        assert is_whole(worker, NEW)


async def test_a_lying_base_ends_a_fetch(tmp_path: Path) -> None:
    frames = list(OLD.frames)
    frames[2] = frames[3]
    liar = small_disk(SEEDS, frames=frames)
    upon = small_delta(liar, [changed(chunk(s), s) if s else chunk(0) for s in SEEDS])
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        hold(putter, liar, upon)
        peers = know(worker, putter)
        await worker.exchange.fetch(upon.datum, peers)
        shelf = worker.store.shelf(upon.pack)
        assert shelf is not None
        assert shelf.parent is not None
        with pytest.raises(VerificationFailed, match=str(liar.pack)):
            shelf.read(0, len(upon.plain))
        assert shelf.parent.convicted
        assert not shelf.convicted
        with pytest.raises(VerificationFailed, match=str(liar.pack)):
            await worker.exchange.fetch(upon.datum, peers)
        hold(worker, OLD)  # an honest pack of the same content
        await worker.exchange.fetch(upon.datum, peers)
        assert is_whole(worker, upon)
