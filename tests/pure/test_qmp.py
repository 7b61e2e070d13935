"""QMP lines decode the same in any cut, and noise is a `BadFrame`."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.errors import BadFrame
from p2pgrid.vm.qmp import LINE_MAX, Event, Greeting, Messages, Reply, command

TALK = b"".join([
    b'{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": ["oob"]}}\r\n',
    b'{"return": {}, "id": 1}\r\n',
    b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN",'
    b' "data": {"guest": true, "reason": "guest-shutdown"}}\r\n',
    b'{"id": 2, "error": {"class": "CommandNotFound", "desc": "no such command"}}\r\n',
    b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\r\n',
    b'{"event": "STOP"}\r\n',
])  # fmt: skip
MEANS = [
    Greeting(),
    Reply(1, {}),
    Event("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}),
    Reply(2, error="no such command"),
    Reply(-1, error="JSON parse error"),
    Event("STOP"),
]


@given(st.lists(st.integers(0, len(TALK)), max_size=20))
def test_any_cut_gives_the_same_messages(places):
    edges = [0, *sorted(places), len(TALK)]
    messages = Messages()
    got = [m for a, b in pairwise(edges) for m in messages.feed(TALK[a:b])]
    assert got == MEANS


@pytest.mark.parametrize(
    "line",
    [
        b"hello\n",
        b"[]\n",
        b"{}\n",
        b'{"event": 1}\n',
        b'{"return": {}}\n',
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
    ],
)
def test_what_is_not_qmp_is_a_bad_frame(line):
    with pytest.raises(BadFrame):
        list(Messages().feed(line))


def test_an_endless_line_is_a_bad_frame():
    with pytest.raises(BadFrame):
        list(Messages().feed(b" " * (LINE_MAX + 1)))


@given(st.binary(max_size=200))
def test_any_bytes_are_messages_or_a_bad_frame(noise):
    try:
        for message in Messages().feed(noise + b"\n"):
            assert isinstance(message, Greeting | Reply | Event)
    except BadFrame:
        pass


def test_a_command_is_one_line():
    line = command("stop", 3)
    assert line.endswith(b"\n")
    assert json.loads(line) == {"execute": "stop", "id": 3}
    assert json.loads(command("x", 4, {"a": "b\n"})) == {"execute": "x", "id": 4, "arguments": {"a": "b\n"}}
