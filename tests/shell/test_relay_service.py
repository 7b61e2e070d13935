"""Does a relay carry every byte, both ways, to the end and no further?  Loopback, real threads."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import time
from collections.abc import AsyncIterator

import attrs
import pytest
import trio
import trio.lowlevel

from p2pgrid.errors import Misconfigured
from p2pgrid.hole_punch.rates import FILL, Bucket
from p2pgrid.hole_punch.relay import service as services
from p2pgrid.hole_punch.relay.limits import Limits
from p2pgrid.hole_punch.relay.messages import (
    MAGIC,
    TOKEN,
    Connect,
    Connected,
    Ended,
    Incoming,
    Message,
    Reason,
    Refused,
    Reserve,
    Reserved,
    Told,
    decode,
)
from p2pgrid.hole_punch.relay.service import RelayService
from p2pgrid.hole_punch.relay.splice import CAPPED_TURN, TURN
from p2pgrid.ids import PeerId

A, B, C = map(PeerId, "ABC")


class Line:
    """A link as the relay sees it: what is sent can be received."""

    def __init__(self, peer: PeerId) -> None:
        self.peer = peer
        self._token = trio.lowlevel.current_trio_token()
        self._send, self._told = trio.open_memory_channel[Message](1000)

    def send(self, first: bytes, *rest: bytes, bulk: bool = False) -> None:
        message = decode(first)
        assert message is not None
        self._token.run_sync_soon(self._send.send_nowait, message)

    async def told(self) -> Message:
        return await self._told.receive()


@attrs.frozen
class Desk:
    """A relay, its port, and two members' links to it."""

    service: RelayService
    port: int
    a: Line
    b: Line
    dialled: list[trio.SocketStream] = attrs.field(factory=list)

    async def dial(self, shown: bytes) -> trio.SocketStream:
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        self.dialled.append(stream)
        await stream.send_all(shown)
        return stream

    async def tokens(self) -> tuple[bytes, bytes]:
        """Of a new circuit from a to b."""
        self.service.said(self.a, Connect(1, B))
        one, two = await self.a.told(), await self.b.told()
        assert isinstance(one, Connected)
        assert isinstance(two, Incoming)
        return one.token, two.token

    async def circuit(self) -> tuple[trio.SocketStream, trio.SocketStream]:
        one, two = await self.tokens()
        return await self.dial(MAGIC + one), await self.dial(MAGIC + two)

    async def ended(self) -> tuple[Ended, Ended]:
        """What both are told of their circuit."""
        one, two = await self.a.told(), await self.b.told()
        assert isinstance(one, Ended)
        assert isinstance(two, Ended)
        return one, two


@contextlib.asynccontextmanager
async def open_desk(limits: Limits | None = None, *buckets: Bucket, **made: object) -> AsyncIterator[Desk]:
    service = RelayService(buckets=buckets, **made)  # type: ignore[arg-type]
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, service.run)
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

            async def listen() -> None:
                async with listener:
                    while True:
                        stream = await listener.accept()
                        bare = socket.socket(fileno=stream.socket.detach())
                        bare.setblocking(False)
                        nursery.start_soon(service.admit, bare)

            nursery.start_soon(listen)
            service.open(limits or Limits())
            desk = Desk(service, listener.socket.getsockname()[1], Line(A), Line(B))
            try:
                service.said(desk.b, Reserve())
                assert isinstance(await desk.b.told(), Reserved)
                yield desk
            finally:
                service.stop()
                nursery.cancel_scope.cancel()
        for stream in desk.dialled:
            stream.socket.close()


async def all_of(stream: trio.SocketStream) -> bytes:
    return b"".join([part async for part in stream])


async def test_every_byte_arrives_both_ways_and_each_end_by_itself() -> None:
    rng = random.Random(1)
    there, back = rng.randbytes(5 * TURN + 7), rng.randbytes(3 * TURN + 1)
    async with open_desk() as desk:
        a, b = await desk.circuit()
        got: dict[str, bytes] = {}

        async def send(stream: trio.SocketStream, data: bytes) -> None:
            await stream.send_all(data)
            await stream.send_eof()

        async def take(name: str, stream: trio.SocketStream) -> None:
            got[name] = await all_of(stream)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, a, there)
            nursery.start_soon(send, b, back)
            nursery.start_soon(take, "a", a)
            nursery.start_soon(take, "b", b)
        assert got == {"a": back, "b": there}
        state = await desk.service.look()
        assert state.circuits == ()
        assert state.bytes == state.bytes_total == len(there) + len(back)


async def test_one_direction_goes_on_after_the_end_of_the_other() -> None:
    async with open_desk() as desk:
        a, b = await desk.circuit()
        await a.send_all(b"a question")
        await a.send_eof()
        assert await all_of(b) == b"a question"
        assert len((await desk.service.look()).circuits) == 1
        await b.send_all(b"an answer")
        assert await a.receive_some() == b"an answer"
        await b.send_all(b", and more")
        await b.send_eof()
        assert await all_of(a) == b", and more"


async def test_what_is_said_before_the_other_end_is_there_is_heard() -> None:
    async with open_desk() as desk:
        one, two = await desk.tokens()
        a = await desk.dial(MAGIC + one + b"hello")
        b = await desk.dial(MAGIC + two)
        assert await b.receive_some() == b"hello"
        await a.aclose()
        assert await all_of(b) == b""


async def test_a_token_comes_in_pieces() -> None:
    async with open_desk() as desk:
        one, two = await desk.tokens()
        b = await desk.dial(MAGIC + two)
        a = await desk.dial(MAGIC)
        for byte in one:
            await a.send_all(bytes([byte]))
        await a.send_all(b"x")
        assert await b.receive_some() == b"x"


@pytest.mark.parametrize("shown", [MAGIC + bytes(TOKEN), MAGIC + b"half"])
async def test_who_shows_no_token_is_hung_up_on(shown: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "SHOW", 0.05)
    async with open_desk() as desk:
        liar = await desk.dial(shown)
        with contextlib.suppress(trio.BrokenResourceError):
            assert await liar.receive_some() == b""


async def test_a_token_is_good_once() -> None:
    async with open_desk() as desk:
        one, two = await desk.tokens()
        a, thief = await desk.dial(MAGIC + one), await desk.dial(MAGIC + one)
        assert await thief.receive_some() == b""
        b = await desk.dial(MAGIC + two)
        late = await desk.dial(MAGIC + two)
        assert await late.receive_some() == b""
        await a.send_all(b"still")
        assert await b.receive_some() == b"still"


async def test_a_slow_reader_holds_up_nobody_else_and_little_memory() -> None:
    async with open_desk() as desk:
        slow, _ = await desk.circuit()
        a, b = await desk.circuit()
        sent = 0
        with trio.move_on_after(0.5):  # until it is full everywhere
            while True:
                sent += await slow.socket.send(bytes(TURN))
        assert TURN < sent < 64 * TURN
        data, got = os.urandom(4 * TURN), bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send_all, data)
            while len(got) < len(data):
                got += await b.receive_some()
        assert bytes(got) == data


async def test_a_slow_reader_gets_everything_in_the_end() -> None:
    data = random.Random(2).randbytes(16 * TURN)
    async with open_desk() as desk:
        a, b = await desk.circuit()
        b.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await a.send_all(data)
                await a.send_eof()

            nursery.start_soon(send)
            got = bytearray()
            for _ in range(200):
                got += await b.receive_some(1000)
                await trio.lowlevel.checkpoint()
            got += await all_of(b)
        assert bytes(got) == data


async def test_a_connection_that_is_reset_resets_the_other_and_both_hear_why() -> None:
    async with open_desk() as desk:
        a, b = await desk.circuit()
        await a.send_all(b"x")
        assert await b.receive_some() == b"x"
        a.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        a.socket.close()
        with pytest.raises(trio.BrokenResourceError):
            await b.receive_some()
        for told in await desk.ended():
            assert told.reason is Reason.BROKEN
            assert "reset" in told.why


async def test_a_quota_ends_a_circuit_and_both_hear_why() -> None:
    quota = 3 * TURN + 5
    async with open_desk(Limits(quota_each=quota)) as desk:
        one, two = await desk.tokens()
        a, b = await desk.dial(MAGIC + one), await desk.dial(MAGIC + two)
        got = 0
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                with contextlib.suppress(trio.BrokenResourceError):
                    while True:
                        await a.send_all(bytes(TURN))

            nursery.start_soon(send)
            with contextlib.suppress(trio.BrokenResourceError):
                async for part in b:
                    got += len(part)
            told = await desk.ended()
        assert got == quota
        assert [t.token for t in told] == [one, two]
        for t in told:
            assert t.reason is Reason.QUOTA
            assert t.why.startswith(
                f"the {quota} bytes that A may have here in 24 h are used up; again in 24 h"
            )
        desk.service.said(desk.a, Connect(2, B))
        refused = await desk.a.told()
        assert isinstance(refused, Refused)
        assert (refused.request, refused.reason) == (2, Reason.QUOTA)


async def test_a_quota_that_is_used_up_exactly_ends_nothing() -> None:
    async with open_desk(Limits(quota=10)) as desk:
        a, b = await desk.circuit()
        await a.send_all(b"0123456789")
        await a.send_eof()
        assert await all_of(b) == b"0123456789"
        await b.send_eof()
        assert await all_of(a) == b""
        assert (await desk.service.look()).refused == {}


RATE = 500_000.0


@pytest.mark.parametrize(
    ("limits", "bucket"),
    [(Limits(rate=RATE), None), (Limits(rate_each=RATE), None), (Limits(), Bucket(RATE))],
    ids=["all", "circuit", "node"],
)
async def test_a_rate_is_kept(limits: Limits, bucket: Bucket | None) -> None:
    async with open_desk(limits, *([bucket] if bucket else [])) as desk:
        a, b = await desk.circuit()
        size = 300_000
        began = time.monotonic()
        await a.send_all(bytes(size))
        await a.send_eof()
        assert len(await all_of(b)) == size
        took = time.monotonic() - began
        assert took >= (size - RATE * FILL - 2 * CAPPED_TURN) / RATE


async def test_a_high_cap_is_used_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is ready does not wait for more to come: with 32 KiB in 8 ms there would be 4 MB/s."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    async with open_desk(Limits(rate=40e6)) as desk:
        a, b = await desk.circuit()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send_all, bytes(12 * TURN))
            got = 0
            while got < 12 * TURN:
                got += len(await b.receive_some())
    assert sum(slept) < 0.3


async def test_under_a_cap_all_circuits_go_in_turn() -> None:
    async with open_desk(Limits(rate=2e6)) as desk:
        got = [0, 0, 0]
        async with trio.open_nursery() as nursery:

            async def pump(place: int) -> None:
                a, b = await desk.circuit()
                nursery.start_soon(a.send_all, bytes(8 * TURN))
                async for part in b:
                    got[place] += len(part)
                    if sum(got) > 1_200_000:
                        nursery.cancel_scope.cancel()

            for place in range(3):
                nursery.start_soon(pump, place)
                await trio.testing.wait_all_tasks_blocked()
        assert min(got) > 200_000


async def test_who_is_barred_and_who_is_paused_hears_it() -> None:
    async with open_desk() as desk:
        a, b = await desk.circuit()
        desk.service.bar(A, "its membership was revoked")
        for told in await desk.ended():
            assert (told.reason, told.why) == (Reason.BARRED, "A: its membership was revoked")
        with contextlib.suppress(trio.BrokenResourceError):
            assert await a.receive_some() == b""
        a, b = await desk.circuit()
        desk.service.close("paused: it is within a window")
        for line in (desk.a, desk.b):
            told = await line.told()
            while isinstance(told, Refused):  # the reservation
                told = await line.told()
            assert isinstance(told, Ended)
            assert (told.reason, told.why) == (Reason.NO_RELAY, "paused: it is within a window")
        with contextlib.suppress(trio.BrokenResourceError):
            assert await b.receive_some() == b""
        desk.service.said(desk.a, Connect(9, B))
        refused = await desk.a.told()
        assert isinstance(refused, Refused)
        assert refused.why == "paused: it is within a window"


async def test_no_member_gets_a_circuit_or_is_called() -> None:
    barred = {C: "no member of this grid"}
    async with open_desk(allow=lambda peer: barred.get(peer, "")) as desk:
        stranger = Line(C)
        for asked in (Reserve(), Connect(3, B)):
            desk.service.said(stranger, asked)
            refused = await stranger.told()
            assert isinstance(refused, Refused)
            assert (refused.reason, refused.why) == (Reason.BARRED, "no member of this grid")
        barred[B] = "its ticket was revoked"
        desk.service.said(desk.a, Connect(4, B))
        assert await desk.a.told() == Refused(4, Reason.BARRED, "its ticket was revoked")


async def test_idle_circuits_hold_two_connections_each_and_nothing_else() -> None:
    async with open_desk() as desk:
        pairs = [await desk.circuit() for _ in range(30)]
        for a, b in pairs:
            await a.send_all(b"x")
            assert await b.receive_some() == b"x"
        before = len(os.listdir("/proc/self/fd"))
        for a, b in pairs:
            await a.aclose()
            await b.aclose()
        while (await desk.service.look()).circuits:
            await trio.lowlevel.checkpoint()
        assert before - len(os.listdir("/proc/self/fd")) == 4 * len(pairs)  # ours are here, too


async def test_a_relay_takes_no_more_circuits_than_it_may_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_files", lambda: 60)
    async with open_desk(Limits(circuits=1000)) as desk:
        assert (await desk.service.look()).limits.circuits == 10


async def test_where_there_is_no_splice_nobody_relays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "splice")
    service = RelayService()
    with pytest.raises(Misconfigured, match="only Linux can relay"):
        service.open(Limits())
    service.stop()
    service.run()


async def test_when_it_stops_everybody_hears_and_no_file_stays_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with open_desk() as desk:
        a, _ = await desk.circuit()
        await a.send_all(bytes(TURN))
        await desk.dial(MAGIC + (await desk.tokens())[0])  # and waits for the other end
        told: list[Told] = []
    for line in (desk.a, desk.b):
        while not isinstance(said := await line.told(), Ended):
            told.append(said)  # type: ignore[arg-type]
        assert said.why == "the node stops"
    assert len(os.listdir("/proc/self/fd")) <= before
