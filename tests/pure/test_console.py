"""The console keeps its head and its tail, the status channel its first `exit N`, in any cut."""

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.vm.console import Console, ExitStatus


def kept(pieces: list[bytes], most: int) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder, "console")
        with Console(path, most) as console:
            for piece in pieces:
                console.write(piece)
        return path.read_bytes()


@given(st.lists(st.binary(max_size=40), max_size=30), st.integers(0, 300))
def test_head_and_tail_are_kept(pieces, most):
    said = b"".join(pieces)
    got = kept(pieces, most)
    if len(said) <= most:
        assert got == said
        return
    head, tail = most // 2, most - most // 2
    note = b"\n[%d bytes left out]\n" % (len(said) - most)
    assert got == said[:head] + note + said[len(said) - tail :]


def status(*pieces: bytes) -> int | None:
    told = ExitStatus()
    for piece in pieces:
        told.feed(piece)
    return told.value


@pytest.mark.parametrize(
    ("said", "value"),
    [
        (b"exit 0\n", 0),
        (b"exit 255\r\n", 255),
        (b"hello\nexit 7\nexit 0\n", 7),
        (b"exit 256\nexit 3\n", 3),
        (b"exit 7", None),
        (b"exit -1\n", None),
        (b"exit 7 \n", None),
        (b" exit 7\n", None),
        (b"exit\n", None),
        (b"x" * 10_000 + b"exit 7\n", None),
        (b"x" * 10_000 + b"\nexit 7\n", 7),
        (b"\xff\x00\nexit 9\n", 9),
        (b"exit \xd9\xa7\n", None),
    ],
)
def test_the_first_wellformed_line_counts(said, value):
    assert status(said) == value
    assert status(*(said[i : i + 1] for i in range(len(said)))) == value


@given(st.binary(), st.lists(st.integers(0, 400)))
def test_any_cut_tells_the_same(noise, places):
    said = noise + b"\nexit 5\n" + noise
    edges = [0, *sorted(p % len(said) for p in places), len(said)]
    assert status(*(said[a:b] for a, b in pairwise(edges))) == status(said)
