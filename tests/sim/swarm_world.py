"""Simulate peers that move one pack between them, in virtual time and from one seed.

A node has an uplink that its links share chunk by chunk, and a downlink.  A link carries two *pipes*;
as in a socket, what is once in a pipe cannot be taken back, a node commits up to `commit` bytes to each, and
what it says waits behind the chunks that are in there.  Not more than `window` bytes are on their way in
one pipe, which is how a slow downlink holds its senders back.  News of chunks are gathered for
`announce` seconds, and what comes in is looked at every `gather` seconds, as in `fetch.py`.

Whoever `arrive`s knows the origin alone; it is told of those who came before, and is linked to them soon.
A lossy moment is a delay (TCP sends again), a broken link loses what was on its way, and comes
back.  A crash forgets the swarm, but not the chunks.  Who is `lost` says nothing: its peers
notice when their TCP does.  What a node decides is `Swarm`'s and `Turns`' alone.

The same seed gives the same `trace`.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from p2pgrid.ids import PeerId
from p2pgrid.machine import Tick
from p2pgrid.transfer.slots import STUCK, Slots
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
CHECK_EVERY = 512
"""Steps of all swarms between two calls of `check`."""
NOTICED = 30.0
"""Seconds until TCP gives up on a peer that is gone without a word."""


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


@attrs.define(eq=False, repr=False)
class Pipe:
    """One direction of a link."""

    sender: Node
    receiver: Node
    slots: Slots[Pipe]
    asks: Asks | None = None
    """What the receiver wants of the sender."""
    queue: deque[int] = attrs.Factory(deque)
    """Chunks; the first is in the socket, the others are still overtaken by messages."""
    notes: list[tuple[Callable[..., None], tuple[Any, ...]]] = attrs.Factory(list)
    """Messages that wait for the first."""
    queued: int = 0
    """Bytes of the chunks in it."""
    flying: int = 0
    window: int = 256 << 10
    """Bytes that may be on their way."""
    until: float = 0.0
    """When the last thing under way is there; nothing overtakes it."""
    wakes: float = math.inf
    live: bool = True


@attrs.define(eq=False, repr=False)
class Node:
    """A peer: its swarm, its chunks, its links."""

    name: PeerId
    nature: Nature
    have: bytearray
    """One byte for each chunk."""
    turns: Turns
    swarm: Swarm | None = None
    links: dict[PeerId, Pipe] = attrs.Factory(dict)
    """The pipe to each peer."""
    ready: dict[Pipe, None] = attrs.Factory(dict)
    """Pipes with a chunk that may go, in turn."""
    slots: tuple[Slots[Pipe], Slots[Pipe]] = attrs.Factory(lambda: (Slots(), Slots()))
    """Of what goes to peers that are not near, and to those that are."""
    sending: bool = False
    busy: float = 0.0
    """Seconds its uplink was in use."""
    down_free: float = 0.0
    inbox: list[Event] = attrs.Factory(list)
    looks: float = -math.inf
    untold: list[int] = attrs.Factory(list)
    ticks: float = math.inf
    up: bool = True
    arrived: float = 0.0
    finished: float | None = None
    sent: int = 0
    doubled: int = 0
    spoilt: int = 0
    bad_from: Counter[PeerId] = attrs.Factory(Counter)
    shunned: set[PeerId] = attrs.Factory(set)

    @property
    def holds(self) -> set[int]:
        return {index for index, held in enumerate(self.have) if held}


class World:
    """All nodes, their links and the time."""

    def __init__(
        self,
        seed: int,
        lengths: list[int],
        *,
        loss: float = 0.0,
        commit: int = 256 << 10,
        window: int = 256 << 10,
        announce: float = 0.05,
        gather: float = 0.025,
        check_every: int = CHECK_EVERY,
    ) -> None:
        self.rng = random.Random(seed)
        self.lengths = lengths
        self.loss = loss
        self.commit = commit
        self.window = window
        self.announce = announce
        self.gather = gather
        self.check_every = check_every
        self.now = 0.0
        self.nodes: dict[PeerId, Node] = {}
        self.opened: list[Node] = []
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

    def add(self, name: str, nature: Nature, *, whole: bool = False) -> Node:
        have = bytearray((b"\1" if whole else b"\0") * len(self.lengths))
        node = self.nodes[PeerId(name)] = Node(PeerId(name), nature, have, Turns(len(self.lengths), whole))
        node.arrived = self.now
        if nature.answers and not nature.claims_all:
            self.start(node)
        return node

    def start(self, node: Node) -> None:
        node.up = True
        rng = random.Random(self.rng.getrandbits(64))
        node.swarm = Swarm(self.lengths, self.bitmap(node.have), rng, me=node.name)
        node.turns = Turns(len(self.lengths), all(node.have))
        self.step(node, Tick())

    def bitmap(self, have: bytearray) -> bytes:
        bits = int(bytes(have[::-1]).translate(bytes.maketrans(b"\0\1", b"01")) or b"0", 2)
        return bits.to_bytes(-(-len(have) // 8), "little")

    def arrive(self, node: Node, origin: Node, most: int = 40) -> None:
        """`node` opens the pack at the origin, is told of others, and links to them soon."""
        node.arrived = self.now
        self.at(self.now + self.rng.uniform(0.03, 0.06), self.open, node, origin, most)

    def open(self, node: Node, origin: Node, most: int) -> None:
        if not node.up:
            return
        self.link(node, origin)
        self.opened = [other for other in self.opened if other.up]
        for other in self.rng.sample(self.opened, min(most, len(self.opened))):
            self.at(self.now + self.rng.uniform(0.05, 0.1), self.link, node, other)
        self.opened.append(node)

    def link(self, a: Node, b: Node) -> None:
        if not (a.up and b.up) or b.name in a.links:
            return
        near = self.near(a, b)
        a.links[b.name] = Pipe(a, b, a.slots[near], window=self.window)
        b.links[a.name] = Pipe(b, a, b.slots[near], window=self.window)
        for one, other in ((a, b), (b, a)):
            claims = bytearray(b"\1" * len(self.lengths)) if other.nature.claims_all else other.have
            self.say(other.links[one.name], self.hear, one, Joined(other.name, self.bitmap(claims)))

    def near(self, a: Node, b: Node) -> bool:
        """Whether bytes between the two pass no line that others share."""
        return False

    def unlink(self, a: Node, b: Node) -> None:
        if b.name not in a.links:
            return
        for one, other in ((a, b), (b, a)):
            pipe = one.links.pop(other.name)
            pipe.live = False
            if pipe.asks is not None:
                pipe.asks.leave()
            one.ready.pop(pipe, None)
            pipe.slots.leave(pipe)
            self.go_on(pipe.slots.first(self.now))
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

    def lose(self, node: Node) -> None:
        """`node` leaves without a word."""
        node.up, node.swarm = False, None
        for pipe in node.links.values():
            pipe.live = False
        node.ready.clear()
        self.at(self.now + NOTICED, self.leave, node)

    # --- messages ---

    def say(self, pipe: Pipe, do: Callable[..., None], *args: Any) -> None:
        """Carry one message; in order, behind the chunk that is under way in the pipe."""
        if pipe.queue:
            pipe.notes.append((do, args))
        else:
            self.carry(pipe, do, args)

    def carry(self, pipe: Pipe, do: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.at(self.there(pipe, self.now), self.deliver, pipe, do, args)

    def there(self, pipe: Pipe, time: float) -> float:
        """When what goes now is at the other end, if the downlink has it at `time`."""
        time = max(time, self.now + pipe.sender.nature.latency + pipe.receiver.nature.latency)
        if self.loss and self.rng.random() < self.loss:
            time += self.rng.uniform(0.2, 1.0)
        pipe.until = max(time, pipe.until)
        return pipe.until

    def deliver(self, pipe: Pipe, do: Callable[..., None], args: tuple[Any, ...]) -> None:
        if pipe.live:
            do(*args)

    def tell(self, node: Node) -> None:
        told, node.untold = node.untold, []
        if not node.up:
            return
        for pipe in node.links.values():
            peer = pipe.receiver
            if peer.swarm is not None and not peer.swarm.complete:
                news = [index for index in told if not peer.have[index]]
                if news:  # it would not care for the others
                    self.say(pipe, self.hear, peer, Told(node.name, news))

    # --- a node decides ---

    def hear(self, node: Node, event: Event) -> None:
        """What a link reports is looked at together with what else comes meanwhile."""
        if node.swarm is None:
            return
        node.inbox.append(event)
        if len(node.inbox) == 1:
            if self.now >= node.looks:
                self.look(node)
            else:
                self.at(node.looks, self.look, node)

    def look(self, node: Node) -> None:
        events, node.inbox = node.inbox, []
        node.looks = self.now + self.gather
        self.steps(node, events)

    def step(self, node: Node, event: Event) -> None:
        self.steps(node, (event,))

    def steps(self, node: Node, events: Sequence[Event]) -> None:
        swarm = node.swarm
        if swarm is None:
            return
        self._steps += 1
        for effect in swarm.steps(events, self.now):
            match effect:
                case Ask(peer, wanted, urgent):
                    if pipe := node.links.get(peer):
                        self.say(pipe, self.asked, self.nodes[peer].links[node.name], wanted, urgent)
                case Withdraw(peer, index):
                    if pipe := node.links.get(peer):
                        self.say(pipe, self.withdrawn, self.nodes[peer].links[node.name], index)
                case Shun(peer, _):
                    node.shunned.add(peer)
                case Completed():
                    node.finished = self.now
                    self.note("done", node.name)
        if self._steps % self.check_every == 0:
            swarm.check()
        if swarm.deadline < node.ticks:
            node.ticks = swarm.deadline
            self.at(max(self.now, node.ticks), self.tick, node, swarm, node.ticks)

    def tick(self, node: Node, swarm: Swarm, due: float) -> None:
        if node.ticks == due:
            node.ticks = math.inf
        if node.swarm is swarm and swarm.deadline <= self.now:
            self.step(node, Tick())
        elif node.swarm is swarm and swarm.deadline < node.ticks:
            node.ticks = swarm.deadline
            self.at(node.ticks, self.tick, node, swarm, node.ticks)

    # --- chunks ---

    def asked(self, pipe: Pipe, wanted: tuple[int, ...], urgent: bool) -> None:
        if not pipe.sender.nature.answers:
            return
        if pipe.asks is None:
            pipe.asks = pipe.sender.turns.join(pipe.receiver.name)
        if urgent:
            pipe.asks.urge(wanted, self.now)
            for place, index in enumerate(wanted, 1):  # behind the one that is under way
                pipe.queue.insert(place, index)
                pipe.queued += self.lengths[index]
            pipe.slots.update(pipe, pipe.queued, self.now)
        else:
            pipe.asks.ask(wanted)
        self.fill(pipe)

    def withdrawn(self, pipe: Pipe, index: int) -> None:
        if pipe.asks is not None:
            pipe.asks.withdraw(index)

    def fill(self, pipe: Pipe) -> None:
        """Commit chunks to the pipe, and let the uplink go on."""
        asks = pipe.asks
        if asks is None or not pipe.live:
            return
        slots = pipe.slots
        while pipe.queued < self.commit and asks.due <= self.now:
            if not slots.may(pipe, self.now):
                self.rouse(pipe, self.now + STUCK)
                self.go_on(slots.first(self.now))
                break
            index = asks.next(self.now)
            if index is not None:
                pipe.queue.append(index)
                pipe.queued += self.lengths[index]
                slots.update(pipe, pipe.queued, self.now)
        else:
            self.rouse(pipe, asks.due)
            slots.pause(pipe)
            self.go_on(slots.first(self.now))
        if pipe.queue and pipe.flying < pipe.window:
            pipe.sender.ready.setdefault(pipe)
            self.pump(pipe.sender)

    def go_on(self, pipe: Pipe | None) -> None:
        if pipe is not None:
            self.at(self.now, self.fill, pipe)

    def rouse(self, pipe: Pipe, due: float) -> None:
        if self.now < due < pipe.wakes:
            pipe.wakes = due
            self.at(due, self.wake, pipe, due)

    def wake(self, pipe: Pipe, due: float) -> None:
        if pipe.wakes == due:
            pipe.wakes = math.inf
            self.fill(pipe)

    def pump(self, node: Node) -> None:
        """Send a chunk, of each ready pipe in turn."""
        if node.sending or not node.ready:
            return
        self.emit(next(iter(node.ready)))

    def emit(self, pipe: Pipe) -> None:
        node = pipe.sender
        node.sending = True
        seconds = self.lengths[pipe.queue[0]] / node.nature.up
        node.busy += seconds
        self.at(self.now + seconds, self.sent, pipe)

    def sent(self, pipe: Pipe) -> None:
        node = pipe.sender
        node.sending = False
        if pipe.live:
            node.ready.pop(pipe)
            index = pipe.queue.popleft()
            size = self.lengths[index]
            pipe.queued -= size
            pipe.slots.update(pipe, pipe.queued, self.now)
            pipe.flying += size
            node.sent += size
            good = not node.nature.lies or self.rng.random() >= node.nature.lies
            self.land(pipe, index, good)
            notes, pipe.notes = pipe.notes, []
            for do, args in notes:
                self.carry(pipe, do, args)
            self.fill(pipe)
        self.pump(node)

    def land(self, pipe: Pipe, index: int, good: bool) -> None:
        """A chunk that has left gets to the receiver's downlink."""
        receiver = pipe.receiver
        free = max(self.now + pipe.sender.nature.latency + receiver.nature.latency, receiver.down_free)
        receiver.down_free = free + self.lengths[index] / receiver.nature.down
        self.at(self.there(pipe, receiver.down_free), self.arrived, pipe, index, good)

    def arrived(self, pipe: Pipe, index: int, good: bool) -> None:
        node, sender, size = pipe.receiver, pipe.sender.name, self.lengths[index]
        if not (pipe.live and node.up):
            return
        pipe.flying -= size
        self.fill(pipe)
        if node.swarm is None:
            return
        self.note(node.name, sender, index, good)
        if not good:
            node.spoilt += size
            node.bad_from[sender] += 1
            self.hear(node, Rejected(sender, index))
            return
        if node.have[index]:
            node.doubled += size
        else:
            node.have[index] = 1
            node.untold.append(index)
            if len(node.untold) == 1:
                self.at(self.now + self.announce, self.tell, node)
        self.hear(node, Arrived(sender, index, size))

    def note(self, *facts: object) -> None:
        self._digest.update(repr((self.now, *facts)).encode())
