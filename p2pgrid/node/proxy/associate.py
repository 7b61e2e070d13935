"""Carry a SOCKS program's datagrams, such as questions to a name server, to what it may reach.

RFC 1928's UDP ASSOCIATE: the program sends to a port of ours, each datagram with its destination before it.
Each destination has a stream of its own (`streams.md`); what is lost is lost, as with UDP.  It lasts as long
as the program's connection to the proxy.
"""

from __future__ import annotations

import contextlib
import socket

import structlog
import trio

from p2pgrid.errors import GridError
from p2pgrid.node.proxy import socks
from p2pgrid.node.proxy.names import parse
from p2pgrid.node.proxy.proxy import Proxy
from p2pgrid.node.proxy.rules import HereGuest

log = structlog.get_logger(__name__)

DESTINATIONS_MAX = 64
"""Of one program at once; what is for more is lost."""
WAITING_MAX = 16
"""Datagrams that wait for a destination to be reached."""
DATAGRAM_MAX = 65535


async def associate(
    proxy: Proxy, program: trio.socket.SocketType, caller: HereGuest | None, who: str
) -> None:
    """Until the program ends its connection."""
    host = program.getsockname()[0]
    with trio.socket.socket(program.family, socket.SOCK_DGRAM) as port:
        await port.bind((host, 0))
        await program.send(socks.reply(socks.GRANTED, host, port.getsockname()[1]))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_take, proxy, port, caller, who, nursery)
            with contextlib.suppress(OSError):
                while await program.recv(1024):  # it has nothing more to say, but it may end
                    pass
            nursery.cancel_scope.cancel()


async def _take(
    proxy: Proxy, port: trio.socket.SocketType, caller: HereGuest | None, who: str, nursery: trio.Nursery
) -> None:
    """Hand each of the program's datagrams to its destination."""
    ways: dict[tuple[str, int], trio.MemorySendChannel[bytes]] = {}
    home: tuple[str, int] | None = None
    while True:
        data, sender = await port.recvfrom(DATAGRAM_MAX)
        if home is None:
            home = sender  # from now on nobody else's are taken
        found = socks.read_datagram(data) if sender == home else None
        if found is None:
            continue
        place = found[:2]
        if place not in ways:
            if len(ways) >= DESTINATIONS_MAX:
                continue
            ways[place], bodies = trio.open_memory_channel[bytes](WAITING_MAX)

            async def carry(
                place: tuple[str, int] = place,
                bodies: trio.MemoryReceiveChannel[bytes] = bodies,
                home: tuple[str, int] = home,
            ) -> None:
                try:
                    await _carry(proxy, port, home, place, bodies, caller, who)
                except GridError as failed:
                    log.info("a datagram was not carried", host=place[0], port=place[1], why=str(failed))
                finally:
                    del ways[place]

            nursery.start_soon(carry)
        with contextlib.suppress(trio.WouldBlock, trio.BrokenResourceError):
            ways[place].send_nowait(found[2])


async def _carry(
    proxy: Proxy,
    port: trio.socket.SocketType,
    home: tuple[str, int],
    place: tuple[str, int],
    bodies: trio.MemoryReceiveChannel[bytes],
    caller: HereGuest | None,
    who: str,
) -> None:
    """Datagrams to one destination, and what it answers."""
    reached = await proxy.reach(parse(*place), caller, who, "udp")
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    near.setblocking(False)
    with trio.socket.from_stdlib_socket(near) as ours, bodies:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reached.carry, far)
                nursery.start_soon(_answers, ours, port, home, place)
                async for body in bodies:
                    await ours.send(body)
        except* OSError as gone:
            log.info("a destination of datagrams is gone", why=str(gone.exceptions[0]))
        finally:
            reached.close()


async def _answers(
    ours: trio.socket.SocketType, port: trio.socket.SocketType, home: tuple[str, int], place: tuple[str, int]
) -> None:
    while True:
        body = await ours.recv(DATAGRAM_MAX)
        with contextlib.suppress(OSError):  # too long with its header, or the program is gone
            await port.sendto(socks.datagram(*place, body), home)
