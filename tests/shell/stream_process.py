"""Be a peer that can be killed: a process with links, which echoes whatever comes over a stream.

Says its port in one line, and is over when its input ends.  Run as
`python -m tests.shell.stream_process NAME SECRET`.
"""

from __future__ import annotations

import socket
import sys

import trio

from p2pgrid.hole_punch.bulk import open_links
from p2pgrid.hole_punch.streams.service import Request, open_streams
from tests.memory_network import open_world


async def _echo(stream: trio.SocketStream) -> None:
    async with stream:
        async for data in stream:
            await stream.send_all(data)


async def main(name: str, secret: str) -> None:
    async with open_world() as world, trio.open_nursery() as nursery:
        world.secret = bytes.fromhex(secret)

        async def serve(_: Request) -> tuple[socket.socket, bytes]:
            ours, programs = socket.socketpair()
            programs.setblocking(False)
            nursery.start_soon(_echo, trio.SocketStream(trio.socket.from_stdlib_socket(programs)))
            await trio.lowlevel.checkpoint()
            return ours, b""

        async with open_links(world.join(name), [("127.0.0.1", 0)]) as links, open_streams(links, serve):
            print(links.bound[0][1], flush=True)
            await trio.to_thread.run_sync(sys.stdin.read)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
