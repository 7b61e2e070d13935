"""Do daemons relay as their owners say, and does the grid hear of it?  Real processes on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.grid_processes import Daemon, Grid, open_grid, p2pnode, until


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grid]:
    with open_grid(tmp_path_factory.mktemp("relays"), 2) as grid:
        yield grid


def told(daemon: Daemon) -> Any:
    return p2pnode("relay", "--json", home=daemon.home).json


def uses(daemon: Daemon, *relays: Daemon) -> None:
    """Wait until `daemon` is reached through these, and no others."""
    wanted = {relay.peer for relay in relays}
    until(lambda: {row["relay"] for row in told(daemon)["uses"]} == wanted, f"{daemon.name} uses {wanted}")


def test_the_coordinator_relays_until_it_is_told_not_to_and_another_takes_its_place(grid: Grid) -> None:
    one, two = grid.workers
    uses(one, grid.coordinator)
    uses(two, grid.coordinator)
    state = told(grid.coordinator)
    assert state["on"]
    assert state["wanted"] == "default"
    assert state["uses"] == []
    assert set(state["reserved"]) == {one.peer, two.peer}
    assert told(one)["why"] == "this node is no relay"

    said = p2pnode("relay", "on", "--rate", "80Mbit", "--quota", "5G", "--circuits", "7", home=one.home)
    assert (said.code, said.err) == (0, "")
    assert "for others" in said.out
    assert "10MB" in said.out or "80Mbit" in said.out
    uses(two, grid.coordinator, one)

    assert p2pnode("relay", "off", home=grid.coordinator.home).code == 0
    uses(two, one)
    assert told(two)["lost"][-1]["why"] == "this node is no relay"
    one.kill()
    uses(two)
    one.restart()
    assert told(one)["limits"] == {
        "rate": 1e7,
        "rate_each": None,
        "quota": 5 << 30,
        "quota_each": None,
        "circuits": 7,
        "circuits_each": 128,
    }
    uses(two, one)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("on", "--rate", "fast"), "'fast' is no rate"),
        (("on", "--quota", "0"), "a quota is more than nothing"),
        (("on", "--circuits", "0"), "--circuits is from 1 to 65535"),
    ],
)
def test_what_is_not_understood_changes_nothing(grid: Grid, words: tuple[str, ...], why: str) -> None:
    before = told(grid.workers[1])
    said = p2pnode("relay", *words, home=grid.workers[1].home)
    assert said.code == 2
    assert why in said.err
    assert "Traceback" not in said.err
    after = told(grid.workers[1])
    assert (after["on"], after["limits"]) == (before["on"], before["limits"])
