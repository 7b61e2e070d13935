"""Decide how long to wait for a coordinator that is away, and how often to ask again."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from p2pgrid.errors import Temporary, Unreachable

RETRY_MIN, RETRY_MAX = 0.5, 8.0
"""Seconds between calls to a coordinator that is away: doubled from the one to the other."""
RESTART = 20.0
"""Seconds in which a coordinator that was started again is back."""

T = TypeVar("T")


def backoff(tries: int) -> float:
    """Seconds to wait after `tries` failures, spread so that a grid does not come back in step."""
    return float(min(RETRY_MAX, RETRY_MIN * 2 ** min(tries, 10)) * random.uniform(0.5, 1.0))


async def patiently(call: Callable[[], Awaitable[T]], patience: float = RESTART) -> T:
    """What `call`, which may be repeated, gives; asked again while the coordinator is away.

    Raises its last `Unreachable` or `Temporary` after `patience` seconds, and every other error at once.
    """
    limit = trio.current_time() + patience
    failures = 0
    while True:
        try:
            return await call()
        except (Unreachable, Temporary):
            pause = backoff(failures)
            if trio.current_time() + pause > limit:
                raise
            failures += 1
        await trio.sleep(pause)
