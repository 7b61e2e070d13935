"""Measure the bulk plane: one seeder process, N fetcher processes, loopback, the real stack.

    python -m bench plane [--gib 1] [--fetchers 1 4]

The disk has chunks of 256 KiB that compress about three times.  Prints wall seconds, CPU
seconds per GiB of disk and fetcher at each end (and what of it is the kernel's, and the main threads'),
peak memory, and where the bytes came from.
CPU is counted from the moment everything is imported and listening.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import structlog
import trio

from bench.nowhere import Nowhere
from p2pgrid.dht.manifest import (
    CHUNK_SIZE,
    PAGE_SPAN,
    Content,
    Disk,
    Guest,
    Pack,
    Recipe,
    encode_frames,
    encode_page,
    paged_segments,
    signed,
)
from p2pgrid.dht.store import Store
from p2pgrid.ids import Cid, digest

FRAME = CHUNK_SIZE // 3


def make(store: Store, chunks: int) -> Cid:
    """A disk whose frames are noise: nothing between store and store ever looks inside."""
    from nacl.signing import SigningKey

    key = SigningKey(bytes(32))
    rng = random.Random(chunks)
    sizes = [FRAME + rng.randrange(-20000, 20000) for _ in range(chunks)]
    with store.staging() as staged:
        digests = []
        with (staged / "frames").open("wb") as file:
            for size in sizes:
                frame = rng.randbytes(size)
                digests.append(digest(frame))
                file.write(frame)
        names = [digest(d) for d in digests]
        spans = range(0, chunks, PAGE_SPAN)
        pages = tuple(store.put_object(encode_page(names[i : i + PAGE_SPAN]) or b"") for i in spans)
        content = store.put_object(Content(chunks * CHUNK_SIZE, CHUNK_SIZE, pages).encode())
        lists = tuple(
            store.put_object(encode_frames(sizes[i : i + PAGE_SPAN], digests[i : i + PAGE_SPAN]))
            for i in spans
        )
        pack = store.put_object(signed(Pack(content, chunks, lists, b""), key).encode())
        segments = tuple(store.put_object(p) for p in paged_segments([Guest(0, chunks * CHUNK_SIZE)]))
        recipe = store.put_object(Recipe("raw", True, chunks * CHUNK_SIZE, segments).encode())
        datum = store.put_object(signed(Disk(content, pack, recipe, b""), key).encode())
        store.adopt(datum, staged)
    return datum


async def node(root: Path, place: int, chunks: int) -> None:
    """One process: says where it is, waits for a line (the peers to know), works, says how it went."""
    from p2pgrid.hole_punch.host import open_host
    from p2pgrid.transfer.exchange import open_exchange

    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # what is said is JSON
    with Store(root / str(place)) as store:
        datum = make(store, chunks) if place == 0 else None
        seed = digest(b"bench" + bytes([place]))
        async with (
            open_host(seed) as network,
            open_exchange(network, Nowhere(), store, [("127.0.0.1", 0)]) as exchange,
        ):
            say(me=network.me, addresses=list(network.addresses), datum=str(datum))
            told = json.loads(await trio.to_thread.run_sync(sys.stdin.readline))
            network.learn(told["me"], told["addresses"])
            wall, before = time.monotonic(), spent()
            origins: dict[str, int] = {}
            if place:
                fetched = await exchange.fetch(Cid.parse(told["datum"]), [told["me"]])
                origins = {str(peer): count for peer, count in fetched.bytes_by_peer.items()}
                say(wall=time.monotonic() - wall)
            await trio.to_thread.run_sync(sys.stdin.readline)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            cpu, system, main = (now - then for now, then in zip(spent(), before, strict=True))
            say(cpu=cpu, system=system, main=main, peak=peak, origins=origins)


def spent() -> tuple[float, float, float]:
    """CPU seconds of this process so far: in all, in the kernel, and of this thread, which runs trio."""
    return time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_stime, time.thread_time()


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def run(fetchers: int, gib: float) -> None:
    chunks = int(gib * (1 << 30)) // CHUNK_SIZE
    given = ["--chunks", str(chunks)]
    with tempfile.TemporaryDirectory(prefix="p2pgrid-bench-") as root:
        nodes = [
            subprocess.Popen(
                [sys.executable, "-m", "bench", "plane", "--node", str(place), "--root", root, *given],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for place in range(fetchers + 1)
        ]

        def hear(process: subprocess.Popen[str]) -> dict[str, Any]:
            assert process.stdout is not None
            return json.loads(process.stdout.readline())

        def tell(process: subprocess.Popen[str], line: str) -> None:
            assert process.stdin is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()

        putter, *_ = [hear(process) for process in nodes]
        for process in nodes:
            tell(process, json.dumps(putter))
        walls = [hear(process)["wall"] for process in nodes[1:]]
        for process in nodes:
            tell(process, "")
        ends = [hear(process) for process in nodes]
        for process in nodes:
            process.communicate()
        wire = sum(sum(e["origins"].values()) for e in ends)
        direct = sum(e["origins"].get(putter["me"], 0) for e in ends)
        seeding, fetching = ends[0]["cpu"], sum(e["cpu"] for e in ends[1:])
        say(
            fetchers=fetchers,
            gib=gib,
            wall=[round(w, 2) for w in walls],
            cpu_s_per_gib=round((seeding + fetching) / gib / fetchers, 2),
            seeder=round(seeding / gib / fetchers, 2),
            fetcher=round(fetching / gib / fetchers, 2),
            system=round(sum(e["system"] for e in ends) / gib / fetchers, 2),
            main=round(sum(e["main"] for e in ends) / gib / fetchers, 2),
            peak_mib=[e["peak"] for e in ends],
            wire_mib=wire >> 20,
            from_putter=round(direct / wire, 2),
        )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--gib", type=float, default=1.0)
    arguments.add_argument("--fetchers", type=int, nargs="+", default=[1, 4])
    arguments.add_argument("--node", type=int)
    arguments.add_argument("--root", type=Path)
    arguments.add_argument("--chunks", type=int)
    given = arguments.parse_args()
    if given.node is not None:
        trio.run(node, given.root, given.node, given.chunks)
    else:
        for fetchers in given.fetchers:
            run(fetchers, given.gib)


if __name__ == "__main__":
    main()
