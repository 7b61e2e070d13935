"""Answer what a person asks about disks: put, get, list, show, verify, remove."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import trio

from p2pgrid.dht.drafting import Grown
from p2pgrid.dht.export import Exported, export_datum
from p2pgrid.dht.manifest import (
    CHUNK_SIZE,
    Content,
    Delta,
    Disk,
    Recipe,
    decode_pack,
    read_frames,
    read_layout,
)
from p2pgrid.dht.publish import AUTO, Auto, Published, publish_disk
from p2pgrid.dht.restore import restore_disk
from p2pgrid.dht.shelf import Shelf
from p2pgrid.errors import Conflict, GridError, NotAuthorised, NotFound, Refused
from p2pgrid.ids import Cid
from p2pgrid.node.api import Tell
from p2pgrid.node.drafts import telling
from p2pgrid.node.node import HINT_PATIENCE, STALL_PATIENCE, Node
from p2pgrid.node.patience import patiently
from p2pgrid.node.speed import Speed
from p2pgrid.scheduler import messages as m
from p2pgrid.transfer.exchange import Progress

REPAIR_PATIENCE = 30.0
"""Seconds to fetch again what was bad."""
NEWS_PERIOD = 0.2
"""Seconds between two progress events."""

Args = dict[str, Any]


class Ticker:
    """Carry progress from a thread (or a callback) to whoever asked, a few times a second.

    Events are those of `docs/reference/json.md`.  Leaving the block cancels the thread's work at
    its next report.
    """

    def __init__(self, tell: Tell, phase: str, unit: str = "bytes") -> None:
        self._tell = tell
        self._news: dict[str, Any] = {"phase": phase, "unit": unit, "done": 0, "total": 0, "note": ""}
        self._speed = Speed()
        self._moved = 0
        self._gone = threading.Event()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        self._moved = done
        self._news = self._news | {"done": done, "total": total, "note": note}
        if self._gone.is_set():
            raise Refused(why="whoever asked has gone")

    def fetched(self, progress: Progress) -> None:
        """The same for a fetch."""
        self(progress.bytes_done, progress.bytes_total)
        self._moved = progress.from_peers + progress.from_origins  # what was here is no speed
        self._news = self._news | {
            "sources": {
                "peers": progress.from_peers,
                "origins": progress.from_origins,
                "local": progress.local,
                "resumed": progress.resumed,
                "connected": progress.peers,
            },
            "stall": progress.stall,
            "stalled_for": round(progress.stalled_for, 1),
        }

    async def run(self, work: Callable[[], Any]) -> Any:
        """Run `work` in a thread, telling how far it is."""
        async with self.telling():
            try:
                result = await trio.to_thread.run_sync(work)
            except Refused:
                await trio.lowlevel.checkpoint_if_cancelled()  # it is ours then, and nobody waits for it
                raise
        return result

    @contextlib.asynccontextmanager
    async def telling(self) -> AsyncIterator[None]:
        """Tell how far it is before, while the block runs, and that it is done when it ends well."""
        await self._tell(self._event())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._report)
            yield
            nursery.cancel_scope.cancel()
        total = max(self._news["total"], 1)
        end = {"done": total, "total": total, "left": 0.0} | ({"stall": ""} if "stall" in self._news else {})
        await self._tell(self._event() | end)

    async def _report(self) -> None:
        try:
            while True:
                await self._tell(self._event())
                await trio.sleep(NEWS_PERIOD)
        finally:
            self._gone.set()

    def _event(self) -> dict[str, Any]:
        news, speed = self._news, self._speed
        if news["total"]:  # the clock does not run before it is known how much there is to do
            speed.note(trio.current_time(), self._moved, news["total"] - news["done"])
        left = None if news.get("stall") else speed.left
        return news | {"rate": round(speed.rate), "left": None if left is None else round(left, 1)}


async def put(node: Node, args: Args, tell: Tell) -> Any:
    """Cut a disk image into the store, make it known, and seed it."""
    if "submitter" not in node.roles:
        raise NotAuthorised(why="this node is no submitter")
    path = Path(args["path"])
    before = {str(h.datum) for h in await trio.to_thread.run_sync(node.store.held)}

    parent = await _parent(node, args.get("parent") or "auto", tell)

    async def publish(told: Callable[[Grown], None] | None = None) -> Published:
        ticker = Ticker(tell, "cutting")
        key, skip = node.identity.signing_key, bool(args.get("skip_free"))
        work = functools.partial(
            publish_disk, node.store, path, key, ticker, skip_free=skip, parent=parent, told=told
        )
        published: Published = await ticker.run(work)
        return published

    name = args.get("name") or path.name
    async with telling(node, args.get("replica", 1)) as drafts:
        done = await publish(drafts.told)
        disk = Disk.decode(node.store.get_object(done.datum))
        recipe = Recipe.decode(node.store.get_object(disk.recipe))
        record = m.DatumRecord(
            datum=str(done.datum),
            kind="disk",
            content=str(done.content),
            name=name,
            format=recipe.format,
            size=done.size,
            unique_bytes=done.unique_bytes,
            wire_bytes=done.wire_bytes,
            replica=args.get("replica", 1),
        )
        try:
            await patiently(lambda: node.coordinator.put(record, drafts.name))
            if not node.complete(record.datum):  # dropped by an order that was given before it was put again
                await publish()
                await patiently(lambda: node.coordinator.put(record))
        except (Conflict, NotAuthorised):
            if record.datum not in before:  # nobody is to know of it, so nobody will ever drop it
                await node.drop(record.datum)
            raise
    node.announce(record.datum)
    if args.get("wait"):
        await _until_placed(node, record, tell)
    exported = await _export(node, done.datum, args["export"], tell) if args.get("export") else {}
    return {
        "disk": record.datum,
        "content": record.content,
        "name": name,
        "size": done.size,
        "chunks": done.chunks,
        "holes": done.holes,
        "unique_bytes": done.unique_bytes,
        "wire_bytes": done.wire_bytes,
        "parent": str(done.parent) if done.parent else None,
        "delta_bytes": done.delta_bytes,
        "format": recipe.format,
        "exact": recipe.exact,
        "freed": recipe.freed,
        "seconds": done.seconds,
        **exported,
    }


async def export(node: Node, args: Args, tell: Tell) -> Any:
    """Write a disk as static files, fetching what is not here."""
    _, cid = await _here(node, args["disk"], tell, args.get("origins", ()))
    return {"disk": str(cid), **await _export(node, cid, args["out"], tell)}


async def _export(node: Node, cid: Cid, out: str, tell: Tell) -> dict[str, Any]:
    ticker = Ticker(tell, "exporting")
    done: Exported = await ticker.run(lambda: export_datum(node.store, cid, Path(out), ticker))
    return {
        "export": out,
        "objects": done.objects,
        "packs": done.packs,
        "export_bytes": done.bytes,
        "export_written": done.written,
    }


async def _parent(node: Node, which: str, tell: Tell) -> Cid | Auto | None:
    """The content to tell a new disk by; a disk that is told by another itself stands for that one."""
    match which:
        case "auto":
            return AUTO
        case "none":
            return None
        case _:
            shelf, _ = await _here(node, which, tell)
            return shelf.parts[0].layout.cid


async def _until_placed(node: Node, record: m.DatumRecord, tell: Tell) -> None:
    """Wait until as many nodes hold the disk as were wished for; say so where they are too few."""
    while True:
        view = await node.coordinator.datum(record.datum)
        workers = {n.peer for n in await node.coordinator.nodes() if n.online and "worker" in n.roles}
        wished = record.replica if record.replica >= 0 else len(workers)
        await tell({
            "phase": "placing",
            "done": min(view.owners_count, wished),
            "total": max(1, wished),
            "note": too_few(wished, len(workers | set(view.owners)), len(workers)),
        })  # fmt: skip
        if view.owners_count >= wished:
            return
        await trio.sleep(1)


def too_few(wished: int, able: int, workers: int) -> str:
    """What to say where `wished` copies cannot stand on the `able` nodes there are; else nothing."""
    if wished <= able:
        return ""
    online = f"{workers} worker{'' if workers == 1 else 's'} online"
    return f"{able} of {wished} copies are possible with {online}; waiting for more to join"


async def get(node: Node, args: Args, tell: Tell) -> Any:
    """Write a disk to a file, fetching what is not here."""
    shelf, cid = await _here(node, args["disk"], tell, args.get("origins", ()))
    out, ticker = Path(args["out"]), Ticker(tell, "writing")
    done = await ticker.run(lambda: restore_disk(node.store, cid, out, args.get("format"), ticker))
    return {
        "disk": str(cid),
        "path": str(out),
        "format": done.format,
        "exact": done.exact,
        "bytes": (await trio.Path(out).stat()).st_size,
        "size": shelf.layout.content.size,
    }


async def _here(node: Node, which: str, tell: Tell, origins: Sequence[str] = ()) -> tuple[Shelf, Cid]:
    """The disk's shelf, complete.  A CID needs no coordinator: the index finds who has it."""
    cid = await _cid(node, which)
    if not node.complete(str(cid)):
        await fetch(node, str(cid), tell, origins)
    return await trio.to_thread.run_sync(node.store.begin, cid), cid


async def fetch(node: Node, datum: str, tell: Tell, origins: Sequence[str] = ()) -> None:
    """Have `datum` complete here, telling how far it is."""
    ticker = Ticker(tell, "fetching")
    async with ticker.telling():
        known = await node.providers(datum)
        await node.fetch(datum, known, ticker.fetched, STALL_PATIENCE, origins=origins)


async def _cid(node: Node, which: str) -> Cid:
    try:
        return Cid.parse(which)
    except GridError:
        return Cid.parse((await node.resolve(which)).record.datum)


async def ls(node: Node, args: Args, tell: Tell) -> Any:
    """Every disk of the grid that this node may see, and how much of each is here."""
    held = {str(h.datum): h for h in await trio.to_thread.run_sync(node.store.held)}
    rows = []
    for view in await node.coordinator.data():
        record, here = view.record, held.get(view.record.datum)
        if record.kind == "disk":
            rows.append({
                "disk": record.datum,
                "content": record.content,
                "name": record.name,
                "size": record.size,
                "wire_bytes": record.wire_bytes,
                "holders": view.owners_count,
                "held": here.chunks if here else 0,
                "frames": here.chunks_total if here else 0,
            })  # fmt: skip
    return {"disks": rows}


async def show(node: Node, args: Args, tell: Tell) -> Any:
    """One disk: its chunks, and who holds it."""
    view = await node.resolve(args["disk"])
    cid = Cid.parse(view.record.datum)
    if not await trio.to_thread.run_sync(node.store.has_object, cid):
        return _brief(view)
    disk = Disk.decode(node.store.get_object(cid))
    content = Content.decode(node.store.get_object(disk.content))
    recipe = Recipe.decode(node.store.get_object(disk.recipe))
    layout = await trio.to_thread.run_sync(read_layout, disk.content, node.store.get_object)
    here = next((h for h in node.store.held() if h.datum == cid), None)
    names = {n.peer: n.name for n in await node.coordinator.nodes()}
    return {
        "disk": str(cid),
        "content": str(disk.content),
        "name": view.record.name,
        "size": content.size,
        "format": recipe.format,
        "exact": recipe.exact,
        "freed": recipe.freed,
        "chunk_size": content.chunk_size,
        "chunks": content.positions - layout.holes,
        "holes": layout.holes,
        "frames": here.chunks_total if here else len(layout.frames),
        "held": here.chunks if here else 0,
        **await trio.to_thread.run_sync(_lineage, node, disk),
        "wire_bytes": view.record.wire_bytes,
        "holders": [{"peer": p, "name": names.get(p, "")} for p in view.owners],
    }


def _lineage(node: Node, disk: Disk) -> dict[str, Any]:
    """What the disk is told by, and the bytes that takes."""
    delta = decode_pack(node.store.get_object(disk.pack))
    if not isinstance(delta, Delta):
        return {"parent": None, "delta_bytes": 0}
    frames = read_frames(delta, node.store.get_object)
    return {"parent": str(delta.parent), "delta_bytes": sum(frames.lengths)}


def _brief(view: m.DatumView) -> dict[str, Any]:
    """What the coordinator knows of a disk of which nothing is here."""
    record = view.record
    return {
        "disk": record.datum,
        "content": record.content,
        "name": record.name,
        "size": record.size,
        "format": record.format,
        "exact": None,
        "freed": None,
        "chunk_size": CHUNK_SIZE,
        "chunks": None,
        "holes": None,
        "frames": None,
        "held": 0,
        "parent": None,
        "delta_bytes": 0,
        "wire_bytes": record.wire_bytes,
        "holders": [{"peer": p, "name": ""} for p in view.owners],
    }


async def verify(node: Node, args: Args, tell: Tell) -> Any:
    """Hash every chunk of one datum, or of all that is held here; fetch what is bad again."""
    rows: list[dict[str, Any]] = []
    for cid, name in await _held(node, args["disk"]):
        shelf = await trio.to_thread.run_sync(node.store.begin, cid)
        bad: list[tuple[Shelf, int]] = []
        for part in shelf.parts:
            ticker = Ticker(tell, f"verifying {name}")
            bad += [(part, i) for i in await ticker.run(functools.partial(part.verify, ticker))]
        if bad and args.get("repair", True):
            await tell({"phase": "repairing", "done": 0, "total": len(bad)})
            with trio.move_on_after(REPAIR_PATIENCE):
                await node.fetch(str(cid), await node.providers(str(cid)))
            await tell({"phase": "repairing", "done": len(bad), "total": len(bad)})
        rows.append({
            "datum": str(cid),
            "name": name,
            "checked": sum(p.count - p.taken for p in shelf.parts) + sum(not p.holds(i) for p, i in bad),
            "bad": len(bad),
            "repaired": sum(part.holds(i) for part, i in bad),
        })  # fmt: skip
    totals = {key: sum(row[key] for row in rows) for key in ("checked", "bad", "repaired")}
    return {**totals, "data": rows}


async def _held(node: Node, which: str) -> list[tuple[Cid, str]]:
    """What is held here of `which` ("" for all), by CID and as people call it."""
    here = {str(h.datum): h.datum for h in await trio.to_thread.run_sync(node.store.held)}
    names: dict[str, str] = {}
    with trio.move_on_after(HINT_PATIENCE), contextlib.suppress(GridError):  # a worker is not told names
        names = {v.record.datum: v.record.name for v in await node.coordinator.data()}
    wanted = [str(await _cid(node, which))] if which else sorted(here)
    if which and wanted[0] not in here:
        raise NotFound(what=f"a chunk of {which} on this node")
    return [(here[datum], names.get(datum) or datum[:20] + "…") for datum in wanted]


async def rm(node: Node, args: Args, tell: Tell) -> Any:
    """Forget a disk: this node drops it now, the others when they next beat."""
    view = await node.resolve(args["disk"])
    await node.coordinator.forget(view.record.datum)
    await node.drop(view.record.datum)
    return {"disk": view.record.datum, "name": view.record.name}
