"""Put what the proxy answers the way a person reads it.

Pure: a JSON answer in, text out; the shapes are those of `docs/reference/json.md`.
"""

from __future__ import annotations

from typing import Any

from p2pgrid.node.console import size, table
from p2pgrid.node.plain import plain

Answer = dict[str, Any]


def status(v: Answer) -> str:
    rows = [
        (
            plain(f["who"]), f["to"], "in" if f["opened"] == "there" else "out", f["way"],
            size(f["sent"]), size(f["received"]), f"{f['age']:.0f} s",
        )
        for f in v["flows"]
    ]  # fmt: skip
    flows = table(rows, "WHO", "TO", "", "WAY", "SENT", "RECEIVED", "AGE") if rows else "no connections"
    exposed = [
        f"port {e['port']} is exposed to {plain(e['to'])}"
        + (f", which is {plain(e['host'])}:{e['at']}" if e["host"] else "")
        for e in v["exposed"]
    ]
    return "\n".join([flows, *exposed, f"this node's label: {v['label']}"])
