"""Find out who is at the other end of a socket, and say who we are.

After TLS 1.3, in which only the accepting side shows a certificate, three messages:

    accepting side                                       dialling side
       Welcome: its peer id, a nonce, its signature of
                the certificate's digest               ──>
                                                       <──  Hello: its peer id, where it can be dialled,
                                                            its signature of digest and nonce
       Verdict: nothing, or why there is no link       ──>

TLS proves that the accepting side has the certificate's key, so nobody else can show it with that
signature; what the dialling side signs is good for this certificate and this nonce only, so whoever
hears it cannot use it elsewhere.  Neither needs to have heard of the other's certificate before.

Everything here runs in trio on non-blocking sockets; whoever leaves early closes what it made.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
from collections.abc import AsyncIterator
from typing import TypeVar

import attrs
import msgspec
import structlog
import trio

from p2pgrid.errors import BadFrame, PeerError
from p2pgrid.hole_punch.certificate import Certificate
from p2pgrid.hole_punch.path import ADDRESSES_MAX, Address
from p2pgrid.hole_punch.tls import Tls
from p2pgrid.ids import PeerId, digest
from p2pgrid.net import Network
from p2pgrid.wire import HEADER, decode, encode

log = structlog.get_logger(__name__)

T = TypeVar("T", bound=msgspec.Struct)

ACCEPTS, DIALS = b"p2pgrid link 2 accepts\0", b"p2pgrid link 2 dials\0"
"""What signatures begin with: one is never good as the other, or for anything else."""
NONCE = 32
GREETING_MAX = 4096
"""Bytes of one message's body; ours have some hundred."""
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


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    peer: str
    nonce: bytes
    signature: bytes


class Hello(msgspec.Struct, tag="hello", frozen=True):
    peer: str
    addresses: list[str]
    signature: bytes


class Verdict(msgspec.Struct, tag="verdict", frozen=True):
    why: str = ""
    """Why there is no link; empty: there is one."""
    busy: bool = False
    """Our own attempt goes first: the link will come."""


@attrs.define
class Greeting:
    """Says and hears what is needed on one node's new connections."""

    network: Network
    certificate: Certificate = attrs.field(factory=Certificate.make)
    _claim: bytes = b""

    def __attrs_post_init__(self) -> None:
        self._claim = self.network.sign(ACCEPTS + digest(self.certificate.der))

    async def dial(self, sock: socket.socket, peer: PeerId, addresses: list[str]) -> Tls | Verdict | None:
        """The connection, if `peer` is there and wants it; None: it is somebody else, or nobody."""
        async with _closing(sock) as kept:
            tls = Tls(self.certificate.dialling, sock, server=False)
            await _shake(tls)
            welcome = await _hear(tls, Welcome)
            theirs = digest(tls.certificate or b"")
            if welcome.peer != peer or len(welcome.nonce) != NONCE:
                return None
            if not self.network.verify(peer, ACCEPTS + theirs, welcome.signature):
                return None
            signature = self.network.sign(DIALS + theirs + welcome.nonce)
            await _say(tls, Hello(self.network.me, addresses, signature))
            verdict = await _hear(tls, Verdict)
            if verdict.why:
                return verdict
            kept.whole = True
            return tls
        return None

    async def accept(self, sock: socket.socket) -> Caller | None:
        """Who is at the other end; None: nobody who can prove it.  It waits for a verdict."""
        async with _closing(sock) as kept:
            tls, nonce = Tls(self.certificate.accepting, sock, server=True), secrets.token_bytes(NONCE)
            await _shake(tls)
            await _say(tls, Welcome(self.network.me, nonce, self._claim))
            hello = await _hear(tls, Hello)
            peer, statement = PeerId(hello.peer), DIALS + digest(self.certificate.der) + nonce
            if not self.network.verify(peer, statement, hello.signature):
                return None
            kept.whole = True
            return Caller(peer, tuple(hello.addresses[:ADDRESSES_MAX]), tls)
        return None


@attrs.frozen
class Caller:
    """Who has dialled us, and proved it."""

    peer: PeerId
    addresses: tuple[str, ...]
    """Where it can be dialled itself, as it says."""
    tls: Tls

    async def decline(self, verdict: Verdict) -> None:
        async with _closing(self.tls.socket):
            await _say(self.tls, verdict)


WELL = encode(Verdict())[HEADER:]
"""The verdict that there is a link: its first message, so that there is one when it is heard."""


@attrs.define
class _Kept:
    whole: bool = False


@contextlib.asynccontextmanager
async def _closing(sock: socket.socket) -> AsyncIterator[_Kept]:
    """Close it at the end of the block unless it is whole; what the other side does wrong only ends it."""
    kept = _Kept()
    try:
        yield kept
    except (OSError, EOFError, PeerError) as wrong:
        kept.whole = False
        log.debug("a connection ended in its greeting", why=str(wrong))
    finally:
        if not kept.whole:
            sock.close()


async def _shake(tls: Tls) -> None:
    while wanted := tls.shake():
        await _ready(tls.socket, wanted)


async def _say(tls: Tls, message: msgspec.Struct) -> None:
    tls.seal(encode(message))
    while not tls.flush():
        await _ready(tls.socket, select.POLLOUT)


async def _hear(tls: Tls, kind: type[T]) -> T:
    length = int.from_bytes(await _read(tls, HEADER), "big")
    if length > GREETING_MAX:
        raise BadFrame(why=f"a greeting of {length} bytes")
    heard: T = decode(await _read(tls, length), kind)
    return heard


async def _read(tls: Tls, size: int) -> bytes:
    """No more than that: what follows is the link's."""
    buffer, got = memoryview(bytearray(size)), 0
    while got < size:
        count = tls.read(buffer[got:])
        if not count:
            await _ready(tls.socket, select.POLLIN)
        got += count
    return bytes(buffer)


async def _ready(sock: socket.socket, wanted: int) -> None:
    if wanted == select.POLLIN:
        await trio.lowlevel.wait_readable(sock.fileno())
    else:
        await trio.lowlevel.wait_writable(sock.fileno())
