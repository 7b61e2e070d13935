"""Does a put tell of its drafts as long as it lasts, and does a worker keep them no longer than that?"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from p2pgrid.dht import drafting
from p2pgrid.dht.draft import Draft
from p2pgrid.dht.manifest import encode_frames, signed
from p2pgrid.errors import Conflict, Temporary, VerificationFailed
from p2pgrid.ids import Cid, PeerId, object_cid
from p2pgrid.node import disks, drafts, holdings
from p2pgrid.node.api import leaves
from p2pgrid.scheduler import messages as m
from tests.lone_node import Lone, open_lone
from tests.shell.test_attempt import a_disk
from tests.small_disks import KEY, chunk

FIRST = signed(Draft(None, bytes(32), 99, 0, (), b""), KEY).encode()


@attrs.define
class Heard:
    """What the coordinator and the followers were told."""

    drafts: list[tuple[str, int, bool]] = attrs.field(factory=list)
    put: list[str | None] = attrs.field(factory=list)
    indices: list[int] = attrs.field(factory=list)
    answer: Callable[[], Any] = lambda: None


def listen(lone: Lone, monkeypatch: pytest.MonkeyPatch) -> Heard:
    heard = Heard()

    async def draft(self: Any, draft: str, size: int = 0, replica: int = 0, *, over: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        heard.drafts.append((draft, replica, over))
        heard.answer()

    async def put(self: Any, record: m.DatumRecord, draft: str | None = None) -> None:
        await trio.lowlevel.checkpoint()
        heard.put.append(draft)
        self.put_too(record)

    monkeypatch.setattr(type(lone.calls), "draft", draft, raising=False)
    monkeypatch.setattr(type(lone.calls), "put", put)
    monkeypatch.setattr(
        type(lone.peers), "tell", lambda self, series, indices: heard.indices.extend(indices), raising=False
    )
    monkeypatch.setattr(type(lone.peers), "grown", lambda self, series: None, raising=False)
    monkeypatch.setattr(drafting, "PERIOD", 0.0)
    monkeypatch.setattr(drafting, "STEP", 1 << 20)
    return heard


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"".join(chunk(-1 - at) for at in range(50)))
    return path


async def quiet(event: dict[str, Any]) -> None:
    await trio.lowlevel.checkpoint()


async def test_a_put_tells_of_its_series_and_then_what_became_of_it(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_lone(tmp_path / "home") as lone:
        heard = listen(lone, monkeypatch)
        await disks.put(lone.node, {"path": str(image), "replica": 3}, quiet)
        assert {(replica, over) for _, replica, over in heard.drafts} == {(3, False)}
        assert heard.put == [heard.drafts[0][0]]
        assert heard.indices == list(range(48)), "the last frames come with the disk"
        assert lone.node.store.drafts.get(Cid.parse(heard.drafts[0][0])) is None


async def test_a_put_is_told_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_lone(tmp_path / "home") as lone:
        heard = listen(lone, monkeypatch)

        def refuse() -> None:
            raise Temporary(why="away")

        heard.answer = refuse
        async with drafts.telling(lone.node, 2) as told:
            told._grown(drafting.Grown(object_cid(b"x"), object_cid(b"y"), (0,), 9))
            await trio.sleep(35)
        assert heard.drafts == [(str(object_cid(b"x")), 2, False)] * 4


@pytest.mark.parametrize("away", [False, True])
async def test_a_put_that_the_coordinator_refuses_is_withdrawn(
    away: bool, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it cannot be told any more, it forgets by itself."""
    async with open_lone(tmp_path / "home") as lone:
        heard = listen(lone, monkeypatch)

        def refuse(record: m.DatumRecord) -> None:
            if away:
                heard.answer = fail
            raise Conflict(what="the name")

        def fail() -> None:
            raise Temporary(why="away")

        lone.calls.put_too = refuse
        with pytest.raises(ExceptionGroup) as group:
            await disks.put(lone.node, {"path": str(image), "replica": 3}, quiet)
        assert [type(one) for one in leaves(group.value)] == [Conflict]
        assert heard.drafts[-1] == (heard.put[0], 0, True)
        assert lone.node.store.held() == []
        assert list((lone.node.store.root / "tmp").iterdir()) == []
        assert list((lone.node.store.root / "packs").iterdir()) == []


async def test_a_put_that_is_interrupted_is_withdrawn_and_leaves_nothing(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, wrote = threading.Event(), drafting.Drafting.wrote

    def wait_after(self: drafting.Drafting, *about: Any) -> None:
        wrote(self, *about)
        go_on.wait()

    async with open_lone(tmp_path / "home") as lone:
        heard = listen(lone, monkeypatch)
        monkeypatch.setattr(drafting.Drafting, "wrote", wait_after)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disks.put, lone.node, {"path": str(image), "replica": 3}, quiet)
            while not heard.drafts:
                await trio.lowlevel.checkpoint()
            series = Cid.parse(heard.drafts[0][0])
            assert lone.node.store.shelf(series) is not None
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.testing.wait_all_tasks_blocked()
            go_on.set()
        assert heard.put == []
        assert heard.drafts[-1] == (str(series), 0, True)
        assert lone.node.store.shelf(series) is None
        assert lone.node.store.held() == []
        assert list((lone.node.store.root / "tmp").iterdir()) == []


# --- a worker ---------------------------------------------------------------------------


def ordered(datum: str, kind: str = "draft") -> m.Wanted:
    return m.Wanted(datum, kind, None, 10, "replica", (m.Provider("putter", ("/a",)),))  # type: ignore[arg-type]


async def test_a_draft_that_is_ordered_no_more_is_dropped_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_lone(tmp_path / "home") as lone:
        series = lone.node.store.drafts.begin(FIRST).pack
        disk = a_disk(lone, tmp_path)
        for _ in range(5):
            await drafts.let_go(lone.node, [ordered(str(series))])
            await trio.sleep(drafts.GRACE)
        await drafts.let_go(lone.node, [])
        await trio.sleep(drafts.GRACE)
        await drafts.let_go(lone.node, [])
        assert lone.node.store.drafts.followed() == [series], "it is not over yet"
        await trio.sleep(1)
        await drafts.let_go(lone.node, [ordered(str(object_cid(b"a disk")), "disk")])
        assert lone.node.store.drafts.followed() == [series], "that disk may take it over"
        await drafts.let_go(lone.node, [ordered(str(disk), "disk")])
        assert lone.node.store.drafts.followed() == []
        assert list((lone.node.store.root / "tmp").iterdir()) == []


async def test_what_a_draft_takes_is_room_for_its_disk(tmp_path: Path) -> None:
    async with open_lone(tmp_path / "home") as lone:
        lone.node.config = attrs.evolve(lone.node.config, quota=1 << 20)
        before = holdings.capacity(lone.node).store
        series = lone.node.store.drafts.begin(FIRST).pack
        listed = encode_frames([1000, 2000], [bytes(32), bytes(32)])
        draft = signed(Draft(series, b"", 99, 2, (object_cid(listed),), b""), KEY)
        lone.node.store.drafts.extend(series, draft.encode(), {object_cid(listed): listed})
        assert lone.node.store.used() == 3000
        assert holdings.capacity(lone.node).store == before


async def test_a_draft_that_is_ordered_to_be_dropped_is_dropped_at_once(tmp_path: Path) -> None:
    async with open_lone(tmp_path / "home") as lone:
        series = lone.node.store.drafts.begin(FIRST).pack
        await holdings._drop(lone.node, str(series))
        assert lone.node.store.drafts.followed() == []


async def test_a_liar_s_draft_is_dropped_and_the_node_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_lone(tmp_path / "home") as lone:
        series = lone.node.store.drafts.begin(FIRST).pack
        asked: list[tuple[Cid, list[PeerId]]] = []

        async def follow(self: Any, series: Cid, peers: list[PeerId]) -> dict[PeerId, int]:
            asked.append((series, peers))
            await trio.lowlevel.checkpoint()
            raise VerificationFailed(what="draft", why="it lied")

        monkeypatch.setattr(type(lone.peers), "follow", follow, raising=False)
        wanted = ordered(str(series))
        lone.node.fetching.add(wanted.datum)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(holdings._bring, lone.node, wanted, trio.CapacityLimiter(1))
            while wanted.datum not in lone.node.troubles:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert asked == [(series, [PeerId("putter")])]
        assert lone.node.store.drafts.followed() == []
        assert "it lied" in (await holdings._beat(lone.node, 0.0)).status
