"""The NBD story answers out of order, tells when it is slow, and survives a failing source."""

import errno
import struct

import attrs
import pytest
import trio
import trio.testing

from p2pgrid.errors import BadFrame, NotFound
from p2pgrid.vm import nbd
from p2pgrid.vm.blockdev import BlockCache

HELLO = b"\0\0\0\3" + b"IHAVEOPT" + struct.pack(">II", nbd.GO, 6) + bytes(6)
START = len(nbd.GREETING) + 2 * 20 + 12


def request(kind: int, cookie: int, offset: int = 0, length: int = 0) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, kind, cookie, offset, length)


@attrs.define
class Pattern:
    """A disk whose byte at n is n % 251; `slow` offsets take ten seconds, `lost` ones fail."""

    size: int = 1 << 20
    slow: frozenset[int] = frozenset()
    lost: frozenset[int] = frozenset()
    reads: list[tuple[int, int]] = attrs.field(factory=list)

    async def read(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        await trio.sleep(10 if offset in self.slow else 0.1)
        if offset in self.lost:
            raise NotFound(what=f"the chunk at {offset}")
        return pattern(offset, length)


def pattern(offset: int, length: int) -> bytes:
    return bytes(n % 251 for n in range(offset, offset + length))


class Client:
    def __init__(self, stream):
        self.stream = stream
        self.buffer = b""

    async def take(self, count: int) -> bytes:
        while len(self.buffer) < count:
            data = await self.stream.receive_some()
            assert data, "the server hung up"
            self.buffer += data
        taken, self.buffer = self.buffer[:count], self.buffer[count:]
        return taken

    async def start(self) -> None:
        await self.stream.send_all(HELLO)
        await self.take(START)

    async def answer(self, length: int) -> tuple[int, int, bytes]:
        _, error, cookie = struct.unpack(">IIQ", await self.take(16))
        return cookie, error, b"" if error else await self.take(length)


@pytest.fixture
def ends():
    ours, theirs = trio.testing.memory_stream_pair()
    return Client(ours), theirs


async def test_quick_reads_overtake_slow_ones_and_the_stall_is_told(nursery, autojump_clock, ends):
    client, theirs = ends
    told: list[tuple[float, bool]] = []
    nursery.start_soon(
        nbd.serve, theirs, Pattern(slow=frozenset({0})), lambda s: told.append((trio.current_time(), s)), 2.0
    )
    await client.start()
    began = trio.current_time()
    await client.stream.send_all(request(nbd.READ, 1, 0, 512) + request(nbd.READ, 2, 4096, 1000))
    assert await client.answer(1000) == (2, 0, pattern(4096, 1000))
    assert await client.answer(512) == (1, 0, pattern(0, 512))
    await client.stream.send_all(request(nbd.DISC, 3))
    await trio.testing.wait_all_tasks_blocked()
    assert [(round(at - began, 6), stalled) for at, stalled in told] == [(2.0, True), (10.0, False)]


async def test_a_failing_source_is_an_input_error_and_no_more(nursery, autojump_clock, ends):
    client, theirs = ends
    nursery.start_soon(nbd.serve, theirs, Pattern(lost=frozenset({512})))
    await client.start()
    await client.stream.send_all(request(nbd.READ, 1, 512, 512))
    assert await client.answer(512) == (1, errno.EIO, b"")
    await client.stream.send_all(request(nbd.READ, 2, 1024, 512))
    assert await client.answer(512) == (2, 0, pattern(1024, 512))
    await client.stream.aclose()


async def test_the_last_sector_is_filled_with_zeros(nursery, autojump_clock, ends):
    client, theirs = ends
    nursery.start_soon(nbd.serve, theirs, Pattern(size=700))
    await client.start()
    await client.stream.send_all(request(nbd.READ, 1, 0, 1024))
    assert await client.answer(1024) == (1, 0, pattern(0, 700) + bytes(324))
    await client.stream.aclose()


async def test_noise_ends_the_story_with_bad_frame(autojump_clock, ends):
    client, theirs = ends
    await client.stream.send_all(HELLO + bytes(28))
    with pytest.raises(BadFrame):
        await nbd.serve(theirs, Pattern())


async def test_a_client_that_dies_ends_the_story(autojump_clock, ends):
    client, theirs = ends
    await client.stream.send_all(HELLO + request(nbd.READ, 1, 0, 512))
    await client.stream.aclose()
    await nbd.serve(theirs, Pattern(slow=frozenset({0})))


async def test_the_cache_reads_a_block_once(autojump_clock):
    source = Pattern(size=10_000)
    cache = BlockCache(source, block=4096, most=3)
    got: dict[int, bytes] = {}

    async def read(offset: int) -> None:
        got[offset] = await cache.read(offset, 100)

    async with trio.open_nursery() as nursery:
        for offset in (0, 100, 4050, 4200, 9900):
            nursery.start_soon(read, offset)
    assert got == {offset: pattern(offset, 100) for offset in got}
    assert sorted(source.reads) == [(0, 4096), (4096, 4096), (8192, 1808)]
    await cache.read(8192, 1000)
    assert len(source.reads) == 3, "the block read last is kept"


async def test_a_read_that_fails_in_the_cache_is_tried_again(autojump_clock):
    source = Pattern(lost=frozenset({0}))
    cache = BlockCache(source, block=4096)
    for _ in range(2):
        with pytest.raises(NotFound):
            await cache.read(0, 10)
    assert len(source.reads) == 2


async def test_a_client_that_leaves_ends_the_story_without_hanging_up(autojump_clock, ends):
    client, theirs = ends
    await client.stream.send_all(HELLO + request(nbd.READ, 1, 0, 512) + request(nbd.DISC, 2))
    with trio.fail_after(1):
        await nbd.serve(theirs, Pattern(slow=frozenset({0})))
