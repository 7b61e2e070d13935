"""Simulate many workers at home: uplinks of 5 to 50 Mbit/s, downlinks of 4 to 10 times that, who come and go.

A disk of 430 MB is `CHUNKS` chunks here, each standing for a run of frames: what peers say goes between
frames.  Everybody has up to `NEIGHBOURS` links, the origin as many as `Guests` lets in; who finds no room
there has what others have.  A worker is up for half an hour in the mean (exponential); who leaves is replaced
at once by a newcomer who has nothing, so that N are up at any time.  Three in ten leave without a word.

The *fluid limit* is what N workers who stay would need if bytes were a liquid (Kumar and Ross, 2006):

    max(S / u(origin), S / min d(i), N S / (u(origin) + sum u(i)))

with the uplinks and downlinks of those that were there at the beginning.  What leavers take away and
what newcomers need is not in it.  Times are those of the first N that stay, and count from the beginning.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import attrs

from p2pgrid.ids import PeerId
from p2pgrid.transfer.guests import Guests
from p2pgrid.transfer.swarm import Told
from tests.sim.swarm_world import MBIT, Nature, Node, Pipe, World

SIZE = 430 << 20
CHUNKS = 300
FRAME = 90 << 10
NEIGHBOURS = 40
UP_MEAN = 1800.0
TELL = 5.0
SILENT = 0.3
"""The share of leavers who say nothing."""


@attrs.frozen
class Times:
    """Seconds until those who stayed were complete."""

    workers: int
    limit: float
    median: float
    p99: float
    last: float
    copies: float
    doubled: float
    left: int

    @property
    def efficiency(self) -> float:
        return self.limit / self.last

    def __str__(self) -> str:
        return (
            f"{self.workers} workers, {self.left} left: fluid limit {self.limit:.0f} s, "
            f"median {self.median:.0f} s, p99 {self.p99:.0f} s, last {self.last:.0f} s = "
            f"{self.last / self.limit:.2f} x the limit (efficiency {self.efficiency:.0%}), "
            f"origin sent {self.copies:.2f} copies, {self.doubled:.1%} came twice"
        )


class Homes(World):
    """N workers, and an origin of 100 Mbit/s."""

    def __init__(
        self, seed: int, workers: int, *, chunks: int = CHUNKS, size: int = SIZE, churn: bool = True
    ) -> None:
        super().__init__(
            seed,
            [size // chunks] * chunks,
            window=size // chunks + 1,
            gather=0.1,
            check_every=1 << 62,
        )
        self.churn = churn
        self.number = 0
        self.left = 0
        self.here: list[Node] = []
        self.guests: Guests[Node] = Guests()
        self.origin = self.add("origin", Nature(up=100 * MBIT, down=100 * MBIT), whole=True)
        self.first = [self.come() for _ in range(workers)]

    def come(self) -> Node:
        self.number += 1
        up = self.rng.uniform(5, 50)
        down = up * self.rng.uniform(4, 10)
        latency = self.rng.uniform(0.005, 0.03)
        node = self.add(f"w{self.number}", Nature(up=up * MBIT, down=down * MBIT, latency=latency))
        node.arrived = self.now
        self.at(self.now + self.rng.uniform(0.05, 0.3), self.meet, node)
        if self.churn:
            self.at(self.now + self.rng.expovariate(1 / UP_MEAN), self.go, node)
        return node

    def go(self, node: Node) -> None:
        self.left += 1
        if node in self.here:  # else it leaves before it has met anybody
            self.here.remove(node)
        if self.rng.random() < SILENT:
            self.lose(node)
        else:
            self.leave(node)
        self.come()

    def meet(self, node: Node) -> None:
        """Link to the origin, if it has room, and to some of the others; to more where links are lost."""
        if not node.up:
            return
        if node not in self.here:
            self.here.append(node)
        enters, leaves = self.guests.knock(node, self.now)
        if leaves is not None:
            self.unlink(leaves, self.origin)
        if enters:
            self.link(node, self.origin)
        tries = 0
        while len(node.links) < NEIGHBOURS // 2 and tries < 4 * NEIGHBOURS:
            tries += 1
            other = self.rng.choice(self.here)
            if other is not node and len(other.links) < NEIGHBOURS:
                self.link(node, other)
        if node.swarm is not None and not node.swarm.complete:
            self.at(self.now + 3.0, self.meet, node)

    def say(self, pipe: Pipe, do, *args) -> None:  # type: ignore[no-untyped-def]
        """Messages go between the frames of a chunk."""
        delay = FRAME / pipe.sender.nature.up if pipe.queue else 0.0
        pipe.until = max(pipe.until, self.now + delay)
        self.carry(pipe, do, args)

    def there(self, pipe: Pipe, time: float) -> float:
        """Chunks do not hold up messages."""
        return max(time, self.now + pipe.sender.nature.latency + pipe.receiver.nature.latency)

    def tell(self, node: Node) -> None:
        told, node.untold = node.untold, []
        delay = node.nature.latency + 0.02 + (FRAME / node.nature.up if node.sending else 0.0)
        self.at(self.now + delay, self.spread, node, told)

    def spread(self, node: Node, told: list[int]) -> None:
        """News reach all neighbours at once: one entry of the agenda, not forty."""
        if not node.up:
            return
        for pipe in node.links.values():
            peer = pipe.receiver
            if peer.swarm is not None and not peer.swarm.complete:
                news = [index for index in told if not peer.have[index]]
                if news:
                    self.hear(peer, Told(node.name, news))

    def unlink(self, a: Node, b: Node) -> None:
        super().unlink(a, b)
        if b is self.origin:
            self.guests.leave(a)

    def note(self, *facts: object) -> None:
        """No trace: there are millions of them.  Who is complete is no guest any more."""
        if facts[0] == "done":
            self.guests.leave(self.nodes[PeerId(str(facts[1]))])

    def so_far(self, waiting: int) -> str:
        times = sorted(node.finished for node in self.first if node.finished is not None)
        held = sum(node.have.count(1) for node in self.first) / len(self.lengths) / len(self.first)
        row = f"at {self.now:.0f} s: {held:.1%} held, {len(times)} complete, {waiting} not yet"
        for name, share in (("p50", 0.5), ("p99", 0.99)):  # of those that stay: the others count no more
            place = int((len(times) + waiting) * share)
            row += f", {name} {times[place]:.0f} s" if place < len(times) else ""
        copies = self.origin.sent / sum(self.lengths)
        return f"{row}; {self.now / self.limit():.2f} x the limit, origin sent {copies:.2f} copies"

    def limit(self) -> float:
        size, count = sum(self.lengths), len(self.first)
        up = self.origin.nature.up
        return max(
            size / up,
            size / min(node.nature.down for node in self.first),
            count * size / (up + sum(node.nature.up for node in self.first)),
        )

    def play(self, until: float = 3600.0, progress: Callable[[str], None] = lambda line: None) -> Times:
        """Until all are complete that stay; a line of `progress` every `TELL` simulated seconds."""
        waiting = set(self.first)

        def done() -> bool:
            if self.now < self._look_at:
                return False
            self._look_at = self.now + 1.0
            waiting.difference_update([n for n in waiting if n.finished is not None or not n.up])
            if self.now >= self._tell_at:
                self._tell_at += TELL
                progress(self.so_far(len(waiting)))
            return not waiting

        self._look_at = self._tell_at = 0.0
        self.run(until, done)
        stayed = [node for node in self.first if node.finished is not None]
        times = sorted(node.finished or math.inf for node in stayed)
        assert not waiting, f"{len(waiting)} did not finish"
        size = sum(self.lengths)
        return Times(
            workers=len(self.first),
            limit=self.limit(),
            median=times[len(times) // 2],
            p99=times[int(len(times) * 0.99)],
            last=times[-1],
            copies=self.origin.sent / size,
            doubled=sum(node.doubled for node in self.first) / size / len(self.first),
            left=self.left,
        )
