"""Does a node know who belongs to its grid, and what time it is there, whatever its own clock says?"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.hole_punch.membership import Membership, issue
from p2pgrid.ids import PeerId, digest
from p2pgrid.node.config import MEMBERSHIP
from p2pgrid.node.standing import Standing
from p2pgrid.scheduler import messages as m

GRID, ME, ANN = PeerId("grid"), PeerId("me"), PeerId("ann")
DAY, YEAR = 86400.0, 365 * 86400.0
START = 1.8e9
offsets = st.floats(-20 * YEAR, 20 * YEAR)


def sign(statement: bytes, peer: PeerId = GRID) -> bytes:
    return digest(peer.encode() + statement)


def verify(peer: PeerId, statement: bytes, signature: bytes) -> bool:
    return signature == sign(statement, peer)


def membership(issued: float, peer: PeerId = ME, life: float = 7 * DAY) -> bytes:
    return issue(Membership(GRID, peer, ("worker",), issued, issued + life), sign)


class Machine:
    """One computer: a wall clock that may be wrong, another that counts, and a node's home."""

    def __init__(self, home: Path, wrong: float = 0.0) -> None:
        self.home, self.true, self.wrong = home, START, wrong

    def boot(self, me: PeerId = ME, grid: PeerId = GRID) -> Standing:
        """A new life of the daemon."""
        return Standing.load(
            self.home, me, grid, verify, lambda: self.true - START + 5.0, lambda: self.true + self.wrong
        )

    def join(self, standing: Standing, life: float = 7 * DAY) -> None:
        shown = membership(self.true, life=life)
        standing.welcome(m.Welcome(("worker",), "me", GRID, 5.0, 30.0, self.true, shown))


def revoked(at: float, peer: PeerId = ANN) -> m.RevocationList:
    return m.RevocationList("r1", (m.Revocation(peer, at),))


@given(offsets)
def test_a_wrong_clock_does_not_matter(tmp_path_factory, wrong: float):
    machine = Machine(tmp_path_factory.mktemp("home"), wrong)
    standing = machine.boot()
    machine.join(standing)
    machine.true += 6 * DAY
    assert standing.now() == pytest.approx(machine.true, abs=0.01)
    standing.save()
    again = machine.boot()
    machine.true += 2 * DAY
    assert again.now() == pytest.approx(machine.true, abs=0.01)
    assert again.allow(ANN, membership(machine.true - 6.9 * DAY, ANN)) == ""
    assert "expired" in again.allow(ANN, membership(machine.true - 7.1 * DAY, ANN))


@given(offsets)
def test_a_clock_that_steps_matters_in_a_new_life_only_until_the_coordinator_is_heard(
    tmp_path_factory, step: float
):
    machine = Machine(tmp_path_factory.mktemp("home"))
    standing = machine.boot()
    machine.join(standing)
    standing.save()
    machine.wrong += step
    assert standing.now() == pytest.approx(machine.true, abs=0.01)
    assert standing.unsaved == (abs(step) > 30.0)  # it is written down while the daemon lives
    again = machine.boot()
    assert again.now() >= START - 0.01  # never before what was told
    again.tell(machine.true)
    assert again.now() == pytest.approx(machine.true, abs=0.01)
    assert again.unsaved == (abs(step) > 30.0)
    again.save()
    assert machine.boot().now() == pytest.approx(machine.true, abs=0.01)


def test_what_is_kept_is_kept(tmp_path: Path):
    machine = Machine(tmp_path)
    standing = machine.boot()
    assert (standing.shown, standing.renewal) == (b"", -math.inf)
    machine.join(standing)
    standing.revoke(revoked(START))
    assert standing.unsaved
    standing.save()
    assert not standing.unsaved
    again = machine.boot()
    assert (again.shown, again.mine, again.revision) == (standing.shown, standing.mine, "r1")
    assert "revoked" in again.allow(ANN, membership(START - 1, ANN))
    assert again.allow(ANN, membership(START + 1, ANN)) == ""
    assert list(tmp_path.iterdir()) == [tmp_path / MEMBERSHIP]


@pytest.mark.parametrize("kept", [b"", b"{", b"[]", b'{"grid": 5}', b"\xff"])
def test_what_cannot_be_read_is_asked_for_anew(tmp_path: Path, kept: bytes):
    (tmp_path / MEMBERSHIP).write_bytes(kept)
    standing = Machine(tmp_path).boot()
    assert (standing.shown, standing.renewal) == (b"", -math.inf)


def test_what_is_another_grid_s_or_another_peer_s_is_not_taken(tmp_path: Path):
    machine = Machine(tmp_path)
    standing = machine.boot()
    machine.join(standing)
    standing.save()
    assert machine.boot(grid=PeerId("other")).shown == b""
    assert machine.boot(me=ANN).shown == b""
    standing.welcome(m.Welcome((), "", GRID, 5.0, 30.0, START, membership(START + 1, ANN)))
    assert standing.shown == membership(START)
    standing.welcome(m.Welcome((), "", GRID, 5.0, 30.0, START, b"noise"))
    assert standing.shown == membership(START)


def test_it_is_renewed_at_half_its_life_or_when_it_is_void(tmp_path: Path):
    machine = Machine(tmp_path)
    standing = machine.boot()
    machine.join(standing, life=1000.0)
    assert standing.renewal == pytest.approx(START + 500)
    standing.revoke(revoked(START, ME))
    assert standing.renewal == -math.inf
    machine.true += 1
    machine.join(standing, life=1000.0)
    assert standing.renewal == pytest.approx(START + 501)


def test_the_coordinator_s_own_node_shows_none_and_renews_none(tmp_path: Path):
    machine = Machine(tmp_path)
    standing = machine.boot(me=GRID)
    machine.join(standing)
    assert (standing.shown, standing.renewal) == (b"", math.inf)
    assert standing.allow(ANN, membership(START, ANN)) == ""
    assert machine.boot().allow(GRID, b"") == ""


def test_a_link_is_over_when_what_was_shown_is(tmp_path: Path):
    machine = Machine(tmp_path)
    standing = machine.boot()
    machine.join(standing)
    assert standing.allow(ANN, membership(START, ANN, life=1000.0)) == ""
    assert standing.allow(GRID, b"") == ""
    machine.true += 1099
    assert standing.barred(ANN) == standing.barred(GRID) == ""
    assert standing.over() == []
    machine.true += 2
    assert "expired" in standing.barred(ANN)
    assert [peer for peer, _ in standing.over()] == [ANN]
    assert standing.over() == []
    assert standing.barred(ANN) == standing.barred(PeerId("never seen")) == "it has shown no membership"
    assert standing.barred(GRID) == ""
    assert standing.allow(ANN, membership(machine.true, ANN)) == ""
    assert standing.barred(ANN) == ""
    standing.revoke(revoked(machine.true))
    assert "revoked" in standing.barred(ANN)
    ((peer, why),) = standing.over()
    assert (peer, "revoked" in why) == (ANN, True)


def test_who_was_refused_is_not_remembered(tmp_path: Path):
    standing = Machine(tmp_path).boot()
    for number in range(20):
        assert standing.allow(PeerId(f"p{number}"), b"noise") != ""
    assert not standing._heard
