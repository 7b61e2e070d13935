"""Keep what this node moves within what its owner allows, from moment to moment.

prefs.json ──> Prefs ─┐
clock, battery, meter ┴─> Limits ──> the links' rates
                      └─> why nothing may move ──> no links, until it is over
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import structlog
import trio

from p2pgrid.node.api import Tell
from p2pgrid.node.node import Node
from p2pgrid.node.power import on_battery, on_metered_network
from p2pgrid.node.prefs import Prefs, format_rate

log = structlog.get_logger(__name__)

LOOK = 10.0
"""Seconds between two looks at the clock, the battery and the network."""


async def keep_rules(node: Node) -> None:
    """Apply the owner's preferences, for ever.  Raises `Misconfigured` where they cannot be read."""
    node.prefs = Prefs.load(node.home)
    while True:
        await apply(node)
        await trio.sleep(LOOK)


async def apply(node: Node) -> None:
    """Have the links keep what holds now."""
    battery = await trio.to_thread.run_sync(on_battery)
    metered = await trio.to_thread.run_sync(on_metered_network)
    limits = node.prefs.limits(datetime.now(), battery=battery, metered=metered)
    links = node.exchange.links
    paused = limits if isinstance(limits, str) else ""
    if paused != links.paused:
        log.info("transfers", paused=paused or "no longer")
        links.pause(paused)
    if not isinstance(limits, str):
        links.rates.set(limits)


async def prefs(node: Node, args: dict[str, Any], tell: Tell) -> Any:
    """Change what `args["changes"]` names, and tell all preferences and what holds now.  Raises `Misused`."""
    if args["changes"]:
        changed = node.prefs.changed(args["changes"])
        await trio.to_thread.run_sync(changed.save, node.home)
        node.prefs = changed
    await apply(node)
    links = node.exchange.links
    now = links.rates.limits
    return {
        "up": node.prefs.up,
        "down": node.prefs.down,
        "up_per_link": node.prefs.up_per_link,
        "down_per_link": node.prefs.down_per_link,
        "courteous": node.prefs.courteous,
        "on_battery": node.prefs.on_battery,
        "on_metered": node.prefs.on_metered,
        "port_mapping": node.prefs.port_mapping,
        "windows": list(node.prefs.windows),
        "now": {"paused": links.paused, "up": format_rate(now.up), "down": format_rate(now.down)},
    }
