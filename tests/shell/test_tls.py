"""Does TLS between two buffers in memory lose, add or hold back anything?"""

from __future__ import annotations

import select
import socket
import ssl
from collections.abc import Iterator
from random import Random

import pytest

from p2pgrid.hole_punch.certificate import Certificate
from p2pgrid.hole_punch.tls import RECORD, Tls

THERE = Certificate.make()


def pair() -> tuple[Tls, Tls]:
    a, b = socket.socketpair()
    for sock in (a, b):
        sock.setblocking(False)
    return (
        Tls(THERE.dialling, a, server=False),
        Tls(THERE.accepting, b, server=True),
    )


def shaken(here: Tls, there: Tls) -> None:
    wanted = [select.POLLIN, select.POLLIN]
    while any(wanted):
        wanted = [here.shake(), there.shake()]


@pytest.fixture
def ends() -> Iterator[tuple[Tls, Tls]]:
    here, there = pair()
    shaken(here, there)
    yield here, there
    here.close()
    there.close()


def received(tls: Tls, chance: Random) -> bytes:
    """All that has come, read in pieces of any size."""
    got = b""
    while True:
        space = memoryview(bytearray(chance.randint(1, 3 * RECORD)))
        count = tls.read(space, chance.choice((RECORD, 1 << 18)))
        got += space[:count]
        if not count and not tls.more:
            return got


def read_on(tls: Tls, got: bytearray) -> None:
    """Until it raises."""
    space = memoryview(bytearray(100))
    while True:
        got += space[: tls.read(space)]


@pytest.mark.parametrize("seed", range(5))
def test_every_byte_arrives_in_order_both_ways(ends: tuple[Tls, Tls], seed: int) -> None:
    chance = Random(seed)
    for here, there in (ends, ends[::-1]):
        sent = chance.randbytes(1 << 20)
        at, got = 0, b""
        while at < len(sent) or len(got) < len(sent):
            while at < len(sent) and here.flush():  # until the socket takes no more
                size = chance.randint(1, RECORD)
                here.seal(sent[at : at + size])
                at += size
            here.flush()
            got += received(there, chance)
        assert got == sent


def test_what_was_sent_before_the_end_arrives(ends: tuple[Tls, Tls]) -> None:
    here, there = ends
    here.seal(b"a" * RECORD)
    here.seal(b"the last")
    assert here.flush()
    here.close()
    got = bytearray()
    with pytest.raises(EOFError):
        read_on(there, got)
    assert got == b"a" * RECORD + b"the last"


def test_bytes_that_were_changed_on_the_way_are_an_error(ends: tuple[Tls, Tls]) -> None:
    here, there = ends
    here.seal(b"true")
    records, other = socket.socketpair()
    here.socket, sent = records, here.socket
    assert here.flush()
    changed = bytearray(other.recv(1000))
    changed[-1] ^= 1
    sent.send(changed)
    with pytest.raises(ssl.SSLError):
        there.read(memoryview(bytearray(10)))
    for sock in (records, other, sent):
        sock.close()
