"""Is a membership renewed in time, told on live links, and a link ended with who has none?"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from p2pgrid.errors import BadFrame, GridError, NotAuthorised, Unreachable
from p2pgrid.hole_punch.bulk import Links, open_links
from p2pgrid.hole_punch.membership import Membership, issue
from p2pgrid.ids import PeerId
from p2pgrid.node.config import MEMBERSHIP, Config
from p2pgrid.node.membership import SHOWN, hear_renewals, heed, keep_membership, keep_standing
from p2pgrid.node.node import Node
from p2pgrid.node.standing import Standing
from p2pgrid.scheduler import messages as m
from tests.memory_network import MemoryNetwork, MemoryWorld, open_world

LIFE = 1000.0
START = 1.8e9
LOOPBACK = (("127.0.0.1", 0),)


@attrs.define
class Clock:
    now: float = START


@attrs.define
class Owner:
    """What would be the coordinator, for one node."""

    clock: Any
    network: MemoryNetwork
    peer: PeerId
    joined: list[float] = attrs.field(factory=list)
    away: GridError | None = None
    listed: m.RevocationList = attrs.field(factory=lambda: m.RevocationList(""))

    async def join(self, ticket: str, name: str, shares: Any, addresses: Any) -> m.Welcome:
        await trio.lowlevel.checkpoint()
        now = self.clock()
        self.joined.append(now)
        if self.away is not None:
            raise self.away
        until = Membership(self.network.me, self.peer, ("worker",), now, now + LIFE)
        shown = issue(until, self.network.sign)
        return m.Welcome(("worker",), name, self.network.me, 5.0, 30.0, now, shown)

    async def revocations(self) -> m.RevocationList:
        await trio.lowlevel.checkpoint()
        if self.away is not None:
            raise self.away
        return self.listed


@attrs.define
class NoLinks:
    addresses: tuple[str, ...] = ()


@attrs.define
class Exchange:
    links: Any


def member(home: Path, world: MemoryWorld, owner: MemoryNetwork, name: str, clock: Any) -> Node:
    """As much of a node as these stories need; it has not joined yet."""
    home.mkdir()
    network = world.join(name)
    standing = Standing(home, network.me, owner.me, network.verify, steady=clock, wall=clock)
    calls: Any = Owner(clock, owner, network.me)
    none: Any = None
    exchange: Any = Exchange(NoLinks())
    config = Config(roles=("worker",), name=name)
    return Node(
        home, config, none, network, none, none, exchange, calls, owner.me, ("worker",),
        trio.Event(), standing,
    )  # fmt: skip


async def join(node: Node) -> None:
    node.standing.welcome(await node.coordinator.join("ticket", "", (), ()))


Two = tuple[Node, Links, Node, Links, Clock]


@contextlib.asynccontextmanager
async def open_two(folder: Path) -> AsyncIterator[Two]:
    """Two members that know of each other, and the stories of both."""
    clock = Clock()
    with trio.fail_after(20):
        async with open_world() as world, trio.open_nursery() as nursery:
            owner = world.join("owner")
            nodes = [member(folder / name, world, owner, name, lambda: clock.now) for name in ("a", "b")]
            async with contextlib.AsyncExitStack() as stack:
                made: list[Any] = []
                for node in nodes:
                    await join(node)
                    standing = node.standing
                    links = await stack.enter_async_context(
                        open_links(node.network, LOOPBACK, None, standing.allow, lambda s=standing: s.shown)
                    )
                    hear_renewals(links, standing)
                    node.exchange = Exchange(links)  # type: ignore[assignment]
                    nursery.start_soon(keep_standing, node)
                    made += [node, links]
                for one, other in ((nodes[0], nodes[1]), (nodes[1], nodes[0])):
                    one.network.learn(other.network.me, other.network.addresses)
                yield made[0], made[1], made[2], made[3], clock
                nursery.cancel_scope.cancel()


async def until(true: Callable[[], bool]) -> None:
    """The caller bounds the time."""
    while not true():  # noqa: ASYNC110  (another thread, or a file, tells it)
        await trio.sleep(0.01)


async def heard(node: Node, peer: PeerId, issued: float) -> None:
    """Until `node` was shown what was issued then."""
    await until(lambda: node.standing._heard[peer].issued >= issued - 1)


async def ended(links: Links, peer: PeerId) -> None:
    await until(lambda: all(link.peer != peer for link in links.live()))


async def test_what_is_renewed_is_told_on_a_live_link(tmp_path: Path) -> None:
    async with open_two(tmp_path) as (a, links, b, others, clock):
        link = await links.link(b.network.me)
        clock.now += LIFE / 2
        await join(a)
        await join(b)
        await heard(a, b.network.me, clock.now)
        await heard(b, a.network.me, clock.now)
        clock.now += LIFE * 0.7  # beyond the end of what was shown first
        for node in (a, b):
            node.standing.tell(clock.now)
        await links.ping(b.network.me)
        assert link.live
        assert [link.peer for link in others.live()] == [a.network.me]


async def test_a_link_ends_with_what_its_peer_showed(tmp_path: Path) -> None:
    async with open_two(tmp_path) as (a, links, b, others, clock):
        await links.link(b.network.me)
        clock.now += LIFE / 2
        await join(b)  # a gets none any more
        await heard(a, b.network.me, clock.now)
        clock.now += LIFE * 0.7
        b.standing.tell(clock.now)
        await ended(others, a.network.me)
        await ended(links, b.network.me)
        with pytest.raises(Unreachable, match="expired"):
            await links.link(b.network.me)


async def test_who_is_revoked_loses_its_links_and_makes_none(tmp_path: Path) -> None:
    async with open_two(tmp_path) as (a, links, b, others, clock):
        await links.link(b.network.me)
        barred: list[PeerId] = []
        b.standing.bars.append(lambda peer, why: barred.append(peer))
        calls: Any = b.coordinator
        calls.listed = m.RevocationList("r", (m.Revocation(a.network.me, clock.now),))
        calls.away = Unreachable(who="owner", why="away")
        await heed(b, m.Orders(now=clock.now, revocations="r"))
        assert b.standing.revision == ""  # it is asked for again with the next orders
        calls.away = None
        await heed(b, m.Orders(now=clock.now, revocations="r"))
        await ended(others, a.network.me)
        await ended(links, b.network.me)
        assert barred == [a.network.me]
        for one, peer in ((links, b.network.me), (others, a.network.me)):
            with pytest.raises(Unreachable, match="revoked"):
                await one.link(peer)
        clock.now += 1
        await join(a)
        await links.link(b.network.me)
        await until((b.home / MEMBERSHIP).exists)


@pytest.mark.parametrize("shown", [b"noise", b"x" * 2000])
async def test_who_shows_nonsense_on_a_link_loses_it(tmp_path: Path, shown: bytes) -> None:
    async with open_two(tmp_path) as (a, links, b, others, _):
        (await links.link(b.network.me)).send(bytes([SHOWN]), shown)
        await ended(others, a.network.me)


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def test_it_is_renewed_when_half_its_life_is_over(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_world() as world, trio.open_nursery() as nursery:
        node = member(tmp_path / "a", world, world.join("owner"), "a", lambda: START + trio.current_time())
        await join(node)
        nursery.start_soon(keep_membership, node)
        await trio.sleep(2.4 * LIFE)
        calls: Any = node.coordinator
        assert [at - START for at in calls.joined] == pytest.approx([0, 500, 1000, 1500, 2000], abs=5)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("away", [Unreachable(who="owner", why="x"), NotAuthorised(why="y")])
async def test_while_it_cannot_be_renewed_it_is_tried_ever_less_often(
    tmp_path: Path, autojump_clock: MockClock, away: GridError
) -> None:
    async with open_world() as world, trio.open_nursery() as nursery:
        node = member(tmp_path / "a", world, world.join("owner"), "a", lambda: START + trio.current_time())
        await join(node)
        calls: Any = node.coordinator
        calls.away = away
        nursery.start_soon(keep_membership, node)
        await trio.sleep(LIFE)
        gaps = [after - before for before, after in zip(calls.joined[1:], calls.joined[2:], strict=False)]
        assert gaps == pytest.approx([1, 2, 4, 8, 16, 32, 64, 128], abs=0.1)
        # As soon as the coordinator is heard again, it is asked again.
        calls.away, before = None, len(calls.joined)
        node.standing.tell(START + trio.current_time())
        await trio.testing.wait_all_tasks_blocked()
        assert len(calls.joined) == before + 1
        assert node.standing.renewal == pytest.approx(START + trio.current_time() + LIFE / 2, abs=1)
        nursery.cancel_scope.cancel()


def test_only_one_kind_of_message_is_known() -> None:
    from p2pgrid.node.membership import _Renewals

    unused: Any = None
    with pytest.raises(BadFrame):
        _Renewals(unused, unused, unused).received(memoryview(bytes([SHOWN + 1])))
