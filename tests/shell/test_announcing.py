"""Is the index told of what is here, and of nothing else?"""

from __future__ import annotations

from pathlib import Path

import trio
import trio.testing
from nacl.signing import SigningKey

from p2pgrid.dht.manifest import Disk
from p2pgrid.dht.publish import publish_disk, publish_tree
from p2pgrid.ids import Cid
from p2pgrid.node.node import OWN
from tests.lone_node import Lone, open_lone
from tests.small_disks import changed, chunk, small_delta, small_disk


def records(lone: Lone) -> set[Cid]:
    """What the index knows to be at the node."""
    world = lone.world.records
    return {Cid.from_bytes(key) for key, peers in world.items() if lone.node.network.me in peers}


def put(lone: Lone, image: Path, key: SigningKey | None = None) -> tuple[Cid, Cid]:
    """A disk of the bytes, by `key`: its name and that of its content."""
    image.write_bytes(b"x" * 1024)
    made = publish_disk(lone.node.store, image, key or lone.node.identity.signing_key)
    assert made.content is not None
    return made.datum, made.content


async def all_told(lone: Lone) -> None:
    with trio.fail_after(10):
        while lone.node._unannounced or lone.node._to_announce.is_set():
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked(0.05)


async def test_what_is_dropped_is_announced_no_more_unless_other_data_share_it(tmp_path):
    async with open_lone(tmp_path / "home") as lone, trio.open_nursery() as nursery:
        nursery.start_soon(lone.node.keep_announcing)
        mine, content = put(lone, tmp_path / "a.raw")
        other, same = put(lone, tmp_path / "b.raw", SigningKey.generate())
        assert content == same
        for datum in (mine, other):
            lone.node.announce(str(datum))
        await all_told(lone)
        assert records(lone) == {mine, other, content}
        await lone.node.drop(str(mine))
        assert records(lone) == {other, content}
        await lone.node.drop(str(other))
        assert records(lone) == set()
        nursery.cancel_scope.cancel()


async def test_what_was_dropped_before_it_was_announced_is_not_announced(tmp_path):
    async with open_lone(tmp_path / "home") as lone, trio.open_nursery() as nursery:
        mine, _ = put(lone, tmp_path / "a.raw")
        lone.node.announce(str(mine))
        await lone.node.drop(str(mine))
        nursery.start_soon(lone.node.keep_announcing)
        await all_told(lone)
        assert records(lone) == set()
        nursery.cancel_scope.cancel()


async def test_a_result_is_announced_by_who_made_it_and_by_nobody_else(tmp_path):
    async with open_lone(tmp_path / "home") as lone, trio.open_nursery() as nursery:
        nursery.start_soon(lone.node.keep_announcing)
        (tmp_path / "result" / OWN).mkdir(parents=True)
        (tmp_path / "result" / OWN / "console.log").write_bytes(b"hello")
        mine = publish_tree(lone.node.store, tmp_path / "result", lone.node.identity.signing_key)
        others = publish_tree(lone.node.store, tmp_path / "result", SigningKey.generate())
        for datum in (mine.datum, others.datum):
            lone.node.announce(str(datum))
        await all_told(lone)
        assert records(lone) == {mine.datum, mine.content}
        nursery.cancel_scope.cancel()


async def test_what_a_disk_builds_on_is_announced_with_it(tmp_path):
    """The parent's own datum may be dropped: its chunks are still here, and others need them, too."""
    old = small_disk([1, 2, 3])
    new = small_delta(old, [changed(chunk(1), 1), chunk(2), chunk(3)])
    async with open_lone(tmp_path / "home") as lone, trio.open_nursery() as nursery:
        nursery.start_soon(lone.node.keep_announcing)
        for disk in (old, new):
            disk.put_objects(lone.node.store)
            shelf = lone.node.store.begin(disk.datum)
            for index, frame in enumerate(disk.frames):
                if frame:
                    shelf.put_frame(index, frame)
            lone.node.announce(str(disk.datum))
        contents = {Disk.decode(disk.objects[-1]).content for disk in (old, new)}
        await all_told(lone)
        assert records(lone) == {old.datum, new.datum, *contents}
        await lone.node.drop(str(old.datum))
        assert records(lone) == {new.datum, *contents}
        await lone.node.drop(str(new.datum))
        assert records(lone) == set()
        nursery.cancel_scope.cancel()
