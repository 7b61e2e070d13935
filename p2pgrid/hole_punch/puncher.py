"""Punch: have both sides of a relayed link dial each other at once, and move the link to what comes of it.

`punch.py` decides; here are the sockets.  All are bound to the address and port that links are taken at,
so what stands between maps them as the port that observers have seen.  A first packet of the peer's meets
either a socket of ours that is dialling, and both `connect` at once (simultaneous open), or the listening
one, whose connection comes here by its magic.  Whichever it is, on every connection each side says

    MAGIC (8)  its token of this round (16)

and drops it unless the other's token is the right one.  More than one may pass that (at home and through a
router): the side with the larger peer id, TLS' client, begins TLS on the first, and resets the others; the
other side takes the one on which something comes.
"""

from __future__ import annotations

import contextlib
import errno
import random
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Protocol

import attrs
import psutil
import structlog
import trio

from p2pgrid.drive import drive
from p2pgrid.hole_punch.greeting import bare, share_port
from p2pgrid.hole_punch.nat import Stance, stance
from p2pgrid.hole_punch.path import Address
from p2pgrid.hole_punch.punch import (
    WINDOW,
    Changed,
    Dial,
    Effect,
    Ended,
    Event,
    Expect,
    Forget,
    Gone,
    Heard,
    Punch,
    Relayed,
    Round,
    Settled,
    Tell,
)
from p2pgrid.hole_punch.punch_messages import MAGIC, TOKEN, Decline, Message, Offer, encode
from p2pgrid.ids import PeerId

log = structlog.get_logger(__name__)

RETRY_FIRST, RETRY_LAST = 0.05, 0.2
"""Seconds until a dial that was refused is made again, half as much more or less by chance.

The peer's NAT did not know of us yet, and reset what it did not know; ours then closed the way again that
the dial had opened.  Where both do so first packets must cross between them, so they must not keep step.
"""
NEVER = {errno.EAFNOSUPPORT, errno.ENETUNREACH, errno.EINVAL, errno.EACCES, errno.EPERM}
"""Errors that say that there is no way from here."""
INBOX = 64
"""Events of one peer that wait; beyond, what it says is dropped: it says four things an attempt."""
REMEMBERED_MAX = 1024
"""Peers of which it is known how often punching failed."""
RESET = struct.pack("ii", 1, 0)
"""Closing sends a reset, and nothing of the connection stays: its port is needed again."""


class Ground(Protocol):
    """What punching needs of the node: a relayed way to say something, and somebody to take connections."""

    @property
    def me(self) -> PeerId: ...

    @property
    def bound(self) -> Sequence[Address]:
        """Where links are taken: what is dialled from, too."""
        ...

    def observed(self) -> Sequence[Address]:
        """Where observers, one each, see what is dialled from there."""
        ...

    def mapped(self) -> Sequence[Address]:
        """Where routers let others in to it."""
        ...

    def tell(self, peer: PeerId, message: bytes) -> None: ...

    async def bring(self, sock: socket.socket, peer: PeerId, *, accepts: bool) -> bool:
        """Take a connection into use, whose other side greets us, or is greeted; whether it came to that.

        `sock` is its own, whatever comes of it.
        """
        ...


@attrs.define(eq=False)
class _Attempt:
    """One round, while it lasts."""

    peer: PeerId
    round: Round
    nursery: trio.Nursery | None = None
    held: trio.Event = attrs.field(factory=trio.Event)
    opened: trio.Event = attrs.field(factory=trio.Event)
    taking: trio.Lock = attrs.field(factory=trio.Lock)
    """Held while a connection is taken into use: one at a time."""


class Puncher:
    """The attempts of one node.  In trio's thread only."""

    def __init__(
        self,
        ground: Ground,
        nursery: trio.Nursery,
        interfaces: Callable[[], Iterable[str]],
        draw: Callable[[int], bytes],
    ) -> None:
        self._ground = ground
        self._nursery = nursery
        self._interfaces = interfaces
        self._draw = draw
        self.machines: dict[PeerId, Punch] = {}
        """Of peers that there is a link to, and of some that there was."""
        self._inboxes: dict[PeerId, trio.MemorySendChannel[Event]] = {}
        """Of peers that there is a link to."""
        self._scopes: dict[PeerId, trio.CancelScope] = {}
        self._attempts: dict[bytes, _Attempt] = {}
        """By our token."""
        self.stance = Stance()
        """What peers are told of this node."""
        self.look()

    def outlook(self, peer: PeerId) -> str:
        """For people: what is being done about a direct path, or why there is none."""
        machine = self.machines.get(peer)
        return machine.outlook if machine is not None else ""

    def look(self, *, anew: bool = False) -> None:
        """Find out this node's addresses again; `anew`: its network may be another one with the same."""
        ground = self._ground
        self.stance = stance(ground.bound, self._interfaces(), ground.observed(), ground.mapped())
        for inbox in self._inboxes.values():
            self._put(inbox, Changed(self.stance, anew))

    def relayed(self, peer: PeerId) -> None:
        """There is a relayed path to `peer`, and no better one."""
        self.look()
        if peer not in self._inboxes:
            machine = self.machines.pop(peer, None) or Punch(self._ground.me, peer, self.stance, self._draw)
            self.machines[peer] = machine  # those that were used last are forgotten last
            for old in [p for p in self.machines if p not in self._inboxes][:-REMEMBERED_MAX]:
                del self.machines[old]
            send, receive = trio.open_memory_channel[Event](INBOX)
            self._inboxes[peer] = send
            self._put(send, Changed(self.stance))
            scope = self._scopes[peer] = trio.CancelScope()
            self._nursery.start_soon(self._drive, peer, machine, receive, scope)
        self._put(self._inboxes[peer], Relayed())

    def settled(self, peer: PeerId) -> None:
        """There is a direct path to `peer`."""
        if peer in self._inboxes:
            self._put(self._inboxes[peer], Settled())

    def gone(self, peer: PeerId) -> None:
        """There is no link to `peer`."""
        if peer in self._inboxes:
            self._scopes.pop(peer).cancel()
            self._inboxes.pop(peer).close()
            self.machines[peer].step(Gone(), trio.current_time())  # what it was at ends with its story

    def heard(self, peer: PeerId, message: Message) -> None:
        """`peer` said something of kinds 40 to 47."""
        if peer in self._inboxes:
            self._put(self._inboxes[peer], Heard(message))
        elif isinstance(message, Offer):
            self._ground.tell(peer, encode(Decline(message.token, "there is a direct path")))

    async def admit(self, sock: socket.socket) -> None:
        """Take a connection that begins with `MAGIC`, nothing of which was read."""
        with _dropping(sock) as kept, contextlib.suppress(OSError):
            said = await _read(sock)
            attempts = self._attempts.values()
            attempt = next((a for a in attempts if said == MAGIC + a.round.theirs), None)
            if attempt is None or attempt.nursery is None:
                return
            sock.send(MAGIC + attempt.round.ours)
            kept.whole = True
            attempt.nursery.start_soon(self._take, attempt, sock)

    @staticmethod
    def _put(inbox: trio.MemorySendChannel[Event], event: Event) -> None:
        try:
            inbox.send_nowait(event)
        except trio.WouldBlock:
            log.debug("more is said of punching than can be heard", dropped=str(event))

    # --- the story of one peer ------------------------------------------------------------

    async def _drive(
        self,
        peer: PeerId,
        machine: Punch,
        inbox: trio.MemoryReceiveChannel[Event],
        scope: trio.CancelScope,
    ) -> None:
        async def perform(effect: Effect) -> None:
            match effect:
                case Tell(message):
                    self._ground.tell(peer, encode(message))
                case Expect(expected):
                    await self._hold(self._attempt(peer, expected))
                case Dial(dialled, after):
                    await self._dial(self._attempt(peer, dialled), after)
                case Forget(token):
                    attempt = self._attempts.pop(token, None)
                    if attempt is not None and attempt.nursery is not None:
                        attempt.nursery.cancel_scope.cancel()

        with scope:
            await drive(machine, inbox, perform)

    def _attempt(self, peer: PeerId, attempted: Round) -> _Attempt:
        """That round's: effects of one step are performed in any order."""
        return self._attempts.setdefault(attempted.ours, _Attempt(peer, attempted))

    async def _hold(self, attempt: _Attempt) -> None:
        """Be what all that belongs to an attempt happens in, until it is forgotten."""
        try:
            async with trio.open_nursery() as attempt.nursery:
                attempt.held.set()
                await trio.sleep_forever()
        finally:
            self._attempts.pop(attempt.round.ours, None)

    async def _dial(self, attempt: _Attempt, after: float) -> None:
        await attempt.held.wait()
        await trio.sleep(after)
        with trio.move_on_after(WINDOW):
            async with trio.open_nursery() as nursery:
                for address in attempt.round.targets:
                    nursery.start_soon(self._reach, attempt, address)
                await attempt.opened.wait()
                nursery.cancel_scope.cancel()
        async with attempt.taking:  # what has begun may come to its end
            pass
        self._end(attempt)

    def _end(self, attempt: _Attempt) -> None:
        if attempt.peer in self._inboxes:
            self._put(self._inboxes[attempt.peer], Ended(attempt.round.ours, attempt.opened.is_set()))

    async def _reach(self, attempt: _Attempt, address: Address) -> None:
        """Dial until somebody is there, whoever it is."""
        pause = RETRY_FIRST
        while True:
            try:
                sock = await self._connect(address)
                with _dropping(sock) as kept:
                    sock.send(MAGIC + attempt.round.ours)
                    if await _read(sock) == MAGIC + attempt.round.theirs and attempt.nursery is not None:
                        kept.whole = True
                        attempt.nursery.start_soon(self._take, attempt, sock)
                    return
            except OSError as refused:
                if refused.errno in NEVER:
                    log.debug("cannot punch there", address=address, why=str(refused))
                    return
            await trio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, RETRY_LAST)

    async def _connect(self, address: Address) -> socket.socket:
        """A connection from where links are taken.  Raises `OSError`."""
        six = ":" in address[0]
        bound = next((bound for bound in self._ground.bound if (":" in bound[0]) == six), None)
        if bound is None:
            raise OSError(errno.EAFNOSUPPORT, "links are not taken at such an address")
        sock = trio.socket.socket(socket.AF_INET6 if six else socket.AF_INET)
        try:
            share_port(sock)
            await sock.bind(bound)
            await sock.connect(address)
            return bare(sock)
        finally:
            sock.close()  # one that was handed on is detached: nothing happens

    async def _take(self, attempt: _Attempt, sock: socket.socket) -> None:
        """Take a proved connection into use, if it is the one."""
        accepts = self._ground.me < attempt.peer
        with _dropping(sock) as kept, contextlib.suppress(OSError):
            if accepts:  # the other side chooses
                await trio.lowlevel.wait_readable(sock.fileno())
                if not sock.recv(1, socket.MSG_PEEK):
                    return
            async with attempt.taking:
                if attempt.opened.is_set():
                    return
                kept.whole = True
                if await self._ground.bring(sock, attempt.peer, accepts=accepts):
                    attempt.opened.set()
                    self._end(attempt)


@attrs.define
class _Kept:
    whole: bool = False


@contextlib.contextmanager
def _dropping(sock: socket.socket) -> Iterator[_Kept]:
    """Reset the connection at the end of the block, unless it is kept whole."""
    kept = _Kept()
    try:
        yield kept
    finally:
        if not kept.whole:
            with contextlib.suppress(OSError):  # it has ended by itself
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            sock.close()


async def _read(sock: socket.socket) -> bytes:
    """What a side says first, or less of it, if the connection ends; nothing beyond: that is TLS'."""
    said = b""
    while len(said) < len(MAGIC) + TOKEN:
        await trio.lowlevel.wait_readable(sock.fileno())
        more = sock.recv(len(MAGIC) + TOKEN - len(said))
        if not more:
            break
        said += more
    return said


def own_hosts() -> list[str]:
    """The IP addresses of this computer's interfaces."""
    families = (socket.AF_INET, socket.AF_INET6)
    found = [a for addresses in psutil.net_if_addrs().values() for a in addresses if a.family in families]
    return [a.address for a in found]


@contextlib.asynccontextmanager
async def open_puncher(
    ground: Ground,
    interfaces: Callable[[], Iterable[str]] = own_hosts,
    draw: Callable[[int], bytes] = secrets.token_bytes,
) -> AsyncIterator[Puncher]:
    """Punch while inside, for peers that it is told are relayed."""
    async with trio.open_nursery() as nursery:
        yield Puncher(ground, nursery, interfaces, draw)
        nursery.cancel_scope.cancel()
