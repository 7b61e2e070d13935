"""Does any cut of the bytes give the same messages, and noise nothing but `BadFrame`?"""

import itertools
import re
from pathlib import Path
from typing import Annotated

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.errors import BadFrame
from p2pgrid.wire import BODY_MAX, HEADER, Frames, body_length, decode, encode

PAGE = Path(__file__).parents[2] / "docs" / "protocols" / "control.md"


class Told(msgspec.Struct, tag="told", frozen=True):
    indices: list[int]


class Asked(msgspec.Struct, tag="asked", frozen=True):
    index: Annotated[int, msgspec.Meta(ge=0)]
    why: str = ""


Any = Told | Asked
messages = st.lists(
    st.builds(Told, st.lists(st.integers(-(2**63), 2**64 - 1)))
    | st.builds(Asked, st.integers(0, 2**63 - 1), st.text()),
    max_size=8,
)


def cut(data, places):
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(messages, st.lists(st.integers(min_value=0), max_size=30))
def test_any_cut_gives_the_same_messages(sent, places):
    data = b"".join(map(encode, sent))
    frames = Frames()
    got = [decode(body, Any) for piece in cut(data, places) for body in frames.feed(piece)]
    assert got == sent


@given(messages)
def test_byte_by_byte_each_message_comes_with_its_last_byte(sent):
    frames, sizes, got = Frames(), [], []
    for place, byte in enumerate(b"".join(map(encode, sent)), start=1):
        for body in frames.feed(bytes([byte])):
            sizes.append(place)
            got.append(decode(body, Any))
    assert got == sent
    assert sizes == [sum(len(encode(m)) for m in sent[: n + 1]) for n in range(len(sent))]


@given(st.binary(max_size=4096), st.lists(st.integers(min_value=0), max_size=5))
def test_noise_is_a_bad_frame_or_incomplete(noise, places):
    frames = Frames()
    try:
        for piece in cut(noise, places):
            for body in frames.feed(piece):
                decode(body, Any)
    except BadFrame:
        pass


@given(st.binary(max_size=512))
def test_a_body_of_noise_is_a_bad_frame_or_a_message(body):
    try:
        message = decode(body, Any)
    except BadFrame:
        return
    assert isinstance(message, Told | Asked)


def test_deep_nesting_and_huge_counts_are_bad_frames():
    for body in (
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
    ):
        with pytest.raises(BadFrame):
            decode(body, Any)


def test_what_was_not_agreed_on_is_a_bad_frame():
    for wrong in (
        {"type": "asked", "index": -1},
        {"type": "nobody"},
        {"index": 1},
        {"type": "told"},
        1,
        None,
    ):
        with pytest.raises(BadFrame):
            decode(msgspec.msgpack.encode(wrong), Any)


def test_a_length_above_the_limit_is_refused_before_its_body_is_awaited():
    assert body_length(BODY_MAX.to_bytes(HEADER, "big")) == BODY_MAX
    for length in (BODY_MAX + 1, 2**32 - 1):
        with pytest.raises(BadFrame, match="longer than"):
            list(Frames().feed(length.to_bytes(HEADER, "big")))


def test_the_longest_message_fits_and_one_byte_more_is_our_own_mistake():
    room = BODY_MAX - len(encode(Asked(0))) - HEADER
    longest = Asked(0, "x" * room)
    assert list(Frames().feed(encode(longest)))
    with pytest.raises(AssertionError):
        encode(Asked(0, "x" * (BODY_MAX + 1)))


# --- the page --------------------------------------------------------------------------


def vectors(kind):
    found = re.findall(rf"^```{kind}\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert found, f"no {kind} vectors on the page"
    return found


def from_hex(text):
    return bytes.fromhex(re.sub(r"#.*", "", text))


def test_the_frames_of_the_page():
    page = dict(zip(vectors("message"), map(from_hex, vectors("frame")), strict=True))
    expected = [Asked(7, "why not"), Told([1, 300]), Asked(0)]
    assert [name.strip() for name in page] == [repr(message) for message in expected]
    assert list(page.values()) == [encode(message) for message in expected]
    frames = Frames()
    assert [decode(body, Any) for body in frames.feed(b"".join(page.values()))] == expected


def test_the_bad_frames_of_the_page():
    for text in vectors("bad-frame"):
        with pytest.raises(BadFrame):
            [decode(body, Any) for body in Frames().feed(from_hex(text))]


def test_the_page_lists_every_protocol_of_the_code():
    code = Path(__file__).parents[2] / "p2pgrid"
    spoken = {
        name
        for path in code.rglob("*.py")
        for name in re.findall(r'"(/p2pgrid/[a-z]+/\d+)"', path.read_text())
    }
    assert spoken
    assert spoken == set(re.findall(r"^\| `(/p2pgrid/[a-z]+/\d+)`", PAGE.read_text(), re.M))
