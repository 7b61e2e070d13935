"""Do untouched programs reach what they may on the grid, and nothing else?  Real loopback sockets."""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import AsyncIterator
from functools import partial

import attrs
import pytest
import trio

from p2pgrid.errors import Misused, NotFound
from p2pgrid.hole_punch.bulk import open_links
from p2pgrid.hole_punch.streams.service import Declined
from p2pgrid.ids import PeerId
from p2pgrid.node.proxy import socks
from p2pgrid.node.proxy.listen import check_local, open_forward, open_socks
from p2pgrid.node.proxy.names import parse
from p2pgrid.node.proxy.out import check_host, connect
from p2pgrid.node.proxy.proxy import Proxy, open_proxy
from p2pgrid.node.proxy.rules import Accept, Exposure, HereGuest, Net
from p2pgrid.scheduler import messages as m
from tests.memory_network import MemoryNetwork, open_world

LOOPBACK = [("127.0.0.1", 0)]
ANY = ("127.0.0.1", 0)
WEB = "webjobwebj"
ANN = socks.Account(b"ann", b"secret")


@attrs.define
class Coordinator:
    """Says who runs what."""

    runs: dict[str, dict[PeerId, tuple[int, ...]]] = attrs.field(factory=dict)
    names: dict[str, PeerId] = attrs.field(factory=dict)

    async def neighbours(self, job: str) -> list[m.Neighbour]:
        await trio.lowlevel.checkpoint()
        return [m.Neighbour(peer, (), indices) for peer, indices in self.runs.get(job, {}).items()]

    async def nodes(self) -> list[m.NodeView]:
        await trio.lowlevel.checkpoint()
        return [m.NodeView(peer, name, (), True, 0.0) for name, peer in self.names.items()]


@attrs.define
class World:
    """Ann has submitted a job of one guest, which Bob runs; Eve runs nothing."""

    ann: Proxy
    bob: Proxy
    eve: Proxy
    coordinator: Coordinator
    guest: HereGuest
    server: int
    """The port of a program that says `hello` and then all that it is told, until its end."""


async def _greet(stream: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError):
        await stream.send_all(b"hello ")
        async for data in stream:
            await stream.send_all(data)
        await stream.send_eof()


async def _serve_page(stream: trio.SocketStream) -> None:
    said = b""
    while not said.endswith(b"\r\n\r\n"):
        said += await stream.receive_some()
    await stream.send_all(b"HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\na page")


async def _dial(port: int, net: Net, *, servers: dict[int, int]) -> socket.socket:
    """The guest of these tests has two programs, at its ports 80 and 8080."""
    if port not in servers:
        raise ConnectionRefusedError(111, "Connection refused")
    return await connect([("127.0.0.1", servers[port])], net)


@contextlib.asynccontextmanager
async def open_grid() -> AsyncIterator[World]:
    with trio.fail_after(30):
        async with open_world() as world, contextlib.AsyncExitStack() as stack:
            nursery = await stack.enter_async_context(trio.open_nursery())
            stack.callback(nursery.cancel_scope.cancel)
            [listener] = await nursery.start(partial(trio.serve_tcp, _greet, 0, host="127.0.0.1"))
            server = listener.socket.getsockname()[1]
            [listener] = await nursery.start(partial(trio.serve_tcp, _serve_page, 0, host="127.0.0.1"))
            servers = {80: server, 8080: listener.socket.getsockname()[1]}
            coordinator = Coordinator()
            nets = [world.join(name) for name in ("ann", "bob", "eve")]
            proxies = []
            for net in nets:
                for other in nets:
                    net.learn(other.me, other.addresses)
                proxies.append(await stack.enter_async_context(_node(net, coordinator)))
            ann, bob, eve = proxies
            guest = HereGuest(WEB, 0, ann.me, (Accept(80, "job"), Accept(8080), Accept(81)))
            coordinator.runs[WEB] = {bob.me: (0,)}
            coordinator.names["Anns-PC"] = ann.me
            stack.enter_context(bob.guest(guest, partial(_dial, servers=servers)))
            yield World(ann, bob, eve, coordinator, guest, server)


@contextlib.asynccontextmanager
async def _node(net: MemoryNetwork, coordinator: Coordinator) -> AsyncIterator[Proxy]:
    async with (
        open_links(net, LOOPBACK) as links,
        open_proxy(net.me, links, coordinator, links.learn) as proxy,  # type: ignore[arg-type]
    ):
        yield proxy


async def _conversation(stream: trio.SocketStream, text: bytes) -> bytes:
    async with stream:
        await stream.send_all(text)
        await stream.send_eof()
        return b"".join([data async for data in stream])


async def _talk(at: tuple[str, int], text: bytes) -> bytes:
    return await _conversation(await trio.open_tcp_stream(*at), text)


async def _settled(grid: World, count: int) -> None:
    """Until so many flows are under way at both ends."""
    while not len(grid.ann.flows()) == len(grid.bob.flows()) == count:  # noqa: ASYNC110  (of other threads)
        await trio.sleep(0.01)


async def test_a_forward_leads_to_a_guest() -> None:
    async with open_grid() as grid:
        async with open_forward(grid.ann, ANY, parse(f"80.{WEB}.grid", 1)) as at:
            assert await _talk(at, b"you") == b"hello you"
            await _settled(grid, 0)
            talking = await trio.open_tcp_stream(*at)
            await talking.receive_some()
            [row] = grid.ann.flows()
            assert row["to"] == f"port 80 of a guest of {WEB}"
            assert row["received"] == 6
            assert (row["way"], row["opened"], row["peer"]) == ("direct", "here", "bob")
            assert [row["who"] for row in grid.bob.flows()] == ["ann"]
            await talking.aclose()
        with pytest.raises(OSError, match="attempts to connect"):
            await trio.open_tcp_stream(*at)


async def test_who_may_not_is_refused_by_the_node_that_is_reached() -> None:
    async with open_grid() as grid:
        for proxy, name, why in (
            (grid.eve, f"80.{WEB}.grid", "did not submit"),
            (grid.ann, f"22.{WEB}.grid", "accepts nobody"),
            (grid.ann, "8000.bob.grid", "called bob"),
        ):
            with pytest.raises((Declined, NotFound), match=why):
                await proxy.reach(parse(name, 1))
        with pytest.raises(Declined, match="refused") as told:
            await grid.ann.reach(parse(f"81.{WEB}.grid", 1))
        assert told.value.code == 5


async def test_a_guest_reaches_what_its_submitter_exposes_to_its_job() -> None:
    async with open_grid() as grid:
        for name in ("8000.owner.grid", "8000.ANNS-pc.grid"):
            with pytest.raises(Declined, match="not exposed"):
                await grid.bob.reach(parse(name, 1), grid.guest)
        with grid.ann.exposed(Exposure(8000, WEB, at=grid.server)):
            for name in ("8000.owner.grid", "8000.ANNS-pc.grid"):
                reached = await grid.bob.reach(parse(name, 1), grid.guest)
                ours, program = socket.socketpair()
                await reached.carry(ours)
                program.setblocking(False)
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(program))
                assert await _conversation(stream, b"there") == b"hello there"
            with pytest.raises(Declined, match="not exposed"):  # a node is not its guest
                await grid.bob.reach(parse("8000.anns-pc.grid", 1))
            with pytest.raises(Declined, match="do not run"):  # nor is one that only says so
                await grid.eve.reach(parse("8000.anns-pc.grid", 1), grid.guest)


async def test_who_has_just_got_the_job_is_looked_up_again() -> None:
    async with open_grid() as grid:
        with grid.ann.exposed(Exposure(8000, WEB, at=grid.server)):
            (await grid.bob.reach(parse("8000.owner.grid", 1), grid.guest)).close()
            grid.coordinator.runs[WEB][grid.eve.me] = (1,)
            (await grid.eve.reach(parse("8000.owner.grid", 1), grid.guest)).close()


async def test_guests_of_one_job_reach_each_other_at_one_node_and_at_two() -> None:
    async with open_grid() as grid:
        grid.coordinator.runs[WEB][grid.eve.me] = (1,)
        for proxy in (grid.eve, grid.bob):
            reached = await proxy.reach(parse(f"80.0.{WEB}.grid", 1), grid.guest)
            ours, program = socket.socketpair()
            program.setblocking(False)
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(program))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reached.carry, ours)
                assert await _conversation(stream, b"mate") == b"hello mate"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(
    ("user", "host", "code", "says"),
    [
        ("ann:secret", f"8080.{WEB}.grid", 0, "a page"),
        ("ann:secret", f"8080.0.{WEB.upper()}.GRID", 0, "a page"),
        ("ann:wrong", f"8080.{WEB}.grid", 97, ""),
        ("ann:secret", f"22.{WEB}.grid", 97, ""),
        ("ann:secret", "example.org", 97, ""),
        ("ann:secret", "127.0.0.1", 97, ""),
    ],
)
async def test_curl_talks_through_socks(user: str, host: str, code: int, says: str) -> None:
    async with open_grid() as grid, open_socks(grid.ann, ANY, ANN) as (_, port):
        proxy = ["--proxy-user", user, "--socks5-hostname", f"127.0.0.1:{port}"]
        words = ["curl", "-sS", *proxy, f"http://{host}/"]
        done = await trio.run_process(words, capture_stdout=True, capture_stderr=True, check=False)
        assert done.returncode == code, done.stderr
        assert done.stdout.decode() == says


async def test_what_a_program_sends_too_early_is_not_lost() -> None:
    async with open_grid() as grid, open_socks(grid.ann, ANY, ANN) as at:
        name = f"80.{WEB}.grid".encode()
        wish = b"\5\1\0\3" + bytes((len(name),)) + name + b"\0\1"
        said = await _talk(at, b"\5\1\2" + b"\1\3ann\6secret" + wish + b"early")
        assert said == b"\5\2\1\0" + socks.reply(0) + b"hello early"


async def test_datagrams_reach_a_guest() -> None:
    async with open_grid() as grid, contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(trio.socket.socket(type=socket.SOCK_DGRAM))
        await server.bind(("127.0.0.1", 0))

        async def dial(port: int, net: Net) -> socket.socket:
            return await connect([server.getsockname()], net)

        stack.enter_context(grid.bob.guest(attrs.evolve(grid.guest, index=5, accepts=(Accept(53),)), dial))
        grid.coordinator.runs[WEB][grid.bob.me] = (0, 5)
        _, port = await stack.enter_async_context(open_socks(grid.ann, ANY, ANN))
        control = await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", port))
        await control.send_all(b"\5\1\2" + b"\1\3ann\6secret" + b"\5\3\0\1\0\0\0\0\0\0")
        said = b""
        while len(said) < 14:
            said += await control.receive_some()
        relay = ("127.0.0.1", int.from_bytes(said[-2:], "big"))
        program = stack.enter_context(trio.socket.socket(type=socket.SOCK_DGRAM))
        name = f"53.5.{WEB}.grid"
        for text in (b"question", b"another"):
            await program.sendto(socks.datagram(name, 7, text), relay)
            body, sender = await server.recvfrom(100)
            assert body == text
            await server.sendto(b"answer to " + text, sender)
            assert socks.read_datagram((await program.recvfrom(1000))[0]) == (name, 7, b"answer to " + text)
        await control.aclose()
        await _settled(grid, 0)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "localhost", "8.8.8.8", ""])
def test_a_listener_is_open_to_this_machine_alone(host: str) -> None:
    with pytest.raises(Misused):
        check_local(host)


async def test_a_port_that_is_taken_is_said() -> None:
    async with open_grid() as grid, open_forward(grid.ann, ANY, parse("1.a.grid", 1)) as at:
        with pytest.raises(Misused, match="in use"):
            async with open_forward(grid.ann, at, parse("1.a.grid", 1)):
                pass


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "10.0.0.1", "::1", "127.1", "0x7f.1", "::ffff:10.0.0.1", "", "a b"]
)
def test_only_the_open_internet_can_be_exposed(host: str) -> None:
    with pytest.raises(Misused):
        check_host(host)


async def test_an_exposed_name_that_resolves_to_a_private_address_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with open_grid() as grid:
        with grid.ann.exposed(Exposure(443, WEB, "rebinding.example")):
            for answers in (["127.0.0.1"], ["1.1.1.1", "192.168.0.1"], ["::ffff:10.0.0.1"], ["fe80::1"]):

                async def found(
                    host: object, port: object, answers: list[str] = answers, **_: object
                ) -> list:
                    await trio.lowlevel.checkpoint()
                    return [(2, 1, 6, "", (answer, 0)) for answer in answers]

                monkeypatch.setattr(trio.socket, "getaddrinfo", found)
                with pytest.raises(Declined, match=r"not in the open Internet|of one network"):
                    await grid.bob.reach(parse("443.owner.grid", 1), grid.guest)
                monkeypatch.undo()
