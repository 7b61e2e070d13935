"""Wait for a machine: the only bridge between machines and trio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from p2pgrid.machine import Machine, Tick


async def drive(
    machine: Machine[Any, Any],
    inbox: trio.MemoryReceiveChannel[Any],
    perform: Callable[[Any], Awaitable[None]],
) -> None:
    """Feed `inbox` to `machine` until the inbox ends; perform each effect in a task of its own.

    Effects still running when the inbox ends are cancelled.
    """
    async with trio.open_nursery() as nursery:
        while True:
            event: Any = Tick()
            with trio.move_on_at(machine.deadline):
                try:
                    event = await inbox.receive()
                except trio.EndOfChannel:
                    break
            for effect in machine.step(event, trio.current_time()):
                nursery.start_soon(perform, effect)
        nursery.cancel_scope.cancel()
