"""Look at the network without a daemon, and put what was found into words and JSON.

Without a daemon nobody can be asked where they see us: what is left is this computer's own addresses, what
the router says, and whether the coordinator takes connections.
"""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import attrs
import structlog
import trio

from p2pgrid.hole_punch.nat import Mapping
from p2pgrid.hole_punch.netwatch import Net, read_net
from p2pgrid.hole_punch.outside import is_outside
from p2pgrid.hole_punch.path import Address, format_address
from p2pgrid.hole_punch.portmap import open_mapping
from p2pgrid.hole_punch.portmap import story as portmap
from p2pgrid.node.config import Config
from p2pgrid.node.prefs import Prefs
from p2pgrid.node.verdict import UNREACHABLE, Facts, Observer, nat_name, verdict

ROUTER_PATIENCE = 8.0
"""Seconds in which all three protocols have been tried."""
DIAL_PATIENCE = 5.0
UNWANTED = "its owner does not want the router to be asked"


def report(facts: Facts) -> dict[str, Any]:
    """The answer of `netcheck`; `docs/reference/json.md`."""
    said = verdict(facts)
    return {
        "verdict": said.kind,
        "sentence": said.sentence,
        "advice": list(said.advice),
        "running": facts.running,
        "nat": {
            "mapping": _mapping(facts),
            "name": nat_name(facts),
            "hairpin": facts.hairpin,
        },
        "ipv4": facts.own or None,
        "gateway": facts.gateway or None,
        "ipv6": facts.ipv6,
        "port_mapping": {"address": _text(facts.mapped), "how": facts.how, "why": facts.unmapped},
        "listening": [format_address(address) for address in facts.bound],
        "observers": [_observer(observer) for observer in facts.observers],
    }


def exit_code(report: dict[str, Any]) -> int:
    return UNREACHABLE if report["verdict"] == "cut-off" else 0


def _mapping(facts: Facts) -> str:
    if facts.public:
        return "none"
    return {Mapping.UNKNOWN: "unknown", Mapping.INDEPENDENT: "independent", Mapping.DEPENDENT: "dependent"}[
        facts.mapping
    ]


def _observer(observer: Observer) -> dict[str, Any]:
    return {
        "peer": observer.name,
        "role": observer.role,
        "relays": observer.relays,
        "address": _text(observer.address),
        "delay": observer.delay,
        "way": observer.way,
        "seen": _text(observer.seen),
        "called": observer.called,
        "why": observer.why,
    }


def _text(address: Address | None) -> str | None:
    return None if address is None else format_address(address)


def here(net: Net) -> Facts:
    """What this computer says of itself."""
    public = (h for h in sorted(net.addresses) if ":" not in h and is_outside(h))
    return Facts(
        hosts=tuple(sorted(net.addresses)),
        gateway=net.v4.gateway if net.v4 is not None else "",
        own=net.v4.own if net.v4 is not None else next(public, ""),  # servers may have no default route
        ipv6=net.v6 is not None and any(":" in h and is_outside(h) for h in net.addresses),
    )


def look(home: Path) -> dict[str, Any]:
    """What can be told while no daemon runs on `home`.  Raises `Misconfigured`."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    return trio.run(_look, home)


async def _look(home: Path) -> dict[str, Any]:
    config, wanted = Config.load(home), Prefs.load(home).port_mapping == "on"
    unmapped = "" if wanted else UNWANTED
    facts = attrs.evolve(here(read_net()), running=False, mapping_wanted=wanted, unmapped=unmapped)
    found: dict[str, Any] = {}
    async with trio.open_nursery() as nursery:
        if config is not None and config.coordinator is not None:
            nursery.start_soon(_ask_coordinator, config, found)
        if wanted:
            nursery.start_soon(_ask_router, found)
    return report(attrs.evolve(facts, **found))


async def _ask_router(found: dict[str, Any]) -> None:
    """Have a port of nobody's mapped, and give it back."""
    with socket.socket() as unused:
        unused.bind((portmap.ANY, 0))
        async with open_mapping(unused.getsockname()[1]) as mapping:
            with trio.move_on_after(ROUTER_PATIENCE):
                while not mapping.tried:
                    await mapping.changed.wait()
            found.update(mapped=mapping.address, how=mapping.how, unmapped=mapping.why)


async def _ask_coordinator(config: Config, found: dict[str, Any]) -> None:
    """Dial all its addresses; the first that answers."""
    assert config.coordinator is not None
    asked = Observer(config.coordinator, "coordinator", why="no answer")
    async with trio.open_nursery() as nursery:

        async def dial(host: str, port: int) -> None:
            began = trio.current_time()
            try:
                stream = await trio.open_tcp_stream(host, port)
            except OSError as wrong:
                found.setdefault("observers", (attrs.evolve(asked, why=str(wrong)),))
                return
            seconds = trio.current_time() - began
            async with stream:
                far = stream.socket.getpeername()[:2]
            found["observers"] = (attrs.evolve(asked, address=far, delay=seconds, why=""),)
            nursery.cancel_scope.cancel()

        nursery.cancel_scope.deadline = trio.current_time() + DIAL_PATIENCE
        for text in config.addresses:
            match text.split("/"):
                case ["", "ip4" | "ip6" | "dns" | "dns4" | "dns6", host, "tcp", port, *_] if port.isdigit():
                    nursery.start_soon(dial, host, int(port))
    found.setdefault("observers", (asked,))
