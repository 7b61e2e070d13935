"""Are the links of a grid's daemons closed to everybody else, and open to members whoever is away?"""

from __future__ import annotations

import base64
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import psutil
import pytest
import trio
from nacl.signing import SigningKey

from p2pgrid.dht.store import Store
from p2pgrid.errors import Unreachable
from p2pgrid.hole_punch.greeting import Allow
from p2pgrid.hole_punch.host import open_host
from p2pgrid.hole_punch.membership import Membership, issue
from p2pgrid.ids import Cid, PeerId
from p2pgrid.node.config import MEMBERSHIP
from p2pgrid.node.identity import Identity
from p2pgrid.node.standing import Standing
from p2pgrid.transfer.exchange import Exchange, open_exchange
from tests.grid_processes import Daemon, Grid, open_grid, p2pgrid, until

DISK = random.Random(4).randbytes(300_000)
HOUR = 3600.0


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grid]:
    with open_grid(tmp_path_factory.mktemp("grid"), 0) as grid:
        yield grid


class Nowhere:
    """An index in which nothing is found."""

    async def find(self, key: bytes, most: int = 20, *, soon: bool = False) -> list[PeerId]:
        await trio.lowlevel.checkpoint()
        return []


@contextlib.asynccontextmanager
async def open_peer(
    folder: Path, seed: bytes, shown: bytes, *known: Daemon, allow: Allow = lambda peer, shown: ""
) -> AsyncIterator[Exchange]:
    """Whoever has that key and shows that, in this process; it takes everybody, or whom `allow` allows."""
    nowhere: Any = Nowhere()
    async with open_host(seed) as host:
        with Store(folder) as store:
            async with open_exchange(
                host, nowhere, store, [("127.0.0.1", 0)], allow=allow, membership=lambda: shown
            ) as exchange:
                for daemon in known:
                    status = daemon.ask("status")
                    host.learn(PeerId(status["peer"]), status["addresses"])
                    ports = (c.laddr.port for c in psutil.Process(daemon.process.pid).net_connections("tcp4"))
                    addresses = [f"/ip4/127.0.0.1/tcp/{port}/tls" for port in ports]
                    exchange.links.learn(PeerId(status["peer"]), addresses)
                yield exchange


def kept(daemon: Daemon) -> bytes:
    """The membership that lies in a daemon's home, if it does already."""
    try:
        return base64.b64decode(json.loads((daemon.home / MEMBERSHIP).read_bytes())["membership"])
    except FileNotFoundError:
        return b""


def made(by: Identity, peer: PeerId, issued: float, life: float = 24 * HOUR, grid: str = "") -> bytes:
    """A membership signed with any key."""

    def sign(statement: bytes) -> bytes:
        return SigningKey(by.seed).sign(statement).signature

    return issue(Membership(PeerId(grid or by.peer), peer, ("worker",), issued, issued + life), sign)


async def refusal(folder: Path, seed: bytes, shown: bytes, daemon: Daemon, peer: PeerId) -> str:
    """Why there is no link; empty: there is one."""
    async with open_peer(folder, seed, shown, daemon) as exchange:
        try:
            await exchange.links.link(peer)
        except Unreachable as refused:
            return refused.why
        return ""


@attrs.frozen
class Case:
    says: str
    eve: Identity
    shown: bytes


async def test_a_stranger_that_knows_the_name_gets_nothing(grid: Grid, tmp_path: Path) -> None:
    cid = Cid.parse(grid.put("secret", DISK))
    bob = grid.member("bob", "submitter")
    owner, coordinator = Identity.load_or_create(grid.home), PeerId(grid.coordinator.peer)
    assert owner.peer == coordinator
    stranger, other = Identity(b"s" * 32), Identity(b"o" * 32)
    now = time.time()
    cases = [
        Case("no membership", stranger, b""),
        Case("did not sign", stranger, made(stranger, stranger.peer, now, grid=coordinator)),
        Case("another grid", stranger, made(other, stranger.peer, now)),
        Case("somebody else's", stranger, until(lambda: kept(bob), "bob's membership")),
        Case("expired", stranger, made(owner, stranger.peer, now - 26 * HOUR)),
        Case("", stranger, made(owner, stranger.peer, now)),
    ]
    for number, case in enumerate(cases):
        for daemon, peer in ((grid.coordinator, coordinator), (bob, PeerId(bob.peer))):
            folder = tmp_path / f"{number}-{daemon.name}"
            why = await refusal(folder, case.eve.seed, case.shown, daemon, peer)
            assert case.says in why, (case.says, daemon.name)
            assert bool(why) == bool(case.says)
    # Not by asking on and on, either; and who is a member gets all of it in the same way.
    async with open_peer(tmp_path / "eve", stranger.seed, b"", grid.coordinator) as exchange:
        with trio.move_on_after(2):
            await exchange.fetch(cid, [coordinator])
        assert exchange.store.held() == []
        assert exchange.store.missing_objects(cid) == [cid]
    shown = made(owner, stranger.peer, now)
    async with open_peer(tmp_path / "ann", stranger.seed, shown, grid.coordinator) as exchange:
        with trio.fail_after(20):
            await exchange.fetch(cid, [coordinator])
        assert exchange.store.complete(cid)


async def test_who_is_revoked_loses_its_links_at_once(grid: Grid, tmp_path: Path) -> None:
    bob = grid.member("bob-2", "submitter")
    ticket = grid.coordinator.ask("token_create", role="submitter", uses=1, expires=600.0)["ticket"]
    eve = grid.member("eve", "submitter", ticket)
    shown = until(lambda: kept(eve), "its membership")
    eve.kill()
    identity = Identity.load_or_create(eve.home)
    peers = [PeerId(grid.coordinator.peer), PeerId(bob.peer)]
    async with open_peer(tmp_path / "eve", identity.seed, shown, grid.coordinator, bob) as exchange:
        links = [await exchange.links.link(peer) for peer in peers]
        said = await trio.to_thread.run_sync(
            lambda: p2pgrid("token", "revoke", ticket, "--json", home=grid.home)
        )
        assert said.code == 0
        assert len(said.json["token"]) == 32
        over = partial(until, lambda: not any(link.live for link in links), "its links end")
        await trio.to_thread.run_sync(over)
        for peer in peers:
            with pytest.raises(Unreachable, match="revoked"):
                await exchange.links.link(peer)
    # Bob knows it in his next life, too, whoever is there to tell him.
    grid.coordinator.kill()
    bob.kill()
    bob.restart()
    try:
        assert "revoked" in await refusal(tmp_path / "again", identity.seed, shown, bob, peers[1])
    finally:
        grid.coordinator.restart()


async def test_members_link_while_the_coordinator_is_dead(grid: Grid, tmp_path: Path) -> None:
    ann, cid = grid.member("ann", "submitter"), grid.put("shared", DISK)
    tom = grid.member("tom", "submitter")
    first = grid.folder / "first"
    assert p2pgrid("get", cid, "-o", first, home=tom.home).code == 0
    until(lambda: kept(ann) and kept(tom), "their memberships")
    grid.coordinator.kill()
    try:
        back = grid.folder / "back"
        said = p2pgrid("get", cid, "-o", back, home=ann.home)
        assert said.code == 0, said.err
        assert back.read_bytes() == first.read_bytes() == DISK
        assert ann.ask("status")["received"].keys() == {tom.peer}
        # Both start anew without their coordinator, and with what they kept.
        tom.kill()
        tom.restart()
        ann.kill()
        me, boss = Identity.load_or_create(ann.home), PeerId(tom.ask("status")["grid"])
        async with open_host(me.seed) as host:
            verify = host.verify
        standing = Standing.load(ann.home, me.peer, boss, verify)
        async with open_peer(
            tmp_path / "ann", me.seed, standing.shown, tom, allow=standing.allow
        ) as exchange:
            with trio.fail_after(20):
                await exchange.fetch(Cid.parse(cid), [PeerId(tom.peer)])
    finally:
        grid.coordinator.restart()


def test_a_membership_is_renewed_in_time(tmp_path: Path) -> None:
    with open_grid(tmp_path, 0, membership=4.0) as grid:
        bob = grid.member("bob", "submitter")
        first = until(lambda: kept(bob), "a membership")
        assert until(lambda: kept(bob) != first and kept(bob), "the next one")
        cid = grid.put("disk", DISK)
        assert p2pgrid("get", cid, "-o", tmp_path / "back", home=bob.home).code == 0


def test_a_ticket_that_is_none_of_ours_is_not_revoked(grid: Grid, tmp_path: Path) -> None:
    with open_grid(tmp_path, 0) as other:
        ticket = other.coordinator.ask("token_create", role="worker", uses=1, expires=600.0)["ticket"]
    (tmp_path / "ticket").write_text(ticket)
    said = p2pgrid("token", "revoke", f"file:{tmp_path / 'ticket'}", home=grid.home)
    assert (said.code, "did not make" in said.err) == (4, True)
    assert p2pgrid("token", "revoke", f"file:{tmp_path / 'gone'}", home=grid.home).code == 3
    assert p2pgrid("token", "revoke", "noise", home=grid.home).code == 2
