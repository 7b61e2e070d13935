"""Measure how much memory a disk takes in a node, however many chunks it has.

    python -m bench memory [--chunks 409600] [--seconds 20] [--what holds updated fetches puts]

The disk is signed and complete, but its frames are zeros of about 1 KiB in a sparse file, so 100 GiB of
data (409,600 chunks) take no room.  Each row is a process with all that a node imports, with host and
exchange open:

empty      holds nothing
holds      has the disk complete, and is asked for it
updated    has a second version besides, a delta with one chunk in a hundred of its own
fetches    gets the first one from there; cut off after `--seconds`
puts       reads, names, squeezes and signs chunks that are nearly empty (a minute of CPU)

RSS at the end and the most it ever was, in MiB; what is more than in `empty` is the disk's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import structlog
import trio

from bench.exchange import say
from bench.grid import report
from bench.nowhere import Nowhere
from p2pgrid.dht.manifest import (
    CHUNK_SIZE,
    PAGE_SPAN,
    Content,
    Delta,
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

Row = dict[str, Any]

SHORTEST, SPREAD = 800, 400
"""Bytes of a frame."""


def make(store: Store, chunks: int, old: Cid | None = None) -> Cid:
    """A disk of so many chunks, all different, complete in `store`; its frames are zeros.

    With `old`, it is a delta on that disk.
    """
    from nacl.signing import SigningKey

    key, size = SigningKey(bytes(32)), chunks * CHUNK_SIZE
    zeros = [b"", *(digest(bytes(length)) for length in range(1, SHORTEST + SPREAD))]
    pages, lists = [], []
    for first in range(0, chunks, PAGE_SPAN):
        names, lengths = [], []
        for index in range(first, min(first + PAGE_SPAN, chunks)):
            own = old is None or index % 100 == 0
            names.append(digest(b"%d of version %d" % (index, own and old is not None)))
            lengths.append(SHORTEST + index * 7919 % SPREAD if own else 0)
        pages.append(store.put_object(encode_page(names) or b""))
        lists.append(store.put_object(encode_frames(lengths, [zeros[length] for length in lengths])))
    content = store.put_object(Content(size, CHUNK_SIZE, tuple(pages)).encode())
    made: Pack | Delta = Pack(content, chunks, tuple(lists), b"")
    if old is not None:
        before = Disk.decode(store.get_object(old))
        made = Delta(content, before.content, before.pack, chunks, tuple(lists), b"")
    pack = store.put_object(signed(made, key).encode())
    segments = tuple(store.put_object(page) for page in paged_segments([Guest(0, size)]))
    recipe = store.put_object(Recipe("raw", True, size, segments).encode())
    datum = store.put_object(signed(Disk(content, pack, recipe, b""), key).encode())
    with store.staging() as staged:
        store.adopt(datum, staged)
    return datum


# --- one node ----------------------------------------------------------------------------


async def node(given: argparse.Namespace) -> None:
    """Says where it is, reads whom to know, works for so long, and says what it took."""
    from p2pgrid.node import daemon

    daemon._stay_small()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # what is said is JSON
    root = given.root / given.node
    with Store(root) as store:
        async with _exchange(store, given.node) as (network, exchange):
            held = store.held()
            say(me=network.me, addresses=list(network.addresses))
            told = json.loads(await trio.to_thread.run_sync(sys.stdin.readline))
            done = 0
            if given.node == "fetches":
                network.learn(told["me"], told["addresses"])
                with trio.move_on_after(given.seconds):
                    await exchange.fetch(Cid.parse(told["datum"]), [told["me"]])
                done = sum(one.chunks for one in await trio.to_thread.run_sync(store.held))
            elif given.node == "puts":
                done = await trio.to_thread.run_sync(_put, store, given.chunks)
            say(chunks=done or sum(one.chunks for one in held), peak=memory("VmHWM"), rss=memory("VmRSS"))


@asynccontextmanager
async def _exchange(store: Store, name: str) -> AsyncIterator[Any]:
    from p2pgrid.hole_punch.host import open_host
    from p2pgrid.transfer.exchange import open_exchange

    async with (
        open_host(digest(name.encode())) as network,
        open_exchange(network, Nowhere(), store, [("127.0.0.1", 0)]) as exchange,
    ):
        yield network, exchange


def _put(store: Store, chunks: int) -> int:
    """What `publish_disk` does with a disk of which nothing is known."""
    from nacl.signing import SigningKey

    from p2pgrid.dht.press import full_coding, press

    def read(offset: int, view: memoryview) -> None:
        view[:8] = (offset + 1).to_bytes(8, "big")

    key = SigningKey(bytes(range(32)))
    with store.staging() as staged:
        coding = full_coding(store, key)
        pressed = press(store, chunks * CHUNK_SIZE, range(chunks), read, coding, staged)
        recipe = store.put_object(Recipe("raw", False, chunks * CHUNK_SIZE, ()).encode())
        disk = signed(Disk(pressed.content, pressed.pack, recipe, b""), key)
        store.adopt(store.put_object(disk.encode()), pressed.staged)
    return pressed.chunks


def memory(field: str) -> int:
    """MiB of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) >> 10


# --- all of them -------------------------------------------------------------------------


def run(given: argparse.Namespace, folder: Path) -> None:
    """One node after the other; who fetches does so from one that holds."""
    with Store(folder / "holds") as store:
        datum = make(store, given.chunks)
    if "updated" in given.what:
        with Store(folder / "updated") as store:
            make(store, given.chunks, make(store, given.chunks))
    report(f"{'':10} {'chunks':>8} {'peak':>6} {'RSS':>6}   above empty")
    empty: dict[str, int] | None = None
    for what in ("empty", *given.what):
        for name, row in (_fetched if what == "fetches" else _alone)(given, folder, what, str(datum)):
            empty = empty or row
            more = {f"{key}_more": row[key] - empty[key] for key in ("peak", "rss")}
            report(f"{name:10} {row['chunks']:>8} {row['peak']:>6} {row['rss']:>6}"
                   f"   {more['peak_more']:>+5} {more['rss_more']:>+5}")  # fmt: skip
            say(bench="memory", what=name, **row, **more)


def _alone(given: argparse.Namespace, folder: Path, what: str, datum: str) -> Iterator[tuple[str, Row]]:
    with _Process(given, folder, what) as process:
        process.hear()
        process.tell("{}")
        yield what, process.hear()


def _fetched(given: argparse.Namespace, folder: Path, what: str, datum: str) -> Iterator[tuple[str, Row]]:
    with _Process(given, folder, "holds") as holder, _Process(given, folder, what) as other:
        about = holder.hear()
        other.hear()
        other.tell(json.dumps({**about, "datum": datum}))
        yield what, other.hear()
        holder.tell("{}")
        yield "is asked", holder.hear()


class _Process:
    """A node; ended when it is left."""

    def __init__(self, given: argparse.Namespace, folder: Path, what: str) -> None:
        numbers = ["--chunks", str(given.chunks), "--seconds", str(given.seconds)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench", "memory", "--node", what, "--root", folder, *numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line: dict[str, Any] = json.loads(self._process.stdout.readline())
        return line

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--chunks", type=int, default=409_600)
    arguments.add_argument("--seconds", type=float, default=20.0)
    arguments.add_argument("--what", nargs="+", default=["holds", "updated", "fetches", "puts"])
    arguments.add_argument("--node")
    arguments.add_argument("--root", type=Path)
    given = arguments.parse_args()
    if given.node is not None:
        trio.run(partial(node, given))
        return
    with tempfile.TemporaryDirectory(prefix="p2pgrid-bench-") as folder:
        run(given, Path(folder))


if __name__ == "__main__":
    main()
