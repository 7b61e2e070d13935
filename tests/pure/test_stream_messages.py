"""Do the messages of streams match the page, survive encoding and refuse noise?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.streams.messages import (
    CREDIT_MAX,
    OPENER,
    Credit,
    Data,
    Datagram,
    Fin,
    Message,
    Open,
    Opened,
    Refused,
    Reset,
    decode,
    encode,
)

PAGE = Path(__file__).parents[2] / "docs" / "protocols" / "streams.md"

VECTORS: dict[str, Message] = {
    "Open": Open(7, 4096, b"tcp 80"),
    "Opened": Opened(7 | OPENER, 0, b""),
    "Refused": Refused(7 | OPENER, 2, "no"),
    "Data": Data(7, b"hello"),
    "Credit": Credit(7 | OPENER, 24576),
    "Fin": Fin(7),
    "Reset": Reset(7 | OPENER, "gone"),
    "Datagram": Datagram(7, b"d"),
}

streams = st.integers(0, 2**32 - 1)
counts = st.integers(0, CREDIT_MAX)
reasons = st.text(max_size=100)
any_message = st.one_of(
    st.builds(Open, streams, counts, st.binary(min_size=1, max_size=1024)),
    st.builds(Opened, streams, counts, st.binary(max_size=1024)),
    st.builds(Refused, streams, st.integers(0, 255), reasons),
    st.builds(Data, streams, st.binary(min_size=1)),
    st.builds(Credit, streams, st.integers(1, CREDIT_MAX)),
    st.builds(Fin, streams),
    st.builds(Reset, streams, reasons),
    st.builds(Datagram, streams, st.binary()),
)


@pytest.mark.parametrize("name", VECTORS)
def test_the_page_shows_what_is_sent(name: str) -> None:
    shown = dict(re.findall(r"^    (\w+) = ([0-9a-f ]+)$", PAGE.read_text(), re.MULTILINE))
    assert set(shown) == set(VECTORS)
    assert encode(VECTORS[name]) == bytes.fromhex(shown[name])
    assert decode(memoryview(bytes.fromhex(shown[name]))) == VECTORS[name]


@given(any_message)
def test_what_is_encoded_decodes_to_the_same(message: Message) -> None:
    assert decode(memoryview(encode(message))) == message


@given(st.one_of(st.binary(max_size=300), st.builds(bytes.__add__, st.sampled_from(
    [bytes((kind,)) for kind in range(64, 80)]), st.binary(max_size=60))))  # fmt: skip
def test_noise_is_only_ever_a_bad_frame(noise: bytes) -> None:
    try:
        message = decode(memoryview(noise))
    except BadFrame:
        return
    assert (message is None and noise[0] not in range(64, 72)) or encode(message) == noise


@pytest.mark.parametrize("why", ["ü" * 400, "\ud800", "x" * 1000])
def test_a_reason_is_cut_to_what_may_travel(why: str) -> None:
    message = decode(memoryview(encode(Reset(1, why))))
    assert isinstance(message, Reset)
    assert len(message.why.encode()) <= 512


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\x43\0\0\0",
        b"\x43\0\0\0\1",
        b"\x43\0\0\0\1" + bytes((256 << 10) + 1),
        b"\x44\0\0\0\1\0\0\0\0",
        b"\x44\0\0\0\1\x7f\0\0\0",
        b"\x45\0\0\0\1\0",
        b"\x40\0\0\0\1\0\0\0\0",
        b"\x40\0\0\0\1\0\0\0\0" + bytes(1025),
        b"\x46\0\0\0\1\xff",
        b"\x42\0\0\0\1",
    ],
)
def test_a_message_out_of_its_bounds_is_a_bad_frame(bad: bytes) -> None:
    with pytest.raises(BadFrame):
        decode(memoryview(bad))
