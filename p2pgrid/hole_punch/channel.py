"""Carry whole control messages over one libp2p stream, and end it cleanly whatever happens.

A cancelled `receive` loses nothing: bytes are read by a task of the host's, and the next call
takes up where the last one stopped waiting.  A `send` is never cut half-way: it is shielded,
and libp2p bounds it (a reader that takes nothing for 5 s loses the stream, so: small messages).
No exception of libp2p's leaves this file; a broken stream is `Unreachable`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import structlog
import trio
from libp2p.exceptions import BaseLibp2pError

from p2pgrid.errors import BadFrame, PeerError, Unreachable
from p2pgrid.ids import PeerId
from p2pgrid.net import Serve
from p2pgrid.wire import Frames, decode, encode

log = structlog.get_logger(__name__)

READ_SIZE = 1 << 16
"""Bytes asked of the stream at once: a Yamux frame."""

GOODBYE = 2.0
"""Seconds for telling the peer that a stream ends."""

TROUBLE = (BaseLibp2pError, OSError, EOFError, ValueError, KeyError, trio.TooSlowError,
           trio.BrokenResourceError, trio.ClosedResourceError)  # fmt: skip
"""What libp2p raises when a connection is gone, as one of its own errors or as it comes."""


class ControlChannel:
    """A `Channel` over a libp2p stream."""

    def __init__(self, peer: PeerId, stream: Any, nursery: trio.Nursery) -> None:
        self._peer = peer
        self._stream = stream
        self._nursery = nursery
        self._frames = Frames()
        self._bodies: deque[bytes] = deque()
        self._sending = trio.Lock()
        self._reading: tuple[trio.Event, trio.CancelScope] | None = None
        self._ended = ""
        self._noise: BadFrame | None = None

    @property
    def peer(self) -> PeerId:
        return self._peer

    async def send(self, message: msgspec.Struct) -> None:
        frame = encode(message)
        async with self._sending:
            try:
                with trio.CancelScope(shield=True):
                    await self._stream.write(frame)
            except TROUBLE as trouble:
                raise Unreachable(who=self._peer, why=f"the stream broke: {reason(trouble)}") from None

    async def receive(self, kind: Any) -> Any:
        """One task at a time may wait here."""
        while not self._bodies:
            if self._noise:
                raise BadFrame(why=self._noise.why)
            if self._ended:
                raise Unreachable(who=self._peer, why=self._ended)
            if self._reading is None:
                self._reading = trio.Event(), trio.CancelScope()
                self._nursery.start_soon(self._read, *self._reading)
            await self._reading[0].wait()
        try:
            return decode(self._bodies.popleft(), kind)
        except BadFrame:
            await self.reset()
            raise

    async def _read(self, done: trio.Event, scope: trio.CancelScope) -> None:
        """Take what the stream has next; note why, if it has nothing more."""
        try:
            with scope:
                data = await self._stream.read(READ_SIZE)
                self._bodies.extend(self._frames.feed(data))
                if not data:
                    self._ended = "the stream ended"
        except BadFrame as noise:
            self._noise = noise
            await self.reset()
        except TROUBLE as trouble:
            self._ended = f"the stream ended: {reason(trouble)}"
        finally:
            if scope.cancelled_caught:
                self._ended = self._ended or "the stream was closed here"
            self._reading = None
            done.set()

    async def aclose(self) -> None:
        """Say that nothing more comes; what was sent still arrives."""
        if self._reading is not None:
            await self.reset()  # nobody waits for that answer any more
            return
        self._ended = self._ended or "the stream was closed here"
        await self._say_goodbye(self._stream.close)

    async def reset(self) -> None:
        """End both directions at once; what is under way is lost."""
        self._ended = self._ended or "the stream was reset here"
        await self._say_goodbye(self._stream.reset)
        if self._reading is not None:
            self._reading[1].cancel()

    async def _say_goodbye(self, way: Any) -> None:
        with trio.CancelScope(shield=True), trio.move_on_after(GOODBYE):
            try:
                await way()
            except TROUBLE as trouble:
                log.debug("stream was gone already", peer=self._peer, why=reason(trouble))


async def answer(nursery: trio.Nursery, serve: Serve, stream: Any) -> None:
    """Serve one incoming stream; a peer that breaks the protocol loses just that stream."""
    channel = ControlChannel(PeerId(stream.muxed_conn.peer_id.to_base58()), stream, nursery)
    try:
        await serve(channel)
    except* Unreachable:
        await channel.reset()  # the peer has what it wanted, or is gone
    except* PeerError as broken:
        why = "; ".join(str(leaf) for leaf in leaves(broken))
        log.warning("peer broke the protocol", peer=channel.peer, protocol=stream.get_protocol(), why=why)
        await channel.reset()
    else:
        await channel.aclose()


@contextmanager
def plain() -> Iterator[None]:
    """Let a lone exception pass as itself; each nursery on its way wraps it in a group."""
    try:
        yield
    except BaseExceptionGroup as group:
        alone = leaves(group)
        if len(alone) > 1:
            raise
        raise alone[0] from alone[0].__cause__


def leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    """The exceptions in a group of groups."""
    return [
        leaf for e in group.exceptions for leaf in (leaves(e) if isinstance(e, BaseExceptionGroup) else [e])
    ]


def reason(trouble: BaseException) -> str:
    """One line on what libp2p stumbled over; its causes say more than its errors."""
    while isinstance(trouble, BaseExceptionGroup) or trouble.__cause__ is not None:
        trouble = (
            trouble.exceptions[-1]
            if isinstance(trouble, BaseExceptionGroup)
            else trouble.__cause__ or trouble
        )
    text = " ".join(str(trouble).split())[:200]
    return text or type(trouble).__name__
