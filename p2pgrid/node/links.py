"""Tell a person how this node is linked: all links as they are, and one of them pinged.

A ping is a probe of the link itself, answered by the peer's link before anything that waits there: it tells
the way there, not how busy who is there is.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import trio

from p2pgrid.errors import GridError, Misused, NotFound, Unreachable
from p2pgrid.hole_punch.bulk import Link, Way
from p2pgrid.ids import PeerId
from p2pgrid.node.api import Tell
from p2pgrid.node.node import HINT_PATIENCE, Node
from p2pgrid.scheduler import messages as m

INTERVAL = 1.0
"""Seconds between two pings; a new path is pinged at once."""


def path(link: Link) -> dict[str, Any]:
    """By which way a link goes just now."""
    return {"way": link.way.value, "via": link.path.via, "near": link.near}


def rows(node: Node) -> list[dict[str, Any]]:
    """Every link there is, as `docs/reference/json.md` has it."""
    now = time.monotonic()
    return [
        {
            "peer": link.peer,
            **path(link),
            "connected": link.connected,
            "since": now - link.path.since,
            "sent": link.sent,
            "received": link.heard,
            "delay": link.delay,
        }
        for link in node.exchange.links.live()
    ]


async def ping(node: Node, args: dict[str, Any], tell: Tell) -> Any:
    """Ping a peer `count` times, or until its link goes through nobody else.

    Raises `Unreachable` where there is no link to be had, `NotFound`, `Misused`.
    """
    peer, name = await find(node, args["peer"])
    count, until_direct = int(args["count"]), bool(args["until_direct"])
    if count < 1:
        raise Misused(why="--count is at least 1")
    links, start = node.exchange.links, trio.current_time()
    await links.link(peer)
    told: list[dict[str, Any]] = []
    moved = trio.Event()

    def notice(link: Link) -> None:
        if link.peer == peer:
            moved.set()

    links.paths.append(notice)
    try:
        while len(told) < count and not (until_direct and told and _direct(told[-1])):
            if told:
                with trio.move_on_after(INTERVAL):
                    await moved.wait()
            moved = trio.Event()
            row: dict[str, Any] = {"number": len(told) + 1}
            try:
                seconds, link = await links.ping(peer)
                row |= {"seconds": seconds, **path(link), "why": ""}
            except Unreachable as silent:
                row |= {"seconds": None, "way": None, "via": None, "near": None, "why": silent.why}
            row["after"] = trio.current_time() - start
            told.append(row)
            await tell({"ping": row})
    finally:
        links.paths.remove(notice)
    return {"peer": peer, "name": name, **summary(told), "pings": told}


def summary(told: list[dict[str, Any]]) -> dict[str, Any]:
    """What the pings come to.  Pure."""
    delays = [row["seconds"] for row in told if row["seconds"] is not None]
    last = next((row for row in reversed(told) if row["way"] is not None), None)
    return {
        "answered": len(delays),
        "way": last["way"] if last else None,
        "via": last["via"] if last else None,
        "min": min(delays, default=None),
        "median": statistics.median(delays) if delays else None,
        "max": max(delays, default=None),
        "direct_after": next((row["after"] for row in told if _direct(row)), None),
    }


def _direct(row: dict[str, Any]) -> bool:
    """Whether nobody else passes on what travels."""
    return row["way"] is not None and Way(row["way"]) is not Way.RELAYED


async def find(node: Node, named: str) -> tuple[PeerId, str]:
    """The peer of that name or peer id, and its name.  Raises `NotFound`, `Misused`."""
    known: list[m.NodeView] = []
    trouble: GridError | None = None
    with trio.move_on_after(HINT_PATIENCE):
        try:
            known = await node.coordinator.nodes()
        except GridError as refused:  # it is away, or this node may not ask
            trouble = refused
    called = [view for view in known if named in (view.peer, view.name)]
    if len(called) > 1:
        raise Misused(why=f"{len(called)} nodes are called {named!r}; name one by its peer id")
    view = called[0] if called else None
    peer = PeerId(view.peer) if view is not None else _peer(node, named)
    if peer is None:
        why = f" (names are not known here: {trouble})" if trouble is not None else ""
        raise NotFound(what=f"a node {named!r}{why}")
    if peer == node.network.me:
        raise Misused(why="that is this node itself")
    if view is not None:
        node.exchange.learn(peer, view.addresses)
    return peer, view.name if view is not None else ""


def _peer(node: Node, named: str) -> PeerId | None:
    """The peer that `named` says by itself: its id, or what it is."""
    if named == "coordinator":
        return node.grid
    return PeerId(named) if len(named) == 52 and named.startswith("12D3KooW") else None
