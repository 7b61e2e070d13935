"""Is a node dialled where it is seen, when it asks for that, and nobody else ever?  Real loopback sockets."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from functools import partial

import pytest
import trio

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch import calling as module
from p2pgrid.hole_punch.bulk import Link, Links, Way, open_links
from p2pgrid.hole_punch.calling import Calling, open_calling
from p2pgrid.hole_punch.calling_messages import MAGIC, TOKEN
from p2pgrid.hole_punch.path import to_multiaddr
from tests.memory_network import open_world


@contextlib.asynccontextmanager
async def two() -> AsyncIterator[tuple[Calling, Links, Link, Calling]]:
    """A node that asks, its link, and the one that is asked."""
    with trio.fail_after(20):
        async with open_world() as world, contextlib.AsyncExitStack() as rooms:
            a, b = world.join("a"), world.join("b")
            here = await rooms.enter_async_context(open_links(a, [("127.0.0.1", 0)]))
            there = await rooms.enter_async_context(open_links(b, [("127.0.0.1", 0)]))
            asking = await rooms.enter_async_context(open_calling(here))
            asked = await rooms.enter_async_context(open_calling(there))
            here.learn(b.me, [to_multiaddr(there.bound[0])])
            yield asking, here, await here.link(b.me), asked


async def test_a_port_that_is_open_is_reached_and_one_that_is_not_is_not(monkeypatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with two() as (asking, links, link, _):
            assert await asking.call(link, links.bound[0][1]) is True
            assert await asking.call(link, unused.getsockname()[1]) is False


async def test_somebody_else_at_that_port_is_not_taken_for_us(monkeypatch) -> None:
    monkeypatch.setattr(module, "ARRIVAL_PATIENCE", 0.05)
    async with two() as (asking, _, link, _), trio.open_nursery() as nursery:
        heard = []

        async def other(stream: trio.SocketStream) -> None:
            heard.append(await stream.receive_some(100))

        [listener] = await nursery.start(partial(trio.serve_tcp, other, 0, host="127.0.0.1"))
        assert await asking.call(link, listener.socket.getsockname()[1]) is False
        assert heard[0].startswith(MAGIC)
        nursery.cancel_scope.cancel()


async def test_who_asks_too_often_is_refused() -> None:
    async with two() as (asking, links, link, _):
        assert await asking.call(link, links.bound[0][1]) is True
        assert await asking.call(link, links.bound[0][1]) is None


async def test_a_relayed_link_says_nothing_of_where_its_peer_is(monkeypatch) -> None:
    async with two() as (asking, links, link, _):
        monkeypatch.setattr(Link, "way", Way.RELAYED)
        assert await asking.call(link, links.bound[0][1]) is None


async def test_a_node_reaches_itself() -> None:
    async with two() as (asking, links, _, _):
        assert await asking.reach_self(links.bound[0]) is True


async def test_a_wrong_token_and_half_of_one_are_nothing(monkeypatch) -> None:
    monkeypatch.setattr(module, "ARRIVAL_PATIENCE", 0.05)
    async with two() as (asking, links, _, _):
        for noise in (MAGIC + bytes(TOKEN), MAGIC + b"half"):
            stream = await trio.open_tcp_stream(*links.bound[0])
            await stream.send_all(noise)
            await stream.aclose()
        assert await asking.reach_self(links.bound[0]) is True


@pytest.mark.parametrize("message", [bytes([104]) * 5, bytes([105]) * 50, bytes([104])])
async def test_a_message_of_another_length_ends_the_link(message: bytes) -> None:
    async with two() as (asking, _, link, _):
        with pytest.raises(BadFrame):
            asking.later(link, message)


async def test_a_message_of_a_later_version_is_passed_over() -> None:
    async with two() as (asking, links, link, _):
        asking.later(link, bytes([107, 1]))
        assert await asking.call(link, links.bound[0][1]) is True
