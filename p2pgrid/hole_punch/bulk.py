"""Make links: direct TLS 1.3 sockets between two peers, one per pair.

Who wants a link opens a control channel, `/p2pgrid/link/1`, whose ends libp2p has
authenticated, and both tell their certificate and where their bulk port is:

    A ── Offer(certificate, addresses) ──> B      B now expects A at its port
    A <─ Answer(certificate, addresses) ── B      A now expects B at its port
    A ════ TCP, TLS, welcome ════════════> B      way DIRECT
    A ── DialBack ──> B, where A got nowhere:     A <════ TCP, TLS, welcome ════ B   way REVERSE
    A <─ Dialled ─── B

Both pin: a connection is a peer's only if it shows the very certificate that this peer told.
At the port, whoever is not expected is dropped: at once when nobody is expected, else after a
bounded handshake.  The side that accepts says the *welcome* (an empty message), because in
TLS 1.3 the dialler's handshake ends before the other side has looked at its certificate.

When both want a link at once the smaller peer id's attempt is carried on: it answers the
other's Offer with `Decline(busy)`, and the other waits for the link to come.  A new link to a
peer replaces an old one: a peer that negotiates has none.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import attrs
import msgspec
import structlog
import trio

from p2pgrid.errors import PeerError, Unreachable
from p2pgrid.hole_punch.certificate import Certificate, belongs
from p2pgrid.hole_punch.greeting import bare, connect, discard, greet
from p2pgrid.hole_punch.link import Link, Receive, Receiver
from p2pgrid.hole_punch.path import ADDRESSES_MAX, Address, Way, candidates, own_addresses
from p2pgrid.hole_punch.rates import Rates
from p2pgrid.hole_punch.reactor import Reactor, reactors_wanted
from p2pgrid.hole_punch.tls import Tls
from p2pgrid.ids import PeerId
from p2pgrid.net import Channel, Network

__all__ = ["PROTOCOL", "Link", "Links", "Receive", "Receiver", "Way", "open_links"]

log = structlog.get_logger(__name__)

PROTOCOL = "/p2pgrid/link/1"
DIAL_PATIENCE = 3.0
"""Seconds to reach one of a peer's addresses; a host that is up answers in one round trip."""
HANDSHAKE_PATIENCE = 5.0
"""Seconds a connection at our port may take to show who it is."""
NEGOTIATION_PATIENCE = 12.0
"""Seconds for all of it: a dial, a dial back, and the messages between."""
HANDSHAKES_MAX = 32
"""Connections at our port that have not shown who they are; more are dropped."""
LINKS_MAX = 512
"""Links of one node; more are declined."""
STAGGER = 0.05
"""Seconds between the starts of dials to one peer, best address first."""


class Offer(msgspec.Struct, tag="offer", frozen=True):
    certificate: bytes
    addresses: list[str]


class Answer(msgspec.Struct, tag="answer", frozen=True):
    certificate: bytes
    addresses: list[str]


class Decline(msgspec.Struct, tag="decline", frozen=True):
    why: str
    busy: bool = False


class DialBack(msgspec.Struct, tag="dial-back", frozen=True):
    pass


class Dialled(msgspec.Struct, tag="dialled", frozen=True):
    ok: bool


@attrs.frozen(eq=False)
class _Expected:
    """A peer that may connect to our port now."""

    peer: PeerId
    way: Way
    came: trio.Event = attrs.field(factory=trio.Event)


class Links:
    """The links of one node; see `open_links`."""

    def __init__(
        self, network: Network, receive: Receive, allow: Callable[[PeerId], bool], nursery: trio.Nursery
    ) -> None:
        self.rates = Rates()
        """What the links may move."""
        self._paused = ""
        self._network = network
        self._receive = receive
        self._allow = allow
        self._nursery = nursery
        self._certificate = Certificate.make(network.me)
        self._threads = trio.CapacityLimiter(reactors_wanted())
        self._reactors = [Reactor() for _ in range(reactors_wanted())]
        self._token = trio.lowlevel.current_trio_token()
        self._handshakes = 0
        self._over = False
        self._links: dict[PeerId, Link] = {}
        self._attempts: dict[PeerId, trio.Event] = {}
        self._answering: dict[PeerId, trio.Event] = {}
        self._arrivals: dict[PeerId, trio.Event] = {}
        self._expected: dict[bytes, _Expected] = {}
        self.bound: list[Address] = []
        """Where the bulk port listens."""

    def live(self) -> list[Link]:
        return [link for link in self._links.values() if link.live]

    @property
    def paused(self) -> str:
        """Why there are no links now; empty: there may be."""
        return self._paused

    def pause(self, why: str) -> None:
        """End all links, and have none, until called with an empty `why`."""
        self._paused = why
        if why:
            for link in self.live():
                link.close(f"paused: {why}")

    async def link(self, peer: PeerId) -> Link:
        """The link there is, or a new one.  Raises `Unreachable`."""
        assert peer != self._network.me
        while True:
            link = self._links.get(peer)
            if link is not None and link.live:
                return link
            under_way = self._attempts.get(peer, self._answering.get(peer))
            if under_way is None:
                break
            await under_way.wait()
        if self._paused:
            raise Unreachable(who=peer, why=f"paused: {self._paused}")
        if not self._allow(peer):
            raise Unreachable(who=peer, why="it is not a member of the grid")
        if len(self._links) >= LINKS_MAX:
            raise Unreachable(who=peer, why=f"there are {LINKS_MAX} links already")
        done = self._attempts[peer] = trio.Event()
        try:
            with trio.move_on_after(NEGOTIATION_PATIENCE):
                return await self._negotiate(peer)
            raise Unreachable(who=peer, why=f"no link after {NEGOTIATION_PATIENCE:.0f} s")
        except (PeerError, OSError) as wrong:
            raise Unreachable(who=peer, why=str(wrong)) from None
        finally:
            del self._attempts[peer]
            done.set()

    # --- the side that wants a link -------------------------------------------------------

    async def _negotiate(self, peer: PeerId) -> Link:
        channel = await self._network.open(peer, PROTOCOL)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(_close, channel)
            await channel.send(Offer(self._certificate.der, self._addresses()))
            answer = await channel.receive(Answer | Decline)
            if isinstance(answer, Decline):
                if not answer.busy:
                    raise Unreachable(who=peer, why=answer.why)
                return await self._arrival(peer)
            with self._expecting(peer, answer.certificate, Way.REVERSE) as expected:
                link = await self._dial(peer, answer.certificate, answer.addresses, Way.DIRECT)
                if link is not None:
                    return link
                await channel.send(DialBack())
                if not (await channel.receive(Dialled)).ok:
                    raise Unreachable(who=peer, why="neither side can dial the other")
                await expected.came.wait()
                return self._links[peer]

    async def _arrival(self, peer: PeerId) -> Link:
        """The link that `peer` is making; the caller bounds the wait."""
        while True:
            link = self._links.get(peer)
            if link is not None and link.live:
                return link
            await self._arrivals.setdefault(peer, trio.Event()).wait()

    # --- the side that is asked -----------------------------------------------------------

    async def _serve(self, channel: Channel) -> None:
        try:
            with trio.move_on_after(NEGOTIATION_PATIENCE):
                await self._answer(channel, await channel.receive(Offer))
        except Unreachable:
            pass  # the channel ended: the other side has its link, or has given up
        except OSError as full:
            log.warning("no link to a peer that asked for one", peer=channel.peer, why=str(full))

    async def _answer(self, channel: Channel, offer: Offer) -> None:
        peer = channel.peer
        if not self._allow(peer):
            return await channel.send(Decline("not a member of the grid"))
        if self._paused:
            return await channel.send(Decline("paused by its owner"))
        if peer in self._attempts and self._network.me < peer:
            return await channel.send(Decline("our own attempt goes first", busy=True))
        if len(self._links) >= LINKS_MAX:
            return await channel.send(Decline("too many links"))
        done = self._answering[peer] = trio.Event()
        try:
            with self._expecting(peer, offer.certificate, Way.DIRECT):
                await channel.send(Answer(self._certificate.der, self._addresses()))
                # It ends the channel when it has its link.
                await channel.receive(DialBack)
                link = await self._dial(peer, offer.certificate, offer.addresses, Way.REVERSE)
                await channel.send(Dialled(link is not None))
        finally:
            if self._answering.get(peer) is done:
                del self._answering[peer]
            done.set()
        return None

    @contextlib.contextmanager
    def _expecting(self, peer: PeerId, certificate: bytes, way: Way) -> Iterator[_Expected]:
        if not belongs(certificate, peer):
            raise Unreachable(who=peer, why="it told a certificate that is not its own")
        expected = _Expected(peer, way)
        self._expected[certificate] = expected
        try:
            yield expected
        finally:
            if self._expected.get(certificate) is expected:
                del self._expected[certificate]

    def _addresses(self) -> list[str]:
        return own_addresses(self.bound, self._network.addresses)

    def _adopt(self, peer: PeerId, way: Way, tls: Tls, *, welcome: bool) -> Link:
        try:
            host = ipaddress.ip_address(tls.socket.getpeername()[0].partition("%")[0])
            rates = self.rates.link(private=not host.is_global)
            reactor = min(self._reactors, key=len)
            link = Link(peer, way, tls, self._receive, rates, reactor.call, self._ended)
        except OSError:  # the peer is gone already
            tls.close()
            raise
        if welcome:
            link.send()
        before = self._links.get(peer)
        if before is not None:
            before.close("a newer link took its place")
        self._links[peer] = link
        if self._over or self._paused:
            link.close()
        self._arrivals.pop(peer, trio.Event()).set()
        link.wake()
        return link

    def _ended(self, link: Link) -> None:
        """In a reactor's thread."""

        def forget() -> None:
            if self._links.get(link.peer) is link:
                del self._links[link.peer]

        self._token.run_sync_soon(forget)

    # --- sockets --------------------------------------------------------------------------

    async def _move(self, reactor: Reactor) -> None:
        """Have the reactor's thread until all links have ended, which `close` tells them."""
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(reactor.run, limiter=self._threads)

    async def _dial(self, peer: PeerId, certificate: bytes, told: Sequence[str], way: Way) -> Link | None:
        """Dial all of a peer's addresses, greet those that answer one by one, keep the first that is it."""
        addresses = candidates(told[:ADDRESSES_MAX], self._network.addresses_of(peer))
        context = self._certificate.context(server=False, pinned=[certificate])
        send, answered = trio.open_memory_channel[socket.socket](len(addresses))
        kept: list[Tls] = []
        with trio.move_on_after(DIAL_PATIENCE):
            async with trio.open_nursery() as nursery:
                with send:
                    for place, address in enumerate(addresses):
                        nursery.start_soon(connect, address, place * STAGGER, send.clone())
                async for sock in answered:
                    greeted = await greet(context, sock, certificate, server=False)
                    if greeted is not None:
                        kept.append(greeted)
                        break
                nursery.cancel_scope.cancel()
        discard(answered)
        return self._adopt(peer, way, kept[0], welcome=False) if kept else None

    async def _listen(self, listener: trio.SocketListener) -> None:
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
                if not self._expected or self._handshakes >= HANDSHAKES_MAX:
                    sock.close()
                    continue
                self._handshakes += 1
                self._nursery.start_soon(self._admit, sock)

    async def _admit(self, sock: socket.socket) -> None:
        try:
            with trio.move_on_after(HANDSHAKE_PATIENCE):
                context = self._certificate.context(server=True, pinned=self._expected)
                greeted = await greet(context, sock, None, server=True)
                if greeted is None:
                    return
                expected = self._expected.pop(greeted.certificate or b"", None)
                if expected is None:
                    greeted.close()
                    return
                self._adopt(expected.peer, expected.way, greeted, welcome=True)
                expected.came.set()
        except OSError as full:  # ours, not the peer's: no descriptor or no memory left
            log.warning("a connection was dropped", why=str(full))
            sock.close()
        finally:
            self._handshakes -= 1


@contextlib.asynccontextmanager
async def open_links(
    network: Network,
    listen: Sequence[Address],
    receive: Receive,
    allow: Callable[[PeerId], bool] = lambda peer: True,
) -> AsyncIterator[Links]:
    """Listen at the addresses of `listen` (port 0: any) and have links while inside.

    `allow` says who is a member.  On leaving, every link is closed and its thread has ended.
    Raises `OSError` where an address cannot be listened at.
    """
    async with trio.open_nursery() as nursery:
        links = Links(network, receive, allow, nursery)
        try:
            for host, port in listen:
                for listener in await trio.open_tcp_listeners(port, host=host):
                    links.bound.append(listener.socket.getsockname()[:2])
                    nursery.start_soon(links._listen, listener)
            network.serve(PROTOCOL, links._serve)
            for reactor in links._reactors:
                nursery.start_soon(links._move, reactor, name="links")
            yield links
        finally:
            links._over = True
            for link in links.live():
                link.close()
            for reactor in links._reactors:
                reactor.stop()
            nursery.cancel_scope.cancel()


async def _close(channel: Channel) -> None:
    with trio.move_on_after(1) as scope:
        scope.shield = True
        await channel.aclose()
