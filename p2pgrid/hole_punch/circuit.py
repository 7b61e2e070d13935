"""Speak libp2p's circuit relay v2 over streams: ask, be asked, and carry what passes between two of them.

    source ── HOP: Connect(target) ──> relay ── STOP: Connect(source) ──> target
           <── Status(OK), limits ───        <────── Status(OK) ────────
           ═══════════ from here on bytes of a connection of their own: Noise, Yamux ═══════════

A target has asked before (HOP: Reserve).  Each message is a protobuf after its length (a varint).  The relay
sees neither keys nor bytes; who is at the other end is proved by Noise (libp2p's specs, relay/circuit-v2).
py-libp2p's own relay is not used: see decision 0016.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import trio
from google.protobuf.message import DecodeError
from libp2p.connection_types import ConnectionType
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status, StopMessage
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr

from p2pgrid.hole_punch.channel import TROUBLE

HOP = "/libp2p/circuit/relay/0.2.0/hop"
STOP = "/libp2p/circuit/relay/0.2.0/stop"

MESSAGE_MAX = 4096
"""Bytes of one message, as in go-libp2p."""

READ_SIZE = 1 << 14
"""Bytes carried at once."""


class Refused(BaseLibp2pError):  # type: ignore[misc]
    """A relay, or who is behind it, did not do what it was asked for."""


async def tell(stream: Any, message: Any) -> None:
    await stream.write(encode_varint_prefixed(message.SerializeToString()))


async def hear(stream: Any, kind: Any) -> Any:
    """The next message; `TROUBLE` if there is none, or it is none of `kind`."""
    message = kind()
    try:
        message.ParseFromString(await read_varint_prefixed_bytes_limited(stream, MESSAGE_MAX))
    except DecodeError as noise:
        raise ValueError(f"not a {kind.DESCRIPTOR.name}: {noise}") from None
    if not message.HasField("type"):
        raise ValueError(f"a {kind.DESCRIPTOR.name} without a type")
    return message


async def ask(stream: Any, request: Any) -> Any:
    """The answer to `request`, if it was granted; a relay asks so, too.  Raises `Refused`."""
    await tell(stream, request)
    answer = await hear(stream, type(request))
    if answer.type != type(request).STATUS:
        raise Refused("it answered with something else than a status")
    if answer.status != Status.OK:
        raise Refused(f"it says {_spelled(answer.status)}")
    return answer


def _spelled(status: Any) -> str:
    return str(Status.Name(status)) if status in Status.values() else str(status)


async def connect(stream: Any, target: Any) -> None:
    """Have the relay at the other end of `stream` put us through to `target` (libp2p's peer id)."""
    request = HopMessage(type=HopMessage.CONNECT)
    request.peer.id = target.to_bytes()
    await ask(stream, request)


async def accept(stream: Any, welcome: bool) -> bool:
    """Answer a relay that somebody wants to be put through to us; whether `stream` is a connection now."""
    request = await hear(stream, StopMessage)
    right = request.type == StopMessage.CONNECT and request.HasField("peer")
    status = Status.PERMISSION_DENIED if not welcome else Status.OK if right else Status.MALFORMED_MESSAGE
    await tell(stream, StopMessage(type=StopMessage.STATUS, status=status))
    return bool(status == Status.OK)


class _Pipe:
    """A stream that carries a connection."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def read(self, n: int | None = None) -> bytes:
        try:
            return bytes(await self._stream.read(n))
        except StreamEOF:
            return b""

    async def write(self, data: bytes) -> None:
        await self._stream.write(data)

    async def close(self) -> None:
        await self._stream.close()  # what was written still arrives; then the relay ends it

    def get_remote_address(self) -> tuple[str, int] | None:
        address: tuple[str, int] | None = self._stream.get_remote_address()
        return address


def connection(stream: Any, initiator: bool, address: str) -> Any:
    """What libp2p makes a connection of, to a peer at `address`, a circuit's."""
    return RawConnection(_Pipe(stream), initiator, ConnectionType.RELAYED, [Multiaddr(address)])


def relayed(connection: Any) -> bool:
    """Whether a connection, or that of a stream, is a circuit."""
    return bool(connection.get_connection_type() == ConnectionType.RELAYED)


async def splice(one: Any, other: Any, data: int, duration: float) -> None:
    """Carry bytes both ways until both have ended, or until there were too many or it took too long.

    Neither stream is open afterwards; a half that ends is ended for the other side, too.
    """
    whole = False
    try:
        with trio.move_on_after(duration):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_carry, one, other, data)
                nursery.start_soon(_carry, other, one, data)
            whole = True
    except* TROUBLE:
        pass  # one broke, or had too much to say: the other hears of it by a reset
    finally:
        with trio.CancelScope(shield=True):
            for stream in (one, other):
                with suppress(*TROUBLE):
                    await (stream.close() if whole else stream.reset())


async def _carry(source: Any, target: Any, data: int) -> None:
    while True:
        try:
            part = await source.read(READ_SIZE)
        except StreamEOF:
            part = b""
        if not part:
            await target.close_write()
            return
        data -= len(part)
        if data < 0:
            raise Refused("more than a circuit may carry")
        await target.write(part)
