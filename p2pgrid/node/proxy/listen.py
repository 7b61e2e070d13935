"""Take programs' connections: at a fixed forward, or as a SOCKS5 proxy.

Only at addresses of this machine alone: whoever can connect to a forward is let through as its owner.
A SOCKS5 proxy wants user and password, unless nobody else can reach it (a guest's own network).
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import structlog
import trio

from p2pgrid.errors import BadFrame, GridError, Misused, NotFound, Unreachable
from p2pgrid.hole_punch.streams.service import Declined
from p2pgrid.node.proxy import socks
from p2pgrid.node.proxy.associate import associate
from p2pgrid.node.proxy.names import GridName, parse
from p2pgrid.node.proxy.proxy import Proxy
from p2pgrid.node.proxy.rules import HereGuest

log = structlog.get_logger(__name__)

PATIENCE = 10.0
"""Seconds that a program may take to say what it wants."""
CONNECTIONS_MAX = 1024
"""Programs' connections at once at one listener."""

Address = tuple[str, int]


def check_local(host: str) -> None:
    """Raises `Misused` where others than this machine could connect to `host`."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise Misused(why=f"{host!r} is no address; use 127.0.0.1") from None
    if not address.is_loopback:
        raise Misused(
            why=f"at {host} other machines could use it; use an address of this one alone, 127.0.0.1"
        )


@contextlib.asynccontextmanager
async def open_forward(proxy: Proxy, at: Address, name: GridName) -> AsyncIterator[Address]:
    """Connect whoever connects to `at` (port 0: any) with what `name` calls, while inside; tells where."""

    async def serve(sock: socket.socket) -> None:
        try:
            reached = await proxy.reach(name, who="a program here")
        except GridError as failed:
            sock.close()
            log.info("a forward failed", to=name.label, port=name.port, why=str(failed))
        except BaseException:
            sock.close()
            raise
        else:
            await reached.carry(sock)

    async with _listening(at, serve) as bound:
        yield bound


@contextlib.asynccontextmanager
async def open_socks(proxy: Proxy, at: Address, account: socks.Account) -> AsyncIterator[Address]:
    """Serve SOCKS5 at `at` while inside, to who knows the password."""
    async with _listening(at, partial(serve_socks, proxy, account=account)) as bound:
        yield bound


@contextlib.asynccontextmanager
async def _listening(
    at: Address, serve: Callable[[socket.socket], Awaitable[None]]
) -> AsyncIterator[Address]:
    check_local(at[0])
    try:
        [listener] = await trio.open_tcp_listeners(at[1], host=at[0])
    except OSError as taken:
        why = "it is in use" if taken.errno == errno.EADDRINUSE else taken.strerror
        raise Misused(why=f"cannot listen at {at[0]}:{at[1]}: {why}; choose another port") from None
    limit = trio.Semaphore(CONNECTIONS_MAX)

    async def take(stream: trio.SocketStream) -> None:
        sock = socket.socket(fileno=stream.socket.detach())
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with limit:
            await serve(sock)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, take, [listener])
        yield listener.socket.getsockname()[:2]
        nursery.cancel_scope.cancel()


async def serve_socks(
    proxy: Proxy,
    sock: socket.socket,
    account: socks.Account | None,
    caller: HereGuest | None = None,
    who: str = "a program here",
) -> None:
    """One program's connection to the proxy; `sock` is closed in the end."""
    sock.setblocking(False)
    with trio.socket.from_stdlib_socket(sock) as program:
        session = socks.Session(account)
        asked: socks.Asked | None = None
        try:
            with trio.move_on_after(PATIENCE):
                asked = await _asked(program, session)
        except socks.SocksRefused as refused:
            log.info("a program was not served", why=refused.why)
            await _say(program, refused.answer)
        except (BadFrame, OSError) as wrong:
            log.info("a program was not served", why=str(wrong))
        if asked is not None and asked.command == socks.ASSOCIATE:
            await associate(proxy, program, caller, who)
        elif asked is not None:
            await _connect(proxy, program, session, asked, caller, who)


async def _asked(program: trio.socket.SocketType, session: socks.Session) -> socks.Asked | None:
    while True:
        data = await program.recv(4096)
        if not data:
            return None
        answer, asked = session.feed(data)
        if answer:
            await _say(program, answer)
        if asked is not None:
            return asked


async def _connect(
    proxy: Proxy,
    program: trio.socket.SocketType,
    session: socks.Session,
    asked: socks.Asked,
    caller: HereGuest | None,
    who: str,
) -> None:
    """Connect what was asked for, say so, and hand the program's socket on."""
    try:
        reached = await proxy.reach(parse(asked.host, asked.port), caller, who)
    except GridError as failed:
        log.info("a program was not connected", host=asked.host, port=asked.port, why=str(failed))
        await _say(program, socks.reply(code_of(failed)))
        return
    try:
        await _say(program, socks.reply(socks.GRANTED))
    except BaseException:
        reached.close()
        raise
    await reached.carry(socket.socket(fileno=program.detach()), session.said)


def code_of(failed: GridError) -> int:
    """As SOCKS counts failures."""
    match failed:
        case Declined(code=code):
            return code
        case Misused():
            return socks.NOT_ALLOWED
        case NotFound() | Unreachable():
            return socks.UNREACHABLE
    return socks.FAILED


async def _say(program: trio.socket.SocketType, data: bytes) -> None:
    with contextlib.suppress(OSError):  # it is gone, which others notice
        while data:
            data = data[await program.send(data) :]
