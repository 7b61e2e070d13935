"""Exchange data with any peer over one link each: seed whatever the store holds, fetch what is wanted.

    fetch ──> Download (fetch.py) ─┐                          ┌─> Seeding (seed.py) ──> store
              Download ────────────┴──> Session, a link each ─┴─> Want ──> shelf

All links have their turns in one thread (`hole_punch/reactor.py`); everything here runs in trio.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

import trio

from p2pgrid.dht.shelf import Shelf
from p2pgrid.dht.store import Store
from p2pgrid.errors import Conflict, Unreachable
from p2pgrid.hole_punch.bulk import Link, Links, open_links
from p2pgrid.hole_punch.greeting import Allow
from p2pgrid.hole_punch.path import Address
from p2pgrid.ids import Cid, PeerId
from p2pgrid.net import Index, Network
from p2pgrid.transfer.fetch import Download
from p2pgrid.transfer.follow import Following
from p2pgrid.transfer.messages import ADDRESS_MAX, ADDRESSES_MAX, PEERS_MAX, Peers, encode
from p2pgrid.transfer.peering import Fetched
from p2pgrid.transfer.progress import Progress
from p2pgrid.transfer.seed import Audience, Seeding
from p2pgrid.transfer.session import Session

__all__ = ["Exchange", "Fetched", "Progress", "open_exchange"]


class Exchange:
    """See `open_exchange`."""

    def __init__(
        self,
        network: Network,
        index: Index,
        store: Store,
        rng: random.Random,
        origins: Sequence[str],
    ) -> None:
        self.store = store
        self.index = index
        self.me = network.me
        self.origins = origins
        self.links: Links
        self._network = network
        self._rng = rng
        self._token = trio.lowlevel.current_trio_token()
        self._audience = Audience()
        self._sessions: dict[Link, Session] = {}
        self._downloads: dict[Cid, tuple[Download, trio.Event]] = {}
        self._served: dict[PeerId, int] = {}
        self._served_lock = threading.Lock()

    @property
    def served(self) -> dict[PeerId, int]:
        """Payload bytes sent, by peer, since the exchange was opened."""
        with self._served_lock:
            return dict(self._served)

    async def fetch(
        self,
        datum: Cid,
        peers: Iterable[PeerId] = (),
        progress: Callable[[Progress], None] | None = None,
        most: int | None = None,
        origins: Sequence[str] = (),
    ) -> Fetched:
        """Complete `datum` from `peers` and whoever else has it; returns when it is complete.

        What they do not bring comes from `origins`, and those that the exchange was opened with.

        The caller bounds the time; cancelled, it leaves what came for the next fetch.  Two
        fetches of one datum share the work.  Raises `BadObject`, `VerificationFailed`, `NoSpace`,
        and `Refused` for a content of more than `most` bytes, before anything else of it is fetched.
        """
        while datum in self._downloads:
            download, done = self._downloads[datum]
            download.company.hint(peers)
            download.resort.add(origins)
            with _listening(download, progress):
                await done.wait()
            # It completed, then the next one finds everything here; or it was cancelled, and we go on.
        download, done = Download(datum, self, self._rng, most), trio.Event()
        download.company.hint(peers)
        download.resort.add(origins)
        self._downloads[datum] = download, done
        try:
            with _listening(download, progress):
                return await download.run()
        finally:
            del self._downloads[datum]
            done.set()

    async def follow(self, series: Cid, peers: Iterable[PeerId] = ()) -> dict[PeerId, int]:
        """Fetch what is pressed elsewhere as it grows, from its first draft on; payload bytes by peer.

        It returns once `series` is here no more: its disk was begun, or somebody dropped it.  Cancelled, it
        leaves what came.  Raises `VerificationFailed` where its signer tells two stories, `NoSpace`, and
        `Temporary` when for an hour nothing new was told.
        """
        if series in self._downloads:
            raise Conflict(what=f"{series} is followed already")
        following, done = Following(series, self, self._rng), trio.Event()
        following.company.hint(peers)
        self._downloads[series] = following, done
        try:
            return (await following.run()).bytes_by_peer
        finally:
            del self._downloads[series]
            done.set()

    def urge(self, datum: Cid, indices: Iterable[int]) -> None:
        """These chunks of the datum's own pack are needed before all others, if it is being fetched.

        They are asked of whoever brings them soonest, and sent before all else.  Chunks of a delta that its
        parent tells are not among them: a parent is completed first.
        """
        if datum in self._downloads:
            self._downloads[datum][0].urge(indices)

    # --- what a download needs (`Peering`) --------------------------------------------------

    async def session(self, peer: PeerId) -> Session:
        link = await self.links.link(peer)
        session = self._sessions.get(link)
        if session is None:
            raise Unreachable(who=peer, why="the link ended at once")
        return session

    def allowed(self, peer: PeerId) -> bool:
        return peer != self._network.me

    def learn(self, peer: PeerId, addresses: Iterable[str]) -> None:
        addresses = list(addresses)
        self._network.learn(peer, addresses)
        self.links.learn(peer, addresses)

    def show(self, shelf: Shelf) -> None:
        self._audience.show(shelf)

    def tell(self, pack: Cid, indices: list[int]) -> None:
        """Tell who has opened `pack`, and whoever here wants it, that these are here now."""

        def known(link: Link) -> Callable[[int], bool]:
            session = self._sessions.get(link)
            return (lambda index: False) if session is None else session.known(pack)

        self._audience.tell(pack, indices, known)
        for download, _ in self._downloads.values():
            if download.pack == pack:
                download.hold(indices)

    def grown(self, series: Cid) -> None:
        """Tell who follows `series` that it has grown."""
        shelf = self.store.drafts.get(series)
        if shelf is not None:
            self._audience.grown(shelf)

    def settle(self) -> None:
        """End following what is not here any more."""
        for download, _ in list(self._downloads.values()):
            if isinstance(download, Following):
                download.end_if_over()

    # --- links ------------------------------------------------------------------------------

    def _receive(self, link: Link) -> Session:
        session = Session(link, self._seeding, self._ended, self._token)
        self._sessions[link] = session
        return session

    def _seeding(self, link: Link) -> Seeding:
        def sent(count: int) -> None:
            with self._served_lock:
                self._served[link.peer] = self._served.get(link.peer, 0) + count

        def opened(link: Link, topic: int, pack: Cid) -> None:
            self._token.run_sync_soon(self._opened, link, topic, pack)

        return Seeding(link, self.store, self._audience, opened, sent)

    def _ended(self, session: Session, why: str) -> None:
        self._sessions.pop(session.link, None)
        for download, _ in self._downloads.values():
            download.company.lost(session)

    def _opened(self, link: Link, topic: int, pack: Cid) -> None:
        """A peer wants `pack`: tell it who else does, and ask it, too, if we want it ourselves."""
        others = {listener.peer for listener, _ in self._audience.of(pack)}
        for download, _ in self._downloads.values():
            if pack in download.packs:
                download.company.hint([link.peer])
                others.update(other.peer for other in download.company.sessions())
        others -= {link.peer, self._network.me}
        rows: list[tuple[PeerId, tuple[str, ...]]] = []
        for peer in self._rng.sample(sorted(others), min(PEERS_MAX, len(others))):
            known = (*self.links.addresses_of(peer), *self._network.addresses_of(peer))
            addresses = [address for address in known if len(address) <= ADDRESS_MAX]
            rows.append((peer, tuple(addresses[:ADDRESSES_MAX])))
        if rows:
            link.send(*encode(Peers(topic, tuple(rows))))


@contextlib.asynccontextmanager
async def open_exchange(
    network: Network,
    index: Index,
    store: Store,
    listen: Sequence[Address] = (("0.0.0.0", 0),),
    *,
    allow: Allow = lambda peer, membership: "",
    membership: Callable[[], bytes] = lambda: b"",
    rng: random.Random | None = None,
    origins: Sequence[str] = (),
) -> AsyncIterator[Exchange]:
    """Seed what `store` holds, and fetch, while inside.  `allow` says who is welcome, `membership` what we
    show of ourselves, `origins` (`origin.py`) where to ask when no peer has something.

    On leaving, all links are closed and no thread is left; leave fetches before.
    """
    exchange = Exchange(network, index, store, rng or random.Random(), origins)
    async with open_links(network, listen, exchange._receive, allow, membership) as exchange.links:
        yield exchange


@contextlib.contextmanager
def _listening(download: Download, progress: Callable[[Progress], None] | None) -> Iterator[None]:
    if progress is None:
        yield
        return
    download.listeners.append(progress)
    try:
        yield
    finally:
        download.listeners.remove(progress)
