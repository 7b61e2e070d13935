"""Keep the coordinator told of what is here, and here what it wishes.

One story for every node: beat, do what the answer says, beat again when there is news or
the interval is over.  While the coordinator is away everything else goes on, and the beats
are tried again at growing intervals.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable
from itertools import islice

import psutil
import structlog
import trio

from p2pgrid.dht.files import free as disk_free
from p2pgrid.dht.manifest import Disk, Tree, decode_datum
from p2pgrid.dht.store import Held
from p2pgrid.errors import BadObject, GridError
from p2pgrid.ids import Cid
from p2pgrid.node.drafts import follow, let_go
from p2pgrid.node.membership import heed
from p2pgrid.node.node import STALL_PATIENCE, Node, Running, Trouble
from p2pgrid.node.patience import backoff, patiently
from p2pgrid.node.relaying import heed_relays, relayed_at
from p2pgrid.node.room import RESULT_MAX, offered, store_room
from p2pgrid.node.shortlist import Here, shortlist
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.job import Gone, Revoked

log = structlog.get_logger()

FETCHES = 4
"""Data fetched at the same time because of orders."""
PARTIAL_MAX, STATUS_MAX = 1024, 200
"""What a beat takes: data that are here in part, characters."""
BRING_MIN, BRING_MAX = 0.5, 300.0
"""Seconds between two tries to bring what was ordered: doubled from the one to the other."""


async def keep_holding(node: Node) -> None:
    """Beat for ever."""
    slots = trio.CapacityLimiter(FETCHES)
    failures, patience = 0, 0.0
    async with trio.open_nursery() as nursery:
        while True:
            try:
                orders = await _orders(node, patience)
            except GridError as away:  # it may also have dismissed us, and may think better of it
                if node.connected or not failures:
                    log.warning("no orders from the coordinator; going on without it", why=str(away))
                node.connected = False
                await trio.sleep(backoff(failures))
                failures += 1
                continue
            failures = 0
            if orders is None:
                continue
            node.connected, patience = True, orders.interval
            await heed(node, orders)
            heed_relays(node, orders)
            for task in orders.stop:
                if task in node.running:
                    node.running[task].scope.cancel()
            for datum in orders.drop:
                await _drop(node, datum)
            for datum in node.troubles.keys() - {w.datum for w in orders.hold} - node.fetching:
                del node.troubles[datum]
            await let_go(node, orders.hold)
            for wanted in orders.hold:
                if wanted.datum not in node.fetching:
                    node.fetching.add(wanted.datum)
                    nursery.start_soon(_bring, node, wanted, slots)


async def _orders(node: Node, patience: float) -> m.Orders | None:
    """Beat, and wait up to `patience` seconds for orders; None when there is news to beat again with."""
    orders: m.Orders | None = None
    away: GridError | None = None
    async with trio.open_nursery() as nursery:

        async def until_news() -> None:
            await node.news()
            nursery.cancel_scope.cancel()

        beat = await _beat(node, patience)
        nursery.start_soon(until_news)
        try:
            orders = await node.coordinator.beat(beat)
        except GridError as error:  # as itself, not in the nursery's group
            away = error
        nursery.cancel_scope.cancel()
    if away is not None:
        raise away
    return orders


async def _beat(node: Node, patience: float) -> m.Beat:
    node.reserved()
    total = capacity(node)
    complete, partial, cut = await trio.to_thread.run_sync(_held, node)
    return m.Beat(
        holds=complete,
        partial=partial,
        total=total,
        free=free(node, total),
        shares=node.config.shares,
        addresses=node.addresses,
        status=status(node.running.values(), node.troubles.values()),
        patience=min(patience, m.PATIENCE_MAX),
        cut=cut,
        relay=relayed_at(node),
    )


def status(running: Iterable[Running], troubles: Iterable[Trouble]) -> str:
    """One line for people: how the leases go, and what cannot be brought here."""
    words = [f"{lease.task}: {lease.note}" for lease in running]
    words += [f"{trouble.what} cannot be brought: {trouble.why}" for trouble in troubles]
    return "; ".join(words)[:STATUS_MAX]


def _held(node: Node) -> tuple[tuple[str, ...], tuple[m.Holding, ...], bool]:
    """What is complete here, and what is here in part, as far as a beat takes it; whether there is more."""
    held = node.store.held()
    partial = (m.Holding(str(h.datum), _missing(h)) for h in held if h.chunks < h.chunks_total)
    complete = [h for h in held if h.chunks == h.chunks_total]
    cut = len(complete) > m.HOLDS_MAX
    if not cut:
        names = tuple(str(h.datum) for h in complete)
    else:
        names = shortlist((_here(node, h.datum) for h in complete), m.HOLDS_MAX)
    return names, tuple(islice(partial, PARTIAL_MAX)), cut


def _here(node: Node, datum: Cid) -> Here:
    since = 0.0
    if datum not in node.kinds:
        with contextlib.suppress(GridError):
            node.kinds[datum] = type(decode_datum(node.store.get_object(datum)))
    with contextlib.suppress(OSError):
        since = (node.store.root / "datums" / str(datum)).stat().st_mtime
    return Here(str(datum), node.kinds.get(datum) is Disk, since)


def _missing(held: Held) -> int:
    """Bytes still to come, from the share of chunks that is here."""
    return held.bytes * (held.chunks_total - held.chunks) // max(1, held.chunks)


def capacity(node: Node) -> m.Capacity:
    """What this node would offer when idle; nothing where it is no worker."""
    if "worker" not in node.roles:
        return m.Capacity()
    drafts = (
        node.store.drafts.size()
    )  # their disks will have that room, and the coordinator counts those itself
    return m.Capacity(
        slots=node.config.slots,
        memory=psutil.virtual_memory().total // 2,
        cpus=os.cpu_count() or 1,
        disk=offered(psutil.disk_usage(str(node.home)).free, 0),
        store=store_room(node.config.quota, node.store.used() - drafts, disk_free(node.store.root) + drafts),
    )


def free(node: Node, total: m.Capacity) -> m.Capacity:
    """`total` less the leases under way."""
    slots = max(0, total.slots - len(node.running) - node.resting)
    memory = min(total.memory, psutil.virtual_memory().available) if slots else 0
    reserved = node.reserved()
    return m.Capacity(
        slots=slots,
        memory=memory,
        cpus=total.cpus if slots else 0,
        disk=max(0, total.disk - reserved),
        store=max(0, total.store - reserved),
    )


async def _drop(node: Node, datum: str) -> None:
    """Do as ordered; what a lease needs, or what cannot be dropped just now, is ordered again."""
    if any(datum in lease.data for lease in node.running.values()):
        return
    try:
        await node.drop(datum)
    except (GridError, OSError) as failed:
        log.warning("could not drop a datum; it will be ordered again", datum=datum, why=str(failed))


async def _bring(node: Node, wanted: m.Wanted, slots: trio.CapacityLimiter) -> None:
    """Fetch what was ordered; a result is acknowledged once it is whole, and a tree."""
    is_result = wanted.reason == "result"
    was_here = node.complete(wanted.datum)
    try:
        if wanted.kind == "draft":
            await follow(node, wanted)
            return
        async with slots:
            if not was_here:
                most = RESULT_MAX if is_result else None
                await node.fetch(wanted.datum, wanted.peers, patience=STALL_PATIENCE, most=most)
        if is_result:
            await trio.to_thread.run_sync(lambda: Tree.decode(node.store.get_object(Cid.parse(wanted.datum))))
            await patiently(lambda: node.coordinator.collect(wanted.task, wanted.epoch), math.inf)
        node.troubles.pop(wanted.datum, None)
    except (Gone, Revoked):
        node.troubles.pop(wanted.datum, None)  # another epoch of that task counts now
    except GridError as failed:
        if isinstance(failed, BadObject) and not was_here:
            await _drop(node, wanted.datum)  # it is not what it was said to be; the next one may be
        what = f"the result of {wanted.task}" if is_result else f"{wanted.kind} {wanted.datum[:12]}…"
        trouble = node.troubles.setdefault(wanted.datum, Trouble(what))
        trouble.why = str(failed)
        trouble.tries += 1
        log.warning("could not bring a datum; it will be ordered again", datum=wanted.datum, why=trouble.why)
        node.tell()
        await trio.sleep(pause(trouble.tries))
    finally:
        node.fetching.discard(wanted.datum)
        node.tell()


def pause(tries: int) -> float:
    """Seconds before a datum that did not come `tries` times is tried once more."""
    return min(BRING_MAX, BRING_MIN * 2.0 ** min(tries - 1, 20))
