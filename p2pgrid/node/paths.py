"""Have links follow the network: punched where they are relayed, doubted and punched anew when it changes."""

from __future__ import annotations

from p2pgrid.hole_punch.bulk import Links
from p2pgrid.hole_punch.netwatch import open_netwatch
from p2pgrid.hole_punch.punching import open_punching
from p2pgrid.ids import PeerId


async def keep_paths(links: Links, me: PeerId) -> None:
    """For ever."""
    async with open_punching(links, me) as puncher, open_netwatch() as changes:
        async for _ in changes:  # another address, another router, or we have slept
            links.doubt()
            puncher.look(anew=True)
