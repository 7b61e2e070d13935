"""Put what `netcheck` found the way a person reads it: the verdict first, what helps last.

Pure; the shape is that of `docs/reference/json.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from p2pgrid.node.show_links import delay, short

Answer = dict[str, Any]


def netcheck(v: Answer) -> str:
    rows = [*_facts(v), *(("observer", line) for line in _observers(v)), *(("to do", a) for a in v["advice"])]
    return "\n".join([v["sentence"], *(f"{name:<8}  {text}".rstrip() for name, text in rows)])


def _facts(v: Answer) -> Iterator[tuple[str, str]]:
    hairpin = {None: "", True: ", hairpin", False: ", no hairpin"}[v["nat"]["hairpin"]]
    yield "NAT", v["nat"]["name"] + hairpin
    yield "IPv4", (v["ipv4"] or "no") + (f", router {v['gateway']}" if v["gateway"] else "")
    yield "IPv6", "yes" if v["ipv6"] else "no"
    mapping = v["port_mapping"]
    if mapping["address"]:
        yield "router", f"lets others in at {mapping['address']} ({mapping['how']})"
    else:
        yield "router", f"no port mapped: {mapping['why'] or 'it has not answered yet'}"


def _observers(v: Answer) -> list[str]:
    cells = [_observer(o) for o in v["observers"]]
    widths = [max((len(row[i]) for row in cells), default=0) for i in range(4)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(row[:4], widths, strict=True)), row[4]]) for row in cells]


def _role(o: Answer) -> str:
    return "coordinator, relay" if o["relays"] and o["role"] == "coordinator" else str(o["role"])


def _observer(o: Answer) -> tuple[str, str, str, str, str]:
    if o["delay"] is None:
        return short(o["peer"]), _role(o), "-", "-", f"{o['address'] or 'address unknown'}: {o['why']}"
    called = {None: "", True: ", dials back", False: ", cannot dial back"}[o["called"]]
    seen = f"sees {o['seen']}" if o["seen"] else f"at {o['address']}"
    return short(o["peer"]), _role(o), delay(o["delay"]), o["way"] or "-", seen + called
