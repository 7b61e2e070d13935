"""Is what is said of calls on the wire what the page says?"""

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.calling_messages import CONNECTED, REFUSED, TOKEN, Call, Told, decode, encode

PAGE = Path(__file__).parents[2] / "docs" / "protocols" / "calling.md"
SAID = {
    "CALL, id 7, port 4001, token 00 to 0f": Call(7, 4001, bytes(range(TOKEN))),
    "TOLD, id 7, connected": Told(7, CONNECTED),
    "TOLD, id 4294967295, refused": Told(2**32 - 1, REFUSED),
}


def test_the_page_has_the_vectors():
    vectors = dict(re.findall(r"^\| (.+?) \| `([0-9a-f]+)` \|$", PAGE.read_text(), re.MULTILINE))
    assert {name: bytes.fromhex(text) for name, text in vectors.items()} == {
        name: encode(message) for name, message in SAID.items()
    }


messages = st.builds(
    Call, st.integers(0, 2**32 - 1), st.integers(0, 65535), st.binary(min_size=TOKEN, max_size=TOKEN)
) | st.builds(Told, st.integers(0, 2**32 - 1), st.integers(0, 255))


@given(messages)
def test_what_is_written_is_read(message: Call | Told):
    data = encode(message)
    assert decode(data) == message
    for wrong in (data[:-1], data + b"\0"):
        with pytest.raises(BadFrame):
            decode(wrong)


@given(st.binary(max_size=40))
def test_noise_is_only_ever_a_bad_frame(data: bytes):
    with contextlib.suppress(BadFrame):
        message = decode(data)
        assert message is None or encode(message) == data
