"""Does a node follow its orders, and live on when it cannot?"""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import trio

from p2pgrid import wire
from p2pgrid.dht.publish import publish_tree
from p2pgrid.dht.store import Held, Store
from p2pgrid.errors import NoSpace, NotFound, Temporary
from p2pgrid.ids import Cid, object_cid
from p2pgrid.node import holdings
from p2pgrid.node.node import Running, Trouble
from p2pgrid.node.room import RESULT_MAX
from p2pgrid.scheduler import messages as m
from tests.lone_node import Lone, open_lone
from tests.shell.test_attempt import a_disk


def a_tree(lone: Lone, folder: Path) -> Cid:
    (folder / "tree").mkdir()
    (folder / "tree" / "answer").write_bytes(b"42\n")
    return publish_tree(lone.node.store, folder / "tree", lone.node.identity.signing_key).datum


def result(datum: Cid) -> m.Wanted:
    return m.Wanted(str(datum), "tree", None, 3, "result", task="job.0", epoch=1)


async def bring(lone: Lone, wanted: m.Wanted) -> None:
    """Until it is here, or is known not to come."""
    lone.node.fetching.add(wanted.datum)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(holdings._bring, lone.node, wanted, trio.CapacityLimiter(1))
            while wanted.datum in lone.node.fetching and wanted.datum not in lone.node.troubles:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()


async def test_a_result_that_is_here_is_collected(tmp_path):
    async with open_lone(tmp_path / "home") as lone:
        await bring(lone, result(a_tree(lone, tmp_path)))
        assert lone.calls.collected == ["job.0"]
        assert lone.node.troubles == {}


async def test_a_result_that_is_no_tree_is_not_collected_and_the_node_says_why(tmp_path):
    async with open_lone(tmp_path / "home") as lone:
        await bring(lone, result(a_disk(lone, tmp_path)))
        assert lone.calls.collected == []
        beat = await holdings._beat(lone.node, 0.0)
        assert beat.status.startswith("the result of job.0 cannot be brought: ")


async def test_a_datum_that_was_brought_as_a_result_and_is_none_is_dropped(tmp_path):
    async with open_lone(tmp_path / "home") as lone:

        def fetch(datum: Cid) -> None:
            assert a_disk(lone, tmp_path) == datum

        lone.peers.bring = fetch
        datum = a_disk(lone, tmp_path)
        lone.node.store.drop(datum)
        await bring(lone, result(datum))
        assert lone.peers.most == RESULT_MAX
        assert lone.calls.collected == []
        assert lone.node.store.held() == []


async def test_the_store_s_room_is_told(tmp_path):
    async with open_lone(tmp_path / "home") as lone:
        lone.node.config = attrs.evolve(lone.node.config, quota=1 << 20)
        a_disk(lone, tmp_path)
        beat = await holdings._beat(lone.node, 0.0)
        assert beat.total.store == (1 << 20) - lone.node.store.used()
        assert not beat.cut
        lone.node.running["job.0"] = Running("job.0", 1, tmp_path / "vm", reserved=1 << 60)
        beat = await holdings._beat(lone.node, 0.0)
        assert (beat.free.disk, beat.free.store) == (0, 0)
        with pytest.raises(NoSpace):
            lone.node.store.check_room(1)


async def test_a_datum_that_does_not_come_is_tried_more_and_more_seldom(tmp_path):
    async with open_lone(tmp_path / "home") as lone:
        missing = object_cid(b"nowhere")

        def refuse(datum: Cid) -> None:
            raise Temporary(why="nobody has it")

        lone.peers.bring = refuse
        await bring(lone, result(missing))
        assert lone.node.troubles[str(missing)].tries == 1
    pauses = [holdings.pause(tries) for tries in range(1, 40)]
    assert pauses[:4] == [0.5, 1.0, 2.0, 4.0]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 300.0


async def test_what_a_lease_needs_is_not_dropped_under_it(tmp_path):
    async with open_lone(tmp_path / "home") as lone:
        disk = str(a_disk(lone, tmp_path))
        lone.node.running["job.0"] = Running("job.0", 1, tmp_path / "vm", frozenset({disk}))
        await holdings._drop(lone.node, disk)
        assert lone.node.complete(disk)
        del lone.node.running["job.0"]
        await holdings._drop(lone.node, disk)
        assert not lone.node.complete(disk)


@pytest.mark.parametrize("wrong", [Temporary(why="the disk"), NotFound(what="it"), PermissionError(13, "no")])
async def test_a_drop_that_fails_costs_nothing_else(tmp_path, monkeypatch, wrong):
    async with open_lone(tmp_path / "home") as lone:
        disk = str(a_disk(lone, tmp_path))

        def fail(self: Store, datum: Cid) -> None:
            raise wrong

        with monkeypatch.context() as patched:
            patched.setattr(Store, "drop", fail)
            await holdings._drop(lone.node, disk)
        assert lone.node.complete(disk)


async def test_twenty_thousand_data_fit_in_a_beat(tmp_path, monkeypatch):
    async with open_lone(tmp_path / "home") as lone:
        disk = a_disk(lone, tmp_path)
        (mine,) = lone.node.store.held()
        content, pack = object_cid(b"content"), object_cid(b"pack")
        many = [Held(object_cid(b"%d" % i), content, pack, 1, 1, 1) for i in range(20_000)]
        some = [Held(object_cid(b"half %d" % i), content, pack, 1, 2, 1) for i in range(2_000)]
        monkeypatch.setattr(Store, "held", lambda self: [*many, *some, mine])
        for i in range(300):
            lone.node.troubles[str(i)] = Trouble("a datum", "why " * 100)
        beat = await holdings._beat(lone.node, 0.0)
        assert beat.holds[0] == str(disk)
        again = wire.decode(wire.encode(beat)[wire.HEADER :], m.Beat)
        assert len(again.holds) == m.HOLDS_MAX
        assert again.cut
