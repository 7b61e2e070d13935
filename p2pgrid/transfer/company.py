"""Find peers for one fetch, and keep links to them while it lasts.

Peers are found by hints, by the index, by being told of each other (`Peers`), and by their own
opening of the pack; so whoever fetches the same thing meets, and the putter is not all there is.

    heard of ──> trying ──> in session ──lost──> resting ──> trying …
                   └─ Unreachable ─> resting        └─ shunned: never again in this fetch
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Protocol

import attrs
import trio

from p2pgrid.dht.shelf import Shelf
from p2pgrid.errors import NotFound, Unreachable
from p2pgrid.ids import Cid, PeerId
from p2pgrid.net import Index
from p2pgrid.transfer.session import Session, Want, Wanter

SEARCH = 3.0
"""Seconds between two searches for more peers, while incomplete and nothing comes."""
SEARCH_BUSY, SEARCH_MAX = 15.0, 60.0
"""Seconds between them while something comes, doubled each time: each asks a dozen nodes twice, which
costs both sides as much as a hundred chunks, and whoever is new opens the pack at somebody who
tells of it."""
REST_MIN, REST_MAX = 0.5, 30.0
"""Seconds before a peer that was lost or could not be reached is tried again; doubled each time."""
PEERS_MAX = 40
"""Peers of one fetch; with more, each is asked too little to be worth its link."""
HEARD_MAX = 10 * PEERS_MAX
"""Peers remembered on the word of other peers."""


class Searching(Protocol):
    """What a search needs of the exchange."""

    index: Index

    async def session(self, peer: PeerId) -> Session:
        """Raises `Unreachable`."""
        ...

    def allowed(self, peer: PeerId) -> bool: ...

    def learn(self, peer: PeerId, addresses: Iterable[str]) -> None: ...


class Host(Protocol):
    """Who keeps the company."""

    def about(self, shelf: Shelf) -> Wanter:
        """Who is to hear what peers report about the shelf's pack."""
        ...

    def left(self, peer: PeerId) -> None:
        """`peer` is lost."""
        ...

    def quiet_for(self) -> float:
        """Seconds since something came."""
        ...


@attrs.define
class _Contact:
    """A peer that may have something."""

    session: Session | None = None
    want: Want | None = None
    trying: bool = False
    shunned: bool = False
    losses: int = 0
    rests_until: float = -math.inf


class Company:
    """The peers of one fetch.  Runs in trio."""

    def __init__(self, keys: list[Cid], searching: Searching, host: Host) -> None:
        self.keys = keys
        """What is looked up in the index."""
        self.looked = 0
        """How often the index has answered."""
        self.news = trio.Event()
        """Set, and replaced, when a peer was found or lost."""
        self._searching = searching
        self._host = host
        self._contacts: dict[PeerId, _Contact] = {}
        self._shelf: Shelf | None = None
        self._finding: set[Cid] = set()

    # --- whom there is --------------------------------------------------------------------

    @property
    def heard(self) -> int:
        """How many peers may have something."""
        return len(self._contacts)

    @property
    def unheard(self) -> bool:
        """Whether somebody has yet to say what it has: perhaps nothing, then it says nothing."""
        return any(c.want is not None and not c.want.shown for c in self._contacts.values())

    def sessions(self) -> list[Session]:
        return [c.session for c in self._contacts.values() if c.session is not None and not c.shunned]

    def want(self, peer: PeerId) -> Want | None:
        contact = self._contacts.get(peer)
        return None if contact is None else contact.want

    def gather(self, shelf: Shelf) -> None:
        """Open the shelf's pack with everyone there is, and whoever comes from now on."""
        self._shelf = shelf
        for contact in self._contacts.values():
            self._open(contact)

    def dismiss(self) -> None:
        """Want nothing any more of anyone; the links stay."""
        self._shelf = None
        for contact in self._contacts.values():
            if contact.session is not None and contact.want is not None:
                contact.session.unwant(contact.want)
            contact.want = None

    # --- who comes and goes ---------------------------------------------------------------

    def hint(self, peers: Iterable[PeerId]) -> None:
        """These may have something."""
        for peer in peers:
            if self._searching.allowed(peer) and peer not in self._contacts:
                self._contacts[peer] = _Contact()
                self._ring()

    def meet(self, peers: Iterable[tuple[PeerId, tuple[str, ...]]]) -> None:
        """A peer says that these may have something, and where they are."""
        for peer, addresses in peers:
            contact = self._contacts.get(peer)
            if contact is not None and contact.session is not None:
                continue  # and learnt from itself where it is
            if self._searching.allowed(peer) and len(self._contacts) < HEARD_MAX:
                self._searching.learn(peer, addresses)
                self.hint([peer])

    def proved(self, peer: PeerId) -> None:
        """`peer` is worth its link: when it is lost, it is soon tried again."""
        if contact := self._contacts.get(peer):
            contact.losses = 0

    def shun(self, peer: PeerId) -> None:
        """End the link to `peer`, and never try it again."""
        contact = self._contacts[peer]
        contact.shunned = True
        if contact.session is not None:
            contact.session.link.close("it sent bytes that are not what was asked for")

    def lost(self, session: Session) -> None:
        """The link of `session` ended."""
        contact = self._contacts.get(session.peer)
        if contact is None or contact.session is not session:
            return
        contact.session = contact.want = None
        self._rest(contact)
        self._host.left(session.peer)
        self._ring()

    # --- the search -----------------------------------------------------------------------

    async def search(self) -> None:
        """Look for peers, and attach them; for ever."""
        async with trio.open_nursery() as nursery:
            due, begun = -math.inf, trio.current_time()
            # Who was named is asked first.
            pause, find_due = SEARCH_BUSY, begun + (SEARCH_BUSY if self._contacts else 0)
            while True:
                now = trio.current_time()
                if now >= due:
                    due = now + SEARCH
                    self._open_again()
                    if now >= begun + SEARCH and (self._host.quiet_for() >= SEARCH or not self.sessions()):
                        pause, find_due = SEARCH_BUSY, now
                    if now >= find_due:
                        find_due = now + pause
                        pause = min(2 * pause, SEARCH_MAX)
                        self._look(nursery)
                wake = min(due, self._try(nursery, now))
                with trio.move_on_at(wake):
                    await self.news.wait()

    def _look(self, nursery: trio.Nursery) -> None:
        for key in set(self.keys) - self._finding:
            self._finding.add(key)
            nursery.start_soon(self._find, key)

    def _open_again(self) -> None:
        """With those that had nothing of it yet."""
        for contact in self._contacts.values():
            if contact.want is not None and not contact.want.shown:
                contact.want.open()

    async def _find(self, key: Cid) -> None:
        try:
            with contextlib.suppress(Unreachable, NotFound):
                # Whoever is found first tells of the others.
                self.hint(await self._searching.index.find(bytes(key), soon=not self.looked))
                self.looked += 1
        finally:
            self._finding.discard(key)

    def _try(self, nursery: trio.Nursery, now: float) -> float:
        """Try whoever is due and has room; when the next one is due."""
        attached = sum(c.session is not None or c.trying for c in self._contacts.values())
        wake = math.inf
        for peer, contact in self._contacts.items():
            if contact.session is not None or contact.trying or contact.shunned:
                continue
            if contact.rests_until > now:
                wake = min(wake, contact.rests_until)
            elif attached < PEERS_MAX:
                attached += 1
                contact.trying = True
                nursery.start_soon(self._attach, peer, contact)
        return wake

    async def _attach(self, peer: PeerId, contact: _Contact) -> None:
        try:
            contact.session = await self._searching.session(peer)
        except Unreachable:
            self._rest(contact)
        else:
            self._open(contact)
        finally:
            contact.trying = False
            self._ring()

    def _open(self, contact: _Contact) -> None:
        if contact.session is not None and contact.want is None and self._shelf is not None:
            contact.want = contact.session.want(self._shelf, self._host.about(self._shelf))

    def _rest(self, contact: _Contact) -> None:
        pause = min(REST_MAX, REST_MIN * 2**contact.losses)
        contact.losses += 1
        contact.rests_until = trio.current_time() + pause

    def _ring(self) -> None:
        self.news.set()
        self.news = trio.Event()
