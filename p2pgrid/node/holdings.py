"""Keep the coordinator told of what is here, and here what it wishes.

One story for every node: beat, do what the answer says, beat again when there is news or
the interval is over.  While the coordinator is away everything else goes on, and the beats
are tried again at growing intervals.
"""

from __future__ import annotations

import os

import psutil
import structlog
import trio

from p2pgrid.dht.store import Held
from p2pgrid.errors import GridError, NoSpace
from p2pgrid.node.node import STALL_PATIENCE, Node
from p2pgrid.node.patience import RETRY_MAX, RETRY_MIN, backoff
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.job import Gone

log = structlog.get_logger()

FETCHES = 4
"""Data fetched at the same time because of orders."""


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
            for task in orders.stop:
                if task in node.running:
                    node.running[task].scope.cancel()
            for datum in orders.drop:
                await node.drop(datum)
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
    held = await trio.to_thread.run_sync(node.store.held)
    total = capacity(node)
    return m.Beat(
        holds=tuple(str(h.datum) for h in held if h.chunks == h.chunks_total),
        partial=tuple(m.Holding(str(h.datum), _missing(h)) for h in held if h.chunks < h.chunks_total),
        total=total,
        free=free(node, total),
        shares=node.config.shares,
        addresses=tuple(node.network.addresses)[: m.ADDRESSES_MAX],
        status="; ".join(f"{r.task}: {r.note}" for r in node.running.values())[:200],
        patience=min(patience, m.PATIENCE_MAX),
    )


def _missing(held: Held) -> int:
    """Bytes still to come, from the share of chunks that is here."""
    return held.bytes * (held.chunks_total - held.chunks) // max(1, held.chunks)


def capacity(node: Node) -> m.Capacity:
    """What this node would offer when idle; nothing where it is no worker."""
    if "worker" not in node.roles:
        return m.Capacity()
    return m.Capacity(
        slots=node.config.slots,
        memory=psutil.virtual_memory().total // 2,
        cpus=os.cpu_count() or 1,
        disk=psutil.disk_usage(str(node.home)).free,
    )


def free(node: Node, total: m.Capacity) -> m.Capacity:
    """`total` less the leases under way."""
    slots = max(0, total.slots - len(node.running))
    memory = min(total.memory, psutil.virtual_memory().available) if slots else 0
    return m.Capacity(slots=slots, memory=memory, cpus=total.cpus if slots else 0, disk=total.disk)


async def _bring(node: Node, wanted: m.Wanted, slots: trio.CapacityLimiter) -> None:
    """Fetch what was ordered; a result is acknowledged once it is whole."""
    try:
        async with slots:
            if not node.complete(wanted.datum):
                await node.fetch(wanted.datum, wanted.peers, patience=STALL_PATIENCE)
            if wanted.reason == "result":
                await node.coordinator.collect(wanted.task, wanted.epoch)
    except Gone:
        pass  # another epoch of that task counts now
    except NoSpace as full:
        log.error("no room for a datum that was ordered", datum=wanted.datum, why=str(full))
        await trio.sleep(RETRY_MAX)
    except GridError as failed:
        log.warning("could not bring a datum; it will be ordered again", datum=wanted.datum, why=str(failed))
        await trio.sleep(RETRY_MIN)
    finally:
        node.fetching.discard(wanted.datum)
        node.tell()
