"""Find out who is at the other end of a socket, and say who we are.

After TLS 1.3, in which only the accepting side shows a certificate, three messages:

    accepting side                                       dialling side
       Welcome: its peer id, a nonce, its signature of
                the certificate's digest               ──>
                                                       <──  Hello: its peer id, where it can be dialled, its
                                                            signature of digest and nonce, its membership,
                                                            the session that it goes on with, if any
       Verdict: the session, its membership, and where
                it sees the dialling side; or why there
                is no link                             ──>

TLS proves that the accepting side has the certificate's key, so nobody else can show it with that
signature; what the dialling side signs is good for this certificate and this nonce only, so whoever
hears it cannot use it elsewhere.  Neither needs to have heard of the other's certificate before.
Who belongs to which grid is shown to the peer that was wanted, and to members: not to whoever dials.

Everything here runs in trio on non-blocking sockets; whoever leaves early closes what it made.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import select
import socket
from collections.abc import AsyncIterator, Callable
from typing import Annotated, TypeVar

import attrs
import msgspec
import structlog
import trio

from p2pgrid.errors import BadFrame, PeerError
from p2pgrid.hole_punch.certificate import Certificate
from p2pgrid.hole_punch.link import Order
from p2pgrid.hole_punch.path import ADDRESSES_MAX, Address
from p2pgrid.hole_punch.tls import Tls
from p2pgrid.ids import PeerId, digest
from p2pgrid.net import Network
from p2pgrid.wire import HEADER, decode, encode

log = structlog.get_logger(__name__)

T = TypeVar("T", bound=msgspec.Struct)

ACCEPTS, DIALS = b"p2pgrid link 3 accepts\0", b"p2pgrid link 3 dials\0"
"""What signatures begin with: one is never good as the other, or for anything else."""
NONCE = 32
SESSION = 16
"""Bytes of a session's name."""
GREETING_MAX = 8192
"""Bytes of one message's body; ours have some hundred."""

Allow = Callable[[PeerId, bytes], str]
"""Why there is no link with a peer that shows this membership; empty: it is welcome."""
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


async def connect(
    address: Address,
    delay: float,
    send: trio.MemorySendChannel[socket.socket],
    bound: Address | None = None,
) -> None:
    """Dial, and hand on the socket if somebody answers.

    From `bound`, a port at which we listen ourselves, if it can be had: then what stands between shows
    the other side the address at which that port is seen.
    """
    async with send:
        await trio.sleep(delay)
        for own in dict.fromkeys((bound, None)):
            try:
                send.send_nowait(await _connected(address, own))
            except OSError as refused:
                if own is None or refused.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
                    log.debug("nobody there", address=address, why=str(refused))
                    return
                # A connection from that port to there is still known to one of the systems.
            else:
                return


async def _connected(address: Address, own: Address | None) -> socket.socket:
    """A connection, from `own` where that is told.  Raises `OSError`."""
    sock = trio.socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    try:
        if own is not None:
            share_port(sock)
            await sock.bind(own)
        await sock.connect(address)
        return bare(sock)
    finally:
        sock.close()  # a socket that was handed on is detached: nothing happens


def share_port(sock: trio.socket.SocketType | socket.socket) -> None:
    """Let `sock` be bound to a port that others of this node are bound to."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "SO_REUSEPORT"):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def discard(answered: trio.MemoryReceiveChannel[socket.socket]) -> None:
    with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel):
        while True:
            answered.receive_nowait().close()
    answered.close()


Moves = Annotated[int, msgspec.Meta(ge=0, le=1 << 32)]


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    peer: str
    nonce: bytes
    signature: bytes


class Hello(msgspec.Struct, tag="hello", frozen=True):
    peer: str
    addresses: list[str]
    signature: bytes
    membership: bytes = b""
    session: bytes = b""
    """The one that is to go on over this connection; empty: a new one."""
    moves: Moves = 0
    """How many connections it had before, as far as is known here."""


class Verdict(msgspec.Struct, tag="verdict", frozen=True):
    why: str = ""
    """Why there is no link; empty: there is one."""
    busy: bool = False
    """Our own attempt goes first: the link will come."""
    session: bytes = b""
    """The session that goes on, or begins."""
    moves: Moves = 0
    """How many connections it had before this one."""
    observed: str = ""
    """Where the dialling side is seen, as `host:port`."""
    membership: bytes = b""
    """The accepting side's."""


@attrs.frozen
class Met:
    """Somebody at the other end of a socket, proved, who wants a link."""

    peer: PeerId
    tls: Tls
    session: bytes
    observed: str
    order: Order


@attrs.define
class Greeting:
    """Says and hears what is needed on one node's new connections."""

    network: Network
    membership: Callable[[], bytes] = lambda: b""
    allow: Allow = lambda peer, membership: ""
    certificate: Certificate = attrs.field(factory=Certificate.make)
    _claim: bytes = b""

    def __attrs_post_init__(self) -> None:
        self._claim = self.network.sign(ACCEPTS + digest(self.certificate.der))

    async def dial(
        self, sock: socket.socket, peer: PeerId, addresses: list[str], session: bytes = b"", moves: int = 0
    ) -> Met | Verdict | None:
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
            hello = Hello(self.network.me, addresses, signature, self.membership(), session, moves)
            await _say(tls, hello)
            verdict = await _hear(tls, Verdict)
            if verdict.why:
                return verdict
            if len(verdict.session) != SESSION:
                return None
            if why := self.allow(peer, verdict.membership):
                return Verdict(why)
            kept.whole = True
            return Met(peer, tls, verdict.session, verdict.observed, (verdict.moves, peer))
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
            if len(hello.session) not in (0, SESSION):
                return None
            kept.whole = True
            addresses = tuple(hello.addresses[:ADDRESSES_MAX])
            return Caller(peer, addresses, tls, hello.membership, hello.session, hello.moves)
        return None


@attrs.frozen
class Caller:
    """Who has dialled us, and proved it."""

    peer: PeerId
    addresses: tuple[str, ...]
    """Where it can be dialled itself, as it says."""
    tls: Tls
    membership: bytes
    session: bytes
    """The one that it wants to go on with; empty: a new one."""
    moves: int

    async def decline(self, verdict: Verdict) -> None:
        async with _closing(self.tls.socket):
            await _say(self.tls, verdict)


def well(session: bytes, moves: int, observed: str, membership: bytes) -> bytes:
    """The verdict that there is a link: its first message, so that there is one when it is heard."""
    return encode(Verdict(session=session, moves=moves, observed=observed, membership=membership))


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
