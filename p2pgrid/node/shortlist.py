"""Decide which of the data here are told to the coordinator, where they are more than a beat takes.

Pure.  Disks first, since leases are given to whoever holds the disk; then trees, newest first:
results on their way home are young, and old ones were collected long ago.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs


@attrs.frozen
class Here:
    """A datum that is complete here."""

    datum: str
    disk: bool
    since: float
    """When it was begun; any clock."""


def shortlist(here: Iterable[Here], most: int) -> tuple[str, ...]:
    """At most `most` of them, the ones that matter most first."""
    order = sorted(here, key=lambda one: (not one.disk, -one.since, one.datum))
    return tuple(one.datum for one in order[:most])
