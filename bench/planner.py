"""Measure what one decision of the swarm costs, for few and many chunks and peers.

    python -m bench planner [--json]

Every peer has a random half of the chunks and tells of more as time goes on; one has all.
A *decision* is the step for one chunk that arrived, which asks for the next; *told* is the
step for one chunk that a peer tells of, *joined* the one for a peer's whole bitmap.
CPU time of this process; the table goes to stderr, with `--json` lines go to stdout.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import deque

from p2pgrid.transfer.swarm import Arrived, Ask, Joined, Swarm, Told

CHUNKS = (1_000, 10_000, 100_000, 1_000_000)
PEERS = (8, 64, 200)
DECISIONS = 20_000
SIZE = 96 << 10


def measure(chunks: int, peers: int) -> dict[str, float]:
    rng = random.Random(1)
    swarm = Swarm([SIZE] * chunks, b"", rng)
    queue: deque[tuple[str, int]] = deque()
    now = 0.0
    spent = dict.fromkeys(("joined", "told", "decision"), 0.0)
    count = dict.fromkeys(spent, 0)

    def step(kind: str, event) -> None:
        started = time.process_time()
        effects = swarm.step(event, now)
        spent[kind] += time.process_time() - started
        count[kind] += 1
        for effect in effects:
            if isinstance(effect, Ask):
                queue.extend((effect.peer, index) for index in effect.indices)

    size = -(-chunks // 8)
    for number in range(peers):
        step("joined", Joined(f"peer{number}", b"\xff" * size if not number else rng.randbytes(size)))
    while queue and count["decision"] < DECISIONS:
        now += 0.0002
        peer, index = queue.popleft()
        step("decision", Arrived(peer, index, SIZE))
        step("told", Told(f"peer{rng.randrange(1, peers)}", (rng.randrange(chunks),)))
    return {kind: 1e6 * spent[kind] / count[kind] for kind in spent}


def main() -> None:
    as_json = "--json" in sys.argv
    print(f"{'chunks':>9} {'peers':>5} {'decision µs':>12} {'told µs':>8} {'joined µs':>10}", file=sys.stderr)
    for chunks in CHUNKS:
        for peers in PEERS:
            cost = measure(chunks, peers)
            decision, told, joined = cost["decision"], cost["told"], cost["joined"]
            print(f"{chunks:>9} {peers:>5} {decision:>12.1f} {told:>8.1f} {joined:>10.0f}", file=sys.stderr)
            if as_json:
                row = {"bench": "planner", "chunks": chunks, "peers": peers, **cost}
                print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}))


if __name__ == "__main__":
    main()
