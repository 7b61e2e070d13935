"""Is exactly what the coordinator signed for a peer taken, for as long as it holds, and nothing else?"""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.membership import (
    ALLOWANCE_MAX,
    MEMBERSHIP_MAX,
    Membership,
    issue,
    read,
    refusal,
)
from p2pgrid.ids import PeerId
from p2pgrid.node.identity import peer_id

PAGE = Path(__file__).parents[2] / "docs" / "protocols" / "membership.md"
VECTORS = re.findall(r"^\| `([a-z ]*)` \| ([\d.]+) \| ([\d.]+) \| `([0-9a-f]+)` \|$", PAGE.read_text(), re.M)

KEYS = [SigningKey(bytes([number]) * 32) for number in range(1, 5)]
GRID, ANN, BOB, OTHER_GRID = (peer_id(bytes(key.verify_key)) for key in KEYS)
PUBLIC = dict(zip((GRID, ANN, BOB, OTHER_GRID), (key.verify_key for key in KEYS), strict=True))
DAY = 86400.0

times = st.integers(0, 1 << 40).map(lambda ms: ms / 1000)
lives = st.integers(2, 1 << 36).map(lambda ms: ms / 1000)
roles = st.lists(st.sampled_from(["submitter", "worker", "relay"]), unique=True, max_size=3).map(tuple)


def sign(statement: bytes, number: int = 0) -> bytes:
    return KEYS[number].sign(statement).signature


def verify(peer: PeerId, statement: bytes, signature: bytes) -> bool:
    key: VerifyKey | None = PUBLIC.get(peer)
    try:
        return key is not None and bool(key.verify(statement, signature) is not None)
    except (BadSignatureError, ValueError):
        return False


def ann(issued: float = 0.0, life: float = 7 * DAY, peer: PeerId = ANN, grid: PeerId = GRID) -> Membership:
    return Membership(grid, peer, ("worker",), issued, issued + life)


def refused(shown: bytes, peer: PeerId = ANN, now: float = 1.0, at: float | None = None) -> str:
    """`at`: when Ann's memberships were revoked."""
    return refusal(shown, peer, GRID, now, {} if at is None else {ANN: at}, verify)


def test_the_page_has_vectors():
    assert len(VECTORS) == 2


@pytest.mark.parametrize(("named", "issued", "expires", "shown"), VECTORS)
def test_vectors(named, issued, expires, shown):
    membership = Membership(GRID, ANN, tuple(named.split()), float(issued), float(expires))
    assert issue(membership, sign).hex() == shown
    assert read(bytes.fromhex(shown), GRID, verify) == membership
    assert refusal(bytes.fromhex(shown), ANN, GRID, float(issued), {}, verify) == ""


@given(times, lives, roles)
def test_what_is_issued_is_read(issued, life, roles):
    membership = Membership(GRID, ANN, roles, issued, issued + life)
    shown = issue(membership, sign)
    assert len(shown) <= MEMBERSHIP_MAX
    heard = read(shown, GRID, verify)
    # Whole milliseconds: adding them as floats may be off by one.
    assert abs(heard.issued - issued) <= 0.001
    assert abs(heard.expires - membership.expires) <= 0.001
    assert attrs.evolve(heard, issued=issued, expires=membership.expires) == membership


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_flipped_byte_is_taken(at, flip):
    shown = bytearray(issue(ann(), sign))
    shown[at % len(shown)] ^= flip
    assert refused(bytes(shown)) != ""


@given(st.integers(0, 10_000), st.binary(max_size=80))
def test_nothing_cut_and_nothing_added_is_taken(cut, more):
    shown = issue(ann(), sign)
    other = shown[: cut % len(shown)] + more
    assert (refused(other) == "") == (other == shown)
    if more:
        assert refused(shown + more) != ""


@given(st.binary(max_size=300))
def test_noise_is_refused_and_never_raises(noise):
    assert refused(noise) != ""
    assert refused(b"\x01" + noise) != ""


def test_of_another_grid_or_peer():
    assert refused(issue(ann(), sign)) == ""
    assert "another grid" in refused(issue(ann(grid=OTHER_GRID), lambda s: sign(s, 3)))
    # Who names our grid but is another's coordinator has not its key.
    assert "did not sign" in refused(issue(ann(), lambda s: sign(s, 3)))
    assert "did not sign" in refused(issue(ann(), lambda s: sign(s, 1)))  # a member makes none for itself
    assert "somebody else's" in refused(issue(ann(peer=BOB), sign))
    assert "no membership" in refused(b"")


def test_a_signature_for_anything_else_is_none():
    shown = issue(ann(), lambda statement: sign(statement.partition(b"\0")[2]))
    assert "did not sign" in refused(shown)


def test_the_coordinator_is_a_member_by_its_key():
    assert refused(b"", peer=GRID) == ""
    assert refused(b"noise", peer=GRID) == ""


@given(times, lives, st.floats(0, 2), st.integers(1, 1000))
def test_it_holds_to_its_end_with_an_allowance(issued, life, part, late):
    shown = issue(ann(issued, life), sign)
    held = read(shown, GRID, verify)
    assert held.expires < held.ends <= held.expires + ALLOWANCE_MAX
    assert held.ends - held.expires <= 0.1 * life + 0.001
    assert held.issued <= held.renewal <= held.expires
    now = issued + part * life
    assert (refused(shown, now=now) == "") == (now < held.ends)
    assert "expired" in refused(shown, now=held.ends + late)


def test_a_clock_that_is_behind_refuses_nothing():
    assert refused(issue(ann(issued=5 * DAY), sign), now=0.0) == ""


@given(times, times)
def test_what_was_issued_before_a_revocation_is_void(issued, at):
    shown = issue(ann(issued), sign)
    held = read(shown, GRID, verify)
    assert ("revoked" in refused(shown, now=issued, at=at)) == (held.issued <= at)
    assert refusal(shown, ANN, GRID, issued, {BOB: at}, verify) == ""


@pytest.mark.parametrize(
    "statement",
    [
        ["grid", "peer", []],
        [GRID, ANN, ["worker"], 1.5, 2],
        [GRID, ANN, ["worker"], -1, 2],
        [GRID, ANN, ["worker"] * 9, 1, 2],
        [GRID, ANN, ["worker"], 1, 2, 3],
        {"grid": GRID},
    ],
)
def test_what_is_signed_but_malformed_is_refused(statement):
    from msgspec.msgpack import encode

    body = encode(statement)
    head = b"\x01" + len(body).to_bytes(2, "big") + body
    shown = head + sign(b"p2pgrid membership\0" + head)
    assert refused(shown) != ""
    with pytest.raises(BadFrame):
        read(shown, GRID, verify)
