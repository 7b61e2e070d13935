"""Does a node with too many guests send newcomers to each other?  Over real loopback sockets."""

from __future__ import annotations

from pathlib import Path

import trio

from p2pgrid.transfer.guests import Guests
from tests.shell.test_exchange import Node, hold, is_whole, know, open_nodes
from tests.small_disks import small_disk


async def test_who_finds_no_room_has_it_from_who_waits_too(tmp_path: Path) -> None:
    disk = small_disk(range(1, 41))
    async with open_nodes(tmp_path, "putter", "a", "b") as (putter, a, b):
        hold(putter, disk)
        hold(a, disk, range(20))
        hold(b, disk, range(20, 40))
        audience = putter.exchange._audience
        audience.guests = Guests(1)
        audience.guests.knock("somebody who stays", audience.now())  # type: ignore[arg-type]
        fetched = {}

        async def fetch(worker: Node) -> None:
            fetched[worker.me] = await worker.exchange.fetch(disk.datum, know(worker, putter))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, a)
            nursery.start_soon(fetch, b)
        assert is_whole(a, disk)
        assert is_whole(b, disk)
        assert set(fetched[a.me].bytes_by_peer) == {b.me}
        assert set(fetched[b.me].bytes_by_peer) == {a.me}
        assert not putter.exchange.served.get(a.me)


async def test_when_a_guest_goes_who_waits_is_served(tmp_path: Path) -> None:
    disk = small_disk(range(1, 10))
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        hold(putter, disk)
        audience = putter.exchange._audience
        audience.guests = Guests(1)
        audience.guests.knock("somebody", audience.now())  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.exchange.fetch, disk.datum, know(worker, putter))
            while not audience.of(disk.pack):  # it has come, and waits
                await trio.lowlevel.checkpoint()
            audience.guests.leave("somebody")  # type: ignore[arg-type]
        assert is_whole(worker, disk)
