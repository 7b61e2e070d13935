"""Decide whether this node relays for others, and how much: as its owner said, or as its role has it.

Pure but for `load` and `save` of the one small file that keeps it.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import attrs

from p2pgrid.errors import Misconfigured, Misused
from p2pgrid.hole_punch.relay.limits import Limits
from p2pgrid.node.console import parse_size
from p2pgrid.node.prefs import parse_rate

FILE = "relay.json"
CIRCUITS_MAX = 65535


@attrs.frozen
class RelayPrefs:
    """What an owner allows, as they wrote it."""

    wanted: str = "default"
    """"on", "off", or "default": coordinators relay, others do not."""
    rate: str = "none"
    """Of all that is relayed together."""
    rate_each: str = "none"
    """Of one circuit."""
    quota: str = "none"
    """A day, of all that is relayed together."""
    quota_each: str = "none"
    """A day, of the circuits of one peer."""
    circuits: int = Limits().circuits
    """At a time."""
    circuits_each: int = Limits().circuits_each
    """At a time, of one peer."""

    def __attrs_post_init__(self) -> None:
        """Raises `Misused` where anything is not understood."""
        if self.wanted not in ("on", "off", "default"):
            raise Misused(why=f"{self.wanted!r} is none of on, off, default")
        for name in ("rate", "rate_each", "quota", "quota_each"):
            if not isinstance(getattr(self, name), str):
                raise Misused(why=f"{name} is a text")
        for name in ("circuits", "circuits_each"):
            count = getattr(self, name)
            if not isinstance(count, int) or not 1 <= count <= CIRCUITS_MAX:
                raise Misused(why=f"--{name.replace('_', '-')} is from 1 to {CIRCUITS_MAX}")
        self.limits()

    def relays(self, *, coordinates: bool) -> bool:
        """Whether to relay, where this node is a coordinator or not."""
        return coordinates if self.wanted == "default" else self.wanted == "on"

    def limits(self) -> Limits:
        return Limits(
            circuits=self.circuits,
            circuits_each=self.circuits_each,
            quota=_quota(self.quota),
            quota_each=_quota(self.quota_each),
            rate=parse_rate(self.rate),
            rate_each=parse_rate(self.rate_each),
        )

    def changed(self, settings: dict[str, Any]) -> RelayPrefs:
        """With `settings` by name.  Raises `Misused`."""
        names = {field.name for field in attrs.fields(RelayPrefs)}
        if unknown := sorted(set(settings) - names):
            raise Misused(why=f"there is no setting {unknown[0]!r} of a relay")
        return RelayPrefs(**{**attrs.asdict(self), **settings})

    def save(self, home: Path) -> None:
        draft = home / f"{FILE}.tmp"
        draft.write_text(json.dumps(attrs.asdict(self), indent=2) + "\n")
        os.replace(draft, home / FILE)

    @classmethod
    def load(cls, home: Path) -> RelayPrefs:
        """Those in `home`.  Raises `Misconfigured` where they cannot be read."""
        try:
            return cls().changed(json.loads((home / FILE).read_text()))
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError, AttributeError, OSError, Misused) as broken:
            raise Misconfigured(why=f"{home / FILE} cannot be read: {broken}") from None


def _quota(text: str) -> int | None:
    """Bytes of "100G"; None where there is none.  Raises `Misused`."""
    if text.strip().lower() == "none":
        return None
    quota = parse_size(text)
    if quota <= 0:
        raise Misused(why="a quota is more than nothing; to relay nothing use `p2pnode relay off`")
    return quota


def number(value: float | None) -> float | None:
    """`value` as JSON has it: no limit is null."""
    return None if value is None or value == math.inf else value
