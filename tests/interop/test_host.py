"""Do real libp2p hosts on loopback keep the contract of `net.py`, also when the other side misbehaves?"""

import signal
import socket
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
import trio.testing

from p2pgrid.errors import BadFrame, Misconfigured, Unreachable
from p2pgrid.hole_punch import host as host_module
from p2pgrid.hole_punch.channel import READ_SIZE
from p2pgrid.hole_punch.host import open_host
from p2pgrid.hole_punch.muxer import WINDOW
from p2pgrid.ids import PeerId
from p2pgrid.wire import BODY_MAX, HEADER
from tests.interop import echo_host
from tests.interop.echo_host import ECHO, Say, echo

PATIENCE = 60  # seconds; only a broken host waits that long


def seed(number):
    return number.to_bytes(32, "big")


@asynccontextmanager
async def hosts(count):
    """`count` hosts; each later one knows where the first is."""
    async with AsyncExitStack() as stack:
        made = [await stack.enter_async_context(open_host(seed(n + 1))) for n in range(count)]
        for other in made[1:]:
            other.learn(made[0].me, made[0].addresses)
        with trio.fail_after(PATIENCE):
            yield made


async def say(network, peer, text):
    channel = await network.open(peer, ECHO)
    await channel.send(Say(text))
    answer = await channel.receive(Say)
    await channel.aclose()
    return answer.text


async def test_a_message_goes_there_and_comes_back_both_ways():
    async with hosts(2) as (anna, bert):
        anna.serve(ECHO, echo)
        bert.serve(ECHO, echo)
        assert await say(bert, anna.me, "x" * (BODY_MAX - 100)) == "x" * (BODY_MAX - 100)
        assert await say(anna, bert.me, "back") == "back"  # down the connection that bert opened
        assert bert.connected == [anna.me]
        assert anna.connected == [bert.me]
        assert all(address.endswith(f"/p2p/{anna.me}") for address in anna.addresses)


async def test_the_server_sees_who_asks_and_the_client_gets_the_last_word_before_the_end():
    async with hosts(2) as (anna, bert):
        asked = []

        async def once(channel):
            asked.append(channel.peer)
            await channel.send(Say("last word"))

        anna.serve(ECHO, once)
        channel = await bert.open(anna.me, ECHO)
        assert channel.peer == anna.me
        assert await channel.receive(Say) == Say("last word")
        with pytest.raises(Unreachable) as ended:
            await channel.receive(Say)
        assert ended.value.who == anna.me
        assert asked == [bert.me]


async def test_a_cancelled_receive_loses_nothing():
    async with hosts(2) as (anna, bert):
        waited, sent = trio.Event(), trio.Event()

        async def late(channel):
            await waited.wait()
            for n in range(100):
                await channel.send(Say(f"{n}" * 2000))
            sent.set()

        anna.serve(ECHO, late)
        channel = await bert.open(anna.me, ECHO)
        with trio.move_on_after(0.05):
            await channel.receive(Say)
        waited.set()
        got = []
        while len(got) < 100:
            with trio.move_on_after(0):  # cancelled as often as it can be
                got.append((await channel.receive(Say)).text)
            await trio.sleep(0.0005)
        assert got == [f"{n}" * 2000 for n in range(100)]


async def test_closing_while_a_receive_waits_ends_it():
    async with hosts(2) as (anna, bert):
        anna.serve(ECHO, echo)
        channel = await bert.open(anna.me, ECHO)
        async with trio.open_nursery() as nursery:

            async def wait():
                with pytest.raises(Unreachable):
                    await channel.receive(Say)

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked(0.05)
            await channel.aclose()
        assert await say(bert, anna.me, "on") == "on"


@pytest.mark.parametrize(
    "noise",
    [
        (BODY_MAX + 1).to_bytes(HEADER, "big"),
        (5).to_bytes(HEADER, "big") + b"noise",
        (1).to_bytes(HEADER, "big") + b"\xc1",
    ],
)
async def test_noise_is_a_bad_frame_and_costs_only_its_stream(noise):
    async with hosts(2) as (anna, bert):
        seen = []

        async def strict(channel):
            try:
                await channel.receive(Say)
            except BadFrame as bad:
                seen.append(bad)
                raise

        anna.serve("/p2pgrid/strict/1", strict)
        anna.serve(ECHO, echo)
        other = await bert.open(anna.me, ECHO)
        channel = await bert.open(anna.me, "/p2pgrid/strict/1")
        await channel._stream.write(noise)
        with pytest.raises(Unreachable):
            await channel.receive(Say)
        assert len(seen) == 1
        await other.send(Say("still here"))
        assert await other.receive(Say) == Say("still here")


async def test_who_sends_more_than_was_granted_loses_the_stream_and_fills_no_memory():
    async with hosts(2) as (anna, bert):
        seen = trio.Event()

        async def idle(stream):
            waiting = stream.muxed_conn.stream_buffers[stream.muxed_stream.stream_id]
            assert stream.muxed_stream.recv_window < WINDOW + READ_SIZE  # whatever was read before
            while not stream.muxed_stream.recv_closed:  # noqa: ASYNC110 - libp2p tells who reads, and only that
                await trio.sleep(0.001)
            assert WINDOW < len(waiting) <= 2 * WINDOW
            seen.set()

        anna.libp2p.set_stream_handler("/p2pgrid/idle/1", idle)
        anna.serve(ECHO, echo)
        greedy = (await bert.open(anna.me, "/p2pgrid/idle/1"))._stream
        greedy.muxed_stream.send_window = 1 << 30
        await greedy.write(bytes(8 << 20))
        await seen.wait()
        assert await say(bert, anna.me, "fine") == "fine"


async def test_a_server_that_fails_resets_its_stream_and_goes_on_serving():
    async with hosts(2) as (anna, bert):

        async def buggy(channel):
            async with trio.open_nursery():
                raise ZeroDivisionError("ours")

        anna.serve("/p2pgrid/buggy/1", buggy)
        anna.serve(ECHO, echo)
        channel = await bert.open(anna.me, "/p2pgrid/buggy/1")
        with pytest.raises(Unreachable):
            await channel.receive(Say)
        assert await say(bert, anna.me, "fine") == "fine"


async def test_an_unknown_protocol_an_unknown_peer_and_a_dead_address_are_unreachable():
    async with hosts(2) as (anna, bert):
        session = None
        with pytest.raises(Unreachable, match="does not speak"):
            await bert.open(anna.me, "/p2pgrid/nobody/1")
        session = bert.session(anna.me)
        with pytest.raises(Unreachable, match="does not speak"):
            await bert.open(anna.me, "/p2pgrid/nobody/1")
        assert bert.session(anna.me) is session is not None  # a sound connection is kept
        with pytest.raises(Unreachable, match="not a peer id"):
            await bert.open(PeerId("nobody"), ECHO)
        with pytest.raises(Unreachable, match="none of its addresses"):
            await anna.open(PeerId(echo_host_id(seed(99))), ECHO)
        stranger = PeerId(echo_host_id(seed(98)))
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))  # nobody listens there
            bert.learn(stranger, [f"/ip4/127.0.0.1/tcp/{bound.getsockname()[1]}"])
            with pytest.raises(Unreachable, match="refused"):
                await bert.open(stranger, ECHO)


def echo_host_id(of_seed):
    return host_module._new_host(of_seed).get_id().to_base58()


async def test_another_peer_at_the_address_is_refused_and_a_second_address_saves():
    async with hosts(3) as (anna, bert, carl):
        anna.serve(ECHO, echo)
        carl._learned.clear()
        carl.learn(anna.me, [bert.addresses[0].partition("/p2p/")[0]])
        with pytest.raises(Unreachable):
            await carl.open(anna.me, ECHO)
        carl.learn(anna.me, ["/ip4/127.0.0.1/tcp/1", "not an address", "/ip4/1.2.3.4/udp/1", *anna.addresses])
        assert await say(carl, anna.me, "found") == "found"


async def test_concurrent_opens_share_one_dial():
    async with hosts(2) as (anna, bert):
        anna.serve(ECHO, echo)
        async with trio.open_nursery() as nursery:
            for n in range(20):
                nursery.start_soon(say, bert, anna.me, str(n))
        assert len(bert._swarm.get_connections()) == 1


async def test_a_caller_that_gives_up_does_not_spoil_the_dial_for_others():
    async with hosts(2) as (anna, bert):
        anna.serve(ECHO, echo)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(say, bert, anna.me, "patient")
            with trio.move_on_after(0):
                await bert.open(anna.me, ECHO)
        assert await say(bert, anna.me, "again") == "again"


async def test_only_noise_is_spoken(monkeypatch):
    """A peer that offers plain text, with whatever id it likes, gets no connection."""
    async with hosts(1) as (anna,):
        _, port = anna.addresses[0].partition("/tcp/")[::2]
        stream = await trio.open_tcp_stream("127.0.0.1", int(port.partition("/")[0]))
        async with stream:
            for line in (b"/multistream/1.0.0\n", b"/plaintext/2.0.0\n", b"/tls/1.0.0\n"):
                await stream.send_all(bytes([len(line)]) + line)
            said = b""
            while said.count(b"na\n") < 2:
                part = await stream.receive_some()
                assert part, said
                said += part
        assert b"plaintext" not in said
        assert anna.connected == []


async def test_connections_that_ended_free_their_places(monkeypatch):
    """libp2p keeps a place for every inbound connection there ever was; a coordinator would fill up."""
    monkeypatch.setattr(host_module, "CONNECTIONS_MAX", 3)
    async with hosts(1) as (anna,):
        anna.serve(ECHO, echo)
        for n in range(8):
            async with open_host(seed(50 + n)) as guest:
                guest.learn(anna.me, anna.addresses)
                assert await say(guest, anna.me, "hello") == "hello"
            while anna.connected:  # noqa: ASYNC110 - libp2p tells nobody
                await trio.sleep(0.01)


async def test_a_port_in_use_is_refused_and_a_bad_address_too():
    async with hosts(1) as (anna,):
        with pytest.raises(Misconfigured, match="cannot listen"):
            async with open_host(seed(2), [anna.addresses[0].partition("/p2p/")[0]]):
                pass
        for bad in (
            "",
            "127.0.0.1:4001",
            "/ip4/127.0.0.1/udp/1",
            "/ip4/127.0.0.1/tcp/99999",
            "/dns4/x/tcp/1",
        ):
            with pytest.raises(Misconfigured):
                async with open_host(seed(2), [bad]):
                    pass


async def test_an_error_in_the_block_passes_as_itself():
    with pytest.raises(ZeroDivisionError):
        async with open_host(seed(1)):
            raise ZeroDivisionError


async def test_listening_everywhere_announces_addresses_that_can_be_dialled():
    async with open_host(seed(1), ["/ip4/0.0.0.0/tcp/0"]) as anna, open_host(seed(2)) as bert:
        assert anna.addresses
        assert not any("/0.0.0.0/" in address for address in anna.addresses)
        anna.serve(ECHO, echo)
        bert.learn(anna.me, anna.addresses)
        with trio.fail_after(PATIENCE):
            assert await say(bert, anna.me, "hello") == "hello"


async def test_both_dial_at_once_and_each_is_heard():
    async with hosts(2) as (anna, bert):
        anna.learn(bert.me, bert.addresses)
        for host in (anna, bert):
            host.serve(ECHO, echo)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(say, anna, bert.me, "hello")
            nursery.start_soon(say, bert, anna.me, "hello")
        assert anna._swarm.get_connections()
        assert await say(anna, bert.me, "again") == "again"


# --- other processes -------------------------------------------------------------------


def start(of_seed, port):
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", echo_host.__file__, of_seed.hex(), str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process, process.stdout.readline().strip()


@asynccontextmanager
async def running(of_seed, port):
    process, address = await trio.to_thread.run_sync(start, of_seed, port)
    try:
        yield process, address
    finally:
        process.kill()
        _, said = process.communicate()
        assert [line for line in said.splitlines() if "Deprecat" not in line and ": " in line] == []


async def test_a_peer_killed_and_started_again_is_found_by_the_next_open():
    async with open_host(seed(2)) as bert:
        async with running(seed(1), 0) as (process, address):
            anna = PeerId(address.rpartition("/")[2])
            port = int(address.split("/")[4])
            bert.learn(anna, [address])
            with trio.fail_after(PATIENCE):
                channel = await bert.open(anna, ECHO)
                process.send_signal(signal.SIGKILL)
                with pytest.raises(Unreachable):
                    await channel.receive(Say)
                with pytest.raises(Unreachable):
                    await bert.open(anna, ECHO)
        async with running(seed(1), port):
            with trio.fail_after(5):  # no memory of the failed dial is kept
                assert await say(bert, anna, "back") == "back"


async def test_strangers_and_the_killed_leave_no_word_on_the_terminal_and_no_trouble():
    """Noise on the port, and clients that vanish with streams open."""
    async with running(seed(1), 0) as (_, address):
        anna, port = PeerId(address.rpartition("/")[2]), int(address.split("/")[4])
        with trio.fail_after(PATIENCE):
            for noise in (b"", b"\x13/multistream/1.0.0\n", b"\xff" * 5000, b"GET / HTTP/1.1\r\n\r\n"):
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                await stream.send_all(noise)
                await trio.aclose_forcefully(stream)
            async with open_host(seed(2)) as bert:
                bert.learn(anna, [address])
                await (await bert.open(anna, ECHO)).send(Say("x"))
            async with open_host(seed(3)) as carl:
                carl.learn(anna, [address])
                assert await say(carl, anna, "fine") == "fine"


async def test_a_peer_that_stopped_answering_is_dialled_anew(monkeypatch):
    """SIGSTOP: the connection looks alive and nothing comes back; another process takes the place."""
    monkeypatch.setattr(host_module, "STREAM_PATIENCE", 1.0)
    async with open_host(seed(2)) as bert, running(seed(1), 0) as (process, address):
        anna = PeerId(address.rpartition("/")[2])
        bert.learn(anna, [address])
        with trio.fail_after(PATIENCE):
            assert await say(bert, anna, "before") == "before"
            process.send_signal(signal.SIGSTOP)
            async with running(seed(1), 0) as (_, elsewhere):
                bert.learn(anna, [elsewhere])
                assert await say(bert, anna, "after") == "after"
            process.send_signal(signal.SIGCONT)
