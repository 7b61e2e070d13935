"""Be observers in the hub, or a node at home that asks them; started by `test_netcheck.py` in a namespace.

python -m tests.netns.netcheck_node observe PORT PORT …       says "ready", until its input ends
python -m tests.netns.netcheck_node ask HOST PORT HOST PORT …  says what `netcheck` answers
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import AsyncExitStack

import structlog
import trio

from p2pgrid.hole_punch.bulk import open_links
from p2pgrid.hole_punch.calling import open_calling
from p2pgrid.hole_punch.path import to_multiaddr
from p2pgrid.ids import PeerId
from p2pgrid.node.outlook import open_outlook
from p2pgrid.node.prefs import Prefs
from tests.memory_network import MemoryNetwork, open_world

SECRET = b"of all processes of this laboratory"


async def network(rooms: AsyncExitStack, name: str) -> MemoryNetwork:
    """One that knows nobody else: there are no control channels between these processes."""
    world = await rooms.enter_async_context(open_world())
    world.secret = SECRET
    return world.join(name)


async def observe(ports: list[int]) -> None:
    async with AsyncExitStack() as rooms:
        for number, port in enumerate(ports):
            me = await network(rooms, f"observer{number}")
            links = await rooms.enter_async_context(open_links(me, [("0.0.0.0", port), ("::", port)]))
            await rooms.enter_async_context(open_calling(links))
        print("ready", flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)


async def ask(places: list[tuple[str, int]]) -> None:
    async with AsyncExitStack() as rooms:
        me = await network(rooms, f"home{os.getpid()}")
        links = await rooms.enter_async_context(open_links(me, [("0.0.0.0", 4001), ("::", 4001)]))
        peers = [PeerId(f"observer{number}") for number in range(len(places))]
        for peer, place in zip(peers, places, strict=True):
            links.learn(peer, [to_multiaddr(place)])
        links.observers.update(peers)
        outlook = await rooms.enter_async_context(open_outlook(links, me.me, peers[0], Prefs))
        print(json.dumps(await outlook.check()), flush=True)


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    what, words = sys.argv[1], sys.argv[2:]
    if what == "observe":
        trio.run(observe, [int(word) for word in words])
    else:
        trio.run(ask, list(zip(words[::2], map(int, words[1::2]), strict=True)))
