"""Does a node that knows one other find who has what, also when that one is gone?"""

from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from p2pgrid.dht import index as index_module
from p2pgrid.dht.index import KademliaIndex, open_index
from p2pgrid.errors import BadObject
from p2pgrid.hole_punch.host import Host, open_host
from p2pgrid.ids import object_cid
from tests.interop.echo_host import ECHO, echo
from tests.interop.test_host import PATIENCE, say, seed


@attrs.define
class Node:
    """A node that lives in a task of its own, so that any may leave before any other."""

    network: Host
    index: KademliaIndex
    leaving: trio.Event = attrs.field(factory=trio.Event)
    left: trio.Event = attrs.field(factory=trio.Event)

    async def leave(self):
        self.leaving.set()
        await self.left.wait()


@asynccontextmanager
async def meadow():
    """A place to enter nodes: `enter(number, mode, first, listen)`."""
    nodes = []

    async def live(number, mode, first, listen, task_status):
        async with open_host(seed(number), listen) as network:
            network.serve(ECHO, echo)
            if first:
                network.learn(first.network.me, first.network.addresses)
            bootstrap = [first.network.me] if first else []
            async with open_index(network, mode, bootstrap) as index:
                node = Node(network, index)
                nodes.append(node)
                task_status.started(node)
                await node.leaving.wait()
        node.left.set()

    async with trio.open_nursery() as nursery:

        async def enter(number, mode, first=None, listen=("/ip4/127.0.0.1/tcp/0",)):
            return await nursery.start(live, number, mode, first, listen)

        with trio.fail_after(PATIENCE):
            yield enter
        for node in nodes:
            node.leaving.set()


@asynccontextmanager
async def grid():
    """A first server, two more, and three clients that know the first."""
    async with meadow() as enter:
        first = await enter(1, "server")
        servers = [first, *[await enter(number, "server", first) for number in (2, 3)]]
        yield [*servers, *[await enter(number, "client", first) for number in (4, 5, 6)]]


def key(number):
    return bytes(object_cid(number.to_bytes(4, "big")))


async def until(found, wanted):
    """Ask until the answer is `wanted`: what the nodes know of each other settles within a beat."""
    while set(await found()) != set(wanted):  # noqa: ASYNC110 - each look asks the network
        await trio.sleep(0.02)


async def settle(nodes, servers):
    for node in nodes:

        async def refreshed(node=node):
            await node.index.refresh()
            return {*node.index.servers, node.network.me}

        await until(refreshed, {*(s.network.me for s in servers), node.network.me})


async def test_a_provider_is_found_and_reached_by_a_node_that_knows_only_the_first():
    async with grid() as (_, server, _, anna, bert, carl):
        await anna.index.provide(key(1))
        await server.index.provide(key(1))
        await bert.index.provide(key(2))
        assert set(await carl.index.find(key(1))) == {anna.network.me, server.network.me}
        assert len(await carl.index.find(key(1), most=1)) == 1
        assert await carl.index.find(key(3)) == []
        assert await say(carl.network, anna.network.me, "hello") == "hello"
        # who holds it, too, wants the others
        assert await server.index.find(key(1)) == [anna.network.me]
        assert await anna.index.find(key(1)) == [server.network.me]
        # and hears of those who came later
        await bert.index.provide(key(1))
        assert set(await carl.index.find(key(1))) == {n.network.me for n in (anna, server, bert)}


async def test_clients_stay_out_of_the_routing_tables():
    async with grid() as nodes:
        servers, clients = nodes[:3], nodes[3:]
        await settle(nodes, servers)
        for client in clients:
            await client.index.find(key(1))  # whoever asks is no server for that
            for server in servers:
                assert set(server.index.servers) <= {s.network.me for s in servers}


async def test_the_index_goes_on_without_the_first_node():
    async with grid() as nodes:
        await settle(nodes, nodes[:3])
        first, anna, carl = nodes[0], nodes[3], nodes[5]
        await anna.index.provide(key(1))
        await first.leave()
        assert await carl.index.find(key(1)) == [anna.network.me]
        await carl.index.provide(key(2))
        assert await anna.index.find(key(2)) == [carl.network.me]
        assert await say(anna.network, carl.network.me, "hello") == "hello"


async def test_what_the_only_server_forgot_is_announced_again(monkeypatch):
    monkeypatch.setattr(index_module, "BEAT", 0.1)
    async with meadow() as enter:
        first = await enter(1, "server")
        anna, bert = await enter(2, "client", first), await enter(3, "client", first)
        await anna.index.provide(key(1))
        await anna.index.provide(key(2))
        assert await bert.index.find(key(1)) == [anna.network.me]
        await anna.index.withdraw(key(2))
        where = place(first)
        await first.leave()
        first = await enter(1, "server", listen=where)
        await until(lambda: bert.index.find(key(1)), [anna.network.me])
        assert await bert.index.find(key(2)) == []


async def test_many_records_arrive_though_libp2p_would_drop_all_after_ten(monkeypatch):
    monkeypatch.setattr(index_module, "PACE", 0.0)
    async with meadow() as enter:
        first = await enter(1, "server")
        anna = await enter(2, "client", first)
        for number in range(40):
            await anna.index.provide(key(number))
        for number in range(40):
            await until(lambda number=number: first.index.find(key(number)), [anna.network.me])


async def test_alone_nothing_is_found_and_an_announcement_waits_for_company(monkeypatch):
    monkeypatch.setattr(index_module, "BEAT", 0.1)
    async with meadow() as enter:
        first = await enter(1, "server")
        anna = await enter(2, "client", first)
        where = place(first)
        await first.leave()
        assert await anna.index.find(key(1)) == []
        await anna.index.provide(key(1))
        first = await enter(1, "server", listen=where)
        await until(lambda: first.index.find(key(1)), [anna.network.me])


async def test_the_newest_key_goes_first_and_what_was_withdrawn_is_forgotten():
    async with meadow() as enter:
        node = await enter(1, "server")
        index, order = node.index, []
        held_up, on = trio.Event(), trio.Event()

        async def provide(name):
            order.append(name)
            held_up.set()
            await on.wait()
            return True

        index._kademlia.provider_store.provide = provide
        names = [key(number)[2:] for number in range(6)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(index.provide, key(0))
            await held_up.wait()
            for number in range(1, 5):
                index._due[names[number]] = float(-number)  # announced before, and due for long
            nursery.start_soon(index.provide, key(5))  # a new disk, in the middle of the round
            while names[5] not in index._fresh:
                await trio.lowlevel.checkpoint()
            await index.withdraw(key(2))
            on.set()
        assert order[:2] == [names[0], names[5]]
        await until(lambda: told(order, 5), [*order[:2], names[4], names[3], names[1]])
        assert order[2:] == [names[4], names[3], names[1]]
        for number in range(6):
            await index.withdraw(key(number))
        assert index._due == index._fresh == {}
        assert not index._kademlia.provider_store.providing_keys


async def told(order, count):
    return order[:count]


async def test_only_cids_are_keys():
    async with meadow() as enter:
        node = await enter(1, "server")
        for bad in (b"", b"x" * 36, key(1)[:-1], key(1) + b"x"):
            with pytest.raises(BadObject):
                await node.index.provide(bad)
            with pytest.raises(BadObject):
                await node.index.find(bad)


def place(node):
    return [address.partition("/p2p/")[0] for address in node.network.addresses]
