"""Make links to peers: TCP and TLS, by ways that need no help first.

*A* wants a link to *B*.  Where A has heard at which addresses B takes links it dials them, and the
greeting proves who is there.  Otherwise, or where nobody answers, both talk over a control channel:

    A ── Offer: addresses ───────────────> B
    A <── Answer: addresses, or Decline ── B
    A ════ TCP, TLS, greeting ═══════════> B      way DIRECT
    A ── DialBack ──> B, where A got nowhere:     A <════ TCP, TLS, greeting ════ B   way REVERSE
    A <─ Dialled ─── B

When both want a link at once the smaller peer id's attempt is carried on: it answers the
other's with `busy`, and the other waits for the link to come.  A new link to a peer replaces an
old one: a peer that dials has none.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import msgspec
import structlog
import trio

from p2pgrid.errors import PeerError, Unreachable
from p2pgrid.hole_punch.greeting import WELL, Caller, Greeting, Verdict, bare, connect, discard
from p2pgrid.hole_punch.link import Link, Receive, Receiver
from p2pgrid.hole_punch.path import (
    ADDRESSES_MAX,
    Address,
    Way,
    candidates,
    from_multiaddr,
    is_near,
    own_addresses,
    to_multiaddr,
)
from p2pgrid.hole_punch.rates import Rates
from p2pgrid.hole_punch.reactor import Reactor, reactors_wanted
from p2pgrid.hole_punch.tls import Tls
from p2pgrid.ids import PeerId
from p2pgrid.net import Channel, Network

__all__ = ["PROTOCOL", "Link", "Links", "Receive", "Receiver", "Way", "open_links"]

log = structlog.get_logger(__name__)

PROTOCOL = "/p2pgrid/link/2"
DIAL_PATIENCE = 3.0
"""Seconds to reach one of a peer's addresses; a host that is up answers in one round trip."""
HANDSHAKE_PATIENCE = 5.0
"""Seconds a connection at our port may take to show who it is."""
NEGOTIATION_PATIENCE = 12.0
"""Seconds for all of it: a dial, a dial back, and the messages between."""
HANDSHAKES_MAX = 32
"""Connections at our port that have not shown who they are; the oldest gives way to one more."""
LINKS_MAX = 512
"""Links of one node; more are declined."""
KNOWN_MAX = 4096
"""Peers whose addresses are remembered."""
STAGGER = 0.05
"""Seconds between the starts of dials to one peer, best address first."""


class Offer(msgspec.Struct, tag="offer", frozen=True):
    addresses: list[str]


class Answer(msgspec.Struct, tag="answer", frozen=True):
    addresses: list[str]


class Decline(msgspec.Struct, tag="decline", frozen=True):
    why: str
    busy: bool = False


class DialBack(msgspec.Struct, tag="dial-back", frozen=True):
    pass


class Dialled(msgspec.Struct, tag="dialled", frozen=True):
    ok: bool


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
        self._greeting = Greeting(network)
        self._threads = trio.CapacityLimiter(reactors_wanted())
        self._reactors = [Reactor() for _ in range(reactors_wanted())]
        self._token = trio.lowlevel.current_trio_token()
        self._handshakes: dict[trio.CancelScope, None] = {}
        self._over = False
        self._links: dict[PeerId, Link] = {}
        self._attempts: dict[PeerId, trio.Event] = {}
        self._answering: dict[PeerId, trio.Event] = {}
        self._arrivals: dict[PeerId, trio.Event] = {}
        self._asked_back: set[PeerId] = set()
        """Peers that we asked to dial us."""
        self._known: dict[PeerId, list[Address]] = {}
        self.bound: list[Address] = []
        """Where links are accepted."""

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

    def learn(self, peer: PeerId, multiaddrs: Iterable[str]) -> None:
        """Remember at which of these `peer` takes links."""
        self._know(peer, [address for text in multiaddrs if (address := from_multiaddr(text))])

    def addresses_of(self, peer: PeerId) -> list[str]:
        """Where `peer` takes links, as far as is known, as multiaddrs."""
        return [to_multiaddr(address) for address in self._known.get(peer, ())]

    def _know(self, peer: PeerId, addresses: list[Address]) -> None:
        if addresses:
            self._known.pop(peer, None)
            self._known[peer] = addresses[:ADDRESSES_MAX]  # what was heard last counts, and is forgotten last
            while len(self._known) > KNOWN_MAX:
                del self._known[next(iter(self._known))]

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
                return await self._make(peer)
            raise Unreachable(who=peer, why=f"no link after {NEGOTIATION_PATIENCE:.0f} s")
        except (PeerError, OSError) as wrong:
            raise Unreachable(who=peer, why=str(wrong)) from None
        finally:
            del self._attempts[peer]
            done.set()

    # --- the side that wants a link -------------------------------------------------------

    async def _make(self, peer: PeerId) -> Link:
        if known := self._known.get(peer):
            made = await self._dial(peer, known, Way.DIRECT)
            if made is not None:
                return await self._settled(peer, made)
            self._known.pop(peer, None)
        return await self._negotiate(peer)

    async def _negotiate(self, peer: PeerId) -> Link:
        channel = await self._network.open(peer, PROTOCOL)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(_close, channel)
            await channel.send(Offer(self._addresses()))
            answer = await channel.receive(Answer | Decline)
            if isinstance(answer, Decline):
                return await self._settled(peer, answer)
            made = await self._dial(peer, self._candidates(peer, answer.addresses), Way.DIRECT)
            if made is not None:
                return await self._settled(peer, made)
            self._asked_back.add(peer)
            stack.callback(self._asked_back.discard, peer)
            await channel.send(DialBack())
            if not (await channel.receive(Dialled)).ok:
                raise Unreachable(who=peer, why="neither side can dial the other")
            return await self._arrival(peer)

    async def _settled(self, peer: PeerId, made: Link | Verdict | Decline) -> Link:
        """The link that an attempt came to, ours or the peer's own."""
        if isinstance(made, Link):
            return made
        if not made.busy:
            raise Unreachable(who=peer, why=made.why)
        return await self._arrival(peer)

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
        verdict = self._judge(peer)
        if verdict.why:
            return await channel.send(Decline(verdict.why, verdict.busy))
        done = self._answering[peer] = trio.Event()
        try:
            await channel.send(Answer(self._addresses()))
            # It ends the channel when it has its link.
            await channel.receive(DialBack)
            made = await self._dial(peer, self._candidates(peer, offer.addresses), Way.REVERSE)
            await channel.send(Dialled(isinstance(made, Link)))
        finally:
            if self._answering.get(peer) is done:
                del self._answering[peer]
            done.set()
        return None

    def _judge(self, peer: PeerId) -> Verdict:
        """What we say to a peer that wants a link."""
        if not self._allow(peer):
            return Verdict("not a member of the grid")
        if self._paused:
            return Verdict("paused by its owner")
        if peer in self._attempts and peer not in self._asked_back and self._network.me < peer:
            return Verdict("our own attempt goes first", busy=True)
        if len(self._links) >= LINKS_MAX and peer not in self._links:
            return Verdict("too many links")
        return Verdict()

    def _candidates(self, peer: PeerId, told: Sequence[str]) -> list[Address]:
        return candidates(told[:ADDRESSES_MAX], self._network.addresses_of(peer))

    def _addresses(self) -> list[str]:
        return own_addresses(self.bound, self._network.addresses)

    def _adopt(self, peer: PeerId, way: Way, tls: Tls, first: bytes = b"") -> Link:
        try:
            far, own = tls.socket.getpeername()[0], tls.socket.getsockname()[0]
            rates = self.rates.link(private=is_near(far, own))
            reactor = min(self._reactors, key=len)
            link = Link(peer, way, tls, self._receive, rates, reactor.call, self._ended)
        except OSError:  # the peer is gone already
            tls.close()
            raise
        if first:
            link.send(first)
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

    async def _dial(self, peer: PeerId, addresses: Sequence[Address], way: Way) -> Link | Verdict | None:
        """Dial all of a peer's addresses, greet those that answer one by one, keep the first that is it.

        Its verdict where it wants no link, None where it was not reached.
        """
        send, answered = trio.open_memory_channel[socket.socket](len(addresses))
        greeted: Tls | Verdict | None = None
        reached: Address | None = None
        with trio.move_on_after(DIAL_PATIENCE):
            async with trio.open_nursery() as nursery:
                with send:
                    for place, address in enumerate(addresses):
                        nursery.start_soon(connect, address, place * STAGGER, send.clone())
                async for sock in answered:
                    reached = _far_end(sock)
                    greeted = await self._greeting.dial(sock, peer, self._addresses())
                    if greeted is not None:
                        break
                nursery.cancel_scope.cancel()
        discard(answered)
        if not isinstance(greeted, Tls):
            return greeted
        self._know(peer, [*filter(None, [reached]), *(a for a in addresses if a != reached)])
        return self._adopt(peer, way, greeted)

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
                if len(self._handshakes) >= HANDSHAKES_MAX:
                    next(iter(self._handshakes)).cancel()
                scope = trio.CancelScope()
                self._handshakes[scope] = None
                self._nursery.start_soon(self._admit, sock, scope)

    async def _admit(self, sock: socket.socket, scope: trio.CancelScope) -> None:
        try:
            with scope, trio.move_on_after(HANDSHAKE_PATIENCE):
                caller = await self._greeting.accept(sock)
                if caller is not None:
                    await self._take(caller)
        except OSError as full:  # ours, not the peer's: no descriptor or no memory left
            log.warning("a connection was dropped", why=str(full))
            sock.close()
        finally:
            del self._handshakes[scope]

    async def _take(self, caller: Caller) -> None:
        peer, far = caller.peer, _far_end(caller.tls.socket)
        verdict = self._judge(peer)
        if verdict.why:
            return await caller.decline(verdict)
        self._know(peer, candidates(caller.addresses, [to_multiaddr(far)] if far is not None else []))
        self._adopt(peer, Way.REVERSE if peer in self._asked_back else Way.DIRECT, caller.tls, WELL)
        return None


def _far_end(sock: socket.socket) -> Address | None:
    try:
        host, port = sock.getpeername()[:2]
    except OSError:
        return None
    return host.partition("%")[0], port


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
