"""Does a disk in a delta come from an origin alone: all of it, or what is new to who has the parent?"""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
import trio

from p2pgrid.dht.export import export_datum
from p2pgrid.dht.shelf import Shelf
from p2pgrid.dht.store import Store
from p2pgrid.hole_punch.link import Link
from p2pgrid.ids import Cid, PeerId
from p2pgrid.transfer import lastresort
from p2pgrid.transfer.exchange import Progress
from p2pgrid.transfer.fetch import Download
from tests.origin_server import Server, served
from tests.shell.test_delta_exchange import NEW, NEXT, OLD, OTHER, SEEDS, hold, is_whole, size
from tests.shell.test_exchange import Node, know, open_nodes
from tests.small_disks import SmallDisk, small_disk

GRACE = 1.0
"""Enough for a message from a peer that is linked already."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lastresort, "GRACE", 0.1)
    monkeypatch.setattr(lastresort, "LOOK", 0.02)
    monkeypatch.setattr(lastresort, "pause", lambda failures, told: 0.02)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """What an export of the delta wrote; the putter is gone."""
    with Store(tmp_path / "putter", min_free=0) as store:
        for disk in (OLD, NEW):
            disk.put_objects(store)
            shelf = store.begin(disk.datum)
            for index, frame in enumerate(disk.frames):
                if frame:
                    shelf.put_frame(index, frame)
        export_datum(store, NEW.datum, tmp_path / "www")
    return {
        f"/{path.relative_to(tmp_path / 'www')}": path.read_bytes()
        for path in (tmp_path / "www").rglob("*")
        if path.is_file()
    }


def name_of(server: Server) -> PeerId:
    return PeerId(f"origin 127.0.0.1:{server.server_address[1]}")


def asked(server: Server, what: str) -> set[Cid]:
    """The objects or packs that were asked for."""
    return {Cid.parse(path.split("/")[2]) for path, _ in server.asked if path.startswith(f"/{what}/")}


async def test_who_has_nothing_gets_the_parent_and_the_delta(tmp_path: Path, files: dict[str, bytes]) -> None:
    with served(files) as server:
        async with open_nodes(tmp_path, "alone") as (alone,):
            reports: list[Progress] = []
            fetched = await alone.exchange.fetch(NEW.datum, (), reports.append, origins=[server.url])
            assert is_whole(alone, NEW)
            assert fetched.bytes_by_peer == {name_of(server): size(OLD) + size(NEW)}
            assert reports[-1].bytes_done == reports[-1].bytes_total == size(OLD) + size(NEW)
        assert server.sent == size(OLD) + size(NEW)
        assert asked(server, "packs") == {OLD.pack, NEW.pack}
        assert all(part is not None for path, part in server.asked if path.startswith("/packs/"))


@pytest.mark.parametrize(
    "parent", [OLD, small_disk(SEEDS, key=OTHER)], ids=["the pack it names", "another's pack"]
)
async def test_who_has_the_parent_gets_the_delta(
    tmp_path: Path, files: dict[str, bytes], parent: SmallDisk
) -> None:
    with served(files) as server:
        async with open_nodes(tmp_path, "alone") as (alone,):
            hold(alone, parent)
            fetched = await alone.exchange.fetch(NEW.datum, origins=[server.url])
            assert is_whole(alone, NEW)
            assert fetched.bytes_by_peer == {name_of(server): size(NEW)}
        assert server.sent == size(NEW)
        assert asked(server, "packs") == {NEW.pack}
        assert OLD.pack not in asked(server, "objects")


async def test_who_has_part_of_the_parent_gets_the_rest(tmp_path: Path, files: dict[str, bytes]) -> None:
    with served(files) as server:
        async with open_nodes(tmp_path, "alone") as (alone,):
            OLD.put_objects(alone.store)
            shelf = alone.store.begin(OLD.datum)
            for index in range(20):
                shelf.put_frame(index, OLD.frames[index])
            here = sum(map(len, OLD.frames[:20]))
            await alone.exchange.fetch(NEW.datum, origins=[server.url])
            assert is_whole(alone, NEW)
        assert server.sent == size(OLD) + size(NEW) - here


async def test_a_peer_brings_the_parent_and_the_origin_the_delta(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    with served(files) as server:
        async with open_nodes(tmp_path, "neighbour", "worker") as (neighbour, worker):
            hold(neighbour, OLD)
            peers = know(worker, neighbour)
            await worker.exchange.session(neighbour.me)  # however long a link takes today
            with trio.fail_after(30):
                fetched = await worker.exchange.fetch(NEW.datum, peers, origins=[server.url])
            assert is_whole(worker, NEW)
            assert fetched.bytes_by_peer == {neighbour.me: size(OLD), name_of(server): size(NEW)}
        assert asked(server, "packs") == {NEW.pack}


def say_late(monkeypatch: pytest.MonkeyPatch, node: Node) -> None:
    """Have `node` show what it has of a pack only after somebody looked what to ask of an origin."""
    looked, look, show = threading.Event(), lastresort.LastResort._look, node.exchange._audience.receive

    def watched(resort: lastresort.LastResort) -> None:
        look(resort)
        if resort._shelf is not None:
            looked.set()

    def late(link: Link, topic: int, shelf: Shelf) -> None:
        assert looked.wait(20)
        show(link, topic, shelf)

    monkeypatch.setattr(lastresort.LastResort, "_look", watched)
    monkeypatch.setattr(node.exchange._audience, "receive", late)


async def test_a_peer_gets_time_to_say_what_it_has_of_each_pack(
    tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long ago the fetch began: here the grace that a fetch gives is over at once."""
    with served(files) as server:
        async with open_nodes(tmp_path, "neighbour", "worker") as (neighbour, worker):
            hold(neighbour, OLD)
            peers = know(worker, neighbour)
            await worker.exchange.session(neighbour.me)
            say_late(monkeypatch, neighbour)
            download = Download(NEW.datum, worker.exchange, random.Random(1), None)
            monkeypatch.setattr(lastresort, "GRACE", GRACE)  # from now on
            download.company.hint(peers)
            download.resort.add([server.url])
            with trio.fail_after(30):
                fetched = await download.run()
            assert fetched.bytes_by_peer == {neighbour.me: size(OLD), name_of(server): size(NEW)}


async def test_another_version_with_the_same_parent_costs_what_is_new_in_it(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    more = {f"/packs/{NEXT.pack}": b"".join(NEXT.frames)}
    with Store(tmp_path / "names", min_free=0) as names:
        more |= {f"/objects/{names.put_object(data)}": data for data in NEXT.objects}
    with served(files | more) as server:
        async with open_nodes(tmp_path, "alone") as (alone,):
            await alone.exchange.fetch(NEW.datum, origins=[server.url])
            before = server.sent
            await alone.exchange.fetch(NEXT.datum, origins=[server.url])
            assert is_whole(alone, NEXT)
        assert server.sent - before == size(NEXT)
