"""Do circuits of libp2p's work through us, to us and from us, and end where they should?"""

from __future__ import annotations

import signal
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status

from p2pgrid.errors import Misconfigured, Unreachable
from p2pgrid.hole_punch import circuit, circuit_relay
from p2pgrid.hole_punch.circuit_relay import keep_reserved, open_circuits, serve_circuits
from p2pgrid.hole_punch.host import open_host
from p2pgrid.hole_punch.reservations import Limits
from p2pgrid.ids import PeerId
from p2pgrid.wire import encode
from tests.grid_processes import command, p2pgrid
from tests.interop.echo_host import ECHO, Say, echo
from tests.interop.foreign import Failed, running
from tests.interop.test_host import PATIENCE, hosts, say, seed


async def until(holds):
    """What the other side does tells nobody here when it is done."""
    while not holds():  # noqa: ASYNC110
        await trio.sleep(0.005)


@asynccontextmanager
async def reserved(network, relay):
    """`network` has a place at `relay`."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_reserved, network, relay)
        await until(lambda: relay in network.circuits)
        yield
        nursery.cancel_scope.cancel()


def around(network):
    return [address for address in network.addresses if "p2p-circuit" in address]


@asynccontextmanager
async def called(limits=None):
    """A relay, one who has a place there and is known by it alone, and one who would call."""
    async with hosts(3) as (relay, anna, bert):
        book = serve_circuits(relay, limits)
        anna.serve(ECHO, echo)
        async with reserved(anna, relay.me):
            bert.learn(anna.me, around(anna))
            yield relay, book, anna, bert


async def test_who_has_a_place_is_called_through_the_relay():
    async with called() as (relay, book, anna, bert):
        assert f"{relay.addresses[0]}/p2p-circuit/p2p/{anna.me}" in anna.addresses
        assert await say(bert, anna.me, "through") == "through"
        assert await say(bert, anna.me, "again" * 1000) == "again" * 1000
        assert circuit.relayed(bert.session(anna.me))
        assert circuit.relayed(anna.session(bert.me))
        bert.serve(ECHO, echo)
        assert await say(anna, bert.me, "back") == "back"  # one connection carries both sides' streams
        book.check()
        await bert.session(anna.me).close()
        await until(lambda: not book._ends and anna.me in relay.connected)
        assert all(not c.streams for c in relay._swarm.get_connections())


async def test_a_direct_connection_is_preferred_as_soon_as_there_is_one():
    async with called() as (_, _, anna, bert):
        assert await say(bert, anna.me, "around") == "around"
        anna.learn(bert.me, bert.addresses)
        await anna._swarm.dial_addr(circuit.Multiaddr(bert.addresses[0]), bert.libp2p.get_id())
        await until(lambda: not circuit.relayed(bert.session(anna.me)))
        assert await say(bert, anna.me, "straight") == "straight"


async def test_without_a_place_or_without_a_relay_nobody_is_called():
    async with hosts(3) as (relay, anna, bert):
        bert.learn(anna.me, [f"{relay.addresses[0]}/p2p-circuit/p2p/{anna.me}"])
        with pytest.raises(Unreachable, match="not supported"):
            await bert.open(anna.me, ECHO)
        serve_circuits(relay)
        await anna.reach(relay.me)
        with pytest.raises(Unreachable, match="NO_RESERVATION"):
            await bert.open(anna.me, ECHO)


async def test_a_place_ends_with_the_connection_and_is_had_again(monkeypatch):
    monkeypatch.setattr(circuit_relay, "BEAT", 0.01)
    async with called() as (relay, _, anna, bert):
        before = relay.session(anna.me)
        await before.close()
        await until(lambda: relay.session(anna.me) not in (None, before))
        again = await answered(bert, anna.me)
        assert circuit.relayed(bert.session(anna.me))
        assert again == "again"


async def answered(network, peer):
    """What `peer` says as soon as it can be called."""
    while True:
        try:
            return await say(network, peer, "again")
        except Unreachable:
            await trio.sleep(0.01)


async def test_places_and_circuits_are_few():
    async with called(Limits(reservations=1, circuits=1)) as (relay, book, anna, bert):
        with pytest.raises(Unreachable, match="RESERVATION_REFUSED"):
            await circuit_relay._reserve(bert, relay.me)
        assert await circuit_relay._reserve(anna, relay.me)  # renewed
        assert await say(bert, anna.me, "one") == "one"
        async with open_host(seed(9)) as carl:
            carl.learn(anna.me, around(anna))  # bert has heard of others from anna herself
            with pytest.raises(Unreachable, match="RESOURCE_LIMIT_EXCEEDED"):
                await carl.open(anna.me, ECHO)
            book.check()


@pytest.mark.parametrize("limits", [Limits(data=16 << 10), Limits(duration=0.5)], ids=["bytes", "seconds"])
async def test_a_circuit_ends_when_it_is_used_up_and_the_next_one_works(limits):
    async with called(limits) as (_, book, anna, bert):
        channel = await bert.open(anna.me, ECHO)
        session = bert.session(anna.me)
        for size in (100, 20_000):
            await channel._stream.write(bytes(size))  # no frame: there is no answer but the end
        await until(lambda: bert.session(anna.me) is not session and not book._ends)
        assert await say(bert, anna.me, "anew") == "anew"


async def answers(stream):
    """The statuses that come until there are no more."""
    heard = []
    try:
        while True:
            heard.append((await circuit.hear(stream, HopMessage)).status)
    except circuit.TROUBLE:
        return heard


@pytest.mark.parametrize(
    "noise",
    [
        b"",
        b"\x00",
        b"\x02\x08\x02",
        b"\x02\x08\x07",
        b"\xff" * 12,
        b"\x80\x40" + bytes(8192),
        b"\x05\x08\x01\x12\x01\x0a",
    ],
)
async def test_noise_costs_a_stream_and_nothing_else(noise):
    async with called() as (relay, book, anna, bert):
        await bert.reach(relay.me)
        for network, peer, protocol in ((bert, relay.me, circuit.HOP), (relay, anna.me, circuit.STOP)):
            stream = await network.stream_on(network.session(peer), protocol)
            await stream.write(noise)
            await stream.close_write()
            assert Status.OK not in await answers(stream)
        assert await say(bert, anna.me, "fine") == "fine"
        book.check()


async def test_a_circuit_leads_to_no_further_circuit():
    async with called() as (_, _, anna, bert):
        serve_circuits(anna)
        assert await say(bert, anna.me, "hello") == "hello"
        with pytest.raises(Unreachable, match="no direct connection"):
            await circuit_relay._reserve(bert, anna.me)
        with pytest.raises(circuit.Refused, match="PERMISSION_DENIED"):
            await circuit.ask(
                await bert.stream_on(bert.session(anna.me), circuit.HOP), HopMessage(type=HopMessage.RESERVE)
            )


async def test_who_has_no_place_there_is_not_called_by_that_relay():
    async with hosts(2) as (relay, anna), trio.open_nursery() as nursery:
        stranger = PeerId("12D3KooWHp9eJQ9Afhb9LLijgnZ7ckgaTXUoHnWb2f4jLwhEggBn")
        nursery.start_soon(keep_reserved, anna, stranger)
        await anna.reach(relay.me)
        await until(lambda: circuit.STOP in anna.libp2p.get_mux().handlers)
        request = circuit.StopMessage(type=circuit.StopMessage.CONNECT)
        request.peer.id = relay.libp2p.get_id().to_bytes()
        with pytest.raises(circuit.Refused, match="PERMISSION_DENIED"):
            await circuit.ask(await relay.stream_on(relay.session(anna.me), circuit.STOP), request)
        nursery.cancel_scope.cancel()


async def test_a_daemon_offers_places_and_has_one_itself():
    async with hosts(2) as (relay, anna), open_circuits(relay, 1, []):
        async with open_circuits(anna, 0, relay.addresses):
            await until(lambda: around(anna))
            assert circuit.HOP not in anna.libp2p.get_mux().handlers  # nobody asked it to be one
        assert not around(anna)


@pytest.mark.parametrize(
    "address",
    ["", "/ip4/127.0.0.1/tcp/4001", "relay", "/ip4/127.0.0.1/udp/4001/p2p/12D3KooW", "/p2p/12D3KooW"],
)
async def test_what_is_no_relay_is_refused(address):
    async with hosts(1) as (anna,):
        with pytest.raises(Misconfigured, match="is not a libp2p node"):
            async with open_circuits(anna, 0, [address]):
                pass


# --- with other libp2p implementations --------------------------------------------------


async def test_another_has_a_place_here_and_is_called_by_us(other):
    async with hosts(2) as (relay, bert):
        serve_circuits(relay)
        async with running(other, listen=[f"{relay.addresses[0]}/p2p-circuit"]) as theirs:
            await theirs.ask("echo", protocol=ECHO)
            around = f"{relay.addresses[0]}/p2p-circuit/p2p/{theirs.peer}"
            assert around in (await theirs.ask("whoami"))["addresses"]
            it = PeerId(theirs.peer)
            bert.learn(it, [around])
            assert await say(bert, it, "through") == "through"
            assert circuit.relayed(bert.session(it))
            [back] = [c for c in await theirs.ask("connections") if c["peer"] == bert.me]
            assert back["limited"]


async def test_another_calls_us_and_another_of_its_kind_through_us(other):
    async with called() as (relay, _, anna, _), running(other) as calling:
        frame = encode(Say("across"))
        said = await calling.ask(
            "talk", address=around(anna)[0], protocol=ECHO, send=frame.hex(), count=len(frame)
        )
        assert said == frame.hex()
        [there] = [c for c in await calling.ask("connections") if c["peer"] == anna.me]
        assert there["limited"]
        async with running(other, listen=[f"{relay.addresses[0]}/p2p-circuit"]) as theirs:
            await theirs.ask("echo", protocol="/p2pgrid/parrot/1")
            where = f"{relay.addresses[0]}/p2p-circuit/p2p/{theirs.peer}"
            assert (
                await calling.ask("talk", address=where, protocol="/p2pgrid/parrot/1", send="c0ffee", count=3)
                == "c0ffee"
            )


async def test_we_have_a_place_at_another_and_are_called_through_it(other):
    async with hosts(2) as (anna, bert), running(other, relay=True) as relay, running(other) as calling:
        anna.serve(ECHO, echo)
        anna.learn(PeerId(relay.peer), relay.addresses)
        async with reserved(anna, PeerId(relay.peer)):
            [through] = around(anna)
            assert through == f"{relay.addresses[0]}/p2p-circuit/p2p/{anna.me}"
            frame = encode(Say("across"))
            assert (
                await calling.ask("talk", address=through, protocol=ECHO, send=frame.hex(), count=len(frame))
                == frame.hex()
            )
            bert._learned.clear()
            bert.learn(anna.me, [through])
            assert await say(bert, anna.me, "through") == "through"
            assert circuit.relayed(bert.session(anna.me))


def listening(coordinator):
    """Where a coordinator listens, as it says when it is ready."""
    for line in coordinator.stderr:
        if line.startswith("  /ip4/"):
            return line.strip()
    raise AssertionError("the coordinator ended")


async def test_a_coordinator_is_a_relay_if_it_is_told_to_be_and_another_is_called_through_it(other, tmp_path):
    words = ("coordinator", "--listen", "127.0.0.1:0", "--libp2p-places", 1)
    with command("p2pgrid", *words, home=tmp_path / "home") as coordinator:
        try:
            with trio.fail_after(PATIENCE):
                where = await trio.to_thread.run_sync(listening, coordinator)
                async with (
                    running(other, listen=[f"{where}/p2p-circuit"]) as theirs,
                    open_host(seed(2)) as bert,
                ):
                    await theirs.ask("echo", protocol=ECHO)
                    bert.learn(PeerId(theirs.peer), [f"{where}/p2p-circuit"])
                    assert await say(bert, PeerId(theirs.peer), "through") == "through"
                    with pytest.raises(Failed):
                        async with running(other, listen=[f"{where}/p2p-circuit"]):
                            pass  # there was one place
        finally:
            coordinator.send_signal(signal.SIGINT)
            _, said = await trio.to_thread.run_sync(coordinator.communicate)
            assert "Traceback" not in said, said
    assert coordinator.returncode == 0


def test_what_is_no_relay_is_not_kept(tmp_path):
    home = tmp_path / "home"
    for words, code in ((("--libp2p-relay", "nonsense"), 78), (("--libp2p-places", -1), 2)):
        assert p2pgrid("coordinator", "--listen", "127.0.0.1:0", *words, home=home).code == code
        assert not (home / "daemon.json").exists()
