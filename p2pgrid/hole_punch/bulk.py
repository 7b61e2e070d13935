"""Have one link to each peer that is wanted, by the best way there is.

*A* wants a link to *B*.  Where A has heard at which addresses B takes links it dials them, and a
moment later asks B's relays, too; the greeting proves who is there.  Otherwise, or where nobody
answers, both talk over a control channel:

    A ── Offer: addresses ───────────────> B
    A <── Answer: addresses, or Decline ── B
    A ════ TCP, TLS, greeting ═══════════> B      way DIRECT
    A ── DialBack ──> B, where A got nowhere:     A <════ TCP, TLS, greeting ════ B   way REVERSE
    A <─ Dialled ─── B

When both want a link at once the smaller peer id's attempt is carried on: it answers the
other's with `busy`, and the other waits for the link to come.  A link whose connection is lost, or
says nothing any more, goes on over another one that is made in the same manner (`keeping.py`); one
that is made elsewhere, by punching, is brought here (`bring`).
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

import attrs
import msgspec
import structlog
import trio

from p2pgrid.errors import PeerError, Unreachable
from p2pgrid.hole_punch.doors import Doors, Serve, open_listeners
from p2pgrid.hole_punch.greeting import (
    SESSION,
    Allow,
    Caller,
    Greeting,
    Met,
    Verdict,
    connect,
    discard,
    well,
)
from p2pgrid.hole_punch.keeping import Keeping
from p2pgrid.hole_punch.link import Link, Path, Receive, Receiver
from p2pgrid.hole_punch.path import (
    ADDRESSES_MAX,
    Address,
    Circuit,
    Way,
    candidates,
    circuit_from_multiaddr,
    circuit_to_multiaddr,
    format_address,
    from_multiaddr,
    is_near,
    own_addresses,
    parse_address,
    to_multiaddr,
)
from p2pgrid.hole_punch.rates import Rates
from p2pgrid.hole_punch.reactor import Reactor, reactors_wanted
from p2pgrid.hole_punch.switchboard import TRANSFER, Switchboard
from p2pgrid.ids import PeerId
from p2pgrid.net import Channel, Network

__all__ = ["PROTOCOL", "Link", "Links", "Receive", "Receiver", "Way", "open_links"]

log = structlog.get_logger(__name__)

PROTOCOL = "/p2pgrid/link/3"
DIAL_PATIENCE = 3.0
"""Seconds to reach one of a peer's addresses; a host that is up answers in one round trip."""
RELAY_DELAY = 0.3
"""Seconds that dialling a peer's own addresses is ahead of asking its relays."""
RELAY_STAGGER = 0.2
"""Seconds between two relays of one peer."""
NEGOTIATION_PATIENCE = 12.0
"""Seconds for all of it: a dial, a dial back, and the messages between."""
GREETING_PATIENCE = 5.0
"""Seconds for the greeting over a connection that was made elsewhere."""
LINKS_MAX = 512
"""Links of one node; more are declined."""
KNOWN_MAX = 4096
"""Peers whose addresses are remembered."""
CIRCUITS_MAX = 4
"""Relays tried for one peer."""
STAGGER = 0.05
"""Seconds between the starts of dials to one peer, best address first."""

Dial = Callable[[Circuit, PeerId], Awaitable[socket.socket]]
"""Has a relay connect us with a peer.  Raises `Unreachable`, `PeerError`, `OSError`."""


class Offer(msgspec.Struct, tag="offer", frozen=True):
    addresses: list[str]
    membership: bytes = b""


class Answer(msgspec.Struct, tag="answer", frozen=True):
    addresses: list[str]
    membership: bytes = b""


class Decline(msgspec.Struct, tag="decline", frozen=True):
    why: str
    busy: bool = False


class DialBack(msgspec.Struct, tag="dial-back", frozen=True):
    pass


class Dialled(msgspec.Struct, tag="dialled", frozen=True):
    ok: bool


@attrs.define
class _Known:
    """Where one peer takes links."""

    addresses: list[Address] = attrs.field(factory=list)
    circuits: list[Circuit] = attrs.field(factory=list)


@attrs.define
class _Attempt:
    """Connections to one peer that are tried side by side.

    They may be many; the greeting is one at a time, as whoever greets has the peer make a link of it.
    """

    made: Link | Verdict | None = None
    """The link, or why the peer wants none."""
    settled: trio.Event = attrs.field(factory=trio.Event)
    turn: trio.Lock = attrs.field(factory=trio.Lock)


class Links:
    """The links of one node; see `open_links`."""

    def __init__(
        self, network: Network, allow: Allow, membership: Callable[[], bytes], nursery: trio.Nursery
    ) -> None:
        self.rates = Rates()
        """What the links may move."""
        self.observed: dict[PeerId, Address] = {}
        """Where peers that we dialled saw us, by peer; of observers, the link port itself."""
        self.observers: set[PeerId] = set()
        """Peers that are dialled from the link port, so that they see where that one is."""
        self.mapped: list[Address] = []
        """Where the link port is reached by what stands between us and the others."""
        self.circuits: list[Circuit] = []
        """How we are reached through relays."""
        self.dial_circuit: Dial | None = None
        """Has a relay connect us; None: there is none to be used."""
        self.paths: list[Callable[[Link], None]] = []
        """Called with each link that has a new path, in trio's thread."""
        self.bound: list[Address] = []
        """Where links are accepted."""
        self._paused = ""
        self._network = network
        self._allow = allow
        self._membership = membership
        self._services = Switchboard()
        self._greeting = Greeting(network, membership, allow)
        self._doors = Doors(self._admit, nursery)
        self._keeping = Keeping(self._links_now, self._regain, self._arrival, nursery)
        self._threads = trio.CapacityLimiter(reactors_wanted())
        self._reactors = [Reactor() for _ in range(reactors_wanted())]
        self._token = trio.lowlevel.current_trio_token()
        self._over = False
        self._links: dict[PeerId, Link] = {}
        self._attempts: dict[PeerId, trio.Event] = {}
        self._answering: dict[PeerId, trio.Event] = {}
        self._arrivals: dict[PeerId, trio.Event] = {}
        self._asked_back: set[PeerId] = set()
        """Peers that we asked to dial us."""
        self._known: dict[PeerId, _Known] = {}

    def serve(self, kinds: range, receive: Receive) -> None:
        """Have messages of `kinds` taken by what `receive` makes, on every link; see `switchboard.py`."""
        self._services.serve(kinds, receive)

    def admit(self, magic: bytes, serve: Serve) -> None:
        """Have connections at our port that begin with `magic` taken by `serve`; see `doors.py`."""
        self._doors.admit(magic, serve)

    def reactor(self) -> Reactor:
        """The one with the least to do, for what has turns beside the links and ends before them."""
        return min(self._reactors, key=len)

    def live(self) -> list[Link]:
        return [link for link in self._links.values() if link.live]

    def _links_now(self) -> list[Link]:
        return list(self._links.values())

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
        multiaddrs = list(multiaddrs)
        addresses = [address for text in multiaddrs if (address := from_multiaddr(text))]
        self._know(peer, addresses, [c for text in multiaddrs if (c := circuit_from_multiaddr(text))])

    def addresses_of(self, peer: PeerId) -> list[str]:
        """Where `peer` takes links, as far as is known, as multiaddrs."""
        known = self._known.get(peer, _Known())
        return [*map(to_multiaddr, known.addresses), *map(circuit_to_multiaddr, known.circuits)]

    @property
    def addresses(self) -> list[str]:
        """Where we take links, as multiaddrs, for others to be told."""
        told = filter(None, map(parse_address, self._told_addresses()))
        return [*map(to_multiaddr, told), *map(circuit_to_multiaddr, self.circuits)]

    def _know(self, peer: PeerId, addresses: list[Address], circuits: Sequence[Circuit] = ()) -> None:
        """What was heard last counts, and is forgotten last."""
        known = self._known.pop(peer, _Known())
        if addresses:
            known.addresses = addresses[:ADDRESSES_MAX]
        if circuits:
            known.circuits = [c for c in circuits if c.relay not in (peer, self._network.me)][:CIRCUITS_MAX]
        if known.addresses or known.circuits:
            self._known[peer] = known
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
        if len(self._links) >= LINKS_MAX:
            raise Unreachable(who=peer, why=f"there are {LINKS_MAX} links already")
        return await self._attempt(peer, self._make)

    async def ping(self, peer: PeerId) -> tuple[float, Link]:
        """Seconds until `peer` answered, from link to link, and the link.  Raises `Unreachable`."""
        link = await self.link(peer)
        answered = trio.Event()
        seconds: list[float] = []

        def hear(delay: float) -> None:
            seconds.append(delay)
            self._token.run_sync_soon(answered.set)

        link.probe(hear)
        with trio.move_on_after(DIAL_PATIENCE):
            await answered.wait()
        if not seconds:
            raise Unreachable(who=peer, why=f"no answer in {DIAL_PATIENCE:.0f} s")
        return seconds[0], link

    async def _attempt(self, peer: PeerId, make: Callable[[PeerId], Awaitable[Link]]) -> Link:
        """Make a connection, one attempt a peer.  Raises `Unreachable`."""
        if self._paused:
            raise Unreachable(who=peer, why=f"paused: {self._paused}")
        done = self._attempts[peer] = trio.Event()
        try:
            with trio.move_on_after(NEGOTIATION_PATIENCE):
                return await make(peer)
            raise Unreachable(who=peer, why=f"no link after {NEGOTIATION_PATIENCE:.0f} s")
        except (PeerError, OSError) as wrong:
            raise Unreachable(who=peer, why=str(wrong)) from None
        finally:
            del self._attempts[peer]
            done.set()

    # --- the side that wants a link -------------------------------------------------------

    async def _make(self, peer: PeerId) -> Link:
        made = await self._reach(peer)
        if made is None:
            self._known.pop(peer, None)
            return await self._negotiate(peer)
        return await self._settled(peer, made)

    async def _regain(self, link: Link) -> None:
        """Have a connection for a link that has none, or one that nothing comes through.

        Raises `Unreachable` where nobody is there, or who is there has forgotten the link.
        """

        async def again(peer: PeerId) -> Link:
            made = await self._reach(peer)
            if made is None:
                raise Unreachable(who=peer, why="it is not where it was")
            return await self._settled(peer, made)

        if link.peer in self._attempts or link.peer in self._answering:
            return
        await self._attempt(link.peer, again)

    async def _reach(self, peer: PeerId) -> Link | Verdict | None:
        """Dial where the peer is known to be, and ask its relays; the first one who answers.

        None where it is not found.
        """
        known = self._known.get(peer, _Known())
        attempt = _Attempt()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._try_all, peer, known, attempt)
            await attempt.settled.wait()
            nursery.cancel_scope.cancel()
        return attempt.made

    async def _try_all(self, peer: PeerId, known: _Known, attempt: _Attempt) -> None:
        failed = trio.Event()
        async with trio.open_nursery() as nursery:
            for place, circuit in enumerate(known.circuits if self.dial_circuit is not None else ()):
                nursery.start_soon(self._try_relay, peer, circuit, place, failed, attempt)
            if known.addresses:
                await self._dial(peer, known.addresses, Way.DIRECT, attempt)
            failed.set()
        attempt.settled.set()

    async def _try_relay(
        self, peer: PeerId, circuit: Circuit, place: int, failed: trio.Event, attempt: _Attempt
    ) -> None:
        assert self.dial_circuit is not None
        with trio.move_on_after(RELAY_DELAY):
            await failed.wait()
        await trio.sleep(place * RELAY_STAGGER)
        try:
            sock = await self.dial_circuit(circuit, peer)
        except (PeerError, Unreachable, OSError) as wrong:
            log.debug("no circuit", peer=peer, relay=circuit.relay, why=str(wrong))
            return
        await self._greet(sock, peer, Way.RELAYED, attempt, circuit.relay)

    async def _negotiate(self, peer: PeerId) -> Link:
        channel = await self._network.open(peer, PROTOCOL)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(_close, channel)
            await channel.send(Offer(self._told(), self._membership()))
            answer = await channel.receive(Answer | Decline)
            if isinstance(answer, Decline):
                return await self._settled(peer, answer)
            if why := self._allow(peer, answer.membership):
                raise Unreachable(who=peer, why=why)
            self._hear(peer, answer.addresses)
            made = await self._reach(peer)
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
            if link is not None and link.live and link.connected:
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
        verdict = self._judge(peer, offer.membership)
        if verdict.why:
            return await channel.send(Decline(verdict.why, verdict.busy))
        done = self._answering[peer] = trio.Event()
        try:
            await channel.send(Answer(self._told(), self._membership()))
            # It ends the channel when it has its link.
            await channel.receive(DialBack)
            self._hear(peer, offer.addresses)
            attempt = _Attempt()
            await self._dial(peer, self._known.get(peer, _Known()).addresses, Way.REVERSE, attempt)
            await channel.send(Dialled(isinstance(attempt.made, Link)))
        finally:
            if self._answering.get(peer) is done:
                del self._answering[peer]
            done.set()
        return None

    def _judge(self, peer: PeerId, membership: bytes) -> Verdict:
        """What we say to a peer that wants a link."""
        if why := self._allow(peer, membership):
            return Verdict(why)
        if self._paused or self._over:
            return Verdict("paused by its owner" if self._paused else "it is closing")
        if peer in self._attempts and peer not in self._asked_back and self._network.me < peer:
            return Verdict("our own attempt goes first", busy=True)
        if len(self._links) >= LINKS_MAX and peer not in self._links:
            return Verdict("too many links")
        return Verdict()

    def _hear(self, peer: PeerId, told: Sequence[str], far: Address | None = None) -> None:
        """Remember what `peer` tells of where it takes links, and where it comes from."""
        seen = [to_multiaddr(far)] if far is not None else self._network.addresses_of(peer)
        told = told[: 2 * ADDRESSES_MAX]
        addresses = candidates([text for text in told if not text.startswith("/")], seen)
        self._know(peer, addresses, [c for text in told if (c := circuit_from_multiaddr(text))])

    def _told_addresses(self) -> list[str]:
        """Where we can be dialled, as `host:port`."""
        own = own_addresses(self.bound, self._network.addresses)
        return list(dict.fromkeys([*map(format_address, self.mapped), *own]))[:ADDRESSES_MAX]

    def _told(self) -> list[str]:
        """What to tell a peer: where we can be dialled, and how we are reached through relays."""
        return [*self._told_addresses(), *map(circuit_to_multiaddr, self.circuits[:CIRCUITS_MAX])]

    # --- paths ----------------------------------------------------------------------------

    async def bring(
        self, sock: socket.socket, peer: PeerId, way: Way, *, accepts: bool, via: PeerId | None = None
    ) -> Link:
        """Link to `peer` over a connection that was made elsewhere, or have the link go on over it.

        The side that `accepts` is TLS' server; which of both, they have agreed.  `sock` is closed where it
        comes to nothing.  Raises `Unreachable`.
        """
        attempt = _Attempt()
        with trio.move_on_after(GREETING_PATIENCE):
            if not accepts:
                await self._greet(sock, peer, way, attempt, via)
            else:
                caller = await self._greeting.accept(sock)
                if caller is not None and caller.peer == peer:
                    attempt.made = await self._take(caller, way, via)
                elif caller is not None:
                    caller.tls.close()
        if isinstance(attempt.made, Link):
            return attempt.made
        sock.close()
        raise Unreachable(
            who=peer, why=attempt.made.why if attempt.made is not None else "it did not greet us"
        )

    async def _greet(
        self, sock: socket.socket, peer: PeerId, way: Way, attempt: _Attempt, via: PeerId | None = None
    ) -> None:
        """Say who we are, unless another connection of the attempt has come to something."""
        try:
            await attempt.turn.acquire()
        except trio.Cancelled:
            sock.close()
            raise
        try:
            if attempt.settled.is_set():
                sock.close()
                return
            link = self._links.get(peer)
            session = link.session if link is not None and link.live else b""
            met = await self._greeting.dial(sock, peer, self._told(), session)
            if isinstance(met, Met):
                try:
                    attempt.made = self._adopt(met, way, via)
                except OSError as full:  # or the peer is gone already
                    attempt.made = Verdict(str(full))
            elif met is not None:
                attempt.made = met
            if met is not None:
                attempt.settled.set()
        finally:
            attempt.turn.release()

    async def _admit(self, sock: socket.socket) -> None:
        caller = await self._greeting.accept(sock)
        if caller is not None:
            await self._take(caller, Way.REVERSE if caller.peer in self._asked_back else Way.DIRECT, None)

    async def _take(self, caller: Caller, way: Way, via: PeerId | None) -> Link | Verdict:
        """Let a peer that greeted us have its link, or say why not."""
        peer, far = caller.peer, _far_end(caller.tls.socket)
        verdict = self._judge(peer, caller.membership)
        if verdict.why:
            await caller.decline(verdict)
            return verdict
        self._hear(peer, caller.addresses, far if way is not Way.RELAYED else None)
        link = self._links.get(peer)
        goes_on = link is not None and link.live and link.session == caller.session
        session = caller.session if goes_on else secrets.token_bytes(SESSION)
        seen = format_address(far) if far is not None else ""
        return self._adopt(Met(peer, caller.tls, session, ""), way, via, well(session, seen))

    def _adopt(self, met: Met, way: Way, via: PeerId | None = None, preamble: bytes = b"") -> Link:
        """Have the link go on over the connection that was made, or begin."""
        peer, sock = met.peer, met.tls.socket
        try:
            far, own = sock.getpeername()[0], sock.getsockname()[0]
        except OSError:  # the peer is gone already
            met.tls.close()
            raise
        if (seen := parse_address(met.observed)) is not None:
            self.observed[peer] = seen
        near = way is not Way.RELAYED and is_near(far, own)
        path = Path(met.tls, way, self.rates.link(private=near), via, preamble)
        link = self._links.get(peer)
        if link is not None and link.live and link.session == met.session:
            link.go_on(path)
        else:
            if link is not None:
                link.close("a newer link took its place")
            link = self._begin(peer, met.session, path)
        if self._over or self._paused:
            link.close()
        self._arrivals.pop(peer, trio.Event()).set()
        link.wake()
        for tell in self.paths:
            tell(link)
        return link

    def _begin(self, peer: PeerId, session: bytes, path: Path) -> Link:
        reactor = self.reactor()
        try:
            link = Link(peer, session, path, self._services, reactor.call, self._lost, self._ended)
        except OSError:
            path.tls.close()
            raise
        self._links[peer] = link
        return link

    def _lost(self, link: Link) -> None:
        """In a reactor's thread."""
        self._token.run_sync_soon(self._keeping.regain, link)

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

    async def _dial(self, peer: PeerId, addresses: Sequence[Address], way: Way, attempt: _Attempt) -> None:
        """Dial all of a peer's addresses, greet those that answer, until one is it."""
        send, answered = trio.open_memory_channel[socket.socket](len(addresses))
        with trio.move_on_after(DIAL_PATIENCE):
            async with trio.open_nursery() as nursery:
                with send:
                    for place, address in enumerate(addresses):
                        bound = self._bound_for(peer, address)
                        nursery.start_soon(connect, address, place * STAGGER, send.clone(), bound)
                async for sock in answered:
                    reached = _far_end(sock)
                    await self._greet(sock, peer, way, attempt)
                    if attempt.settled.is_set():
                        if isinstance(attempt.made, Link) and reached is not None:
                            self._know(peer, [reached, *(a for a in addresses if a != reached)])
                        break
                nursery.cancel_scope.cancel()
        discard(answered)

    def _bound_for(self, peer: PeerId, address: Address) -> Address | None:
        """The listening address to dial from, if the peer is to see it."""
        if peer not in self.observers:
            return None
        return next((bound for bound in self.bound if (":" in bound[0]) == (":" in address[0])), None)


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
    receive: Receive | None = None,
    allow: Allow = lambda peer, membership: "",
    membership: Callable[[], bytes] = lambda: b"",
) -> AsyncIterator[Links]:
    """Listen at the addresses of `listen` (port 0: any) and have links while inside.

    `receive` serves transfers, `Links.serve` adds others.  `allow` says who is welcome, `membership` what
    we show that we are.  On leaving, every link is closed and its thread has ended.  Raises `OSError` where
    an address cannot be listened at.
    """
    async with trio.open_nursery() as nursery:
        links = Links(network, allow, membership, nursery)
        if receive is not None:
            links.serve(TRANSFER, receive)
        try:
            for host, port in listen:
                for listener in await open_listeners(host, port):
                    links.bound.append(listener.socket.getsockname()[:2])
                    nursery.start_soon(links._doors.listen, listener)
            network.serve(PROTOCOL, links._serve)
            nursery.start_soon(links._keeping.watch)
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
