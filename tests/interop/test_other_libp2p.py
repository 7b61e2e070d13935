"""Do nodes of other libp2p implementations and we understand each other: connections, streams, the index?

Each is a process of its own, `js/node.mjs` and `go/main.go`.  Circuits: `test_circuits.py`.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p.peer.id import ID

from p2pgrid.dht.index import open_index
from p2pgrid.errors import Unreachable
from p2pgrid.hole_punch.host import open_host
from p2pgrid.hole_punch.muxer import WINDOW
from p2pgrid.ids import Cid, PeerId, object_cid
from p2pgrid.wire import BODY_MAX, encode
from tests.interop.echo_host import ECHO, Say, echo
from tests.interop.foreign import Failed, running
from tests.interop.test_host import say, seed

PATIENCE = 60  # seconds for a test
MIB = 1 << 20
BULK = "/p2pgrid/bulk-test/1"


@asynccontextmanager
async def pair(other, **start):
    """One of ours and one of theirs; neither knows the other."""
    with trio.fail_after(PATIENCE):
        async with open_host(seed(1)) as ours, running(other, **start) as theirs:
            yield ours, theirs


def key(number):
    return bytes(object_cid(number.to_bytes(4, "big")))


def named(key):
    """js is told what to look for; go, whose Kademlia is the test's own, what to ask for."""
    return {"cid": str(Cid.from_bytes(key)), "key": key[2:].hex()}


async def test_it_dials_us_and_learns_who_we_are(other):
    async with pair(other) as (ours, theirs):
        ours.serve(ECHO, echo)
        assert await theirs.ask("dial", address=ours.addresses[0]) == {
            "peer": ours.me,
            "limited": False,
            "encryption": "/noise",
            "muxer": "/yamux/1.0.0",
        }
        assert await theirs.ask("ping", address=ours.me) >= 0
        known = await theirs.ask("known", peer=ours.me)
        assert known["agent"].startswith("py-libp2p/")
        assert ECHO in known["protocols"]
        assert [f"{address}/p2p/{ours.me}" for address in known["addresses"]] == list(ours.addresses)
        frame = encode(Say("across"))
        assert (
            await theirs.ask("talk", address=ours.me, protocol=ECHO, send=frame.hex(), count=len(frame))
            == frame.hex()
        )


async def test_we_dial_it_and_learn_who_it_is(other):
    async with pair(other) as (ours, theirs):
        await theirs.ask("echo", protocol=ECHO)
        it = PeerId(theirs.peer)
        ours.learn(it, theirs.addresses)
        for text in ("hello", "x" * (BODY_MAX - 100)):
            assert await say(ours, it, text) == text
        assert ours.connected == [it]
        store = ours.libp2p.get_peerstore()
        await until(lambda: ECHO in store.get_protocols(ID.from_base58(it)))  # identification goes beside
        assert set(theirs.addresses) <= set(ours.addresses_of(it))


async def test_another_key_than_expected_is_refused_by_either(other):
    async with pair(other) as (ours, theirs):
        stranger = "12D3KooWHp9eJQ9Afhb9LLijgnZ7ckgaTXUoHnWb2f4jLwhEggBn"
        with pytest.raises(Failed):
            await theirs.ask("dial", address=ours.addresses[0].replace(ours.me, stranger))
        ours.learn(PeerId(stranger), [theirs.addresses[0].replace(theirs.peer, stranger)])
        with pytest.raises(Unreachable):
            await ours.open(PeerId(stranger), ECHO)


# --- more bytes than fit at once ---------------------------------------------------------


def pattern(size):
    return b"".join(bytes([n % 256]) * (1 << 16) for n in range(size >> 16))


def digest_of(data):
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


async def until(holds):
    """libp2p tells nobody when a window moves."""
    while not holds():  # noqa: ASYNC110
        await trio.sleep(0.001)


async def test_it_stops_sending_when_our_window_is_full(other):
    size = 4 * MIB

    async def taken_late(stream):
        waiting = stream.muxed_conn.stream_buffers
        await until(lambda: len(waiting[stream.muxed_stream.stream_id]) >= WINDOW)
        await theirs.ask("ping", address=ours.me)  # what it sent before is all here
        assert len(waiting[stream.muxed_stream.stream_id]) < 2 * WINDOW
        got = b""
        while len(got) < size:
            got += await stream.read(WINDOW)
        await stream.write(json.dumps(digest_of(got)).encode())
        await stream.close()

    async with pair(other) as (ours, theirs):
        ours.libp2p.set_stream_handler(BULK, taken_late)
        told = await theirs.ask("flood", address=ours.addresses[0], protocol=BULK, size=size)
        assert json.loads(told["said"]) == digest_of(pattern(size))
        assert told["waits"] > 0


async def test_we_stop_sending_when_its_window_is_full(other):
    size = 4 * MIB
    async with pair(other) as (ours, theirs):
        await theirs.ask("swallow", protocol=BULK)
        ours.learn(PeerId(theirs.peer), theirs.addresses)
        stream = (await ours.open(PeerId(theirs.peer), BULK))._stream
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, pattern(size))
            await until(lambda: stream.muxed_stream.send_window == 0)
            assert await theirs.ask("ping", address=ours.me) >= 0  # the connection goes on meanwhile
            await theirs.ask("resume")
        await stream.close_write()
        assert json.loads(await stream.read()) == digest_of(pattern(size))


# --- the index --------------------------------------------------------------------------


async def test_it_finds_who_announced_to_us_and_dials_them(other):
    async with (
        pair(other, server=False) as (server, theirs),
        open_index(server, "server"),
        open_host(seed(2)) as bert,
    ):
        bert.serve(ECHO, echo)
        bert.learn(server.me, server.addresses)
        async with open_index(bert, "client", [server.me]) as index:
            await index.provide(key(1))
            await theirs.ask("dial", address=server.addresses[0])
            assert await theirs.ask("find", **named(key(1)), address=server.addresses[0]) == {
                bert.me: list(bert.addresses)
            }
            assert await theirs.ask("find", **named(key(2)), address=server.addresses[0]) == {}
            assert (await theirs.ask("dial", address=bert.me))["peer"] == bert.me


async def test_we_find_what_it_announced_to_us_and_dial_it(other):
    async with (
        pair(other, server=False) as (server, theirs),
        open_index(server, "server"),
        open_host(seed(2)) as bert,
    ):
        bert.learn(server.me, server.addresses)
        async with open_index(bert, "client", [server.me]) as index:
            await theirs.ask("echo", protocol=ECHO)
            await theirs.ask("dial", address=server.addresses[0])
            await theirs.ask("provide", **named(key(1)), address=server.addresses[0])
            while await index.find(key(1)) != [theirs.peer]:  # noqa: ASYNC110 - announcements get no answer
                await trio.sleep(0.02)
            assert await say(bert, PeerId(theirs.peer), "found") == "found"


async def test_a_js_server_holds_nothing_of_ours_up(js):
    """It takes none of our names (see decision 0016), so the servers of our kind have to do."""
    async with pair(js) as (server, theirs), open_host(seed(2)) as anna, open_host(seed(3)) as bert:
        it = PeerId(theirs.peer)
        for host in (anna, bert):
            host.learn(it, theirs.addresses)
            host.learn(server.me, server.addresses)
        async with (
            open_index(server, "server"),
            open_index(anna, "client", [it, server.me]) as annas,
            open_index(bert, "client", [it, server.me]) as berts,
        ):
            for index in (annas, berts):
                while set(index.servers) != {it, server.me}:
                    await index.refresh()
            await annas.provide(key(1))
            assert await berts.find(key(1)) == [anna.me]
            assert list(bert.addresses_of(anna.me)) == list(anna.addresses)
