"""Carry the streams of one connection: libp2p's Yamux, with bounds where it has none.

Its windows stay as large as they begin: libp2p doubles a window with each small read, and the six of
agreeing on a protocol make 4 MiB of it.  What was not granted is not taken.
"""

from __future__ import annotations

from typing import Any

import trio
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID, Yamux, YamuxStream

__all__ = ["PROTOCOL_ID", "WINDOW", "Muxer"]

WINDOW = 256 << 10
"""Bytes of a stream that may wait to be read here; Yamux begins with this, and we leave it there."""

WRITE_PATIENCE = 10.0
"""Seconds a full TCP buffer may refuse bytes before the connection is given up."""


class _Buffer(bytearray):
    """What of one stream waits to be read; libp2p takes more than it granted, and says so in its log."""

    def extend(self, data: Any) -> None:
        if len(self) + len(data) > 2 * WINDOW:  # it grants what was read twice now and then
            raise ValueError("more than was granted")  # libp2p ends the stream
        super().extend(data)


class _Buffers(dict[int, bytearray]):
    """Those of all streams of a connection."""

    def __setitem__(self, stream: int, data: bytearray) -> None:
        super().__setitem__(stream, _Buffer(data))


class Muxer(Yamux):  # type: ignore[misc]
    """Yamux whose writes nobody's cancellation cuts: Noise counts messages, and one lost ends them all."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.stream_buffers = _Buffers()

    async def _write_frame(self, data: bytes) -> None:
        with trio.CancelScope(shield=True), trio.fail_after(WRITE_PATIENCE):
            await super()._write_frame(data)

    async def start(self) -> None:
        """However the connection ends, its socket is closed and who waits for that learns of it."""
        try:
            await super().start()
        finally:
            with trio.CancelScope(shield=True):
                await self.secured_conn.close()
            self.event_closed.set()


YamuxStream._apply_autotune_epoch = lambda stream, buffered: 0
