"""Serve a disk to a hypervisor: the read-only half of NBD, over one Unix socket.

`Export` is pure (bytes in; bytes, reads and a farewell out), `serve` is its story.  Fixed newstyle
negotiation and simple replies; of the options only EXPORT_NAME, INFO, GO and ABORT are supported.

    server                                  client
    "NBDMAGIC" "IHAVEOPT" flags(16)  ──>
                                     <──    flags(32)
                                     <──    "IHAVEOPT" option(32) length(32) data
    option reply                     ──>          … until EXPORT_NAME or GO
                                     <──    0x25609513 flags(16) kind(16) cookie(64) offset(64) length(32)
    0x67446698 error(32) cookie data ──>          … until DISC; replies in any order

All numbers are big endian.  The client is QEMU, which a hostile guest may have taken over:
noise only ever raises `BadFrame`.  Source: the NBD project's doc/proto.md.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Generator, Iterator

import attrs
import trio

from p2pgrid.errors import BadFrame, GridError
from p2pgrid.vm.blockdev import BlockSource

SECTOR = 512
TRANSFER_MAX = 32 << 20
"""Bytes of one read or write: what the protocol lets a client assume."""
OPTION_MAX = 4096
"""Bytes of one option's data: the longest export name the protocol allows."""
IN_FLIGHT = 16
"""Reads under way at once; QEMU's own client never has more."""
PATIENCE = 2.0
"""Seconds that a read may take before the guest is paused: far below any guest's disk timeout (30)."""

FIXED_NEWSTYLE, NO_ZEROES = 1, 2
EXPORT_NAME, ABORT, INFO, GO = 1, 2, 6, 7  # options
ACK, INFO_REPLY = 1, 3
UNSUPPORTED, INVALID = 0x80000001, 0x80000003
HAS_FLAGS, READ_ONLY, SEND_FLUSH = 1, 2, 4
READ, WRITE, DISC, FLUSH = 0, 1, 2, 3

GREETING = b"NBDMAGICIHAVEOPT" + struct.pack(">H", FIXED_NEWSTYLE | NO_ZEROES)


@attrs.frozen
class Read:
    """The client wants `length` bytes from `offset`; answer with `reply(cookie, data)`."""

    cookie: int
    offset: int
    length: int


@attrs.frozen
class Bye:
    """The client is done."""


Step = bytes | Read | Bye
Conversation = Generator[int | Step, bytes, None]
"""Yields how many bytes it needs next and is sent them, or yields a step and is sent nothing."""


def reply(cookie: int, data: bytes = b"", error: int = 0) -> bytes:
    """A simple reply: the data, or an errno."""
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data


class Export:
    """One connection's state: feed it what came in, do what it yields."""

    def __init__(self, size: int) -> None:
        assert size % SECTOR == 0, "a disk has whole sectors"
        self._buffer = bytearray()
        self._conversation = _converse(size)
        self._next: int | Step | None = next(self._conversation)

    def feed(self, data: bytes) -> Iterator[Step]:
        """Bytes to send, reads to do, or `Bye`, in order.  Raises `BadFrame`."""
        self._buffer += data
        while self._next is not None:
            if isinstance(self._next, int):
                need = self._next
                if len(self._buffer) < need:
                    return
                piece = bytes(self._buffer[:need])
                del self._buffer[:need]
                self._next = self._conversation.send(piece)
            else:
                yield self._next
                self._next = next(self._conversation, None)


def _converse(size: int) -> Conversation:
    flags = int.from_bytes((yield 4), "big")
    if flags & ~(FIXED_NEWSTYLE | NO_ZEROES):
        raise BadFrame(why=f"NBD client flags {flags:#x} that nobody offered")
    going = yield from _negotiate(size, bool(flags & NO_ZEROES))
    while going:
        going = yield from _transmit(size)
    yield Bye()


def _negotiate(size: int, no_zeroes: bool) -> Generator[int | Step, bytes, bool]:
    """Options until the client starts (True) or leaves (False)."""
    export = struct.pack(">QH", size, HAS_FLAGS | READ_ONLY | SEND_FLUSH)
    while True:
        magic, option, length = struct.unpack(">8sII", (yield 16))
        if magic != b"IHAVEOPT" or length > OPTION_MAX:
            raise BadFrame(why="not an NBD option")
        data = (yield length) if length else b""
        if option == EXPORT_NAME:  # has no reply of its own; whatever the name, there is one disk
            yield export + (b"" if no_zeroes else bytes(124))
            return True
        if option == ABORT:
            yield _option_reply(option, ACK)
            return False
        if option not in (INFO, GO):
            yield _option_reply(option, UNSUPPORTED)
        elif not _names_an_export(data):
            yield _option_reply(option, INVALID)
        else:
            yield _option_reply(option, INFO_REPLY, b"\0\0" + export) + _option_reply(option, ACK)
            if option == GO:
                return True


def _names_an_export(data: bytes) -> bool:
    """Whether `data` is a name's length, the name, a count, and that many 16-bit questions."""
    if len(data) < 6:
        return False
    name = int.from_bytes(data[:4], "big")
    return len(data) >= name + 6 and len(data) == name + 6 + 2 * int.from_bytes(
        data[name + 4 : name + 6], "big"
    )


def _option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


def _transmit(size: int) -> Generator[int | Step, bytes, bool]:
    """One request; False when it was the last."""
    magic, _flags, kind, cookie, offset, length = struct.unpack(">IHHQQI", (yield 28))
    if magic != 0x25609513:
        raise BadFrame(why="not an NBD request")
    if kind == DISC:
        return False
    if kind in (READ, WRITE) and length > TRANSFER_MAX:
        raise BadFrame(why=f"an NBD request of {length} bytes")
    if kind == READ and length > 0 and offset + length <= size:
        yield Read(cookie, offset, length)
    elif kind == READ:
        yield reply(cookie, error=errno.EINVAL)
    elif kind == FLUSH:
        yield reply(cookie)
    else:
        if kind == WRITE and length:
            yield length  # the payload must be taken off the wire before it can be refused
        yield reply(cookie, error=errno.EPERM)
    return True


def whole_sectors(size: int) -> int:
    """`size` rounded up to sectors; `serve` fills the rest with zeros."""
    return -(-size // SECTOR) * SECTOR


async def serve(
    stream: trio.abc.Stream,
    source: BlockSource,
    stalled: Callable[[bool], None] = lambda stalled: None,
    patience: float = PATIENCE,
) -> None:
    """Answer one client until it leaves; closes `stream`.  Raises `BadFrame`.

    `stalled(True)` is called when some read has taken longer than `patience` seconds, and
    `stalled(False)` when none does any more.  Where `source` fails, the client gets EIO.
    """
    server = _Server(stream, source, stalled, patience)
    broken: BaseException | None = None
    try:
        async with stream, trio.open_nursery() as nursery:
            await server.run(nursery)
    except* (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # the client died; nobody is left to answer
    except* BadFrame as bad:
        broken = bad.exceptions[0]
    if broken is not None:
        raise broken


@attrs.define(eq=False)
class _Server:
    stream: trio.abc.Stream
    source: BlockSource
    stalled: Callable[[bool], None]
    patience: float
    room: trio.Semaphore = attrs.field(factory=lambda: trio.Semaphore(IN_FLIGHT))
    sending: trio.Lock = attrs.field(factory=trio.Lock)
    late: int = 0
    """Reads that have taken longer than `patience`."""

    async def run(self, nursery: trio.Nursery) -> None:
        export = Export(whole_sectors(self.source.size))
        await self.send(GREETING)
        async for data in self.stream:
            for step in export.feed(bytes(data)):
                match step:
                    case Read():
                        await self.room.acquire()
                        nursery.start_soon(self.answer, step, nursery)
                    case bytes():
                        await self.send(step)
                    case Bye():
                        nursery.cancel_scope.cancel()
        nursery.cancel_scope.cancel()

    async def send(self, message: bytes) -> None:
        async with self.sending:
            await self.stream.send_all(message)

    async def answer(self, read: Read, nursery: trio.Nursery) -> None:
        watch = trio.CancelScope()
        nursery.start_soon(self.watch, watch)
        inside = max(0, min(read.length, self.source.size - read.offset))
        try:
            data = await self.source.read(read.offset, inside) if inside else b""
            assert len(data) == inside, "a block source answers with what was asked"
            message = reply(read.cookie, data + bytes(read.length - inside))
        except (GridError, OSError):
            message = reply(read.cookie, error=errno.EIO)
        finally:
            watch.cancel()
        await self.send(message)
        self.room.release()

    async def watch(self, scope: trio.CancelScope) -> None:
        """Say so when a read takes too long, and when it is over."""
        with scope:
            await trio.sleep(self.patience)
            self.late += 1
            if self.late == 1:
                self.stalled(True)
            try:
                await trio.sleep_forever()
            finally:
                self.late -= 1
                if not self.late:
                    self.stalled(False)
