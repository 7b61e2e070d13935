"""Is every pair of nodes linked, whatever stands between: over a relay at once, directly where it can be?"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import pytest

from p2pgrid.hole_punch.path import Way
from tests.grid_processes import until
from tests.netns.grid_homes import Bond, grid
from tests.netns.lab import Host, Lab, lab, needs_namespaces, run
from tests.netns.nats import HAIRPIN, KINDS, PORT, PORT_RESTRICTED, Nat, direct_is_possible

pytestmark = needs_namespaces

PAIRS = [(a, KINDS[(n + step) % len(KINDS)]) for step in range(len(KINDS)) for n, a in enumerate(KINDS)]
"""Who wants the link, and whom to; ten in a row are ten pairs of different nodes."""
PATIENCE = 20.0
"""Seconds for anything: no figure, the machine may be busy."""


@pytest.fixture(scope="module")
def world() -> Iterator[Lab]:
    with lab() as built:
        yield built


@pytest.fixture(scope="module")
def bonds(world: Lab) -> dict[tuple[Nat, Nat], Bond]:
    hosts: dict[str, tuple[Host, int]] = {}
    for nat in KINDS:
        a, b = world.homes(nat, 2) if nat is HAIRPIN else (world.home(nat), world.home(nat))
        hosts |= {f"a-{nat}": (a, PORT), f"b-{nat}": (b, PORT + 1)}
    found: dict[tuple[Nat, Nat], Bond] = {}
    with grid(world, hosts) as made:
        for row in range(0, len(PAIRS), len(KINDS)):
            under_way = []
            for a, b in PAIRS[row : row + len(KINDS)]:
                patience = PATIENCE if direct_is_possible(a, b) else 0.5
                found[a, b] = made[f"a-{a}"].bond(made[f"b-{b}"], patience)
                under_way.append(found[a, b])
            for bond in under_way:
                assert bond.over.wait(2 * PATIENCE)
    return found


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=lambda nat: str(nat))
def test_every_pair_is_linked(bonds: dict[tuple[Nat, Nat], Bond], a: Nat, b: Nat):
    bond = bonds[a, b]
    assert not bond.why
    assert bond.first_byte is not None
    assert (bond.ways[-1][0] is not Way.RELAYED) == direct_is_possible(a, b)


def test_figures(bonds: dict[tuple[Nat, Nat], Bond]):
    """A link is there soon, and direct soon after."""
    relayed = [
        bond.first_byte for bond in bonds.values() if bond.first_byte and bond.ways[0][0] is Way.RELAYED
    ]
    punched = [bond.ways[-1][1] for bond in bonds.values() if bond.ways[-1][0] is Way.PUNCHED]
    for name, seconds in (("first byte over a relay", relayed), ("punched", punched)):
        median, last = statistics.median(seconds), max(seconds)
        print(f"{name}: {len(seconds)} pairs, median {median:.3f} s, last {last:.3f} s")
    assert statistics.median(punched) < 2.0


def test_a_black_hole_is_left_for_the_relay_and_punched_again(world: Lab):
    """Of what is sent on the link meanwhile nothing is lost, nothing comes twice or in another order."""
    hosts = {name: (world.home(PORT_RESTRICTED), PORT) for name in "ab"}
    chain = f"type filter hook forward priority -1; ip daddr {hosts['b'][0].outside} drop;"
    swallow = f"table inet hole {{\n chain swallow {{ {chain}\n }}\n }}"
    nft = ["ip", "netns", "exec", hosts["a"][0].router, "nft"]
    with grid(world, hosts) as made:
        a, b = made["a"], made["b"]
        bond = a.bond(b, PATIENCE)
        assert bond.over.wait(2 * PATIENCE)
        assert bond.ways[-1][0] is Way.PUNCHED
        with a.stream(b) as counted:
            until(lambda: counted() > 100, "a stream")
            run([*nft, "-f", "-"], swallow)
            before = counted()
            until(lambda: a.way(b) is Way.RELAYED and b.way(a) is Way.RELAYED, "the relay", 15.0)
            until(lambda: counted() > before + 100, "the stream going on over the relay")
            run([*nft, "delete", "table", "inet", "hole"], "")
            a.change()
            until(lambda: a.way(b) is Way.PUNCHED and b.way(a) is Way.PUNCHED, "another path", 30.0)
            before = counted()
            until(lambda: counted() > before + 100, "the stream going on over it")
