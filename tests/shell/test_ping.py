"""Does a ping tell by which way it went, when that changes, and who cannot be reached?"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from p2pgrid.errors import GridError, Misused, NotAuthorised, NotFound, Unreachable
from p2pgrid.hole_punch.bulk import Links, Way, open_links
from p2pgrid.hole_punch.greeting import bare
from p2pgrid.ids import PeerId
from p2pgrid.node import commands
from p2pgrid.node import links as node_links
from p2pgrid.node.links import find, ping, rows
from p2pgrid.scheduler import messages as m
from tests.grid_processes import command, open_grid, p2pnode
from tests.lone_node import Lone, open_lone
from tests.memory_network import MemoryNetwork

LOOPBACK = (("127.0.0.1", 0),)
STRANGER = "12D3KooWJWoaqZhDaoEFshF7Rh1bpY9ohihFhzcW6d69Lr2NASuq"


@attrs.define
class Rooms:
    """What `ping` needs of an exchange."""

    links: Links
    network: MemoryNetwork
    learned: list[PeerId] = attrs.field(factory=list)

    def learn(self, peer: PeerId, addresses: Any) -> None:
        self.learned.append(peer)
        self.network.learn(peer, list(addresses))


@attrs.define
class Known:
    """What would be the coordinator: it knows these nodes, or refuses to tell."""

    views: list[m.NodeView] = attrs.field(factory=list)
    refuses: bool = False

    async def nodes(self) -> list[m.NodeView]:
        await trio.lowlevel.checkpoint()
        if self.refuses:
            raise NotAuthorised(why="nodes needs the role of a submitter")
        return self.views


@attrs.define
class Pair:
    lone: Lone
    links: Links
    other: MemoryNetwork
    others: Links
    known: Known
    told: list[dict[str, Any]] = attrs.field(factory=list)

    async def tell(self, event: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        self.told.append(event["ping"])

    async def ping(self, peer: str = "ann", count: int = 2, until_direct: bool = False) -> Any:
        args = {"peer": peer, "count": count, "until_direct": until_direct}
        return await ping(self.lone.node, args, self.tell)


@contextlib.asynccontextmanager
async def open_pair(home: Path) -> AsyncIterator[Pair]:
    """A node, and another one called ann."""
    async with open_lone(home) as lone:
        mine: Any = lone.node.network
        other = lone.world.join("ann-id")
        view = m.NodeView("ann-id", "ann", ("worker",), True, 1.0, addresses=tuple(other.addresses))
        me = m.NodeView(mine.me, "me", ("worker",), True, 1.0)
        known = Known([me, view])
        async with open_links(mine, LOOPBACK) as links, open_links(other, LOOPBACK) as others:
            lone.node.exchange = Rooms(links, mine)  # type: ignore[assignment]
            lone.node.coordinator = known  # type: ignore[assignment]
            with trio.fail_after(20):
                yield Pair(lone, links, other, others, known)


async def bring(pair: Pair, way: Way, via: PeerId | None = None) -> None:
    """Have the link of both go on by `way`."""
    async with contextlib.AsyncExitStack() as stack:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await stack.enter_async_context(listener)
        near = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        far = await listener.accept()

    async def one(links: Links, sock: socket.socket, peer: PeerId, accepts: bool) -> None:
        await links.bring(sock, peer, way, accepts=accepts, via=via)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, pair.links, bare(near.socket), pair.other.me, False)
        nursery.start_soon(one, pair.others, bare(far.socket), pair.lone.node.network.me, True)


async def test_each_answer_is_told_with_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_links, "INTERVAL", 0.01)
    async with open_pair(tmp_path / "home") as pair:
        said = await pair.ping(count=3)
        assert said["pings"] == pair.told
        assert (said["peer"], said["name"], said["answered"], said["way"]) == ("ann-id", "ann", 3, "direct")
        assert [(row["number"], row["way"], row["near"]) for row in pair.told] == [
            (n, "direct", True) for n in (1, 2, 3)
        ]
        assert 0 < said["min"] <= said["median"] <= said["max"] < 3
        (row,) = rows(pair.lone.node)
        assert (row["peer"], row["way"], row["via"], row["connected"]) == ("ann-id", "direct", None, True)
        assert row["delay"] in [ping["seconds"] for ping in pair.told]
        assert row["sent"] > 0
        assert row["received"] > 0
        assert 0 < row["since"] < 20


async def test_until_direct_ends_with_the_upgrade_and_does_not_wait_for_the_next_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_links, "INTERVAL", 1000.0)
    async with open_pair(tmp_path / "home") as pair:
        relay = PeerId("relay-id")
        await bring(pair, Way.RELAYED, relay)
        answers: list[Any] = []

        async def watch() -> None:
            answers.append(await pair.ping(count=60, until_direct=True))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            while not pair.told:
                await trio.lowlevel.checkpoint()
            await bring(pair, Way.PUNCHED)
        (said,) = answers
        assert [(row["way"], row["via"]) for row in said["pings"]] == [("relayed", relay), ("punched", None)]
        assert said["direct_after"] == said["pings"][-1]["after"]
        assert pair.links.paths == []
        # One that is direct already is pinged once.
        assert len((await pair.ping(count=60, until_direct=True))["pings"]) == 1


async def test_until_direct_gives_up_after_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_links, "INTERVAL", 0.01)
    async with open_pair(tmp_path / "home") as pair:
        await bring(pair, Way.RELAYED, PeerId("relay-id"))
        said = await pair.ping(count=3, until_direct=True)
        assert (len(said["pings"]), said["way"], said["direct_after"]) == (3, "relayed", None)


async def test_who_cannot_be_reached_is_told_at_once(tmp_path: Path) -> None:
    async with open_pair(tmp_path / "home") as pair:
        pair.lone.world.down.add(pair.other.me)
        with pytest.raises(Unreachable):
            await pair.ping()
        assert pair.told == []
        assert pair.links.paths == []


async def test_silence_is_told_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_links, "INTERVAL", 0.01)
    async with open_pair(tmp_path / "home") as pair:

        async def silent(peer: PeerId) -> Any:
            await trio.lowlevel.checkpoint()
            raise Unreachable(who=peer, why="no answer in 3 s")

        monkeypatch.setattr(pair.links, "ping", silent)
        said = await pair.ping()
        assert (said["answered"], said["way"], len(said["pings"])) == (0, None, 2)
        assert pair.told[0]["why"] == "no answer in 3 s"


async def test_whom_a_person_may_name(tmp_path: Path) -> None:
    async with open_pair(tmp_path / "home") as pair:
        node = pair.lone.node
        assert await find(node, "ann") == await find(node, "ann-id") == ("ann-id", "ann")
        assert pair.lone.node.exchange.learned == ["ann-id", "ann-id"]  # type: ignore[attr-defined]
        assert await find(node, STRANGER) == (STRANGER, "")
        assert await find(node, "coordinator") == (node.grid, "")
        with pytest.raises(Misused, match="itself"):
            await find(node, "me")
        with pytest.raises(NotFound, match="'bob'"):
            await find(node, "bob")
        pair.known.views.append(m.NodeView("ann-2", "ann", ("worker",), True, 1.0))
        with pytest.raises(Misused, match="2 nodes"):
            await find(node, "ann")
        pair.known.refuses = True
        with pytest.raises(NotFound, match="role of a submitter"):
            await find(node, "ann")
        assert await find(node, STRANGER) == (STRANGER, "")
        with pytest.raises(Misused, match="count"):
            await pair.ping(STRANGER, count=0)


PINGED = {
    "peer": STRANGER, "name": "ann", "answered": 1, "way": "relayed", "via": STRANGER, "min": 0.1,
    "median": 0.1, "max": 0.1, "direct_after": None, "pings": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("said", "words", "code"),
    [
        ({}, {}, 0),
        ({}, {"until_direct": True}, 5),
        ({"way": "punched"}, {"until_direct": True}, 0),
        ({"answered": 0, "pings": [{"why": "no answer in 3 s"}]}, {}, 6),
    ],
)
def test_what_a_ping_exits_with(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    said: dict[str, Any],
    words: dict[str, Any],
    code: int,
) -> None:
    asked: list[dict[str, Any]] = []

    def call(home: Path, op: str, args: dict[str, Any], on_event: Any) -> dict[str, Any]:
        asked.append(args)
        return PINGED | said

    monkeypatch.setattr(commands.api, "call", call)
    try:
        ended = commands.ping("ann", as_json=True, **words)
    except GridError as error:
        ended = error.exit_code
    assert ended == code
    assert asked == [{"peer": "ann", "count": 60 if words else 4, "until_direct": bool(words)}]
    assert json.loads(capsys.readouterr().out) == {"schema": 1, **PINGED, **said}


def test_ping_on_the_command_line(tmp_path: Path) -> None:
    with open_grid(tmp_path, 0) as grid:
        bob = grid.member("bob", "submitter")
        said = p2pnode("ping", "bob", "--count", 2, home=grid.home)
        assert said.code == 0, said.err
        first, second, end = said.out.splitlines()
        assert first.split()[:3] == ["1", "direct,", "near"]
        assert second.split()[0] == "2"
        assert end.startswith("2 of 2 answered")
        told = p2pnode("ping", bob.peer, "--until-direct", "--json", home=grid.home)
        assert (told.code, told.json["name"], told.json["way"], told.err) == (0, "bob", "direct", "")
        status = p2pnode("status", "--json", home=bob.home).json
        assert [link["peer"] for link in status["links"]] == [grid.coordinator.peer]
        assert status["membership_ends"] > 0
        assert "direct, near" in p2pnode("status", home=bob.home).out
        for words, code in (
            (("nobody",), 3),
            ((grid.coordinator.peer,), 2),
            (("bob", "--count", 0), 2),
            ((STRANGER,), 6),
        ):
            wrong = p2pnode("ping", *words, home=grid.home)
            assert (wrong.code, wrong.out) == (code, ""), words
            assert wrong.err.startswith("error: ")
        assert p2pnode("ping", "bob", home=tmp_path / "nowhere").code == 6
        bob.kill()
        gone = p2pnode("ping", "bob", "--count", 1, home=grid.home)
        assert gone.code == 6
        bob.restart()
        with command("p2pnode", "ping", "bob", "--count", 1000, home=grid.home) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("  1  ")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        assert (process.returncode, "Traceback" in out + err) == (130, False)
