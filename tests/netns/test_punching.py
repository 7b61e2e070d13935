"""Is a direct connection punched for every pair of NATs that theory allows, soon and at the first attempt?"""

from __future__ import annotations

import contextlib
import itertools
import socket
import statistics
import threading
from collections.abc import Iterator

import pytest

from p2pgrid.hole_punch.punch_messages import MAGIC
from tests.grid_processes import until
from tests.netns.lab import Host, Lab, lab, needs_namespaces
from tests.netns.nats import (
    DUAL,
    HAIRPIN,
    IPV6_ONLY,
    KINDS,
    PORT,
    PORT_RESTRICTED,
    PUBLIC,
    RESETTING,
    STRICT,
    SYMMETRIC,
    Nat,
    direct_is_possible,
)
from tests.netns.punch_homes import Meeting, Node, nodes
from tests.netns.spaces import inside

pytestmark = needs_namespaces

ALSO = [(DUAL, DUAL), (DUAL, IPV6_ONLY), (STRICT, STRICT), (STRICT, PUBLIC), (RESETTING, PORT_RESTRICTED),
        (PORT_RESTRICTED, RESETTING), (STRICT, PORT_RESTRICTED)]  # fmt: skip
PAIRS = [*itertools.product(KINDS, KINDS), *ALSO]
"""Who offers, and who answers."""
PATIENCE = 20.0
"""Seconds for anything: no figure, the machine may be busy."""

Met = tuple[Meeting, Meeting]


def meet(one: Node, other: Node) -> Met:
    return one.meet(other.me), other.meet(one.me)


def wait_over(met: Met) -> None:
    assert all(meeting.over.wait(PATIENCE) for meeting in met)


@pytest.fixture(scope="module")
def world() -> Iterator[Lab]:
    with lab() as built:
        yield built


@pytest.fixture(scope="module")
def met(world: Lab) -> dict[tuple[Nat, Nat], Met]:
    """What came of every pair: at once where theory says that nothing will, one after the other otherwise."""
    hosts: dict[str, tuple[Host, int]] = {}
    for nat in {nat: None for pair in PAIRS for nat in pair}:
        a, b = world.homes(nat, 2) if nat is HAIRPIN else (world.home(nat), world.home(nat))
        hosts |= {f"a-{nat}": (a, PORT), f"b-{nat}": (b, PORT + 1)}
    found: dict[tuple[Nat, Nat], Met] = {}
    with nodes(world, hosts) as made:
        for hopeless in (True, False):
            for a, b in PAIRS:
                if direct_is_possible(a, b) != hopeless:
                    one, other = made[f"a-{a}"], made[f"b-{b}"]
                    found[a, b] = meet(one, other)
                    if not hopeless:
                        wait_over(found[a, b])
                        one.part(other.me)
                        other.part(one.me)
            if hopeless:
                for pair in found.values():
                    wait_over(pair)
    return found


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=lambda nat: str(nat))
def test_a_pair_is_linked_directly_where_theory_allows_it(met: dict[tuple[Nat, Nat], Met], a: Nat, b: Nat):
    both = met[a, b]
    assert [meeting.seconds is not None for meeting in both] == [direct_is_possible(a, b)] * 2
    if direct_is_possible(a, b):
        assert both[0].attempts == both[1].attempts == 1


def test_it_takes_less_than_two_seconds(met: dict[tuple[Nat, Nat], Met]):
    seconds = [meeting.seconds for pair in met.values() for meeting in pair if meeting.seconds is not None]
    median = statistics.median(seconds)
    print(f"punched: {len(seconds) // 2} pairs, median {median:.3f} s, last {max(seconds):.3f} s")
    assert median < 2.0


def test_neighbours_meet_at_home_where_the_router_does_not_turn_them_round(world: Lab):
    a, b = world.homes(PORT_RESTRICTED, 2)
    with nodes(world, {"a": (a, PORT), "b": (b, PORT + 1)}) as made:
        met = meet(made["a"], made["b"])
        wait_over(met)
        assert met[0].address == (b.ipv4, PORT + 1)


@pytest.mark.parametrize("nat", [PORT_RESTRICTED, RESETTING], ids=str)
def test_far_from_each_other_they_dial_at_the_same_moment(world: Lab, nat: Nat):
    """Where both NATs reset what they were not asked for, first packets must cross between them."""
    delays = {"a": 0.06, "b": 0.01}
    hosts = {name: (world.home(nat, delay), PORT) for name, delay in delays.items()}
    with nodes(world, hosts) as made:
        met = meet(made["a"], made["b"])
        wait_over(met)
        assert all(meeting.seconds is not None for meeting in met)


def test_a_pair_that_parts_can_meet_again_at_once(world: Lab):
    """Neither a closed connection's port nor what the routers remember of it stands in the way."""
    with nodes(world, {name: (world.home(), PORT) for name in "ab"}) as made:
        for first, second in ("ab", "ba", "ab"):
            met = meet(made["a"], made["b"])
            wait_over(met)
            assert all(meeting.seconds is not None for meeting in met)
            for one, other in ((made[first], made[second]), (made[second], made[first])):
                one.part(other.me)  # closed in an orderly way, by one and then the other
                until(lambda one=one: not one.kept, "closed")


def test_a_stranger_at_the_peers_address_is_dropped(world: Lab):
    """In our own network somebody else has the address that the peer tells; it gives back what it hears."""
    a, b = world.home(), world.home()
    heard: list[bytes] = []
    listening = inside(a.router, lambda: Host.bound(socket.AF_INET, PORT + 1, socket.SOCK_STREAM))

    def echo() -> None:
        with listening.accept()[0] as sock, contextlib.suppress(ConnectionResetError):
            while said := sock.recv(1000):
                heard.append(said)
                sock.send(said)

    with listening, nodes(world, {"a": (a, PORT), "b": (b, PORT)}) as made:
        listening.listen()
        thread = threading.Thread(target=echo)
        thread.start()
        made["b"].claims.append((a.ipv4.removesuffix("2") + "1", PORT + 1))
        met = meet(made["a"], made["b"])
        wait_over(met)
        assert met[0].address == (b.outside, PORT)
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert [said[:8] for said in heard] == [MAGIC]


def test_an_attempt_that_failed_is_made_again_when_the_network_changes(world: Lab):
    with nodes(world, {name: (world.home(SYMMETRIC), PORT) for name in "ab"}) as made:
        met = meet(made["a"], made["b"])
        wait_over(met)
        assert met[0].seconds is None
        tried = [meeting.attempts for meeting in met]
        made["b"].change()
        # not in an hour
        until(lambda: met[0].attempts > tried[0] and met[1].attempts > tried[1], "another attempt")
