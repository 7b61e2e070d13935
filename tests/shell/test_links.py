"""Does exactly the right peer get a link, one of them, and nobody else?  Real loopback sockets."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import NoReturn

import pytest
import trio

from p2pgrid.errors import BadFrame, Unreachable
from p2pgrid.hole_punch import bulk
from p2pgrid.hole_punch.bulk import Answer, Decline, Link, Links, Offer, Way, open_links
from p2pgrid.hole_punch.certificate import Certificate, belongs
from p2pgrid.hole_punch.framing import MESSAGE_MAX
from p2pgrid.hole_punch.link import LOW, QUEUE_MAX
from p2pgrid.hole_punch.path import Address
from p2pgrid.hole_punch.rates import FILL, RECORD, Limits
from p2pgrid.ids import PeerId
from tests.memory_network import MemoryNetwork, MemoryWorld, open_world

LOOPBACK = (("127.0.0.1", 0),)


class Inbox:
    """Keeps what links bring, and sends what it is asked for; a receiver."""

    def __init__(self) -> None:
        self.token = trio.lowlevel.current_trio_token()
        self.send, self.messages = trio.open_memory_channel[bytes](1000)
        self.ended, self.why = trio.open_memory_channel[str](1000)
        self.links: list[Link] = []
        self.asked = 0

    def __call__(self, link: Link) -> Inbox:
        self.links.append(link)
        return self

    def received(self, message: memoryview) -> None:
        if message == b"noise":
            raise BadFrame(why="noise")
        self.token.run_sync_soon(self.send.send_nowait, bytes(message))

    def drained(self) -> None:
        self.asked += 1

    def left(self, why: str) -> None:
        self.token.run_sync_soon(self.ended.send_nowait, why)


Opened = tuple[MemoryNetwork, Links, Inbox]


@contextlib.asynccontextmanager
async def open_two(
    one: Sequence[Address] = LOOPBACK, two: Sequence[Address] = LOOPBACK, **allow: Callable[[PeerId], bool]
) -> AsyncIterator[tuple[Opened, Opened, MemoryWorld]]:
    with trio.fail_after(20):
        async with open_world() as world:
            a, b = world.join("a"), world.join("b")
            a.learn(b.me, b.addresses)
            b.learn(a.me, a.addresses)
            here, there = Inbox(), Inbox()
            async with open_links(a, one, here) as links, open_links(b, two, there, **allow) as others:
                yield (a, links, here), (b, others, there), world


async def test_messages_go_both_ways() -> None:
    async with open_two() as ((a, links, here), (b, others, there), _):
        link = await links.link(b.me)
        assert link.way is Way.DIRECT
        assert await links.link(b.me) is link
        long = random.Random(1).randbytes(MESSAGE_MAX)
        link.send(b"hello, ", b"you")
        link.send(b"long", long[4:])
        assert await there.messages.receive() == b"hello, you"
        assert await there.messages.receive() == b"long" + long[4:]
        back = await others.link(a.me)
        assert there.links == [back]
        back.send(b"and back")
        assert await here.messages.receive() == b"and back"


async def test_who_cannot_be_dialled_dials_back() -> None:
    async with open_two(two=()) as ((_, links, _), (b, others, there), _):
        link = await links.link(b.me)
        link.send(b"1")
        assert await there.messages.receive() == b"1"
        assert (link.way, there.links[0].way) == (Way.REVERSE, Way.REVERSE)
        assert len(links.live()) == len(others.live()) == 1


async def test_when_neither_can_be_dialled_it_is_said() -> None:
    async with open_two(one=(), two=()) as ((_, links, _), (b, _, _), _):
        with pytest.raises(Unreachable, match="neither side"):
            await links.link(b.me)
        assert links.live() == []


@pytest.mark.parametrize("tries", range(10))
async def test_two_attempts_at_once_make_one_link(tries: int) -> None:
    async with open_two() as ((a, links, here), (b, others, there), _):
        made: list[Link] = []

        async def make(links: Links, peer: PeerId) -> None:
            made.append(await links.link(peer))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(make, links, b.me)
                nursery.start_soon(make, others, a.me)
        assert len(set(made)) == 2
        assert len(here.links) == len(there.links) == 1
        here.links[0].send(b"1")
        assert await there.messages.receive() == b"1"


async def test_a_link_that_is_lost_is_told_at_both_ends_and_made_anew() -> None:
    async with open_two() as ((_, links, here), (b, _, there), _):
        link = await links.link(b.me)
        there.links[0].close("enough")
        assert await there.why.receive() == "enough"
        assert await here.why.receive() == "the peer closed the link"
        again = await links.link(b.me)
        assert again is not link
        again.send(b"1")
        assert await there.messages.receive() == b"1"


async def test_noise_ends_the_link_and_nothing_else() -> None:
    async with open_two() as ((_, links, here), (b, _, there), _):
        (await links.link(b.me)).send(b"noise")
        assert "noise" in await there.why.receive()
        await here.why.receive()
        (await links.link(b.me)).send(b"music")
        assert await there.messages.receive() == b"music"


async def test_a_reader_that_does_not_read_is_not_waited_for() -> None:
    stop = threading.Event()
    async with open_two() as ((_, links, here), (b, _, there), _):
        there.received = lambda message: (stop.wait(10), None)[1]  # type: ignore[method-assign]
        link = await links.link(b.me)
        try:
            while link.live:
                link.send(bytes(LOW // 2))
                assert link.queued <= QUEUE_MAX + LOW
                await trio.lowlevel.checkpoint()
        finally:
            stop.set()
        assert await here.why.receive() == "the peer does not read"


@pytest.mark.parametrize("limits", [Limits(up=4e6), Limits(up_link=4e6)])
async def test_a_capped_sender_takes_its_time(limits: Limits) -> None:
    async with open_two() as ((_, links, _), (b, _, there), _):
        links.rates.set(limits)
        link = await links.link(b.me)
        began = time.monotonic()
        for _ in range(8):
            link.send(bytes(LOW))
            await there.messages.receive()
        # Less than one second's worth may be owed at the end; how much longer it takes is not ours to say.
        assert time.monotonic() - began > (8 * LOW - RECORD) / 4e6 - FILL


async def test_a_capped_reader_takes_its_time_and_still_sends_at_once() -> None:
    async with open_two() as ((_, links, here), (b, others, there), _):
        others.rates.set(Limits(down=2e6))
        link = await links.link(b.me)
        began = time.monotonic()
        for _ in range(4):
            link.send(bytes(LOW))
        while not there.links:
            await trio.lowlevel.checkpoint()
        there.links[0].send(b"still here")
        assert await here.messages.receive() == b"still here"
        for _ in range(4):
            await there.messages.receive()
        assert time.monotonic() - began > (4 * LOW - RECORD) / 2e6 - FILL


async def test_a_paused_node_has_no_links_until_it_goes_on() -> None:
    async with open_two() as ((a, links, here), (b, others, there), _):
        link = await links.link(b.me)
        links.pause("it is lunch time")
        assert "lunch" in await here.why.receive()
        await there.why.receive()
        assert not link.live
        with pytest.raises(Unreachable, match="lunch"):
            await links.link(b.me)
        with pytest.raises(Unreachable, match="paused by its owner"):
            await others.link(a.me)
        links.pause("")
        assert (await others.link(a.me)).live


async def test_only_members_get_links() -> None:
    async with open_two(allow=lambda peer: False) as ((a, links, _), (b, others, _), _):
        with pytest.raises(Unreachable, match="not a member"):
            await links.link(b.me)
        with pytest.raises(Unreachable, match="not a member"):
            await others.link(a.me)


def connect(port: int, certificate: Certificate, pinned: bytes) -> bytes:
    """What an own TLS client hears at a bulk port; empty where it is turned away."""
    context = certificate.context(server=False, pinned=[pinned])
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port), 5) as sock,
        context.wrap_socket(sock) as tls,
    ):
        return tls.recv(4)
    return b""


async def test_another_certificate_than_the_one_told_is_turned_away() -> None:
    async with open_two() as ((a, _, _), (b, others, there), _):
        port = others.bound[0][1]
        told, other = Certificate.make(a.me), Certificate.make(a.me)
        nobody = await trio.to_thread.run_sync(connect, port, told, told.der)
        assert nobody == b""  # nobody is expected
        channel = await a.open(b.me, bulk.PROTOCOL)
        await channel.send(Offer(told.der, []))
        theirs = (await channel.receive(Answer)).certificate
        assert await trio.to_thread.run_sync(connect, port, other, theirs) == b""
        assert there.links == []
        assert await trio.to_thread.run_sync(connect, port, told, theirs) == bytes(4)
        assert [link.peer for link in there.links] == [a.me]
        assert await trio.to_thread.run_sync(connect, port, told, theirs) == b""  # once only
        await channel.aclose()


async def test_a_certificate_of_somebody_else_is_not_taken() -> None:
    async with open_two() as ((a, _, _), (b, _, _), _):
        victim = Certificate.make(PeerId("victim"))
        for told in (victim.der, b"noise", b"", bytes(5000)):
            channel = await a.open(b.me, bulk.PROTOCOL)
            await channel.send(Offer(told, []))
            with pytest.raises(Unreachable):
                await channel.receive(Answer | Decline)
            await channel.aclose()
    assert belongs(victim.der, PeerId("victim"))
    assert not belongs(victim.der, a.me)


async def test_an_answer_with_anothers_certificate_is_not_dialled() -> None:
    async with open_two() as ((_, links, _), (b, others, _), _):
        others._certificate = Certificate.make(PeerId("victim"))
        with pytest.raises(Unreachable, match="not its own"):
            await links.link(b.me)


async def test_strangers_cost_little_and_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "HANDSHAKE_PATIENCE", 0.3)
    async with open_two() as ((a, links, _), (b, others, there), _):
        channel = await a.open(b.me, bulk.PROTOCOL)  # now somebody is expected
        await channel.send(Offer(Certificate.make(a.me).der, []))
        await channel.receive(Answer)
        strangers = [await trio.open_tcp_stream("127.0.0.1", others.bound[0][1]) for _ in range(50)]
        for place, stranger in enumerate(strangers):
            with contextlib.suppress(trio.BrokenResourceError):
                if place % 2:
                    await stranger.send_all(random.Random(place).randbytes(300))
        for stranger in strangers:
            with contextlib.suppress(trio.BrokenResourceError):
                while await stranger.receive_some():  # a TLS alert, perhaps, and then the end
                    pass
            await stranger.aclose()
        await channel.aclose()
        assert there.links == []
        assert (await links.link(b.me)).live


def full(*args: object, **more: object) -> NoReturn:
    raise OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize("what", ["Link of the dialler", "Link of the other", "context", "socket"])
async def test_no_descriptor_left_costs_one_attempt_and_nothing_else(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said as `Unreachable`, leaves no socket behind, and the next attempt makes a link."""
    monkeypatch.setattr(bulk, "NEGOTIATION_PATIENCE", 1.0)
    async with open_two() as ((_, links, here), (b, _, there), _):
        with monkeypatch.context() as patch:
            match what:
                case "Link of the dialler":
                    patch.setattr(bulk, "Link", lambda *a: full() if a[3] is here else Link(*a))
                case "Link of the other":
                    patch.setattr(bulk, "Link", lambda *a: full() if a[3] is there else Link(*a))
                case "context":
                    patch.setattr(Certificate, "context", full)
                case "socket":
                    patch.setattr(trio.socket, "socket", full)
            with pytest.raises(Unreachable):
                await links.link(b.me)
        for _ in here.links:  # dialled back, it had one for a moment
            await here.why.receive()
        (await links.link(b.me)).send(b"1")
        assert await there.messages.receive() == b"1"


async def test_a_port_goes_on_listening_when_no_descriptor_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    accept, calls = trio.SocketListener.accept, []

    async def accept_or_full(listener: trio.SocketListener) -> trio.SocketStream:
        calls.append(trio.current_time())
        if len(calls) < 4:
            full()
        return await accept(listener)

    monkeypatch.setattr(trio.SocketListener, "accept", accept_or_full)
    async with open_two() as ((_, links, _), (b, _, there), _):
        (await links.link(b.me)).send(b"1")
        assert await there.messages.receive() == b"1"
        assert calls[-1] - calls[0] >= 0.1  # it did not spin


def test_a_key_never_touches_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "there is none"))
    Certificate.make(PeerId("a")).context(server=True, pinned=[])


def test_old_tls_is_not_spoken() -> None:
    context = Certificate.make(PeerId("a")).context(server=True, pinned=[])
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert context.verify_mode is ssl.CERT_REQUIRED
