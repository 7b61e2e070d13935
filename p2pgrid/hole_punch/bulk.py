"""Have one link to each peer that is wanted, by the best way there is.

    link ─> its addresses, its relays (`dialling.py`) ─┐
            a control channel (`negotiation.py`) ──────┼─> greeting ─> adopt ─> a link begins, or goes on
    whoever dials us (`doors.py`) ─────────────────────┤
    bring: a connection made elsewhere, by punching ───┘

A link whose connection is lost, or says nothing any more, goes on over another one that is made in the
same manner (`keeping.py`).
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

import structlog
import trio

from p2pgrid.errors import PeerError, Unreachable
from p2pgrid.hole_punch.addressbook import CIRCUITS_MAX, AddressBook
from p2pgrid.hole_punch.dialling import (
    DIAL_PATIENCE,
    GREETING_PATIENCE,
    Attempt,
    DialCircuit,
    Dialling,
    far_end,
)
from p2pgrid.hole_punch.doors import Doors, Serve, open_listeners
from p2pgrid.hole_punch.greeting import SESSION, Allow, Caller, Greeting, Met, Verdict, well
from p2pgrid.hole_punch.keeping import Keeping
from p2pgrid.hole_punch.link import Link, Path, Receive, Receiver
from p2pgrid.hole_punch.negotiation import NEGOTIATION_PATIENCE, PROTOCOL, Negotiation
from p2pgrid.hole_punch.path import (
    ADDRESSES_MAX,
    Address,
    Circuit,
    Way,
    circuit_to_multiaddr,
    format_address,
    is_near,
    own_addresses,
    parse_address,
    to_multiaddr,
)
from p2pgrid.hole_punch.rates import Rates
from p2pgrid.hole_punch.reactor import Reactor, reactors_wanted
from p2pgrid.hole_punch.switchboard import TRANSFER, Switchboard
from p2pgrid.ids import PeerId
from p2pgrid.net import Network

__all__ = ["PROTOCOL", "Link", "Links", "Receive", "Receiver", "Way", "open_links"]

log = structlog.get_logger(__name__)

CIRCUITS_TOLD = 2
"""Relays that members are told of: one may die."""
LINKS_MAX = 512
"""Links of one node; more are declined."""


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
        self.dial_circuit: DialCircuit | None = None
        """Has a relay connect us; None: there is none to be used."""
        self.paths: list[Callable[[Link], None]] = []
        """Called with each link that has a new path, in trio's thread."""
        self.bound: list[Address] = []
        """Where links are accepted."""
        self.book = AddressBook(network.me)
        """Where peers take links."""
        self._paused = ""
        self._network = network
        self._allow = allow
        self._services = Switchboard()
        self._greeting = Greeting(network, membership, allow)
        self._doors = Doors(self._admit, nursery)
        self._dialling = Dialling(self, self._greeting)
        self._negotiation = Negotiation(network, self, self._dialling, allow, membership)
        self._keeping = Keeping(self._links_now, self._regain, self.arrival, nursery)
        self._threads = trio.CapacityLimiter(reactors_wanted())
        self._reactors = [Reactor() for _ in range(reactors_wanted())]
        self._token = trio.lowlevel.current_trio_token()
        self._over = False
        self._links: dict[PeerId, Link] = {}
        self._attempts: dict[PeerId, tuple[Attempt, trio.Event]] = {}
        """What is tried, and when that is over."""
        self._arrivals: dict[PeerId, trio.Event] = {}

    def serve(self, kinds: range, receive: Receive) -> None:
        """Have messages of `kinds` taken by what `receive` makes, on every link; see `switchboard.py`."""
        self._services.serve(kinds, receive)

    def admit(self, magic: bytes, serve: Serve) -> None:
        """Have connections at our port that begin with `magic` taken by `serve`; see `doors.py`."""
        self._doors.admit(magic, serve)

    def reactor(self) -> Reactor:
        """The one with the least to do, for what has turns beside the links and ends before them."""
        return min(self._reactors, key=len)

    def doubt(self) -> None:
        """The network has changed, or may have: paths that do not work any more are to be left soon."""
        self._keeping.doubt()

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
        self.book.learn(peer, multiaddrs)

    def addresses_of(self, peer: PeerId) -> list[str]:
        """Where `peer` takes links, as far as is known, as multiaddrs."""
        return self.book.told(peer)

    @property
    def addresses(self) -> list[str]:
        """Where we take links, as multiaddrs, for others to be told."""
        told = filter(None, map(parse_address, self._own_addresses()))
        return [*map(circuit_to_multiaddr, self.circuits[:CIRCUITS_TOLD]), *map(to_multiaddr, told)]

    def _own_addresses(self) -> list[str]:
        """Where we can be dialled, as `host:port`."""
        own = own_addresses(self.bound, self._network.addresses)
        return list(dict.fromkeys([*map(format_address, self.mapped), *own]))[:ADDRESSES_MAX]

    def told(self) -> list[str]:
        """What to tell a peer: where we can be dialled, and how we are reached through relays."""
        return [*self._own_addresses(), *map(circuit_to_multiaddr, self.circuits[:CIRCUITS_MAX])]

    async def link(self, peer: PeerId) -> Link:
        """The link there is, or a new one.  Raises `Unreachable`."""
        assert peer != self._network.me
        with trio.move_on_after(2 * NEGOTIATION_PATIENCE) as waiting:
            while True:
                link = self._links.get(peer)
                if link is not None and link.live:
                    return link
                if peer in self._attempts:
                    await self._attempts[peer][1].wait()
                elif peer in self._negotiation.answering:
                    await self._negotiation.answering[peer].wait()
                else:
                    break
        if waiting.cancelled_caught:
            raise Unreachable(who=peer, why="it asks for links again and again, and makes none")
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

    async def _attempt(self, peer: PeerId, make: Callable[[PeerId, Attempt], Awaitable[Link]]) -> Link:
        """Make a connection, one attempt a peer.  Raises `Unreachable`."""
        if self._paused:
            raise Unreachable(who=peer, why=f"paused: {self._paused}")
        attempt, done = self._attempts[peer] = Attempt(), trio.Event()
        try:
            with trio.move_on_after(NEGOTIATION_PATIENCE):
                return await make(peer, attempt)
            raise Unreachable(who=peer, why=f"no link after {NEGOTIATION_PATIENCE:.0f} s")
        except (PeerError, OSError) as wrong:
            raise Unreachable(who=peer, why=str(wrong)) from None
        finally:
            del self._attempts[peer]
            done.set()

    async def _make(self, peer: PeerId, attempt: Attempt) -> Link:
        made = await self._dialling.reach(peer, attempt)
        if made is None:
            self.book.forget(peer)
            made = await self._negotiation.ask(peer)
        return await self._settled(peer, made)

    async def _regain(self, link: Link) -> None:
        """Have a connection for a link that has none, or one that nothing comes through.

        Raises `Unreachable` where nobody is there, or who is there has forgotten the link.
        """

        async def again(peer: PeerId, attempt: Attempt) -> Link:
            made = await self._dialling.reach(peer, attempt)
            if made is None:
                raise Unreachable(who=peer, why="it is not where it was")
            return await self._settled(peer, made)

        if link.peer not in self._attempts and link.peer not in self._negotiation.answering:
            await self._attempt(link.peer, again)

    async def _settled(self, peer: PeerId, made: Link | Verdict) -> Link:
        """The link that an attempt came to, ours or the peer's own."""
        if isinstance(made, Link):
            return made
        if not made.busy:
            raise Unreachable(who=peer, why=made.why)
        return await self.arrival(peer)

    async def arrival(self, peer: PeerId) -> Link:
        """The link that `peer` is making; the caller bounds the wait."""
        while True:
            link = self._links.get(peer)
            if link is not None and link.live and link.connected:
                return link
            await self._arrivals.setdefault(peer, trio.Event()).wait()

    def judge(self, peer: PeerId, membership: bytes, attempt: Attempt | None) -> Verdict:
        """What we say to a peer that wants a link, where `attempt` is our own to have one with it.

        While that one is being greeted the smaller peer id's goes first.
        """
        if why := self._allow(peer, membership):
            return Verdict(why)
        if self._paused or self._over:
            return Verdict("paused by its owner" if self._paused else "it is closing")
        if self._network.me < peer and (attempt.greets if attempt is not None else peer in self._attempts):
            return Verdict("our own attempt goes first", busy=True)
        if len(self._links) >= LINKS_MAX and peer not in self._links:
            return Verdict("too many links")
        return Verdict()

    # --- paths ----------------------------------------------------------------------------

    async def bring(
        self, sock: socket.socket, peer: PeerId, way: Way, *, accepts: bool, via: PeerId | None = None
    ) -> Link:
        """Link to `peer` over a connection that was made elsewhere, or have the link go on over it.

        The side that `accepts` is TLS' server; which of both, they have agreed.  `sock` is closed where it
        comes to nothing.  Raises `Unreachable`.
        """
        attempt = Attempt()
        with trio.move_on_after(GREETING_PATIENCE):
            if not accepts:
                await self._dialling.greet(sock, peer, way, attempt, via)
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

    def session(self, peer: PeerId) -> tuple[bytes, int]:
        """Of the link with `peer` that is to go on, and how many connections it had; empty: there is none."""
        link = self._links.get(peer)
        return (link.session, link.path.order[0]) if link is not None and link.live else (b"", 0)

    async def _admit(self, sock: socket.socket) -> None:
        caller = await self._greeting.accept(sock)
        if caller is not None:
            await self._take(
                caller, Way.REVERSE if caller.peer in self._negotiation.asked_back else Way.DIRECT, None
            )

    async def _take(self, caller: Caller, way: Way, via: PeerId | None) -> Link | Verdict:
        """Let a peer that greeted us have its link, or say why not."""
        peer, far = caller.peer, far_end(caller.tls.socket)
        attempt = self._attempts[peer][0] if peer in self._attempts else Attempt()
        verdict = self.judge(peer, caller.membership, attempt)
        if verdict.why:
            await caller.decline(verdict)
            return verdict
        seen_at = [to_multiaddr(far)] if far is not None and way is not Way.RELAYED else []
        self.book.hear(peer, caller.addresses, seen_at)
        link = self._links.get(peer)
        session, moves = secrets.token_bytes(SESSION), 0
        if link is not None and link.live and link.session == caller.session:
            session, moves = link.session, max(link.path.order[0], caller.moves) + 1
        seen = format_address(far) if far is not None else ""
        preamble = well(session, moves, seen, self._greeting.membership())
        met = Met(peer, caller.tls, session, "", (moves, self._network.me))
        link = self.adopt(met, way, via, preamble)
        attempt.settle(link)  # ours has come to something, if by the other side
        return link

    def adopt(self, met: Met, way: Way, via: PeerId | None = None, preamble: bytes = b"") -> Link:
        """Have the link go on over the connection that was made, or begin."""
        peer, sock = met.peer, met.tls.socket
        if self._over:
            met.tls.close()
            raise OSError("it is closing")
        try:
            far, own = sock.getpeername()[0], sock.getsockname()[0]
        except OSError:  # the peer is gone already
            met.tls.close()
            raise
        if (seen := parse_address(met.observed)) is not None:
            self.observed[peer] = seen
        near = way is not Way.RELAYED and is_near(far, own)
        path = Path(met.tls, way, self.rates.link(private=near), via, preamble, met.order)
        link = self._links.get(peer)
        if link is not None and link.live and link.session == met.session:
            link.go_on(path)
        else:
            if link is not None:
                link.close("a newer link took its place")
            link = self._begin(peer, met.session, path)
        if self._paused:
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

        def seek() -> None:
            if not link.connected:
                self._keeping.regain(link)

        self._token.run_sync_soon(seek)

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
            network.serve(PROTOCOL, links._negotiation.serve)
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
