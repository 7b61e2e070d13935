"""Hold what the stories of one daemon share, and the few things that all of them do."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path

import attrs
import trio

from p2pgrid.dht.manifest import Delta, Tree, decode_datum, decode_pack
from p2pgrid.dht.store import MIN_FREE, Store
from p2pgrid.errors import GridError, NotFound, Temporary
from p2pgrid.hole_punch.relay.relaying import Relaying
from p2pgrid.ids import Cid, PeerId
from p2pgrid.net import Index, Network
from p2pgrid.node.config import Config
from p2pgrid.node.identity import Identity
from p2pgrid.node.lan import Lans
from p2pgrid.node.outlook import Outlook
from p2pgrid.node.prefs import Prefs
from p2pgrid.node.proxy.proxy import Proxy
from p2pgrid.node.reach import told
from p2pgrid.node.relay_prefs import RelayPrefs
from p2pgrid.node.standing import Standing
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.client import Calls
from p2pgrid.transfer.exchange import Exchange, Fetched, Progress
from p2pgrid.vm.guest import written

STALL_PATIENCE = 300.0
"""Seconds without one new byte after which a fetch for a job is given up and the task tried elsewhere."""

OWN = ".p2pgrid"
"""Folder of a result tree for what the node that made it adds: the console."""

HINT_PATIENCE = 3.0
"""Seconds that the coordinator gets to say who has something."""

Watch = Callable[[Progress], None]


@attrs.define
class Running:
    """A lease under way on this node."""

    task: str
    epoch: int
    folder: Path
    """Where its machine lives."""
    data: frozenset[str] = frozenset()
    """What it needs here until it ends."""
    reserved: int = 0
    """Bytes that its machine may come to write."""
    note: str = "starting"
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    def outstanding(self) -> int:
        """Bytes reserved and not written yet."""
        return max(0, self.reserved - written(self.folder))


@attrs.define
class Trouble:
    """A datum that was ordered and cannot be brought."""

    what: str
    why: str = ""
    tries: int = 0


@attrs.define(eq=False)
class Node:
    """The rooms of one daemon, put together by `daemon.py`."""

    home: Path
    config: Config
    identity: Identity
    network: Network
    index: Index
    store: Store
    exchange: Exchange
    coordinator: Calls
    grid: PeerId
    """Peer id of the grid's coordinator."""
    roles: tuple[str, ...]
    stopping: trio.Event
    """This daemon is told to end."""
    standing: Standing = attrs.Factory(
        lambda self: Standing(self.home, self.network.me, self.grid, self.network.verify), takes_self=True
    )
    """Who belongs to the grid, as far as this node knows."""
    prefs: Prefs = attrs.field(factory=Prefs)
    """What its owner allows it to move."""
    received: Counter[PeerId] = attrs.field(factory=Counter)
    """Payload bytes fetched since the start, by peer."""
    running: dict[str, Running] = attrs.field(factory=dict)
    fetching: set[str] = attrs.field(factory=set)
    """Data on their way here because of an order."""
    troubles: dict[str, Trouble] = attrs.field(factory=dict)
    """Data that were ordered and did not come."""
    kinds: dict[Cid, type] = attrs.field(factory=dict)
    """What data here are; known only where it was needed."""
    unordered: dict[str, float] = attrs.field(factory=dict)
    """Since when drafts that are followed here have not been ordered."""
    resting: int = 0
    """Slots that take no lease for a while, since the last ones failed here."""
    outlook: Outlook | None = None
    """How it stands in the network."""
    lans: Lans | None = None
    relaying: Relaying | None = None
    """The relay that it may be, and those that it uses."""
    relay_prefs: RelayPrefs = attrs.field(factory=RelayPrefs)
    relays: bool = False
    """Whether it relays for others just now."""
    """Where its guests meet those of other nodes; a worker has it."""
    proxy: Proxy | None = None
    """What programs of this node reach through the grid, and who reaches what here."""
    connected: bool = False
    _news: trio.Event = attrs.field(factory=trio.Event)
    _unannounced: dict[str, None] = attrs.field(factory=dict)
    _announced: dict[str, tuple[Cid, ...]] = attrs.field(factory=dict)
    """Data that the index was told of, by the keys it was told."""
    _to_announce: trio.Event = attrs.field(factory=trio.Event)

    def tell(self) -> None:
        """Have the next beat go out at once: there is news for the coordinator."""
        self._news.set()

    async def news(self) -> None:
        """Wait until `tell`."""
        await self._news.wait()
        self._news = trio.Event()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where this node is, for members to be told."""
        return told(self.exchange.links.addresses, self.network.addresses)

    async def fetch(
        self,
        datum: str,
        peers: Iterable[m.Provider],
        watch: Watch | None = None,
        patience: float = math.inf,
        most: int | None = None,
        origins: Sequence[str] = (),
    ) -> Fetched:
        """Have `datum` complete here, then say so to the index and the coordinator.

        Beside the node's own, `origins` are asked for what no peer has.

        Raises `Temporary` when no byte came for `patience` seconds, `Refused` for a content of
        more than `most` bytes.
        """
        for provider in peers:
            self.exchange.learn(PeerId(provider.peer), provider.addresses)
        names = [PeerId(p.peer) for p in peers]
        with trio.CancelScope() as scope:
            scope.deadline = trio.current_time() + patience
            seen, stall = -1, ""

            def notice(progress: Progress) -> None:
                nonlocal seen, stall
                stall = progress.stall
                if progress.bytes_done != seen:
                    seen = progress.bytes_done
                    scope.deadline = trio.current_time() + patience
                if watch:
                    watch(progress)

            fetched = await self.exchange.fetch(Cid.parse(datum), names, notice, most, origins)
        if scope.cancelled_caught:
            why = f": {stall}" if stall else ""
            raise Temporary(why=f"nothing came of {datum} for {patience:.0f} s{why}")
        self.received.update(fetched.bytes_by_peer)
        self.announce(datum)
        return fetched

    def announce(self, datum: str) -> None:
        """Have the coordinator and the index told that `datum` is complete here.

        Nobody waits for it: the index may take long to find that servers are out of reach.
        """
        self.tell()
        self._unannounced[datum] = None
        self._to_announce.set()

    async def keep_announcing(self) -> None:
        """Tell the index, for ever: one record for each datum and one for its content."""
        while True:
            await self._to_announce.wait()
            self._to_announce = trio.Event()
            while self._unannounced:
                datum = next(iter(self._unannounced))
                del self._unannounced[datum]
                with contextlib.suppress(GridError):  # what failed is told again by the index
                    await self._provide(datum)

    async def _provide(self, datum: str) -> None:
        keys = await trio.to_thread.run_sync(self._keys, Cid.parse(datum))
        self._announced[datum] = keys
        for key in keys:
            await self.index.provide(bytes(key))
        if self._announced.get(datum) is not keys:  # dropped meanwhile
            await self._withdraw(keys)

    def _keys(self, datum: Cid) -> tuple[Cid, ...]:
        """What the index is told of `datum`: nothing where it is a result that somebody else made.

        Such a result is here because it is wanted here; nobody else will ask for it.
        """
        about = decode_datum(self.store.get_object(datum))
        is_result = isinstance(about, Tree) and any(f.path.startswith(OWN + "/") for f in about.files)
        if is_result and about.signer != bytes(self.identity.signing_key.verify_key):
            return ()
        if about.content is None or about.pack is None:
            return (datum,)
        pack = decode_pack(self.store.get_object(about.pack))
        # Who builds on the same parent finds it here, though its own datum may be gone.
        return (datum, about.content, *((pack.parent,) if isinstance(pack, Delta) else ()))

    async def _withdraw(self, keys: Iterable[Cid]) -> None:
        """Announce `keys` no more, but for those that other data here share."""
        shared = {key for others in self._announced.values() for key in others}
        for key in keys:
            if key not in shared:
                await self.index.withdraw(bytes(key))

    def reserved(self) -> int:
        """Bytes that the machines under way may yet write; the store leaves them alone from now on."""
        outstanding = sum(lease.outstanding() for lease in self.running.values())
        self.store.min_free = MIN_FREE + outstanding
        return outstanding

    def complete(self, datum: str) -> bool:
        """Whether every chunk of `datum` is here."""
        return self.store.complete(Cid.parse(datum))

    async def drop(self, datum: str) -> None:
        """Have `datum` here no more, whoever dropped it first."""
        with contextlib.suppress(NotFound):
            await trio.to_thread.run_sync(self.store.drop, Cid.parse(datum))
        self.exchange.settle()
        self._unannounced.pop(datum, None)
        await self._withdraw(self._announced.pop(datum, ()))

    async def providers(self, datum: str) -> tuple[m.Provider, ...]:
        """Who has `datum`, as the coordinator knows; nobody where it is away or knows no such datum.

        It need not be waited for long: the index knows, too.
        """
        found: tuple[m.Provider, ...] = ()
        with trio.move_on_after(HINT_PATIENCE), contextlib.suppress(GridError):
            found = await self.coordinator.providers(datum)
        return found

    @contextlib.asynccontextmanager
    async def scratchpad(self) -> AsyncIterator[Path]:
        """A folder for passing things, gone at the end."""
        folder = Path(tempfile.mkdtemp(dir=self.home / "tmp"))
        try:
            yield folder
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(lambda: shutil.rmtree(folder, ignore_errors=True))

    async def resolve(self, which: str) -> m.DatumView:
        """The disk that a person named: by name, by CID, or "" for the one put last."""
        view = await self.coordinator.datum(which)
        if view.record.kind != "disk":
            raise NotFound(what=f"a disk {which!r} (it is a {view.record.kind})")
        return view
