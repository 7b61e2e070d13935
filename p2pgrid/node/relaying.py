"""Relay for others as far as the owner allows, and know whom to be reached through.

relay.json, the role, pauses ──> RelayService: open within limits, or closed and why ──> beats tell of it
orders tell of relays ─────────> Relays: two of them are held
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import structlog
import trio

from p2pgrid.hole_punch.path import from_multiaddr
from p2pgrid.hole_punch.relay.limits import Limits
from p2pgrid.hole_punch.relay.relaying import Relaying
from p2pgrid.ids import PeerId
from p2pgrid.node.api import Tell
from p2pgrid.node.node import Node
from p2pgrid.node.relay_prefs import RelayPrefs, number
from p2pgrid.scheduler import messages as m

log = structlog.get_logger(__name__)

LOOK = 1.0
"""Seconds between two looks at whether transfers are paused: it relays nothing then."""
OFF = "this node is no relay"


async def keep_relaying(node: Node) -> None:
    """Be a relay or not, as it is wanted, for ever.  Raises `Misconfigured` where that cannot be read."""
    assert node.relaying is not None
    node.relay_prefs = RelayPrefs.load(node.home)
    if node.grid == node.network.me:
        node.relaying.relays.want(0)  # members reach their coordinator, or there is no grid
    _learn(node, {node.grid: ()})  # until the coordinator tells of others
    done: object = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_tell_how_reached, node, node.relaying)
        while True:
            wanted = _wanted(node)
            if wanted != done:
                _apply(node, node.relaying, wanted)
                done = wanted
            await trio.sleep(LOOK)


async def _tell_how_reached(node: Node, relaying: Relaying) -> None:
    """Members hear at once through which relays this node is reached, not with the next beat."""
    while True:
        await relaying.relays.changed()
        node.tell()


def _wanted(node: Node) -> Limits | str:
    """Within which limits to relay, or why not."""
    if not node.relay_prefs.relays(coordinates=node.grid == node.network.me):
        return OFF
    paused = node.exchange.links.paused
    return f"paused: {paused}" if paused else node.relay_prefs.limits()


def _apply(node: Node, relaying: Relaying, wanted: Limits | str) -> None:
    if isinstance(wanted, str):
        relaying.service.close(wanted)
    else:
        relaying.service.open(wanted)
    relays = not isinstance(wanted, str)
    if relays != node.relays:
        log.info("relaying for others", on=relays, why="" if relays else wanted)
        node.relays = relays
        node.tell()


def relayed_at(node: Node) -> tuple[str, ...]:
    """What beats tell: where this node relays."""
    links = node.exchange.links
    mine = [address for address in links.addresses if from_multiaddr(address)]
    return tuple(mine[: m.ADDRESSES_MAX]) if node.relays else ()


def heed_relays(node: Node, orders: m.Orders) -> None:
    """Take in which relays there are; where none is told of, the coordinator's machine is one by default."""
    if node.relaying is not None:
        told = {PeerId(relay.peer): relay.addresses for relay in orders.relays}
        _learn(node, told or {node.grid: ()})


def _learn(node: Node, relays: Mapping[PeerId, Sequence[str]]) -> None:
    """Relays are observers, too: they can be asked at which address the link port is seen."""
    assert node.relaying is not None
    node.exchange.links.observers.update(set(relays) - {node.network.me})
    node.relaying.relays.learn(relays)


async def relay(node: Node, args: dict[str, Any], tell: Tell) -> Any:
    """Change what `args["changes"]` names, and tell all of it and what is relayed now.  Raises `Misused`."""
    assert node.relaying is not None
    if args["changes"]:
        changed = node.relay_prefs.changed(args["changes"])
        await trio.to_thread.run_sync(changed.save, node.home)
        node.relay_prefs = changed
        _apply(node, node.relaying, _wanted(node))
    state, relays, now = await node.relaying.service.look(), node.relaying.relays, trio.current_time()
    limits = state.limits
    return {
        "on": not state.closed,
        "why": state.closed,
        "wanted": node.relay_prefs.wanted,
        "limits": {
            "rate": number(limits.rate),
            "rate_each": number(limits.rate_each),
            "quota": limits.quota,
            "quota_each": limits.quota_each,
            "circuits": limits.circuits,
            "circuits_each": limits.circuits_each,
        },
        "reserved": list(state.reserved),
        "circuits": [{"caller": caller, "called": called} for caller, called in state.circuits],
        "bytes_today": state.bytes,
        "bytes": state.bytes_total,
        "refused": state.refused,
        "uses": [
            {"relay": relay, "address": held.circuit.address[0], "delay": held.delay}
            for relay, held in sorted(relays.held.items(), key=lambda row: row[1].delay)
        ],
        "lost": [
            {"relay": lost.relay, "peer": lost.peer, "why": lost.why, "age": now - lost.at}
            for lost in relays.lately
        ],
    }
