"""Listen where links are taken, and lead each connection to whoever its first bytes ask for.

A TLS record goes to the greeting; eight bytes of *magic* to the door of that name (a relay's circuits,
punched connections), which finds nothing consumed.  Whoever says nothing in time is dropped, and of many
the oldest gives way to one more.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import structlog
import trio

from p2pgrid.hole_punch.greeting import bare, share_port

log = structlog.get_logger(__name__)

HANDSHAKE_PATIENCE = 5.0
"""Seconds a connection at our port may take to show who it is."""
HANDSHAKES_MAX = 256
"""Connections at our port that have not shown who they are; the oldest gives way to one more.

More than come at the same moment when a relay's peers all come back."""
BACKLOG = 128
MAGIC = 8
"""Bytes of a door's name."""
TLS_RECORD = 0x16
"""The first byte of a TLS connection."""

Serve = Callable[[socket.socket], Awaitable[None]]
"""Takes a connection, non-blocking and unread, and closes it unless it hands it on."""


class Doors:
    """The listening sockets of one node."""

    def __init__(self, greet: Serve, nursery: trio.Nursery) -> None:
        self._greet = greet
        self._nursery = nursery
        self._doors: dict[bytes, Serve] = {}
        self._handshakes: dict[trio.CancelScope, None] = {}

    def admit(self, magic: bytes, serve: Serve) -> None:
        """Have `serve` called with connections that begin with `magic`."""
        assert len(magic) == MAGIC
        assert magic[0] != TLS_RECORD
        self._doors[magic] = serve

    async def listen(self, listener: trio.SocketListener) -> None:
        async with listener:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as full:
                    if full.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                        raise
                    await trio.sleep(0.1)  # until something else has closed a file
                    continue
                try:
                    sock = bare(stream.socket)
                except OSError as gone:
                    log.debug("a connection ended before it was looked at", why=str(gone))
                    continue
                if len(self._handshakes) >= HANDSHAKES_MAX:
                    next(iter(self._handshakes)).cancel()
                scope = trio.CancelScope()
                self._handshakes[scope] = None
                self._nursery.start_soon(self._lead, sock, scope)

    async def _lead(self, sock: socket.socket, scope: trio.CancelScope) -> None:
        handed_on = False
        try:
            with scope, trio.move_on_after(HANDSHAKE_PATIENCE):
                serve = await self._door(sock)
                if serve is not None:
                    handed_on = True
                    await serve(sock)
        except OSError as full:  # ours, not the peer's: no descriptor or no memory left
            log.warning("a connection was dropped", why=str(full))
            sock.close()
        finally:
            del self._handshakes[scope]
            if not handed_on:
                sock.close()

    async def _door(self, sock: socket.socket) -> Serve | None:
        """Who is asked for; None: nobody that is here."""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, MAGIC)
        await trio.lowlevel.wait_readable(sock.fileno())
        try:
            first = sock.recv(MAGIC, socket.MSG_PEEK)
        except OSError:  # reset meanwhile
            return None
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        return self._greet if first[:1] == bytes([TLS_RECORD]) else self._doors.get(first)


async def open_listeners(host: str, port: int) -> Sequence[trio.SocketListener]:
    """Listen at `host`, at a port that connections may also be made from.  Raises `OSError`."""
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    async with _closed_if_it_fails() as listeners:
        for family, kind, protocol, _, address in found:
            if port == 0 and listeners:
                address = (address[0], listeners[0].socket.getsockname()[1], *address[2:])
            sock = trio.socket.socket(family, kind, protocol)
            try:
                share_port(sock)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                await sock.bind(address)
                sock.listen(BACKLOG)
            except BaseException:
                sock.close()
                raise
            listeners.append(trio.SocketListener(sock))
    return listeners


@contextlib.asynccontextmanager
async def _closed_if_it_fails() -> AsyncIterator[list[trio.SocketListener]]:
    listeners: list[trio.SocketListener] = []
    try:
        yield listeners
    except BaseException:
        for listener in listeners:
            listener.socket.close()
        raise
