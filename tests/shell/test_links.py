"""Does exactly the right peer get a link, one of them, and nobody else?  Real loopback sockets."""

from __future__ import annotations

import contextlib
import errno
import pathlib
import random
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NoReturn

import pytest
import trio

from p2pgrid.errors import BadFrame, Unreachable
from p2pgrid.hole_punch import bulk, doors, greeting
from p2pgrid.hole_punch.bulk import Link, Links, Way, open_links
from p2pgrid.hole_punch.certificate import Certificate
from p2pgrid.hole_punch.framing import MESSAGE_MAX
from p2pgrid.hole_punch.greeting import Allow, Greeting, Hello, Verdict, Welcome
from p2pgrid.hole_punch.link import LOW, QUEUE_MAX, Path
from p2pgrid.hole_punch.negotiation import Answer, Decline, DialBack, Dialled, Offer
from p2pgrid.hole_punch.path import Address
from p2pgrid.hole_punch.rates import FILL, RECORD, Limits
from p2pgrid.hole_punch.switchboard import Switchboard
from p2pgrid.hole_punch.tls import Tls
from p2pgrid.ids import PeerId, digest
from p2pgrid.wire import encode
from tests.memory_network import MemoryNetwork, MemoryWorld, open_world

LOOPBACK = (("127.0.0.1", 0),)
TEXT = range(40, 256)
"""The kinds of messages that begin with a letter or a number in ASCII."""


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
    one: Sequence[Address] = LOOPBACK,
    two: Sequence[Address] = LOOPBACK,
    **allow: Allow,
) -> AsyncIterator[tuple[Opened, Opened, MemoryWorld]]:
    with trio.fail_after(20):
        async with open_world() as world:
            a, b = world.join("a"), world.join("b")
            a.learn(b.me, b.addresses)
            b.learn(a.me, a.addresses)
            here, there = Inbox(), Inbox()
            async with open_links(a, one) as links, open_links(b, two, **allow) as others:
                links.serve(TEXT, here)
                others.serve(TEXT, there)
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
        assert await here.why.receive() == "the peer closed the link: enough"
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
                link.send(b"x" * (LOW // 2))
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
            link.send(b"x" * LOW)
            await there.messages.receive()
        # Less than one second's worth may be owed at the end; how much longer it takes is not ours to say.
        assert time.monotonic() - began > (8 * LOW - RECORD) / 4e6 - FILL


async def test_a_capped_reader_takes_its_time_and_still_sends_at_once() -> None:
    async with open_two() as ((_, links, here), (b, others, there), _):
        others.rates.set(Limits(down=2e6))
        link = await links.link(b.me)
        began = time.monotonic()
        for _ in range(4):
            link.send(b"x" * LOW)
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


async def test_a_peer_that_only_asks_for_links_holds_nobody_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "NEGOTIATION_PATIENCE", 0.2)
    async with open_two() as ((a, links, _), (b, _, _), _), trio.open_nursery() as nursery:
        channels: list[object] = []

        async def ask() -> None:
            while True:
                channels.append(channel := await b.open(a.me, bulk.PROTOCOL))
                await channel.send(Offer([]))
                await channel.receive(Answer | Decline)
                await trio.sleep(0.05)

        nursery.start_soon(ask)
        while b.me not in links._negotiation.answering:
            await trio.lowlevel.checkpoint()
        with pytest.raises(Unreachable, match="again and again"):
            await links.link(b.me)
        nursery.cancel_scope.cancel()


async def test_only_members_get_links() -> None:
    async with open_two(allow=lambda peer, membership: "not a member") as ((a, links, _), (b, others, _), _):
        with pytest.raises(Unreachable, match="not a member"):
            await links.link(b.me)
        with pytest.raises(Unreachable, match="not a member"):
            await others.link(a.me)


async def test_no_stranger_is_told_an_address_or_dialled() -> None:
    async with open_world() as world:
        a, b = world.join("a"), world.join("b")
        a.learn(b.me, b.addresses)

        def members(peer: PeerId, shown: bytes) -> str:
            return "" if shown == b"a's" else "a stranger"

        async with open_links(b, LOOPBACK, Inbox(), members, lambda: b"b's secret") as links:
            with socket.create_server(("127.0.0.1", 0)) as mine, trio.fail_after(10):
                mine.setblocking(False)
                told = [f"127.0.0.1:{mine.getsockname()[1]}"]
                stranger = await a.open(b.me, bulk.PROTOCOL)
                await stranger.send(Offer(told, b"noise"))
                assert await stranger.receive(Answer | Decline) == Decline("a stranger")
                with contextlib.suppress(Unreachable):  # nobody hears it: the channel has ended
                    await stranger.send(DialBack())
                with pytest.raises(Unreachable):
                    await stranger.receive(Dialled)
                with pytest.raises(BlockingIOError):
                    mine.accept()
                member = await a.open(b.me, bulk.PROTOCOL)
                await member.send(Offer(told, b"a's"))
                answer = await member.receive(Answer | Decline)
                assert answer == Answer([f"127.0.0.1:{links.bound[0][1]}"], b"b's secret")
                await member.send(DialBack())
                await trio.lowlevel.wait_readable(mine)
                mine.accept()[0].close()


async def test_who_belongs_where_is_shown_to_no_stranger() -> None:
    async with open_world() as world:
        b, inbox = world.join("b"), Inbox()

        def members(peer: PeerId, shown: bytes) -> str:
            return "" if shown == b"a's" else "a stranger"

        async with open_links(b, LOOPBACK, inbox, members, lambda: b"b's secret") as links:
            port = links.bound[0][1]
            for shown in (b"", b"a's"):
                stranger = Stranger(world, "a")
                said = await stranger.all_that_is_said(port, shown)
                assert (b"b's secret" in said) == (shown == b"a's")


class Stranger:
    """Somebody at a bulk port who speaks TLS, and says what it likes in the greeting."""

    def __init__(self, world: MemoryWorld, name: str) -> None:
        self.greeting = Greeting(MemoryNetwork(world, PeerId(name)))

    async def all_that_is_said(self, port: int, membership: bytes) -> bytes:
        """By the accepting side, in whole messages."""
        own = self.greeting.network
        with socket.create_connection(("127.0.0.1", port), 5) as sock:
            sock.setblocking(False)
            tls = Tls(self.greeting.certificate.dialling, sock, server=False)
            await greeting._shake(tls)
            welcome = await greeting._hear(tls, Welcome)
            signed = own.sign(greeting.DIALS + digest(tls.certificate or b"") + welcome.nonce)
            await greeting._say(tls, Hello(own.me, [], signed, membership))
            return encode(welcome) + encode(await greeting._hear(tls, Verdict))

    async def hears(self, port: int, hello: Callable[[bytes], Hello] | bytes) -> Verdict | None:
        """What it is answered; None where it is turned away."""
        with socket.create_connection(("127.0.0.1", port), 5) as sock:
            sock.setblocking(False)
            tls = Tls(self.greeting.certificate.dialling, sock, server=False)
            with contextlib.suppress(OSError, EOFError):
                await greeting._shake(tls)
                welcome = await greeting._hear(tls, Welcome)
                signed = greeting.DIALS + digest(tls.certificate or b"") + welcome.nonce
                if isinstance(hello, bytes):
                    tls.seal(hello)
                    assert tls.flush()
                else:
                    await greeting._say(tls, hello(signed))
                return await greeting._hear(tls, Verdict)
        return None


async def test_who_proves_its_name_gets_a_link_and_no_one_else() -> None:
    async with open_two() as ((a, _, _), (_, others, there), world):
        port, me = others.bound[0][1], PeerId("me")
        stranger = Stranger(world, me)
        own = stranger.greeting.network
        heard: list[bytes] = []

        def keep(signed: bytes) -> Hello:
            heard.append(own.sign(signed))
            return Hello(me, [], heard[-1])

        wrong: list[Callable[[bytes], Hello] | bytes] = [
            lambda signed: Hello(a.me, [], own.sign(signed)),  # another's name
            lambda signed: Hello(me, [], own.sign(signed + b"x")),
            lambda signed: Hello(me, [], own.sign(greeting.ACCEPTS + signed[len(greeting.DIALS) :])),
            lambda signed: Hello(me, [], b""),
            lambda signed: Hello("", [], own.sign(signed)),
            lambda signed: Hello(me, [], heard[0]),  # what was signed for another connection
            b"noise that is no greeting at all",
            (2**31).to_bytes(4, "big"),
        ]
        verdict = await stranger.hears(port, keep)
        assert verdict is not None
        assert verdict.why == ""
        assert [link.peer for link in there.links] == [me]
        for hello in wrong:
            assert await stranger.hears(port, hello) is None
        assert len(there.links) == 1


async def test_who_answers_in_anothers_place_is_not_taken_for_it() -> None:
    """Neither with a name of its own nor with a signature it heard before."""
    async with open_two(one=()) as ((_, links, here), (b, others, _), world):
        claim = others._greeting._claim
        others._greeting.network = MemoryNetwork(world, PeerId("c"))
        with pytest.raises(Unreachable):
            await links.link(b.me)
        others._greeting.network = b
        others._greeting.certificate = Certificate.make()  # not the one that was signed
        assert others._greeting._claim == claim
        with pytest.raises(Unreachable):
            await links.link(b.me)
        assert here.links == []


async def test_who_is_known_is_dialled_without_a_word_before() -> None:
    async with open_two() as ((a, links, _), (b, others, there), world):
        links.learn(b.me, [f"/ip4/127.0.0.1/tcp/{others.bound[0][1]}/tls", "/ip4/127.0.0.1/tcp/1", "noise"])
        world.down.add(b.me)  # no control channel
        link = await links.link(b.me)
        link.send(b"1")
        assert await there.messages.receive() == b"1"
        assert link.way is Way.DIRECT
        # And whoever was dialled has heard where the other one takes links.
        assert others.addresses_of(a.me) == [f"/ip4/127.0.0.1/tcp/{links.bound[0][1]}/tls"]
        assert links.addresses_of(b.me) == [f"/ip4/127.0.0.1/tcp/{others.bound[0][1]}/tls"]


async def test_where_nobody_is_any_more_it_is_asked_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    async with open_two() as ((_, links, _), (b, others, _), _):
        links.learn(b.me, [f"/ip4/127.0.0.1/tcp/{port}/tls"])
        assert (await links.link(b.me)).live
        assert links.addresses_of(b.me) == [f"/ip4/127.0.0.1/tcp/{others.bound[0][1]}/tls"]


async def test_strangers_cost_little_and_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "HANDSHAKE_PATIENCE", 0.3)
    async with open_two() as ((_, links, _), (b, others, there), _):
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
        assert there.links == []
        assert (await links.link(b.me)).live


async def test_silent_strangers_keep_nobody_out() -> None:
    """However long one of them may stay, a peer that greets gets its link."""
    async with open_two() as ((_, links, _), (b, others, _), _), contextlib.AsyncExitStack() as stack:
        for _ in range(2 * doors.HANDSHAKES_MAX):
            stack.push_async_callback((await trio.open_tcp_stream("127.0.0.1", others.bound[0][1])).aclose)
        assert (await links.link(b.me)).live


def full(*args: object, **more: object) -> NoReturn:
    raise OSError(errno.EMFILE, "Too many open files")


def full_for(inbox: Inbox) -> Callable[..., None]:
    """No link can be made by the node whose receiver this is."""
    make = Link.__init__

    def init(link: Link, peer: PeerId, session: bytes, path: Path, board: Switchboard, *rest: object) -> None:
        full() if board.services[TEXT] is inbox else make(link, peer, session, path, board, *rest)

    return init


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
                    patch.setattr(Link, "__init__", full_for(here))
                case "Link of the other":
                    patch.setattr(Link, "__init__", full_for(there))
                case "context":
                    patch.setattr(Tls, "__init__", full)
                case "socket":
                    patch.setattr(trio.socket, "socket", full)
            with pytest.raises(Unreachable):
                await links.link(b.me)
            for _ in range(len(here.links)):  # dialled back, it had one for a moment
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


def test_a_key_never_touches_a_disk(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "there is none"))
    Certificate.make()


def test_old_tls_is_not_spoken() -> None:
    made = Certificate.make()
    assert made.accepting.minimum_version is made.dialling.minimum_version is ssl.TLSVersion.TLSv1_3
