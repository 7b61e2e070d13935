"""Keep a port of ours mapped at the gateway while the block runs: sockets and clock around `mapper.py`.

network changes ──Placed──┐            ┌──Ask──> UDP to the gateway's port 5351
answers, announcements ───┼─> Mapper ──┼──AskUpnp──> upnp.py
(the gateway's own only) ─┘            └──Tell──> Mapping
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Sequence

import structlog
import trio

from p2pgrid.drive import drive
from p2pgrid.hole_punch.netwatch import Change, Net, open_netwatch, read_net
from p2pgrid.hole_punch.path import Address, format_address
from p2pgrid.hole_punch.portmap import messages
from p2pgrid.hole_punch.portmap.mapper import (
    LIFETIME,
    WAYS,
    Announced,
    Ask,
    AskUpnp,
    Effect,
    Event,
    Heard,
    Left,
    Mapper,
    NobodyThere,
    Place,
    Placed,
    ReleaseUpnp,
    Tell,
)
from p2pgrid.hole_punch.portmap.upnp import Upnp

log = structlog.get_logger(__name__)

INBOX = 64
"""Events that wait; what comes from the network beyond them is lost, as datagrams may be."""
RELEASE_PATIENCE = 1.5
"""Seconds that giving the mapping back may take; it lapses by itself."""
RELEASE_TRIES = 3
ANY = "0.0.0.0"

Look = Callable[[], Net]


class Mapping:
    """What is mapped to our port now."""

    def __init__(self) -> None:
        self.address: Address | None = None
        """Where we can be reached from outside."""
        self.how = ""
        """"pcp", "nat-pmp" or "upnp"."""
        self.why = ""
        """Why there is no address; empty: there is one, or it is being tried."""
        self.changed = trio.Event()
        """Set at the next change; there is a new one then."""

    @property
    def tried(self) -> bool:
        """Whether it is known by now that there is an address, or why not."""
        return self.address is not None or bool(self.why)

    def _tell(self, told: Tell) -> None:
        self.address, self.how, self.why = told.address, told.how, told.why
        if told.address is not None:
            log.info("the gateway lets others in", at=format_address(told.address), how=told.how)
        elif told.why:
            log.info("no port of the gateway's is ours", why=told.why)
        self.changed.set()
        self.changed = trio.Event()


def place_of(net: Net, host: str = ANY) -> Place | None:
    """Our IPv4 gateway, and our address towards it, unless we listen at another one than that."""
    route = net.v4
    if route is None or not route.gateway or host not in (ANY, route.own):
        return None
    return Place(route.gateway, route.own)


@contextlib.asynccontextmanager
async def open_mapping(
    port: int,
    host: str = ANY,
    *,
    ways: Sequence[str] = WAYS,
    lifetime: int = LIFETIME,
    look: Look = read_net,
) -> AsyncIterator[Mapping]:
    """Have TCP `port`, where we listen at `host`, reachable from outside, as far as the gateway helps.

    Nothing is waited for: `Mapping.address` comes when it comes, and may go again.  On leaving the
    mapping is given back, which takes `RELEASE_PATIENCE` at most.
    """
    mapping, upnp, line = Mapping(), Upnp(port), _Line()
    machine = Mapper(port, secrets.token_bytes(messages.NONCE), tuple(ways), lifetime)
    send, inbox = trio.open_memory_channel[Event](INBOX)

    async def perform(effect: Effect) -> None:
        match effect:
            case Ask(data):
                await line.send(data)
            case AskUpnp():
                await send.send(await upnp.map(effect))
            case ReleaseUpnp(external):
                with trio.move_on_after(RELEASE_PATIENCE):
                    await upnp.release(external)
            case Tell():
                mapping._tell(effect)

    async def follow_network(changes: trio.MemoryReceiveChannel[Change]) -> None:
        async for change in changes:
            await go(place_of(change.after, host))

    async def go(place: Place | None) -> None:
        line.connect(place)
        nursery.start_soon(line.listen, send)
        await send.send(Placed(place))

    try:
        async with open_netwatch(look=look) as changes, trio.open_nursery() as nursery:
            nursery.start_soon(drive, machine, inbox, perform)
            nursery.start_soon(_hear_announcements, line, send)
            await go(place_of(look(), host))
            nursery.start_soon(follow_network, changes)
            yield mapping
            nursery.cancel_scope.cancel()
    finally:
        held = machine.address is not None
        with trio.CancelScope(deadline=trio.current_time() + RELEASE_PATIENCE, shield=True):
            for effect in machine.step(Left(), trio.current_time()):
                match effect:
                    case Ask(data) if held:
                        await line.insist(data)
                    case Ask(data):  # what was asked for and not answered: it may have been granted
                        await line.send(data)
                    case ReleaseUpnp(external):
                        await upnp.release(external)
        line.close()


class _Line:
    """A UDP socket to the gateway's port, which only the gateway can answer."""

    def __init__(self) -> None:
        self.gateway = ""
        self._sock: trio.socket.SocketType | None = None

    def connect(self, place: Place | None) -> None:
        """Be to this gateway from now on; `listen` must be called again."""
        self.close()
        self.gateway = place.gateway if place is not None else ""
        if place is None:
            return
        with contextlib.ExitStack() as unless_whole:
            bare = unless_whole.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            try:
                bare.bind((place.own, 0))
                bare.connect((place.gateway, messages.PORT))
            except OSError as gone:  # the network has changed once more; we shall hear of it
                log.debug("the gateway cannot be asked", gateway=place.gateway, why=str(gone))
                return
            bare.setblocking(False)
            self._sock = trio.socket.from_stdlib_socket(bare)
            unless_whole.pop_all()

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    async def send(self, data: bytes) -> None:
        if self._sock is not None:
            with contextlib.suppress(OSError, trio.ClosedResourceError):  # lost, as any datagram may be
                await self._sock.send(data)

    async def listen(self, send: trio.MemorySendChannel[Event]) -> None:
        """Pass on what comes, until it is connected elsewhere."""
        sock = self._sock
        while sock is not None:
            event: Event
            try:
                event = Heard(await sock.recv(messages.DATAGRAM_MAX + 1))
            except trio.ClosedResourceError:
                return
            except OSError:  # the gateway, or a host on the way, says that nobody is there
                event = NobodyThere()
            with contextlib.suppress(trio.WouldBlock):
                send.send_nowait(event)

    async def insist(self, data: bytes) -> None:
        """Send until something is answered; nobody else listens any more."""
        if self._sock is None:
            return
        for attempt in range(RELEASE_TRIES):
            await self.send(data)
            with trio.move_on_after(0.25 * 2**attempt), contextlib.suppress(OSError):
                await self._sock.recv(messages.DATAGRAM_MAX + 1)
                return


async def _hear_announcements(line: _Line, send: trio.MemorySendChannel[Event]) -> None:
    """Pass on what the gateway tells everybody, above all that it has just started."""
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # other programs listen there, too
        try:
            await sock.bind((messages.ANNOUNCE_GROUP, messages.ANNOUNCE_PORT))
        except OSError as taken:
            log.debug("a gateway's restart will be noticed late", why=str(taken))
            return
        while True:
            data, (host, *_) = await sock.recvfrom(messages.DATAGRAM_MAX + 1)
            if host == line.gateway:
                with contextlib.suppress(trio.WouldBlock):
                    send.send_nowait(Announced(data))
