"""Find out whether others can dial this node where they see it: ask one of them to try.

    asking ── CALL: id, port, token ──(link)──> asked     if it may be asked, it dials the host that it
    asking <═══ TCP: MAGIC, token ═══════════   asked     sees the link come from, from another port
    asking <── TOLD: id, result ──────(link)──  asked

The link's own host is dialled and no other, so nobody can be made to knock at a stranger's door; a
relayed link has no such host.  What counts is the token's arrival, not what the other says of it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
from collections.abc import AsyncIterator, Iterator

import attrs
import structlog
import trio

from p2pgrid.hole_punch.bulk import Links
from p2pgrid.hole_punch.calling_messages import (
    CONNECTED,
    FAILED,
    MAGIC,
    REFUSED,
    TOKEN,
    Call,
    Told,
    decode,
    encode,
)
from p2pgrid.hole_punch.link import Link
from p2pgrid.hole_punch.path import Address, Way
from p2pgrid.hole_punch.switchboard import CALLING
from p2pgrid.ids import PeerId

log = structlog.get_logger(__name__)

PATIENCE = 3.0
"""Seconds for a connection, of which the most is a firewall's silence."""
ANSWER_PATIENCE = 5.0
ARRIVAL_PATIENCE = 1.0
"""Seconds that a token may take that the other says it has sent."""
CALLS_MAX = 8
"""Calls that are made for others at a time."""
PAUSE = 1.0
"""Seconds between two calls for one peer."""
PEERS_MAX = 1024
"""Peers of which it is remembered when they asked last."""


@attrs.define(eq=False)
class _Call:
    """One that we asked for."""

    arrived: trio.Event = attrs.field(factory=trio.Event)
    told: trio.Event = attrs.field(factory=trio.Event)
    result: int = REFUSED


class Calling:
    """Asks others to dial this node, and dials for others; see `open_calling`."""

    def __init__(self, links: Links, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._calls: dict[tuple[PeerId, int], _Call] = {}
        self._tokens: dict[bytes, trio.Event] = {}
        self._asked: dict[PeerId, float] = {}
        self._under_way = 0
        self._number = 0
        self.over = False
        links.serve(CALLING, lambda link: _Receiver(link, self))
        links.admit(MAGIC, self._arrive)

    async def call(self, link: Link, port: int) -> bool | None:
        """Whether the peer can dial `port` where it sees us; None: it did not try."""
        self._number = (self._number + 1) % (1 << 32)
        asked, key = _Call(), (link.peer, self._number)
        self._calls[key] = asked
        try:
            with self._expected(asked.arrived) as token:
                link.send(encode(Call(self._number, port, token)))
                with trio.move_on_after(ANSWER_PATIENCE):
                    await asked.told.wait()
                if asked.result == CONNECTED:
                    with trio.move_on_after(ARRIVAL_PATIENCE):
                        await asked.arrived.wait()
                if asked.arrived.is_set():
                    return True
                return None if asked.result == REFUSED else False
        finally:
            del self._calls[key]

    async def reach_self(self, address: Address) -> bool:
        """Whether this node reaches itself at `address`, from another port ("hairpin")."""
        arrived = trio.Event()
        with self._expected(arrived) as token:
            if not await _dial(address, token):
                return False
            with trio.move_on_after(ARRIVAL_PATIENCE):
                await arrived.wait()
        return arrived.is_set()

    @contextlib.contextmanager
    def _expected(self, arrived: trio.Event) -> Iterator[bytes]:
        token = secrets.token_bytes(TOKEN)
        self._tokens[token] = arrived
        try:
            yield token
        finally:
            del self._tokens[token]

    async def _arrive(self, sock: socket.socket) -> None:
        """A connection that begins with our magic; the caller bounds the time."""
        with trio.socket.from_stdlib_socket(sock) as line:
            data = b""
            with contextlib.suppress(OSError):
                while len(data) < len(MAGIC) + TOKEN:
                    more = await line.recv(len(MAGIC) + TOKEN - len(data))
                    if not more:
                        return
                    data += more
            if (arrived := self._tokens.get(data[len(MAGIC) :])) is not None:
                arrived.set()

    # --- from reactors' threads -----------------------------------------------------------

    def later(self, link: Link, message: bytes) -> None:
        """Take a message of `link`'s.  Raises `BadFrame`."""
        match decode(message):
            case Call() as call:
                self._token.run_sync_soon(self._serve, link, _far_host(link), call)
            case Told(number, result):
                self._token.run_sync_soon(self._tell, link.peer, number, result)

    # --- in trio's ------------------------------------------------------------------------

    def _tell(self, peer: PeerId, number: int, result: int) -> None:
        call = self._calls.get((peer, number))
        if call is not None:
            call.result = result
            call.told.set()

    def _serve(self, link: Link, host: str, call: Call) -> None:
        if self.over:
            return
        now = trio.current_time()
        last = self._asked.pop(link.peer, -PAUSE)
        self._asked[link.peer] = now
        while len(self._asked) > PEERS_MAX:
            del self._asked[next(iter(self._asked))]
        if not host or not call.port or now - last < PAUSE or self._under_way >= CALLS_MAX:
            link.send(encode(Told(call.number, REFUSED)))
            return
        self._under_way += 1
        self._nursery.start_soon(self._dial_for, link, host, call)

    async def _dial_for(self, link: Link, host: str, call: Call) -> None:
        try:
            connected = await _dial((host, call.port), call.token)
        finally:
            self._under_way -= 1
        link.send(encode(Told(call.number, CONNECTED if connected else FAILED)))


@attrs.frozen
class _Receiver:
    """What one link brings of it."""

    link: Link
    calling: Calling

    def received(self, message: memoryview) -> None:
        self.calling.later(self.link, bytes(message))

    def drained(self) -> None:
        return None

    def left(self, why: str) -> None:
        pass


def _far_host(link: Link) -> str:
    """The host that the link comes from; empty where that is not the peer's."""
    if link.way is Way.RELAYED:
        return ""
    try:
        host = str(link.path.tls.socket.getpeername()[0])
    except OSError:
        return ""
    ip = ipaddress.ip_address(host.partition("%")[0])
    return "" if ip.is_link_local else str(ip)


async def _dial(address: Address, token: bytes) -> bool:
    """Whether somebody takes a connection there, and the token."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with contextlib.suppress(OSError), trio.socket.socket(family, socket.SOCK_STREAM) as sock:
        with trio.move_on_after(PATIENCE):
            await sock.connect(address)
            sent = await sock.send(MAGIC + token)
            return sent == len(MAGIC) + TOKEN
    return False


@contextlib.asynccontextmanager
async def open_calling(links: Links) -> AsyncIterator[Calling]:
    """Ask, and be asked, while inside."""
    async with trio.open_nursery() as nursery:
        calling = Calling(links, nursery)
        try:
            yield calling
        finally:
            calling.over = True
            nursery.cancel_scope.cancel()
