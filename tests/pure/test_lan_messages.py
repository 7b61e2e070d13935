"""Do switches understand each other as the page says, and nothing else?"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.errors import BadFrame, Misused
from p2pgrid.hole_punch.lan import packets as p
from p2pgrid.hole_punch.lan.messages import FRAMES_MAX, Frames, Knock, decode, head
from p2pgrid.hole_punch.lan.segment import (
    NUMBER,
    PLACES_MAX,
    Segment,
    ip_of,
    mac_of,
    text_of_ip,
    text_of_mac,
)

PAGE = (Path(__file__).parents[2] / "docs" / "protocols" / "lan.md").read_text()
SEGMENT = Segment("k7q2m", (0, 10, 20))


def block(name: str) -> str:
    (found,) = re.findall(rf"```{name}\n(.*?)```", PAGE, re.DOTALL)
    return found


def vector(name: str) -> bytes:
    return bytes.fromhex(re.sub(r"#.*", "", block(name)))


def test_the_page_shows_what_is_sent():
    frames = [p.ethernet(mac_of(1), mac_of(0), p.IPV6, body) for body in (b"\x60hi", b"\x60!")]
    data = b"".join(struct.pack("!I", len(frame)) + frame for frame in frames)
    assert head(Frames, SEGMENT.number) + data == vector("frames")
    assert decode(vector("frames")) == Frames(SEGMENT.number, data)
    assert head(Knock, SEGMENT.number) == vector("knock")
    assert decode(memoryview(vector("knock"))) == Knock(SEGMENT.number)


def test_the_page_shows_who_has_which_address():
    rows = [line.split() for line in block("addresses").strip().splitlines()]
    assert [
        [place, text_of_mac(mac_of(int(place))), text_of_ip(ip_of(int(place)))] for place, *_ in rows
    ] == rows
    assert int(rows[-1][0]) == PLACES_MAX - 1


@given(st.binary(min_size=NUMBER, max_size=NUMBER), st.binary(min_size=1, max_size=200))
def test_what_is_sent_is_understood(number: bytes, data: bytes):
    assert decode(head(Frames, number) + data) == Frames(number, data)
    assert decode(head(Knock, number)) == Knock(number)


@given(st.binary(min_size=1, max_size=40))
def test_noise_is_only_ever_a_bad_frame(noise: bytes):
    try:
        message = decode(noise)
    except BadFrame:
        return
    assert head(type(message), message.segment) + getattr(message, "data", b"") == noise


@pytest.mark.parametrize(
    "bad",
    [
        head(Frames, bytes(8)),
        head(Frames, bytes(8)) + bytes(FRAMES_MAX + 1),
        head(Knock, bytes(8)) + b"!",
        bytes([82]) + bytes(20),
        bytes([80, 1, 2]),
    ],
)
def test_beyond_the_limits_is_a_bad_frame(bad: bytes):
    with pytest.raises(BadFrame):
        decode(bad)


def test_a_job_with_more_tasks_than_addresses_has_no_lan():
    with pytest.raises(Misused, match="64516"):
        Segment("j", tuple(range(PLACES_MAX + 1)))
