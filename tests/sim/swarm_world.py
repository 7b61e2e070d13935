"""Simulate peers that move one pack between them, in virtual time and from one seed.

A node has an uplink that serves its askers in turn, chunk by chunk, and a downlink; every
pair of linked nodes has a latency and keeps the order of its messages.  A lossy moment is a
delay (TCP sends again), a broken link loses what was on its way, and comes back.  A crash
forgets the swarm, but not the chunks.  What a node decides is `Swarm`'s alone.

The same seed gives the same `trace`.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import attrs

from p2pgrid.ids import PeerId
from p2pgrid.machine import Tick
from p2pgrid.transfer.swarm import (
    Arrived,
    Ask,
    Completed,
    Event,
    Joined,
    Left,
    Rejected,
    Shun,
    Swarm,
    Told,
    Withdraw,
)
from p2pgrid.transfer.turns import Asks, Turns

MBIT = 125_000.0
TELL_EVERY = 0.2
CHECK_EVERY = 512
"""Steps of all swarms between two calls of `check`."""


@attrs.define(kw_only=True)
class Nature:
    """What kind of node it is."""

    up: float = 20 * MBIT
    down: float = 100 * MBIT
    latency: float = 0.01
    lies: float = 0.0
    """The chance that a chunk it sends is garbage."""
    claims_all: bool = False
    answers: bool = True


@attrs.define(eq=False)
class Node:
    """A peer: its swarm, its chunks, what others asked of it."""

    name: PeerId
    nature: Nature
    have: set[int]
    turns: Turns
    swarm: Swarm | None = None
    links: dict[PeerId, int] = attrs.Factory(dict)
    """Peer to the number of the link, which tells old messages from new ones."""
    asks: dict[PeerId, Asks] = attrs.Factory(dict)
    """By peer; who was served last is last."""
    sending: bool = False
    wakes: float = float("inf")
    down_free: float = 0.0
    untold: list[int] = attrs.Factory(list)
    ticks: float = float("inf")
    up: bool = True
    finished: float | None = None
    sent: int = 0
    doubled: int = 0
    spoilt: int = 0
    bad_from: Counter[PeerId] = attrs.Factory(Counter)
    shunned: set[PeerId] = attrs.Factory(set)


class World:
    """All nodes, their links and the time."""

    def __init__(self, seed: int, lengths: list[int], *, loss: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.lengths = lengths
        self.loss = loss
        self.now = 0.0
        self.nodes: dict[PeerId, Node] = {}
        self.quiet_until: dict[tuple[PeerId, PeerId], float] = {}
        self.numbers = itertools.count(1)
        self._agenda: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = itertools.count()
        self._digest = hashlib.blake2b(digest_size=16)
        self._steps = 0

    @property
    def trace(self) -> str:
        return self._digest.hexdigest()

    def at(self, time: float, do: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._agenda, (time, next(self._serial), do, args))

    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        while self._agenda and self._agenda[0][0] <= until and not done():
            self.now, _, do, args = heapq.heappop(self._agenda)
            do(*args)

    # --- nodes and links ---

    def add(self, name: str, nature: Nature, have: set[int] | None = None) -> Node:
        node = self.nodes[PeerId(name)] = Node(PeerId(name), nature, have or set(), Turns(len(self.lengths)))
        if nature.answers and not nature.claims_all:
            self.start(node)
        self.at(self.rng.uniform(0, TELL_EVERY), self.tell, node)
        return node

    def start(self, node: Node) -> None:
        node.up = True
        node.swarm = Swarm(self.lengths, self.bitmap(node.have), random.Random(self.rng.getrandbits(64)))
        node.turns = Turns(len(self.lengths))
        self.step(node, Tick())

    def bitmap(self, have: set[int]) -> bytes:
        return sum(1 << i for i in have).to_bytes(-(-len(self.lengths) // 8), "little")

    def link(self, a: Node, b: Node) -> None:
        if not (a.up and b.up) or b.name in a.links:
            return
        number = next(self.numbers)
        a.links[b.name] = b.links[a.name] = number
        for one, other in ((a, b), (b, a)):
            claims = set(range(len(self.lengths))) if other.nature.claims_all else other.have
            self.send(other, one, self.step, one, Joined(other.name, self.bitmap(claims)))

    def unlink(self, a: Node, b: Node) -> None:
        if a.links.pop(b.name, None) is None:
            return
        del b.links[a.name]
        for one, other in ((a, b), (b, a)):
            if other.name in one.asks:
                one.asks.pop(other.name).leave()
            self.step(one, Left(other.name))

    def crash(self, node: Node, back_after: float) -> None:
        partners = [self.nodes[name] for name in node.links]
        node.up, node.swarm = False, None
        for partner in partners:
            self.unlink(node, partner)

        def back() -> None:
            self.start(node)
            for partner in partners:
                self.link(node, partner)

        self.at(self.now + back_after, back)

    def leave(self, node: Node) -> None:
        node.up, node.swarm = False, None
        for name in list(node.links):
            self.unlink(node, self.nodes[name])

    # --- messages ---

    def send(self, sender: Node, receiver: Node, do: Callable[..., None], *args: Any) -> None:
        """Carry one message; in order, and only as long as this very link lasts."""
        pair = (sender.name, receiver.name)
        number = sender.links[receiver.name]
        time = self.now + sender.nature.latency + receiver.nature.latency
        if self.loss and self.rng.random() < self.loss:
            time += self.rng.uniform(0.2, 1.0)
        time = self.quiet_until[pair] = max(time, self.quiet_until.get(pair, 0.0))
        self.at(time, self.deliver, sender, receiver, number, do, args)

    def deliver(self, sender: Node, receiver: Node, number: int, do: Any, args: Any) -> None:
        if receiver.links.get(sender.name) == number:
            do(*args)

    def tell(self, node: Node) -> None:
        if node.untold and node.up:
            told, node.untold = tuple(node.untold), []
            for name in node.links:
                peer = self.nodes[name]
                if peer.swarm is not None and not peer.swarm.complete:
                    self.send(node, peer, self.step, peer, Told(node.name, told))
        self.at(self.now + TELL_EVERY, self.tell, node)

    # --- a node decides ---

    def step(self, node: Node, event: Event) -> None:
        if node.swarm is None:
            return
        self._steps += 1
        for effect in node.swarm.step(event, self.now):
            match effect:
                case Ask(peer, wanted):
                    assert peer in node.links
                    self.send(node, self.nodes[peer], self.asked, self.nodes[peer], node.name, wanted)
                case Withdraw(peer, index):
                    if peer in node.links:
                        self.send(node, self.nodes[peer], self.withdrawn, self.nodes[peer], node.name, index)
                case Shun(peer, _):
                    node.shunned.add(peer)
                case Completed():
                    node.finished = self.now
                    self.note("done", node.name)
        if self._steps % CHECK_EVERY == 0:
            node.swarm.check()
        if node.swarm.deadline < node.ticks:
            node.ticks = node.swarm.deadline
            self.at(max(self.now, node.ticks), self.tick, node, node.swarm, node.ticks)

    def tick(self, node: Node, swarm: Swarm, due: float) -> None:
        if node.ticks == due:
            node.ticks = float("inf")
        if node.swarm is swarm and swarm.deadline <= self.now:
            self.step(node, Tick())
        elif node.swarm is swarm and swarm.deadline < node.ticks:
            node.ticks = swarm.deadline
            self.at(node.ticks, self.tick, node, swarm, node.ticks)

    # --- chunks ---

    def asked(self, node: Node, by: PeerId, wanted: tuple[int, ...]) -> None:
        if not node.nature.answers:
            return
        if by not in node.asks:
            node.asks[by] = node.turns.join(by)
        node.asks[by].ask(wanted)
        self.serve(node)

    def withdrawn(self, node: Node, by: PeerId, index: int) -> None:
        if by in node.asks:
            node.asks[by].withdraw(index)

    def serve(self, node: Node) -> None:
        """Serve whoever may be sent something; while all have to wait, the uplink is idle."""
        if node.sending or not node.up:
            return
        for to, asks in node.asks.items():
            index = asks.next(self.now)
            if index is not None:
                node.sending = True
                node.asks[to] = node.asks.pop(to)
                number = node.links[to]
                self.at(self.now + self.lengths[index] / node.nature.up, self.sent, node, to, number, index)
                return
        due = min((asks.due for asks in node.asks.values()), default=float("inf"))
        if due < node.wakes:
            node.wakes = due
            self.at(due, self.wake, node)

    def wake(self, node: Node) -> None:
        node.wakes = float("inf")
        self.serve(node)

    def sent(self, node: Node, to: PeerId, number: int, index: int) -> None:
        node.sending = False
        if node.links.get(to) == number:
            node.sent += self.lengths[index]
            good = self.rng.random() >= node.nature.lies
            receiver = self.nodes[to]
            self.send(node, receiver, self.arriving, receiver, node.name, index, good)
        self.serve(node)

    def arriving(self, node: Node, sender: PeerId, index: int, good: bool) -> None:
        node.down_free = max(self.now, node.down_free) + self.lengths[index] / node.nature.down
        self.at(node.down_free, self.arrived, node, sender, node.links[sender], index, good)

    def arrived(self, node: Node, sender: PeerId, number: int, index: int, good: bool) -> None:
        if node.links.get(sender) != number or node.swarm is None:
            return
        self.note(node.name, sender, index, good)
        if not good:
            node.spoilt += self.lengths[index]
            node.bad_from[sender] += 1
            self.step(node, Rejected(sender, index))
            return
        if index in node.have:
            node.doubled += self.lengths[index]
        else:
            node.have.add(index)
            node.untold.append(index)
        self.step(node, Arrived(sender, index, self.lengths[index]))

    def note(self, *facts: object) -> None:
        self._digest.update(repr((self.now, *facts)).encode())
