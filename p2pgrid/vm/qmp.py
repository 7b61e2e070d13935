"""Speak QMP, QEMU's control protocol: JSON lines in, JSON lines out.

`Messages` is pure; `Monitor` is one connection, open once both sides have shaken hands.

    server: {"QMP": …}           client: {"execute": "qmp_capabilities"}     server: {"return": {}}
    then     {"execute": …, "id": n}  ──>   <── {"return": …, "id": n} | {"error": …, "id": n}
    and at any time                         <── {"event": …, "data": …}

Source: QEMU docs/interop/qmp-spec.txt.  QEMU is believed no more than a peer: `BadFrame`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Self

import attrs
import msgspec
import trio

from p2pgrid.errors import BadFrame, Unreachable

LINE_MAX = 1 << 20
"""Bytes; the longest answers (query-qmp-schema) are not asked for here."""


@attrs.frozen
class Greeting:
    """The first message of a connection."""


@attrs.frozen
class Reply:
    """The answer to command `id`: a value, or what went wrong."""

    id: int
    value: Any = None
    error: str | None = None


@attrs.frozen
class Event:
    """Something happened: SHUTDOWN, RESET, STOP, RESUME, GUEST_PANICKED, …"""

    name: str
    data: dict[str, Any] = attrs.field(factory=dict)


Message = Greeting | Reply | Event


def command(name: str, number: int, arguments: dict[str, Any] | None = None) -> bytes:
    """One command line."""
    body: dict[str, Any] = {"execute": name, "id": number}
    if arguments:
        body["arguments"] = arguments
    return msgspec.json.encode(body) + b"\n"


class Messages:
    """Collect bytes as they come; iterate over the messages that are whole."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Raises `BadFrame` for what is not QMP."""
        self._buffer += data
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = bytearray(rest)
        if len(rest) > LINE_MAX:
            raise BadFrame(why=f"a QMP line longer than {LINE_MAX} bytes")
        for line in lines:
            if line.strip():
                yield _decode(bytes(line))


def _decode(line: bytes) -> Message:
    try:
        value = msgspec.json.decode(line)
    except (msgspec.MsgspecError, RecursionError, ValueError) as broken:
        raise BadFrame(why=f"not QMP: {broken}") from None
    match value:
        case {"QMP": dict()}:
            return Greeting()
        case {"event": str(name)}:
            data = value.get("data")
            return Event(name, data if isinstance(data, dict) else {})
        case {"return": answer, "id": int(number)}:
            return Reply(number, answer)
        case {"error": {"desc": str(why)}}:
            number = value.get("id")
            return Reply(number if isinstance(number, int) else -1, error=why)
        case _:
            raise BadFrame(why="a QMP message of unknown form")


@attrs.define(eq=False)
class Monitor:
    """One QMP connection: any task may `tell`, one task iterates over replies and events."""

    _stream: trio.abc.Stream
    _incoming: Messages = attrs.field(factory=Messages)
    _arrived: deque[Message] = attrs.field(factory=deque)
    _sending: trio.Lock = attrs.field(factory=trio.Lock)
    _number: int = 0

    async def tell(self, name: str, arguments: dict[str, Any] | None = None) -> int:
        """Send a command and return its number; the reply comes out of the iteration.

        Raises `Unreachable` when QEMU has ended.
        """
        self._number += 1
        number = self._number
        try:
            async with self._sending:
                await self._stream.send_all(command(name, number, arguments))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise Unreachable(who="QEMU", why="its monitor is closed") from None
        return number

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        """The next message; the iteration ends when QEMU does.  Raises `BadFrame`."""
        while not self._arrived:
            try:
                data = await self._stream.receive_some()
            except trio.BrokenResourceError:
                data = b""
            if not data:
                raise StopAsyncIteration
            self._arrived.extend(self._incoming.feed(bytes(data)))
        return self._arrived.popleft()


@asynccontextmanager
async def open_monitor(stream: trio.abc.Stream) -> AsyncIterator[Monitor]:
    """Shake hands with QEMU over `stream`, which is closed on leaving.

    Raises `Unreachable` when QEMU ends before it is ready.
    """
    async with stream:
        monitor = Monitor(stream)
        number = -1
        async for message in monitor:
            if isinstance(message, Greeting):
                number = await monitor.tell("qmp_capabilities")
            elif isinstance(message, Reply) and message.id == number:
                break
        else:
            raise Unreachable(who="QEMU", why="it ended before its monitor was ready")
        yield monitor
