"""Have links punched where they are relayed, and again whenever the network has changed."""

from __future__ import annotations

import trio

from p2pgrid.hole_punch.punching import open_punching
from p2pgrid.node.outlook import Outlook


async def keep_paths(outlook: Outlook) -> None:
    """For ever."""
    async with open_punching(outlook.links, outlook.me) as puncher:
        outlook.changed.append(lambda _: puncher.look(anew=True))
        await trio.sleep_forever()
