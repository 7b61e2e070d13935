"""Know the nodes of a grid as their heartbeats tell: who lives, what is where.

Pure, and volatile: nothing here is written down.  A node is online from its first sign of
life until it was silent too long; only data of nodes online are counted as held.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from p2pgrid.ids import PeerId
from p2pgrid.scheduler.messages import Beat, Capacity, Provider, Relay
from p2pgrid.scheduler.placement import Candidate

NO_CAPACITY = Capacity()


@attrs.define(eq=False)
class Node:
    """A member's state of the moment.  Dicts stand for ordered sets."""

    peer: PeerId
    works: bool = False
    """It has the role of a worker."""
    online: bool = False
    seen: float | None = None
    addresses: tuple[str, ...] = ()
    relay: tuple[str, ...] = ()
    """Where it relays for members."""
    shares: tuple[str, ...] = ()
    total: Capacity = NO_CAPACITY
    free: Capacity = NO_CAPACITY
    status: str = ""
    holds: set[str] = attrs.field(factory=set)
    partial: dict[str, int] = attrs.field(factory=dict)
    """Bytes missing, by datum."""
    leases: dict[str, None] = attrs.field(factory=dict)
    """Tasks it runs."""
    results: dict[str, None] = attrs.field(factory=dict)
    """Tasks whose result it holds until it is collected."""
    lapsed: dict[str, None] = attrs.field(factory=dict)
    """Tasks it lost by silence and that nobody else got yet."""
    promised: dict[str, None] = attrs.field(factory=dict)
    """Replicas it was told to hold and does not have yet."""
    stops: dict[str, None] = attrs.field(factory=dict)
    """Tasks taken back that it has not been told of."""
    dropping: set[str] = attrs.field(factory=set)
    """Data it was told to drop."""
    cut: bool = False
    """It holds more than its heartbeats list."""
    awake: float = 0.0
    """Seconds for which it was online, in total."""
    told: object = None
    """The orders it knows."""


class Roster:
    """Nodes by peer, and owners by datum."""

    def __init__(self) -> None:
        self.nodes: dict[PeerId, Node] = {}
        self.news: dict[PeerId, None] = {}
        """Nodes whose orders may have changed."""
        self._owners: dict[str, dict[PeerId, None]] = {}
        self._promised: dict[str, dict[PeerId, None]] = {}
        self._partly: dict[str, dict[PeerId, None]] = {}
        self._relays: dict[PeerId, None] = {}

    def node(self, peer: PeerId) -> Node:
        """The node of `peer`, new and offline where it was not known."""
        return self.nodes.setdefault(peer, Node(peer))

    def owners(self, datum: str) -> Iterable[PeerId]:
        """Nodes online that hold it completely."""
        return self._owners.get(datum, {}).keys()

    def have(self, datum: str) -> dict[PeerId, None]:
        """Nodes online that hold any of it."""
        return self._owners.get(datum, {}) | self._partly.get(datum, {})

    def claimed(self, datum: str) -> dict[PeerId, None]:
        """Owners, and those that were told to become one."""
        return self._owners.get(datum, {}) | self._promised.get(datum, {})

    def beat(self, node: Node, beat: Beat) -> None:
        """Take in what a heartbeat tells."""
        node.addresses, node.shares = beat.addresses, beat.shares
        node.total, node.free, node.status = beat.total, beat.free, beat.status
        node.cut = beat.cut
        self._set_relay(node, beat.relay)
        holds = set(beat.holds)
        if beat.cut:
            holds |= node.holds - node.dropping - {h.datum for h in beat.partial}
        for datum in node.holds - holds:
            self._unlist(self._owners, datum, node.peer)
        for datum in beat.holds:
            if datum not in node.holds:
                self._owners.setdefault(datum, {})[node.peer] = None
                self._break(node, datum)
        node.holds = holds
        self._set_partial(node, {h.datum: h.missing for h in beat.partial if h.datum not in holds})

    def hold(self, node: Node, datum: str) -> None:
        """`node` holds `datum`, as it just said in passing."""
        if node.online and datum not in node.holds:
            node.holds.add(datum)
            self._owners.setdefault(datum, {})[node.peer] = None
            self._break(node, datum)

    def promise(self, node: Node, data: Iterable[str]) -> None:
        """`node` was told to hold `data`, and nothing else as a replica."""
        for datum in list(node.promised):
            self._break(node, datum)
        for datum in data:
            node.promised[datum] = None
            self._promised.setdefault(datum, {})[node.peer] = None

    def inherit(self, old: str, new: str) -> None:
        """Whoever was told to hold `old` was told to hold `new`."""
        for peer in list(self._promised.get(old, {})):
            node = self.nodes[peer]
            self._break(node, old)
            if new not in node.holds:
                node.promised[new] = None
                self._promised.setdefault(new, {})[peer] = None

    def lost(self, node: Node) -> None:
        """`node` is offline: what it holds does not count until it tells again."""
        node.online = False
        for datum in node.holds:
            self._unlist(self._owners, datum, node.peer)
        node.holds = set()
        self._set_partial(node, {})
        self.promise(node, ())
        self._set_relay(node, ())
        node.told = None

    def missing(self, peer: PeerId, datum: str, size: int) -> int:
        """Bytes of `datum` (of `size` bytes) that `peer` would have to fetch."""
        node = self.nodes[peer]
        return 0 if datum in node.holds else node.partial.get(datum, size)

    def providers(self, datum: str, asking: PeerId, most: int) -> tuple[Provider, ...]:
        """Who has `datum`: complete holders first, each asker starting with another one."""
        found: list[Provider] = []
        for peers, complete in ((self._owners, True), (self._partly, False)):
            listed = [p for p in peers.get(datum, {}) if p != asking]
            start = sum(asking.encode()) % len(listed) if listed else 0
            turned = listed[start:] + listed[:start]
            room = most - len(found) if not complete else most - (most // 2 if datum in self._partly else 0)
            found += [Provider(p, self.nodes[p].addresses, complete) for p in turned[:room]]
        return tuple(found)

    def relays(self, asking: PeerId, most: int) -> tuple[Relay, ...]:
        """Who relays, each asker starting with another one."""
        listed = [peer for peer in self._relays if peer != asking]
        start = sum(asking.encode()) % len(listed) if listed else 0
        return tuple(Relay(p, self.nodes[p].relay) for p in (listed[start:] + listed[:start])[:most])

    def candidates(self) -> list[Candidate]:
        """The workers that are online and offer anything."""
        return [Candidate(n.peer, n.total, n.free, n.shares)
                for n in self.nodes.values() if n.online and n.works and n.total.slots]  # fmt: skip

    def _set_partial(self, node: Node, partial: dict[str, int]) -> None:
        for datum in node.partial.keys() - partial.keys():
            self._unlist(self._partly, datum, node.peer)
        for datum in partial:
            self._partly.setdefault(datum, {})[node.peer] = None
        node.partial = partial

    def _set_relay(self, node: Node, relay: tuple[str, ...]) -> None:
        node.relay = relay
        if relay:
            self._relays[node.peer] = None
        else:
            self._relays.pop(node.peer, None)

    def _break(self, node: Node, datum: str) -> None:
        if datum in node.promised:
            del node.promised[datum]
            self._unlist(self._promised, datum, node.peer)

    @staticmethod
    def _unlist(table: dict[str, dict[PeerId, None]], datum: str, peer: PeerId) -> None:
        del table[datum][peer]
        if not table[datum]:
            del table[datum]

    def check(self) -> None:
        for table, field in (
            (self._owners, "holds"),
            (self._promised, "promised"),
            (self._partly, "partial"),
        ):
            listed = {(d, p) for d, peers in table.items() for p in peers}
            assert listed == {(d, n.peer) for n in self.nodes.values() for d in getattr(n, field)}
            assert all(table.values()), "an empty entry is kept"
        assert self._relays.keys() == {n.peer for n in self.nodes.values() if n.relay}
        for node in self.nodes.values():
            assert node.online or not (node.holds or node.partial or node.promised or node.relay)
            assert not node.holds & node.promised.keys(), "a promise outlives its keeping"
