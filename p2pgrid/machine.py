"""State the contract of a machine: pure state with one door.

Pure.  Everything that decides over time has this shape, so that one driver
(`drive.py`) can wait for all of them, and a test can replay any history.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

Event = TypeVar("Event", contravariant=True)
Effect = TypeVar("Effect", covariant=True)


class Machine(Protocol[Event, Effect]):
    """Decides; never waits, reads a clock or touches the world."""

    @property
    def deadline(self) -> float:
        """When `step(Tick(), now)` wants to be called next, in seconds; `inf` for never."""
        ...

    def step(self, event: Event, now: float) -> Iterable[Effect]:
        """Take one event at time `now` (seconds, monotonic) and say what to do."""
        ...

    def check(self) -> None:
        """Assert every invariant; tests call it after each step."""
        ...


class Tick:
    """The deadline has passed and nothing else happened."""

    def __repr__(self) -> str:
        return "Tick()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tick)

    def __hash__(self) -> int:
        return hash(Tick)
