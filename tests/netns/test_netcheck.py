"""Does `netcheck` tell every kind of network for what it is?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.gateway import HUB as HUB_OUTSIDE
from tests.netns.gateway import gateway, needs_miniupnpd
from tests.netns.lab import HUB, HUB6, HUB6_TOO, HUB_TOO, Host, Lab, lab, needs_namespaces
from tests.netns.nats import (
    ADDRESS_RESTRICTED,
    CGNAT,
    FULL_CONE,
    HAIRPIN,
    IPV6_ONLY,
    KINDS,
    ONLY_443,
    PORT_RESTRICTED,
    PUBLIC,
    REMAP,
    SYMMETRIC,
    Nat,
)

pytestmark = needs_namespaces

PORTS = (4321, 443)
"""Of the observers in the hub."""


@pytest.fixture(scope="module")
def world() -> Iterator[Lab]:
    """A hub with observers in both kinds of IP."""
    with lab() as built:
        words = ["observe", *map(str, PORTS)]
        child = start(built.hub, words)
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "ready\n"
            yield built
        finally:
            child.communicate("", timeout=20)


def start(space: str, words: list[str]) -> subprocess.Popen[str]:
    command = ["ip", "netns", "exec", space, sys.executable, "-m", "tests.netns.netcheck_node", *words]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(host: Host, *observers: str) -> subprocess.Popen[str]:
    """A node that knows two observers, at these addresses of the hub's."""
    hosts = observers or ((HUB, HUB_TOO) if host.ipv4 else (HUB6, HUB6_TOO))
    words = [str(word) for place in zip(hosts, PORTS, strict=True) for word in place]
    return start(host.space, ["ask", *words])


def answer(child: subprocess.Popen[str]) -> dict:
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    return json.loads(said)


@pytest.fixture(scope="module")
def homes(world: Lab) -> Iterator[dict[Nat, tuple[Host, subprocess.Popen[str]]]]:
    """One of each kind, all asking at the same time: most of theirs is waiting for what does not come."""
    hosts = {nat: world.home(nat) for nat in KINDS}
    children = {nat: ask(host) for nat, host in hosts.items()}
    try:
        yield {nat: (hosts[nat], child) for nat, child in children.items()}
    finally:
        for child in children.values():
            child.kill()
            child.communicate()


@pytest.mark.parametrize(
    ("nat", "kind", "mapping", "called", "hairpin"),
    [
        (PUBLIC, "open", "none", True, None),
        (FULL_CONE, "called", "independent", True, False),
        (ADDRESS_RESTRICTED, "called", "independent", True, False),
        (PORT_RESTRICTED, "easy", "independent", False, False),
        (REMAP, "easy", "independent", False, False),
        (SYMMETRIC, "hard", "dependent", False, None),
        (CGNAT, "easy", "independent", False, False),
        (HAIRPIN, "called", "independent", True, True),
        (IPV6_ONLY, "easy", "none", False, None),
    ],
    ids=str,
)
def test_each_kind(homes, nat: Nat, kind: str, mapping: str, called: bool, hairpin: bool | None):
    host, child = homes[nat]
    said = answer(child)
    assert (said["verdict"], said["nat"]["mapping"], said["nat"]["hairpin"]) == (kind, mapping, hairpin)
    answered = [o for o in said["observers"] if o["delay"] is not None]
    assert len(answered) == 2
    assert {o["called"] for o in answered} == {called}
    assert all(o["delay"] < 1 and o["way"] == "direct" for o in answered)
    if host.ipv4:
        assert {o["seen"].rpartition(":")[0] for o in answered} == {host.outside}
    assert said["ipv6"] is nat.ipv6


def test_a_network_that_lets_only_443_out(homes):
    said = answer(homes[ONLY_443][1])
    assert said["verdict"] == "only-443"
    assert [o["delay"] is None for o in said["observers"]] == [True, False]


@needs_miniupnpd
def test_a_router_that_opens_a_port_is_believed_when_an_observer_gets_in(world: Lab, tmp_path: Path):
    host = world.home(SYMMETRIC)
    with gateway(world, host, tmp_path) as router:
        said = answer(ask(host, HUB_OUTSIDE, HUB_OUTSIDE))
        assert said["verdict"] == "mapped"
        assert said["port_mapping"] == {"address": f"{router.external}:4001", "how": "pcp", "why": ""}
        assert {o["called"] for o in said["observers"]} == {True}
        assert not router.maps, "it was given back"
