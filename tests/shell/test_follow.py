"""Is a disk fetched while it is being put, once, and is nothing left where no disk comes of it?"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import trio
from nacl.signing import SigningKey

from p2pgrid.dht import drafting, shelf
from p2pgrid.dht.draft import Draft, read_list
from p2pgrid.dht.drafting import Grown
from p2pgrid.dht.manifest import CHUNK_SIZE, encode_frames, signed
from p2pgrid.dht.publish import Published, publish_disk
from p2pgrid.errors import NoSpace, NotFound, Refused, VerificationFailed
from p2pgrid.ids import Cid, digest, object_cid
from tests.shell.test_exchange import Node, know, open_nodes
from tests.small_disks import KEY, chunk

POSITIONS = 12 * 16  # twelve batches of the press
PLAIN = [chunk(-1 - at) if at % 5 else chunk(0) for at in range(POSITIONS)]
PLAIN[7] = PLAIN[3]
FRAMES = len({digest(plain) for plain in PLAIN}) - 1


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "PERIOD", 0.0)
    monkeypatch.setattr(drafting, "STEP", 1 << 20)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "disk.raw"
    path.write_bytes(b"".join(PLAIN))
    return path


@attrs.define
class Put:
    """A put in a thread, which stops where it was told to and goes on when it may."""

    node: Node
    image: Path
    stop_at: int
    """Positions after which it waits."""
    stopped: trio.Event = attrs.field(factory=trio.Event)
    go_on: threading.Event = attrs.field(factory=threading.Event)
    cancelled: bool = False
    grown: Grown | None = None
    counts: list[int] = attrs.field(factory=list)
    done: Published | None = None
    over: trio.Event = attrs.field(factory=trio.Event)

    async def run(self) -> None:
        def progress(done: int, total: int) -> None:
            if done >= self.stop_at * CHUNK_SIZE and not self.go_on.is_set():
                trio.from_thread.run_sync(self.stopped.set)
                self.go_on.wait()
            if self.cancelled:
                raise Refused(why="whoever asked has gone")

        def told(grown: Grown) -> None:
            trio.from_thread.run_sync(self._told, grown)

        try:
            self.done = await trio.to_thread.run_sync(
                lambda: publish_disk(self.node.store, self.image, KEY, progress, told=told)
            )
        except Refused:
            assert self.cancelled
        finally:
            self.over.set()

    def _told(self, grown: Grown) -> None:
        self.grown = grown
        self.counts.append(len(grown.indices))
        self.node.exchange.tell(grown.series, list(grown.indices))
        self.node.exchange.grown(grown.series)

    @property
    def series(self) -> Cid:
        assert self.grown is not None
        return self.grown.series

    @property
    def known(self) -> int:
        return sum(self.counts)


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  (links bring it, in threads of their own)
        await trio.sleep(0.005)


def here(node: Node, series: Cid) -> int:
    shelf = node.store.drafts.get(series)
    return 0 if shelf is None else shelf.count


def files(node: Node) -> set[str]:
    return {str(p.relative_to(node.store.root)) for p in node.store.root.rglob("*")} - {"lock"}


def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many bytes each store wrote into files of frames, by the folder of the node."""
    counts: dict[str, int] = {}
    write_all = shelf.write_all

    def counted(fd: int, data: bytes, offset: int) -> None:
        node = Path(f"/proc/self/fd/{fd}").readlink().parents[2].name
        if node == "store":
            node = Path(f"/proc/self/fd/{fd}").readlink().parents[3].name
        counts[node] = counts.get(node, 0) + len(data)
        write_all(fd, data, offset)

    monkeypatch.setattr(shelf, "write_all", counted)
    return counts


async def test_a_worker_has_all_there_is_before_the_put_ends_and_fetches_nothing_again(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = written(monkeypatch)
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        async with trio.open_nursery() as nursery:
            put = Put(putter, image, POSITIONS - 16)
            nursery.start_soon(put.run)
            await put.stopped.wait()
            came: dict[str, int] = {}

            async def follow() -> None:
                came.update(await worker.exchange.follow(put.series, know(worker, putter)))

            nursery.start_soon(follow)
            await until(lambda: here(worker, put.series) == put.known)
            assert put.known >= 0.9 * FRAMES
            assert worker.store.held() == []
            inode = (worker.store.drafts.get(put.series).folder / "frames").stat().st_ino
            put.go_on.set()
            await put.over.wait()
            assert put.done is not None
            fetched = await worker.exchange.fetch(put.done.datum, [putter.me])
        shelf = worker.store.begin(put.done.datum)
        assert shelf.complete
        assert shelf.read(0, POSITIONS * CHUNK_SIZE) == b"".join(PLAIN)
        assert (shelf.folder / "frames").stat().st_ino == inode, "the file is the draft's"
        assert sum(came.values()) + sum(fetched.bytes_by_peer.values()) == put.done.wire_bytes
        assert fetched.resumed_bytes == came[putter.me]
        assert counts["worker"] == put.done.wire_bytes, "nothing is written twice"
        assert list((worker.store.root / "tmp").iterdir()) == []
        assert worker.store.drafts.followed() == []
        assert worker.store.used() == putter.store.used()


async def test_workers_pass_on_what_came_and_one_that_is_late_catches_up(tmp_path: Path, image: Path) -> None:
    async with open_nodes(tmp_path, "putter", "a", "b", "late") as (putter, a, b, late):
        async with trio.open_nursery() as nursery:
            put = Put(putter, image, POSITIONS // 2)
            nursery.start_soon(put.run)
            await put.stopped.wait()
            for worker in (a, b):
                nursery.start_soon(worker.exchange.follow, put.series, know(worker, putter))
            await until(lambda: all(here(w, put.series) == put.known for w in (a, b)))
            nursery.start_soon(late.exchange.follow, put.series, know(late, a))  # who is not the putter
            await until(lambda: here(late, put.series) == put.known)
            before, put.stop_at = put.known, POSITIONS - 16
            put.go_on.set()
            await put.over.wait()
            assert put.known > before
            assert put.done is not None
            for worker in (a, b, late):
                nursery.start_soon(worker.exchange.fetch, put.done.datum, [putter.me, a.me, b.me])
        for worker in (a, b, late):
            shelf = worker.store.begin(put.done.datum)
            assert shelf.complete
            assert shelf.read(0, POSITIONS * CHUNK_SIZE) == b"".join(PLAIN)
        # Three copies went out; the putter did not send three.
        assert sum(putter.exchange.served.values()) < 2.5 * put.done.wire_bytes


async def test_a_worker_that_has_half_when_the_disk_comes_fetches_the_other_half(
    tmp_path: Path, image: Path
) -> None:
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        async with trio.open_nursery() as nursery:
            put = Put(putter, image, POSITIONS // 2)
            nursery.start_soon(put.run)
            await put.stopped.wait()
            nursery.start_soon(worker.exchange.follow, put.series, know(worker, putter))
            await until(lambda: here(worker, put.series) > FRAMES // 4)
            growing = worker.store.drafts.get(put.series)
            assert growing is not None
            put.go_on.set()
            await put.over.wait()
            assert put.done is not None
            had = growing.held_bytes()
            fetched = await worker.exchange.fetch(put.done.datum, [putter.me])
            assert fetched.resumed_bytes >= had
        assert worker.store.begin(put.done.datum).complete


async def test_a_put_that_is_cancelled_leaves_nothing_anywhere(tmp_path: Path, image: Path) -> None:
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        before = files(putter), files(worker), worker.store.used(), putter.store.used()
        async with trio.open_nursery() as nursery:
            put = Put(putter, image, POSITIONS // 2)
            nursery.start_soon(put.run)
            await put.stopped.wait()
            nursery.start_soon(worker.exchange.follow, put.series, know(worker, putter))
            await until(lambda: here(worker, put.series) == put.known)
            assert worker.store.used() > before[2]
            put.cancelled = True
            put.go_on.set()
            await put.over.wait()
            assert putter.store.drafts.get(put.series) is None
            worker.store.drop(put.series)  # as it is ordered
            worker.exchange.settle()
        assert (files(putter), files(worker), worker.store.used(), putter.store.used()) == before
        with pytest.raises(NotFound):
            worker.store.drop(put.series)


async def test_who_slept_through_the_promotion_goes_on_with_what_it_has(tmp_path: Path, image: Path) -> None:
    async with open_nodes(tmp_path, "putter", "a", "sleeper") as (putter, a, sleeper):
        async with trio.open_nursery() as nursery:
            put = Put(putter, image, POSITIONS // 2)
            nursery.start_soon(put.run)
            await put.stopped.wait()
            asleep = trio.CancelScope()

            async def follow() -> None:
                with asleep:
                    await sleeper.exchange.follow(put.series, know(sleeper, putter))

            nursery.start_soon(follow)
            nursery.start_soon(a.exchange.follow, put.series, know(a, putter))
            await until(lambda: all(here(node, put.series) == put.known for node in (a, sleeper)))
            had = sleeper.store.drafts.get(put.series).held_bytes()
            asleep.cancel()
            put.go_on.set()
            await put.over.wait()
            assert put.done is not None
            await a.exchange.fetch(put.done.datum, [putter.me])
            assert a.store.drafts.followed() == []
            assert sleeper.store.drafts.followed() == [put.series]
            fetched = await sleeper.exchange.fetch(put.done.datum, [putter.me, a.me])
            assert fetched.resumed_bytes == had
            assert sum(fetched.bytes_by_peer.values()) == put.done.wire_bytes - had
        assert sleeper.store.begin(put.done.datum).complete
        assert sleeper.store.drafts.followed() == []


async def test_a_disk_that_does_not_go_on_from_its_draft_is_fetched_as_any(
    tmp_path: Path, image: Path
) -> None:
    """The putter gave up and put something else: what was followed is of no use, and in nobody's way."""
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        other = tmp_path / "other.raw"
        other.write_bytes(b"".join(chunk(-500 - at) for at in range(16)))
        async with trio.open_nursery() as nursery:
            put = Put(putter, image, POSITIONS // 2)
            nursery.start_soon(put.run)
            await put.stopped.wait()
            nursery.start_soon(worker.exchange.follow, put.series, know(worker, putter))
            await until(lambda: here(worker, put.series) == put.known)
            done = publish_disk(putter.store, other, KEY)
            await worker.exchange.fetch(done.datum, [putter.me])
            assert worker.store.begin(done.datum).complete
            assert here(worker, put.series) == put.known
            put.cancelled = True
            put.go_on.set()
            worker.store.drop(put.series)
            worker.exchange.settle()


# --- who lies -----------------------------------------------------------------------------


def lend(node: Node, first: bytes, frames: list[bytes], key: SigningKey = KEY) -> Cid:
    """A series on `node` whose only growth is `frames`, signed with `key` whoever may do that."""
    folder = node.store.root / "tmp" / "lent"
    folder.mkdir()
    growing = node.store.drafts.lend(folder, first)
    listed = encode_frames([len(f) for f in frames], [digest(f) for f in frames])
    draft = signed(Draft(growing.pack, b"", 99, len(frames), (object_cid(listed),), b""), key)
    growing.extend(draft, draft.encode(), {object_cid(listed): listed}, *read_list(listed))
    for index, frame in enumerate(frames):
        growing.put_frame(index, frame)
    return growing.pack


FIRST = signed(Draft(None, bytes(32), 99, 0, (), b""), KEY).encode()


async def test_a_signer_who_tells_two_stories_is_believed_by_nobody(tmp_path: Path) -> None:
    async with open_nodes(tmp_path, "one", "two", "worker") as (one, two, worker):
        story, other = [b"a" * 1000] * 3, [b"b" * 1000] * 4
        series = lend(one, FIRST, story)
        assert lend(two, FIRST, other) == series
        with pytest.raises(VerificationFailed, match="it lied"):
            await worker.exchange.follow(series, know(worker, one, two))
        assert worker.store.drafts.get(series) is not None, "whoever asked for it drops it"
        worker.store.drop(series)
        assert list((worker.store.root / "tmp").iterdir()) == []


async def test_a_peer_that_makes_a_story_up_is_shunned_and_the_putter_s_goes_on(tmp_path: Path) -> None:
    """It has the first draft, which is the putter's, and goes on from there under a key of its own."""
    async with open_nodes(tmp_path, "putter", "liar", "worker") as (putter, liar, worker):
        series = lend(putter, FIRST, [b"a" * 1000] * 3)
        lend(liar, FIRST, [b"wrong"], SigningKey(bytes(32)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.exchange.follow, series, know(worker, liar))
            await until(lambda: worker.store.drafts.get(series) is not None)
            (following, _) = worker.exchange._downloads[series]
            await until(lambda: following.company._contacts[liar.me].shunned)
            assert here(worker, series) == 0
            following.company.hint(know(worker, putter))
            await until(lambda: here(worker, series) == 3)
            nursery.cancel_scope.cancel()


async def test_a_worker_without_room_says_so_and_goes_on_without(tmp_path: Path, image: Path) -> None:
    async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
        worker.store._room._quota = 3 << 20
        async with trio.open_nursery() as nursery:
            put = Put(putter, image, POSITIONS // 2)
            nursery.start_soon(put.run)
            await put.stopped.wait()
            with pytest.raises(NoSpace):
                await worker.exchange.follow(put.series, know(worker, putter))
            worker.store.drop(put.series)
            assert worker.store.used() == 0
            put.cancelled = True
            put.go_on.set()
