"""Put what is relayed the way a person reads it.

Pure: a JSON answer in, text out; the shapes are those of `docs/reference/json.md`.
"""

from __future__ import annotations

from typing import Any

from p2pgrid.node.console import size
from p2pgrid.node.prefs import format_rate

Answer = dict[str, Any]
LOST_MAX = 5
"""Circuits lost that are shown: the newest."""


def relay(v: Answer) -> str:
    limits = v["limits"]
    lines = [
        f"relays   {'for others' if v['on'] else 'nothing: ' + v['why']}"
        + (" (the default of its role)" if v["wanted"] == "default" else "")
    ]
    if v["on"]:
        lines += [
            f"limits   {_rate(limits['rate'])} in all, {_rate(limits['rate_each'])} a circuit; "
            f"{_quota(limits['quota'])} a day in all, {_quota(limits['quota_each'])} a peer; "
            f"{limits['circuits']} circuits, {limits['circuits_each']} a peer",
            f"carried  {size(v['bytes_today'])} today, {size(v['bytes'])} since the start",
            f"now      {len(v['circuits'])} circuit(s), {len(v['reserved'])} peer(s) are reached through it",
            *(f"circuit  {c['caller']} -> {c['called']}" for c in v["circuits"]),
            *(f"refused  {count} time(s): {reason}" for reason, count in sorted(v["refused"].items())),
        ]
    lines += [f"uses     {use['relay']}  {1000 * use['delay']:.0f} ms" for use in v["uses"]]
    lines += [
        f"lost     {one['relay']}, to {one['peer'] or 'us'}, {one['age']:.0f} s ago: {one['why']}"
        for one in v["lost"][-LOST_MAX:]
    ]
    return "\n".join(lines)


def _rate(rate: float | None) -> str:
    return "any rate" if rate is None else format_rate(rate)


def _quota(quota: int | None) -> str:
    return "any amount" if quota is None else size(quota)
