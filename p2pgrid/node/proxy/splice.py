"""Move bytes between two sockets of this node, where both ends of a connection are here."""

from __future__ import annotations

import socket
import struct
import time
from typing import Any

import attrs
import trio

PIECE = 128 << 10


@attrs.define(eq=False)
class Splice:
    who: str
    to: str
    since: float = attrs.field(factory=time.monotonic)
    sent: int = 0
    got: int = 0

    def row(self, now: float) -> dict[str, Any]:
        return {
            "who": self.who,
            "to": self.to,
            "peer": "",
            "way": "here",
            "opened": "here",
            "sent": self.sent,
            "received": self.got,
            "age": round(now - self.since, 1),
        }

    async def run(self, near: socket.socket, far: socket.socket, first: bytes) -> None:
        """Until both have ended, or one has broken; closes both.  Half-close is kept.  `first` goes first."""
        with _trio(near) as one, _trio(far) as other:
            try:
                await self._send(other, first)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump, one, other, True)
                    nursery.start_soon(self._pump, other, one, False)
            except* OSError:
                for sock in (one, other):  # the programs are to see that it did not end well
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def _send(self, to: trio.socket.SocketType, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[await to.send(view) :]

    async def _pump(self, source: trio.socket.SocketType, to: trio.socket.SocketType, ours: bool) -> None:
        datagrams = source.type == socket.SOCK_DGRAM
        while data := await source.recv(PIECE):
            await self._send(to, data)
            if ours:
                self.sent += len(data)
            else:
                self.got += len(data)
        if not datagrams:
            to.shutdown(socket.SHUT_WR)


def _trio(sock: socket.socket) -> trio.socket.SocketType:
    sock.setblocking(False)
    return trio.socket.from_stdlib_socket(sock)
