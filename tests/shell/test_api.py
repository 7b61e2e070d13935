"""The local API: one answer a request, errors as they are, and hanging up cancels."""

import json
import os
import socket
import stat
import threading
from contextlib import asynccontextmanager

import pytest
import trio

from p2pgrid.errors import Misused, NotFound
from p2pgrid.node import api


class Ops:
    """A few operations, and what became of them."""

    def __init__(self):
        self.cancelled = trio.Event()
        self.started = trio.Event()

    async def echo(self, args, tell):
        for i in range(args.get("events", 0)):
            await tell({"step": i})
        return args

    async def forever(self, args, tell):
        self.started.set()
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled.set()

    async def refuse(self, args, tell):
        raise NotFound(what="a unicorn")

    async def refuse_in_a_group(self, args, tell):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.refuse, args, tell)

    async def fail(self, args, tell):
        raise ZeroDivisionError

    async def disk(self, args, tell):
        (args["folder"] / "x").read_text()  # a str has no folder: a bug, told as one

    async def no_permission(self, args, tell):
        os.stat("/proc/1/nowhere/x")

    def table(self):
        names = ("echo", "forever", "refuse", "refuse_in_a_group", "fail", "disk", "no_permission")
        return {name: getattr(self, name) for name in names}


@asynccontextmanager
async def served(home):
    home.mkdir(parents=True, exist_ok=True)
    ops = Ops()
    async with api.serve_api(home, ops.table()):
        yield ops


async def call(home, op, args=None, on_event=None):
    return await trio.to_thread.run_sync(api.call, home, op, args, on_event)


async def raw(home, data, half_close=False):
    """What the daemon answers to these bytes."""

    def talk():
        with api.connected(home) as line:
            line.sendall(data)
            if half_close:
                line.shutdown(socket.SHUT_WR)
            with line.makefile("rb") as answers:
                return answers.read()

    return await trio.to_thread.run_sync(talk)


async def test_an_answer_comes_after_its_events(tmp_path):
    events = []
    async with served(tmp_path):
        assert await call(tmp_path, "echo", {"events": 3, "x": "é\n"}, events.append) == {
            "events": 3,
            "x": "é\n",
        }
    assert events == [{"step": 0}, {"step": 1}, {"step": 2}]


async def test_a_data_directory_may_have_a_very_long_path(tmp_path):
    home = tmp_path / ("long" * 30) / ("longer" * 20)
    async with served(home):
        assert await call(home, "echo", {"a": 1}) == {"a": 1}
        assert api.daemon_runs(home)
        assert stat.S_IMODE(os.stat(home / api.SOCKET).st_mode) == 0o600
    assert not (home / api.SOCKET).exists()
    assert not api.daemon_runs(home)


@pytest.mark.parametrize("op", ["refuse", "refuse_in_a_group"])
async def test_an_error_arrives_as_it_was_raised(tmp_path, op):
    async with served(tmp_path):
        with pytest.raises(api.Told) as told:
            await call(tmp_path, op)
    assert (told.value.kind, told.value.code) == ("NotFound", 3)
    assert "a unicorn" in str(told.value)


@pytest.mark.parametrize("op", ["fail", "disk", "no_permission"])
async def test_a_bug_in_one_answer_ends_neither_daemon_nor_others(tmp_path, op):
    async with served(tmp_path):
        with pytest.raises(api.Told) as told:
            await call(tmp_path, op, {"folder": "x"})
        assert told.value.code in (1, 2)
        assert await call(tmp_path, "echo", {"a": 1}) == {"a": 1}


@pytest.mark.parametrize(
    "request_",
    [b"\n", b"[" * 100_000 + b"\n",
     b"nonsense\n", b"[]\n", b'"x"\n', b"{}\n", b'{"op": "echo"}\n', b'{"op": [], "args": {}}\n',
     b'{"op": "nonsense", "args": {}}\n', b'{"op": "echo", "args": 5}\n', b"\xff\xfe\n"],
)  # fmt: skip
async def test_what_is_no_request_is_misused(tmp_path, request_):
    async with served(tmp_path):
        answer = json.loads(await raw(tmp_path, request_))
        assert answer["error"]["exit_code"] == 2
        assert await call(tmp_path, "echo", {"a": 1}) == {"a": 1}


@pytest.mark.parametrize("data", [b"", b'{"op": "echo"', b"x" * 70_000])
async def test_half_a_request_gets_no_answer(tmp_path, data):
    async with served(tmp_path):
        assert await raw(tmp_path, data, half_close=True) == b""


async def test_hanging_up_cancels(tmp_path):
    async with served(tmp_path) as ops:
        with api.connected(tmp_path) as line:
            line.sendall(b'{"op": "forever", "args": {}}\n')
            await ops.started.wait()
            assert not ops.cancelled.is_set()
        with trio.fail_after(5):
            await ops.cancelled.wait()
        assert await call(tmp_path, "echo", {"a": 1}) == {"a": 1}


async def test_hanging_up_amid_events_ends_only_that(tmp_path):
    async with served(tmp_path):
        with api.connected(tmp_path) as line:
            line.sendall(b'{"op": "echo", "args": {"events": 100000}}\n')
            assert await trio.to_thread.run_sync(line.recv, 10)
        assert await call(tmp_path, "echo", {"a": 1}) == {"a": 1}


async def test_a_daemon_that_ends_amid_a_request_says_try_again(tmp_path):
    caught = []

    def ask():
        try:
            api.call(tmp_path, "forever")
        except api.Told as told:
            caught.append(told)

    async with served(tmp_path) as ops:
        thread = threading.Thread(target=ask)
        thread.start()
        await ops.started.wait()
    await trio.to_thread.run_sync(thread.join)
    assert [(told.kind, told.code) for told in caught] == [("Ended", 75)]


async def test_many_ask_at_once(tmp_path):
    async with served(tmp_path), trio.open_nursery() as nursery:
        for i in range(20):
            nursery.start_soon(call, tmp_path, "echo", {"events": i})


def test_no_daemon_is_said_so(tmp_path):
    (tmp_path / "file").touch()
    for home in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(api.NoDaemon) as none:
            api.call(home, "status")
        assert none.value.exit_code == 6
        assert "--data-dir" in none.value.advice


def test_a_socket_that_a_killed_daemon_left_is_no_daemon(tmp_path):
    with socket.socket(socket.AF_UNIX) as left, api.socket_path(tmp_path) as name:
        left.bind(name)
    assert (tmp_path / api.SOCKET).exists()
    assert not api.daemon_runs(tmp_path)
    with pytest.raises(api.NoDaemon):
        api.call(tmp_path, "status")


async def test_a_socket_that_was_left_is_replaced(tmp_path):
    (tmp_path / api.SOCKET).touch()
    async with served(tmp_path):
        assert await call(tmp_path, "echo", {"a": 1}) == {"a": 1}


def test_failures_carry_what_to_do():
    told = api.Told.of(api.failure(Misused(why="so"))["error"])
    assert (told.code, told.kind) == (2, "Misused")
    assert "so" in str(told)
