"""Simulate sites: workers with a fast LAN each, and a thin line to everybody else.

What goes from one site to another passes the sender's line up and the receiver's line down, in order; a
connection across has not more than about `ACROSS` bytes under way, and less where a line is full.
Within a site only the network cards bound anything.  Everybody knows which of its links stay within its site.

The *ideal* is what the lines allow if bytes were a liquid: every site gets each byte across once,

    max(S / u(origin), S / d(line), (sites S - what lines up can carry meanwhile) / u(origin))
"""

from __future__ import annotations

import math

import attrs

from p2pgrid.transfer.swarm import Event, Joined
from tests.sim.swarm_world import MBIT, Nature, Node, Pipe, World

LAN = Nature(up=1000 * MBIT, down=1000 * MBIT, latency=0.0002)
FAR = 0.015
"""Seconds that a line adds to what passes it, one way."""
ACROSS = 64 << 10
BUFFER = 0.2
"""Seconds that wait in front of a line before its senders notice."""


@attrs.define(eq=False)
class Site:
    """Where some nodes are, and the line that they share."""

    up: float
    down: float
    up_free: float = 0.0
    down_free: float = 0.0
    came: int = 0
    """Bytes of chunks that crossed the line inwards."""
    went: int = 0


class Sites(World):
    """An origin at a place of its own, and `workers` at each of some sites."""

    def __init__(
        self,
        seed: int,
        size: int,
        *,
        sites: int = 2,
        workers: int = 8,
        origin: float = 100 * MBIT,
        up: float = 10 * MBIT,
        down: float = 50 * MBIT,
        lan: float = 1000 * MBIT,
        knows: bool = True,
    ) -> None:
        super().__init__(seed, [])
        while sum(self.lengths) < size:
            self.lengths.append(self.rng.randrange(40 << 10, 120 << 10))
        """`knows`: whether nodes are told which peers are near."""
        self.knows = knows
        self.putter = Site(origin, origin)
        self.sites = [Site(up, down) for _ in range(sites)]
        self.site_of: dict[Node, Site] = {}
        self.origin = self.add("origin", LAN, whole=True)
        self.site_of[self.origin] = self.putter
        self.workers: list[Node] = []
        for number in range(sites * workers):
            node = self.add(f"w{number}", attrs.evolve(LAN, up=lan))
            self.site_of[node] = self.sites[number % sites]
            self.workers.append(node)
            self.at(self.rng.uniform(0, 0.05), self.arrive, node, self.origin)

    def near(self, a: Node, b: Node) -> bool:
        return self.site_of[a] is self.site_of[b]

    def link(self, a: Node, b: Node) -> None:
        super().link(a, b)
        for one, other in ((a, b), (b, a)):
            if (pipe := one.links.get(other.name)) and not self.near(a, b):
                pipe.window = ACROSS

    def hear(self, node: Node, event: Event) -> None:
        if isinstance(event, Joined) and self.knows:
            event = attrs.evolve(event, near=self.near(node, self.nodes[event.peer]))
        super().hear(node, event)

    def there(self, pipe: Pipe, time: float) -> float:
        far = 0.0 if self.near(pipe.sender, pipe.receiver) else 2 * FAR
        return super().there(pipe, time + far)

    def land(self, pipe: Pipe, index: int, good: bool) -> None:
        if self.near(pipe.sender, pipe.receiver):
            super().land(pipe, index, good)
            return
        here = self.site_of[pipe.sender]
        here.went += self.lengths[index]
        here.up_free = max(self.now, here.up_free) + self.lengths[index] / here.up
        self.at(here.up_free, self.enter, pipe, index, good)

    def enter(self, pipe: Pipe, index: int, good: bool) -> None:
        """A chunk has passed its sender's line."""
        there = self.site_of[pipe.receiver]
        there.came += self.lengths[index]
        there.down_free = max(self.now, there.down_free) + self.lengths[index] / there.down
        self.at(there.down_free, super().land, pipe, index, good)

    def pump(self, node: Node) -> None:
        """What goes across waits at its sender while there is `BUFFER` in front of it, as TCP sees to."""
        if node.sending:
            return
        again = math.inf
        for pipe in list(node.ready):
            here, there = self.site_of[pipe.sender], self.site_of[pipe.receiver]
            free = self.now if here is there else max(here.up_free, there.down_free) - BUFFER
            if free <= self.now:
                self.emit(pipe)
                return
            again = min(again, free)
        if again < math.inf:
            self.at(again + self.rng.uniform(0, BUFFER / 4), self.pump, node)

    def ideal(self) -> float:
        size, origin, count = sum(self.lengths), self.putter.up, len(self.sites)
        up, down = self.sites[0].up, self.sites[0].down
        return max(size / origin, size / down, count * size / (origin + count * up))

    def play(self, until: float = 600.0) -> float:
        """Seconds until the last is complete."""
        self.run(until, lambda: all(node.finished is not None for node in self.workers))
        assert all(node.finished is not None for node in self.workers)
        return max(node.finished or 0.0 for node in self.workers)

    def __str__(self) -> str:
        size = sum(self.lengths)
        lines = " ".join(f"{site.came / size:.3f}" for site in self.sites)
        last = max(node.finished or 0.0 for node in self.workers)
        twice = sum(n.doubled for n in self.workers) / size / len(self.workers)
        return (
            f"last {last:.1f} s = {last / self.ideal():.2f} x the ideal, over the lines {lines} copies, "
            f"origin sent {self.origin.sent / size:.2f}, {twice:.1%} came twice"
        )
