"""Find out who is at the other end of a socket: dial, shake hands, hear the welcome.

Everything here runs in trio on non-blocking sockets; whoever leaves early closes what it made.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl

import structlog
import trio

from p2pgrid.hole_punch.framing import HEADER
from p2pgrid.hole_punch.path import Address
from p2pgrid.hole_punch.tls import Tls

log = structlog.get_logger(__name__)

UNSENT = 64 << 10
"""Bytes that the kernel takes beyond those under way: what lies there can no longer be chosen."""


def bare(sock: trio.socket.SocketType) -> socket.socket:
    """The socket without trio around it, tuned: still non-blocking.  Raises `OSError`, and closes it."""
    bare = socket.socket(fileno=sock.detach())
    try:
        _tune(bare)
    except OSError:  # some systems refuse options of a connection that has just been reset
        bare.close()
        raise
    return bare


def _tune(bare: socket.socket) -> None:
    bare.setblocking(False)
    bare.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    bare.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = [
        ("TCP_NOTSENT_LOWAT", UNSENT),
        # A peer whose machine is gone is noticed within half a minute, sending or not.
        ("TCP_KEEPIDLE", 10),
        ("TCP_KEEPINTVL", 5),
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", 30_000),
    ]
    for option, value in options:
        if hasattr(socket, option):  # they differ by system; none is needed to be right
            bare.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


async def connect(address: Address, delay: float, send: trio.MemorySendChannel[socket.socket]) -> None:
    async with send:
        await trio.sleep(delay)
        try:
            sock = trio.socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        except OSError as full:  # no descriptor left, or a system without IPv6
            log.debug("cannot dial", address=address, why=str(full))
            return
        try:
            await sock.connect(address)
            send.send_nowait(bare(sock))
        except OSError:
            return
        finally:
            sock.close()  # a socket that was handed on is detached: nothing happens


def discard(answered: trio.MemoryReceiveChannel[socket.socket]) -> None:
    with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel):
        while True:
            answered.receive_nowait().close()
    answered.close()


async def greet(
    context: ssl.SSLContext, sock: socket.socket, pinned: bytes | None, *, server: bool
) -> Tls | None:
    """Shake hands on `sock`; where we dialled, compare the certificate and hear the welcome.

    None, and the socket closed, where it is somebody else or nobody.
    """
    kept = False
    tls = Tls(context, sock, server=server)
    try:
        while wanted := tls.shake():
            await _ready(sock, wanted)
        if pinned is not None:
            if tls.certificate != pinned:
                return None
            welcome = memoryview(bytearray(HEADER))  # no more than that: what follows is the link's
            got = 0
            while got < HEADER:
                count = tls.read(welcome[got:])
                if not count:
                    await _ready(sock, select.POLLIN)
                got += count
            if any(welcome):
                return None
        kept = True
        return tls
    except (OSError, EOFError):
        return None
    finally:
        if not kept:
            tls.close()


async def _ready(sock: socket.socket, wanted: int) -> None:
    if wanted == select.POLLIN:
        await trio.lowlevel.wait_readable(sock.fileno())
    else:
        await trio.lowlevel.wait_writable(sock.fileno())
