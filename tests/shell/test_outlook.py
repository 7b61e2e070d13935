"""Does a node know how it stands, and act when the network changes?  Over loopback, without a router."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
import trio

from p2pgrid.hole_punch.bulk import Links, open_links
from p2pgrid.hole_punch.calling import open_calling
from p2pgrid.hole_punch.netlink import Route
from p2pgrid.hole_punch.netwatch import Change, Net
from p2pgrid.hole_punch.path import to_multiaddr
from p2pgrid.node import outlook as module
from p2pgrid.node.outlook import Outlook, open_outlook
from p2pgrid.node.prefs import Prefs
from tests.memory_network import open_world

HOME = Net(frozenset(["10.0.0.7"]), Route("10.0.0.1", "10.0.0.7", 2))
CAFE = Net(frozenset(["10.9.0.7"]), Route("10.9.0.1", "10.9.0.7", 2))
ASLEEP, LAST = Change(HOME, HOME, 3600.0), Change(HOME, CAFE)


@contextlib.asynccontextmanager
async def node(
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[tuple[Outlook, Links, trio.MemorySendChannel[Change]]]:
    """One that knows a coordinator, and how to tell it of changes."""
    tell, changes = trio.open_memory_channel[Change](0)

    @contextlib.asynccontextmanager
    async def netwatch() -> AsyncIterator[trio.MemoryReceiveChannel[Change]]:
        yield changes

    monkeypatch.setattr(module, "open_netwatch", netwatch)
    with trio.fail_after(20):
        async with open_world() as world, contextlib.AsyncExitStack() as rooms:
            me, grid = world.join("a"), world.join("grid")
            links = await rooms.enter_async_context(open_links(me, [("127.0.0.1", 0)]))
            others = await rooms.enter_async_context(open_links(grid, [("127.0.0.1", 0)]))
            await rooms.enter_async_context(open_calling(others))
            links.learn(grid.me, [to_multiaddr(others.bound[0])])
            made = open_outlook(links, me.me, grid.me, lambda: Prefs(port_mapping="off"))
            yield await rooms.enter_async_context(made), links, tell


async def test_an_observer_is_asked_all_there_is_to_ask(monkeypatch) -> None:
    async with node(monkeypatch) as (outlook, links, _):
        told = await outlook.check()
        [observer] = told["observers"]
        assert (observer["peer"], observer["role"], observer["way"]) == ("grid", "coordinator", "direct")
        assert observer["seen"] == f"127.0.0.1:{links.bound[0][1]}", "it sees the link port itself"
        assert observer["called"] is True
        assert told["verdict"] == "open"
        assert told["port_mapping"]["address"] is None
        assert told["port_mapping"]["why"]


async def test_who_does_not_answer_is_named_with_the_reason(monkeypatch) -> None:
    async with node(monkeypatch) as (outlook, links, _):
        links.pause("on battery")
        told = await outlook.check()
        assert told["verdict"] == "cut-off"
        assert "battery" in told["observers"][0]["why"]


async def test_another_network_forgets_what_was_seen_of_the_last_one(monkeypatch) -> None:
    async with node(monkeypatch) as (outlook, links, tell):
        await outlook.check()
        doubts, heard = [], trio.Event()
        monkeypatch.setattr(links, "doubt", lambda: doubts.append(dict(links.observed)))
        outlook.changed.append(lambda change: heard.set() if change is LAST else None)
        await tell.send(ASLEEP)
        await tell.send(LAST)
        await heard.wait()
        asleep, elsewhere = doubts
        assert list(asleep) == ["grid"]
        assert not elsewhere
