"""Be reachable through relays, and reach others through theirs.

known relays ──how long does a connection take?──> two of them ──Reserve──> held: `links.circuits`
     ^                                                                         │
     └─────────────── failed, refused, gone: it rests, another one is held <───┘

dial      Connect ──> Connected(token) ──> connection to the relay's link port: MAGIC, token, then the peer
Incoming(token) ─────────────────────────> the same from the other side, brought to `links`
"""

from __future__ import annotations

import collections
import math
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import attrs
import structlog
import trio

from p2pgrid.errors import Unreachable
from p2pgrid.hole_punch.path import Address, Circuit, Way, from_multiaddr, to_multiaddr
from p2pgrid.hole_punch.relay.choice import Choice
from p2pgrid.hole_punch.relay.messages import (
    MAGIC,
    Connect,
    Connected,
    Decline,
    Ended,
    Incoming,
    Refused,
    Release,
    Reserve,
    Reserved,
    Told,
    encode,
)
from p2pgrid.hole_punch.relay.reaching import reach
from p2pgrid.ids import PeerId

log = structlog.get_logger(__name__)

ANSWER_PATIENCE = 3.0
"""Seconds that a relay gets for an answer."""
LINK_PATIENCE = 15.0
"""Seconds for a link to a relay."""
INCOMING_MAX = 64
"""Circuits that are taken up at the same time."""
CIRCUITS_KEPT = 256
"""Circuits of which it is remembered whom they lead to, should the relay end them."""
REQUESTS_MAX = 1 << 30
NOT_NEEDED = "it is not needed any more"
LATELY = 16
"""Ended circuits that are remembered, with their reasons."""


class Line(Protocol):
    """What is needed of a link."""

    peer: PeerId

    @property
    def live(self) -> bool: ...
    @property
    def connected(self) -> bool: ...
    def send(self, first: bytes, *rest: bytes, bulk: bool = False) -> None: ...


class Ways(Protocol):
    """What is needed of a node's links."""

    circuits: list[Circuit]

    @property
    def paused(self) -> str: ...
    def learn(self, peer: PeerId, multiaddrs: Iterable[str]) -> None: ...
    def addresses_of(self, peer: PeerId) -> list[str]: ...
    async def link(self, peer: PeerId) -> Line: ...
    async def bring(
        self, sock: socket.socket, peer: PeerId, way: Way, *, accepts: bool, via: PeerId | None = None
    ) -> object: ...


@attrs.define
class Held:
    """A reservation."""

    circuit: Circuit
    """How others reach us through it."""
    delay: float
    """Seconds that a connection to it took."""
    terms: Reserved


@attrs.frozen
class Lost:
    """A circuit, or a reservation, that a relay ended or refused."""

    relay: PeerId
    peer: PeerId | None
    """At the other end; None: the reservation itself."""
    why: str
    at: float


@attrs.define(eq=False)
class _Answer:
    peer: PeerId
    """Who was asked for, or who was asked."""
    told: Told | None = None
    came: trio.Event = attrs.field(factory=trio.Event)


@attrs.define(eq=False)
class _End:
    """Of a reservation: set once it is over."""

    why: str = ""
    came: trio.Event = attrs.field(factory=trio.Event)

    def set(self, why: str) -> None:
        self.why = self.why or why
        self.came.set()


class Relays:
    """The relays of one node, as it uses them; `keep` is its story.  In trio, but for `told` and `left`."""

    def __init__(self, links: Ways, me: PeerId, nursery: trio.Nursery) -> None:
        self.held: dict[PeerId, Held] = {}
        """Where we are reached."""
        self.lately: collections.deque[Lost] = collections.deque(maxlen=LATELY)
        self._links = links
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._choice = Choice(me)
        self._told: dict[PeerId, list[Address]] = {}
        """Where relays take links, as the coordinator says."""
        self._news = trio.Event()
        self._changed = trio.Event()
        self._mishap = trio.Event()
        self._answers: dict[tuple[PeerId, int], _Answer] = {}
        self._ends: dict[PeerId, _End] = {}
        self._circuits: dict[bytes, PeerId] = {}
        """Whom circuits that were asked for or came lead to, by token; the newest."""
        self._request = 0
        self._incoming = 0
        self.over = False
        """Nothing is begun any more."""

    def learn(self, relays: Mapping[PeerId, Sequence[str]]) -> None:
        """These are the grid's relays, and where they take links (multiaddrs)."""
        self._told = {
            relay: [a for text in told if (a := from_multiaddr(text))] for relay, told in relays.items()
        }
        self._choice.learn(relays)
        self._news.set()

    def want(self, count: int) -> None:
        """Hold so many reservations: 0 where everybody reaches us anyway."""
        self._choice.wanted = count
        self._news.set()

    async def keep(self) -> None:
        """Hold reservations, for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                self._news = trio.Event()
                for relay in list(self._choice.held)[self._choice.wanted :]:
                    self._end(relay, NOT_NEEDED)
                delays = await self._survey(self._choice.survey(trio.current_time()))
                for relay in self._choice.choose({r: delay for r, (delay, _) in delays.items()}):
                    nursery.start_soon(self._hold, relay, *delays[relay])
                again = self._choice.again(trio.current_time())
                with trio.move_on_after(math.inf if again is None else max(0.0, again)):
                    await self._news.wait()

    async def _survey(self, relays: Iterable[PeerId]) -> dict[PeerId, tuple[float, Address]]:
        """How long a connection to each of these takes, and where; those that answer."""
        found: dict[PeerId, tuple[float, Address]] = {}

        async def look(relay: PeerId) -> None:
            try:
                found[relay] = await self.delay(relay)
            except Unreachable as away:
                log.debug("a relay does not answer", relay=relay, why=away.why)
                self._choice.failed(relay, trio.current_time())

        async with trio.open_nursery() as nursery:
            for relay in relays:
                nursery.start_soon(look, relay)
        return found

    async def delay(self, relay: PeerId) -> tuple[float, Address]:
        """Seconds that a connection to `relay` takes, and where it answered.  Raises `Unreachable`."""
        try:
            sock, address, seconds = await reach(relay, self._addresses(relay))
        except (
            Unreachable
        ):  # nobody told, or it was started again elsewhere: it is asked over the control plane
            await self._link(relay)
            sock, address, seconds = await reach(relay, self._addresses(relay))
        sock.close()
        if address not in self._known(relay):
            self._links.learn(relay, [to_multiaddr(address)])
        return seconds, address

    async def _hold(self, relay: PeerId, delay: float, address: Address) -> None:
        """Have a reservation as long as it can be had."""
        end = self._ends[relay] = _End()
        try:
            while not end.why:
                link = await self._link(relay)
                terms = await self._ask(link, 0, Reserve())
                if not isinstance(terms, Reserved):
                    raise Unreachable(who=relay, why=terms.why if isinstance(terms, Refused) else "nonsense")
                if relay not in self.held:
                    log.info("reached through a relay", relay=relay, ms=round(1000 * delay))
                self._choice.worked(relay)
                self.held[relay] = Held(Circuit(relay, address), delay, terms)
                self._tell()
                with trio.move_on_after(max(1.0, terms.seconds / 2)):
                    await end.came.wait()
            if end.why == NOT_NEEDED:
                link.send(encode(Release()))
        except Unreachable as away:
            end.set(away.why)
        finally:
            del self._ends[relay]
            self.held.pop(relay, None)
            if end.why == NOT_NEEDED:
                self._choice.let_go(relay)
            else:
                self._choice.failed(relay, trio.current_time())
            self._tell()
            self._news.set()
        if end.why != NOT_NEEDED:
            self._remember(relay, None, end.why)

    def _end(self, relay: PeerId, why: str) -> None:
        if relay in self._ends:
            self._ends[relay].set(why)

    def _tell(self) -> None:
        """Have others told how we are reached, nearest relay first."""
        near = sorted(self.held.values(), key=lambda held: held.delay)
        circuits = [held.circuit for held in near]
        if circuits == self._links.circuits:
            return
        self._links.circuits[:] = circuits
        before, self._changed = self._changed, trio.Event()
        before.set()

    async def changed(self) -> None:
        """Wait until we are reached in another way than now."""
        await self._changed.wait()

    async def lost(self) -> None:
        """Wait until there is one more in `lately`."""
        await self._mishap.wait()

    # --- circuits ---------------------------------------------------------------------------

    async def dial(self, circuit: Circuit, peer: PeerId) -> socket.socket:
        """A connection to `peer` through that relay; what comes next on it is the peer's.

        Raises `Unreachable`, with the relay's reason.
        """
        relay = circuit.relay
        if not self._addresses(relay):
            self._links.learn(relay, [to_multiaddr(circuit.address)])
        link = await self._link(relay)
        self._request = self._request % REQUESTS_MAX + 1
        told = await self._ask(link, self._request, Connect(self._request, peer), peer)
        if not isinstance(told, Connected):
            why = told.why if isinstance(told, Refused) else "nonsense"
            self._remember(relay, peer, why)
            raise Unreachable(who=peer, why=f"the relay {relay} says: {why}")
        return await self._show(relay, told.token, peer, [circuit.address, *self._addresses(relay)])

    async def _take(self, relay: PeerId, token: bytes, peer: PeerId) -> None:
        """Be the other end of a circuit that `peer` asked for."""
        try:
            sock = await self._show(relay, token, peer, self._addresses(relay))
            await self._links.bring(sock, peer, Way.RELAYED, accepts=True, via=relay)
        except Unreachable as wrong:
            log.info("no link through a relay", relay=relay, peer=peer, why=wrong.why)
        finally:
            self._incoming -= 1

    async def _show(
        self, relay: PeerId, token: bytes, peer: PeerId, addresses: Sequence[Address]
    ) -> socket.socket:
        """Dial the relay and show it the token."""
        if token not in self._circuits:
            said = [lost.why for lost in self.lately if (lost.relay, lost.peer) == (relay, peer)]
            raise Unreachable(who=peer, why=f"the relay {relay} says: {(said or ['it is over'])[-1]}")
        sock, _, _ = await reach(relay, list(dict.fromkeys(addresses)))
        try:
            sock.sendall(MAGIC + token)  # the first bytes of a connection always have room
        except OSError as gone:
            sock.close()
            raise Unreachable(who=relay, why=str(gone)) from None
        return sock

    def _addresses(self, relay: PeerId) -> list[Address]:
        """Where `relay` itself may be dialled."""
        return list(dict.fromkeys([*self._told.get(relay, ()), *self._known(relay)]))

    def _known(self, relay: PeerId) -> list[Address]:
        return list(filter(None, map(from_multiaddr, self._links.addresses_of(relay))))

    async def _link(self, relay: PeerId) -> Line:
        with trio.move_on_after(LINK_PATIENCE):
            link = await self._links.link(relay)
            if not link.connected:
                raise Unreachable(who=relay, why="the relay is away just now")
            return link
        raise Unreachable(who=relay, why=f"no link to the relay in {LINK_PATIENCE:.0f} s")

    async def _ask(
        self, link: Line, request: int, message: Reserve | Connect, peer: PeerId | None = None
    ) -> Told:
        """What the relay answers.  Raises `Unreachable` where it does not."""
        key = (link.peer, request)
        answer = self._answers[key] = _Answer(peer or link.peer)
        try:
            link.send(encode(message))
            with trio.move_on_after(ANSWER_PATIENCE):
                await answer.came.wait()
        finally:
            if self._answers.get(key) is answer:
                del self._answers[key]
        if answer.told is None:
            raise Unreachable(who=link.peer, why=f"the relay did not answer in {ANSWER_PATIENCE:.0f} s")
        return answer.told

    # --- what relays tell -------------------------------------------------------------------

    def told(self, link: Line, message: Told) -> None:
        """A relay's link brought this; in the reactor's thread."""
        self._token.run_sync_soon(self._hear, link, message)

    def left(self, link: Line, why: str) -> None:
        """A link is gone; in the reactor's thread."""
        self._token.run_sync_soon(self._end, link.peer, f"the link to it ended: {why}")

    def _hear(self, link: Line, message: Told) -> None:
        relay = link.peer
        match message:
            case Reserved():
                self._answered(relay, 0, message)
            case Connected(request, token):
                if (answer := self._answers.get((relay, request))) is not None:
                    self._keep(token, answer.peer)  # at once: its end may be the next that is told
                self._answered(relay, request, message)
            case Refused(request, _, why):
                if not self._answered(relay, request, message) and request == 0:
                    self._end(relay, why)
            case Incoming(token, peer):
                self._come(link, token, peer)
            case Ended(token, _, why):
                if (other := self._circuits.pop(token, None)) is not None:
                    self._remember(relay, other, why)

    def _answered(self, relay: PeerId, request: int, message: Told) -> bool:
        answer = self._answers.get((relay, request))
        if answer is None:
            return False
        answer.told = message
        answer.came.set()
        return True

    def _come(self, link: Line, token: bytes, peer: PeerId) -> None:
        """Somebody wants a circuit to us."""
        no = ""
        if link.peer not in self.held:
            no = "it asked for no reservation here"
        elif self._links.paused:
            no = f"paused: {self._links.paused}"
        elif self._incoming >= INCOMING_MAX:
            no = f"{INCOMING_MAX} others come at the same moment"
        if no or self.over:
            link.send(encode(Decline(token, no)))
        else:
            self._incoming += 1
            self._keep(token, peer)
            self._nursery.start_soon(self._take, link.peer, token, peer)

    def _keep(self, token: bytes, peer: PeerId) -> None:
        self._circuits[token] = peer
        while len(self._circuits) > CIRCUITS_KEPT:
            del self._circuits[next(iter(self._circuits))]

    def _remember(self, relay: PeerId, peer: PeerId | None, why: str) -> None:
        self.lately.append(Lost(relay, peer, why, trio.current_time()))
        before, self._mishap = self._mishap, trio.Event()
        before.set()
        log.info("not through this relay", relay=relay, to=peer or "us", why=why)
