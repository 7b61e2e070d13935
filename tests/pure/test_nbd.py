"""The NBD export answers any cut of any conversation the same, and noise with `BadFrame`."""

import errno
import struct
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from p2pgrid.errors import BadFrame
from p2pgrid.vm import nbd
from p2pgrid.vm.nbd import Bye, Export, Read

SIZE = 1 << 20


def option(kind: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", kind, len(data)) + data


def go(name: bytes = b"", kind: int = nbd.GO) -> bytes:
    return option(kind, struct.pack(">I", len(name)) + name + b"\0\0")


def request(kind: int, cookie: int, offset: int = 0, length: int = 0) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, kind, cookie, offset, length)


HELLO = b"\0\0\0\3"


def steps(data: bytes) -> list[nbd.Step]:
    return list(Export(SIZE).feed(data))


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(p % (len(data) + 1) for p in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


CONVERSATION = b"".join([
    HELLO, option(3), go(b"disk", nbd.INFO), go(),
    request(nbd.READ, 1, 512, 1024), request(nbd.FLUSH, 2), request(nbd.WRITE, 3, 0, 700) + bytes(700),
    request(nbd.READ, 4, SIZE - 512, 512), request(nbd.DISC, 5),
])  # fmt: skip


def test_a_whole_conversation():
    listed, info, gone, *transmission = steps(CONVERSATION)
    assert listed == struct.pack(">QIII", 0x3E889045565A9, 3, nbd.UNSUPPORTED, 0)
    size_and_flags = struct.pack(">HQH", 0, SIZE, nbd.HAS_FLAGS | nbd.READ_ONLY | nbd.SEND_FLUSH)
    assert isinstance(info, bytes)
    assert size_and_flags in info
    assert gone == info.replace(struct.pack(">I", nbd.INFO), struct.pack(">I", nbd.GO))
    assert transmission == [
        Read(1, 512, 1024),
        nbd.reply(2),
        nbd.reply(3, error=errno.EPERM),
        Read(4, SIZE - 512, 512),
        Bye(),
    ]


@given(st.lists(st.integers(0, 1 << 16), max_size=30))
@example([len(CONVERSATION)])  # an empty piece after the end
def test_any_cut_gives_the_same_steps(places):
    export = Export(SIZE)
    assert [s for piece in cut(CONVERSATION, places) for s in export.feed(piece)] == steps(CONVERSATION)


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_export_name_starts_at_once(flags):
    first, *rest = steps(flags.to_bytes(4, "big") + option(nbd.EXPORT_NAME, b"x") + request(nbd.DISC, 1))
    assert isinstance(first, bytes)
    assert len(first) == (10 if flags & nbd.NO_ZEROES else 134)
    assert rest == [Bye()]


def test_abort_is_acknowledged():
    assert steps(HELLO + option(nbd.ABORT)) == [struct.pack(">QIII", 0x3E889045565A9, 2, 1, 0), Bye()]


@pytest.mark.parametrize(
    ("offset", "length"), [(SIZE, 512), (SIZE - 1, 2), (2**64 - 512, 512), (0, 0), (2**63, 1)]
)
def test_reads_outside_the_disk_are_refused(offset, length):
    assert steps(HELLO + go() + request(nbd.READ, 9, offset, length))[-1] == nbd.reply(9, error=errno.EINVAL)


@pytest.mark.parametrize("kind", [1, 4, 5, 6, 7, 99])
def test_nothing_but_reads_and_flushes_is_allowed(kind):
    assert steps(HELLO + go() + request(kind, 9))[-1] == nbd.reply(9, error=errno.EPERM)


@pytest.mark.parametrize(
    "noise",
    [
        b"\0\0\1\0",
        HELLO + b"IHAVEOP!" + bytes(8),
        HELLO + b"IHAVEOPT" + struct.pack(">II", 7, nbd.OPTION_MAX + 1),
        HELLO + go() + bytes(28),
        HELLO + go() + request(nbd.READ, 1, 0, nbd.TRANSFER_MAX + 1),
        HELLO + go() + request(nbd.WRITE, 1, 0, 2**32 - 1),
    ],
)
def test_noise_is_a_bad_frame(noise):
    with pytest.raises(BadFrame):
        steps(noise)


def test_malformed_go_is_invalid_and_the_talk_goes_on():
    bad = option(nbd.GO, b"\0\0\0\xff\0\0")
    first, _, last = steps(HELLO + bad + go() + request(nbd.FLUSH, 1))
    assert first == struct.pack(">QIII", 0x3E889045565A9, 7, nbd.INVALID, 0)
    assert last == nbd.reply(1)


@given(st.binary(max_size=300), st.sampled_from([b"", HELLO, HELLO + go()]))
def test_any_bytes_end_in_steps_or_bad_frame(noise, before):
    export = Export(SIZE)
    try:
        for step in export.feed(before + noise):
            if isinstance(step, Read):
                assert 0 < step.length <= nbd.TRANSFER_MAX
                assert step.offset + step.length <= SIZE
    except BadFrame:
        pass
