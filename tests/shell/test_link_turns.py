"""Does each end of a link take every message once, however its connections are cut, cross, and come late?

Two links over real TLS, whose turns, and the bytes between them, are given by hand.
"""

from __future__ import annotations

import contextlib
import functools
import random
import socket
import struct
from collections.abc import Iterator

import attrs
import pytest

from p2pgrid.hole_punch import link as link_module
from p2pgrid.hole_punch import link_messages as own
from p2pgrid.hole_punch.certificate import Certificate
from p2pgrid.hole_punch.framing import header
from p2pgrid.hole_punch.link import RETIRED_MAX, Link, Order, Path
from p2pgrid.hole_punch.outbox import OWN_MAX
from p2pgrid.hole_punch.path import Way
from p2pgrid.hole_punch.rates import Rates
from p2pgrid.hole_punch.tls import READ, Tls
from p2pgrid.ids import PeerId

SESSION = bytes(16)
CERTIFICATE = Certificate.make()
TALK, BULK, LONG, ONCE = KINDS = range(64, 68)
"""Kinds of messages: what is kept, what is kept and overtaken, what is made again, what is not sent again."""


def tls_pair(accepted: socket.socket, dialled: socket.socket) -> tuple[Tls, Tls]:
    for sock in (accepted, dialled):
        sock.setblocking(False)
    return Tls(CERTIFICATE.accepting, accepted, server=True), Tls(CERTIFICATE.dialling, dialled, server=False)


@attrs.define(eq=False)
class Wire:
    """A connection between two ends, through which as many bytes come as are moved."""

    tls: tuple[Tls, Tls]
    middle: tuple[socket.socket, socket.socket]
    """What comes out of the one end and goes into the other's."""
    dialler: int
    moves: int = 0
    """What the dialling end knew of when it began."""
    order: Order | None = None
    """What the accepting one said."""

    @classmethod
    def make(cls, dialler: int, moves: int) -> Wire:
        (one, near), (other, far) = socket.socketpair(), socket.socketpair()
        for sock in (near, far):
            sock.setblocking(False)
        accepting, dialling = tls_pair(one, other)
        wire = cls((accepting, dialling), (near, far), dialler, moves)
        while accepting.shake() | dialling.shake():
            wire.move(1 << 20)
        wire.move(1 << 20)
        return wire if dialler else cls((dialling, accepting), (far, near), dialler, moves)

    def move(self, most: int) -> bool:
        """Whether any came through."""
        moved = False
        for this, that in (self.middle, self.middle[::-1]):
            with contextlib.suppress(OSError):
                data = this.recv(min(most, READ), socket.MSG_PEEK)
                if data:
                    this.recv(that.send(data))
                    moved = True
                else:
                    that.shutdown(socket.SHUT_WR)
        return moved

    def cut(self) -> None:
        """With whatever is under way on it."""
        for sock in self.middle:
            sock.close()


class End:
    """One end's link, and what it took; a receiver."""

    def __init__(self, place: int, path: Path) -> None:
        self.place = place
        self.sent = dict.fromkeys(KINDS, 0)
        self.taken: dict[int, list[int]] = {kind: [] for kind in KINDS}
        self.losses = 0
        self.ends: list[str] = []
        self.link = Link(
            PeerId("b" if place == 0 else "a"), SESSION, path, lambda _: self, _no, self._lost, _no
        )

    def _lost(self, link: Link) -> None:
        self.losses += 1

    def received(self, message: memoryview) -> None:
        kind, number = message[0], int.from_bytes(message[1:5], "big")
        assert bytes(message) == b"".join(body(kind, number))
        self.taken[kind].append(number)

    def drained(self) -> None:
        return None

    def left(self, why: str) -> None:
        self.ends.append(why)

    def send(self, kind: int) -> None:
        number, self.sent[kind] = self.sent[kind], self.sent[kind] + 1
        again = {LONG: functools.partial(body, kind, number), ONCE: lambda: None}.get(kind)
        self.link.send(*body(kind, number), bulk=kind in (BULK, LONG), again=again)

    def turn(self) -> None:
        assert self.link.turn(True) is not None, self.link


def _no(_: object) -> None:
    return None


def body(kind: int, number: int) -> tuple[bytes, bytes]:
    return bytes([kind]) + number.to_bytes(4, "big"), bytes([number & 255]) * (1 + number * 7919 % 40_000)


def path(wire: Wire, place: int) -> Path:
    return Path(wire.tls[place], Way.DIRECT, Rates().link(private=True), order=wire.order or (0, ""))


class World:
    """Two ends, and connections between them in every state."""

    def __init__(self) -> None:
        first = Wire.make(1, 0)
        self.wires = [first]
        self.dialled: list[Wire] = []
        """That the other side does not know of yet."""
        self.accepted: list[Wire] = []
        """That the dialling side does not know to be accepted yet."""
        self.ends = [End(place, path(first, place)) for place in range(2)]

    def dial(self, dialler: int) -> None:
        self.dialled.append(Wire.make(dialler, self.ends[dialler].link.path.order[0]))
        self.wires.append(self.dialled[-1])

    def accept(self, wire: Wire) -> None:
        self.dialled.remove(wire)
        place = 1 - wire.dialler
        link = self.ends[place].link
        wire.order = max(link.path.order[0], wire.moves) + 1, "ab"[place]
        link.go_on(path(wire, place))
        self.accepted.append(wire)

    def hear(self, wire: Wire) -> None:
        self.accepted.remove(wire)
        self.ends[wire.dialler].link.go_on(path(wire, wire.dialler))

    def settle(self) -> None:
        """Until nothing moves any more."""
        quiet = 0
        while quiet < 3:
            for end in self.ends:
                end.turn()
            moved = [wire.move(1 << 20) for wire in self.wires]
            quiet = 0 if any(moved) else quiet + 1

    def close(self) -> None:
        for end in self.ends:
            end.link.end("the test is over")
        for wire in self.wires:
            wire.cut()
            for tls in wire.tls:
                tls.close()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(link_module, "ACK_MESSAGES", 5)
    made = World()
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(40))
def test_every_message_is_taken_once_whatever_becomes_of_connections(world: World, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(300):
        end = chance.choice(world.ends)
        match chance.choices(
            ["turn", "move", "send", "dial", "accept", "hear", "cut"], [30, 30, 20, 3, 3, 3, 1 + seed % 3]
        )[0]:
            case "turn":
                end.turn()
            case "move":
                chance.choice(world.wires[-4:]).move(chance.choice([100, 10_000, 1_000_000]))
            case "send":
                end.send(chance.choice(KINDS))
            case "dial":
                world.dial(end.place)
            case "accept" if world.dialled:
                world.accept(chance.choice(world.dialled))
            case "hear" if world.accepted:
                world.hear(chance.choice(world.accepted))
            case "cut":
                chance.choice(world.wires[-3:]).cut()
        for end in world.ends:
            assert len(end.link._retired) <= RETIRED_MAX
    while world.accepted:
        world.hear(world.accepted[0])
    world.settle()
    world.dial(seed % 2)
    world.accept(world.dialled[-1])
    world.hear(world.accepted[-1])
    world.settle()
    for end, other in (world.ends, world.ends[::-1]):
        assert end.link.live
        assert not end.link._retired
        for kind in (TALK, BULK, LONG):
            assert other.taken[kind] == list(range(end.sent[kind]))
        assert other.taken[ONCE] == sorted(set(other.taken[ONCE]))
        assert end.link.queued == 0


@pytest.mark.parametrize("later", [0, 1])
def test_connections_that_cross_bring_both_ends_to_the_same(world: World, later: int) -> None:
    """Each end accepts one and then hears that the one it dialled itself was accepted."""
    world.dial(0)
    world.dial(1)
    for wire in list(world.dialled):
        world.accept(wire)
        world.ends[1 - wire.dialler].turn()
        world.ends[1 - wire.dialler].send(TALK)
    for wire in list(world.accepted[:: 1 - 2 * later]):
        world.hear(wire)
        world.ends[wire.dialler].turn()
    world.settle()
    assert [end.losses for end in world.ends] == [0, 0]
    assert [end.taken[TALK] for end in world.ends] == [[0], [0]]


def test_a_peer_that_moves_and_never_says_how_far_it_is_holds_little(world: World) -> None:
    """However often it comes again: a connection that was left is not kept for ever."""
    for _ in range(10):
        world.dial(1)
        world.accept(world.dialled[-1])
        world.ends[0].turn()
    open_ones = [wire for wire in world.wires if wire.tls[0].fileno() >= 0]
    assert len(open_ones) <= 1 + RETIRED_MAX


def test_a_peer_that_does_not_go_on_in_time_is_lost(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "RESUME_PATIENCE", 0.0)
    world.dial(1)
    world.accept(world.dialled[-1])
    world.ends[0].turn()
    while world.ends[0].link.connected:  # until the clock has ticked
        world.ends[0].turn()
    world.ends[0].turn()
    assert world.ends[0].losses == 1
    assert [wire.tls[0].fileno() for wire in world.wires] == [-1, -1]


def test_a_peer_that_asks_and_never_reads_is_left(world: World) -> None:
    """Probes are answered before all else: the answers must not pile up."""
    end, peer, (to_end, from_peer) = world.ends[0], world.wires[0].tls[1], world.wires[0].middle
    probe = own.encode(own.PROBE, 1)
    for _ in range(100):
        peer.seal((header(len(probe)) + probe) * 1000)
        assert peer.flush()
        to_end.sendall(from_peer.recv(READ))
        if end.link.turn(True) is None:
            break
        assert len(end.link._outbox._own) <= OWN_MAX + READ // len(probe)
    assert "does not read" in repr(end.link)


def test_what_a_peer_said_before_it_left_is_heard_even_if_sending_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A peer that ends in good order, while much is under way both ways, need not be looked for."""
    monkeypatch.setattr(link_module, "AT_ONCE", 1 << 10)
    with socket.create_server(("127.0.0.1", 0)) as server:
        dialled = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    here, there = tls_pair(accepted, dialled)
    while here.shake() | there.shake():
        pass
    end, bye = End(0, Path(here, Way.DIRECT, Rates().link(private=True))), own.bye("enough")
    end.turn()
    talk = bytes([TALK, 0, 0, 0, 0, 0])
    there.seal((header(len(talk)) + talk) * 1000)
    there.seal(header(len(bye)) + bye)
    assert there.flush()
    there.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    there.close()
    end.received = lambda message: None  # type: ignore[method-assign]
    end.send(BULK)
    while end.link.turn(True) is not None and not end.losses:
        pass
    end.link.end("")
    assert end.losses == 0
    assert end.ends == ["the peer closed the link: enough"]
