"""Does a ticket say what was put into it, and nothing that was not?"""

import base64
import math
import os
import re
import stat
from datetime import UTC, datetime
from pathlib import Path

import biscuit_auth
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.errors import Misconfigured, Misused, NotAuthorised
from p2pgrid.ids import digest
from p2pgrid.node.identity import IDENTITY_FILE, Identity, load_or_create_root, peer_id
from p2pgrid.node.ticket import ADDRESSES_MAX, create_ticket, public_key, read_ticket, verify

ROOT, NOW = bytes(range(32)), 1_800_000_000.0
GRID = Identity(b"\1" * 32).peer
OTHER_GRID = Identity(b"\2" * 32).peer
ADDRESS = "/ip4/192.0.2.7/tcp/4001"
PAGE = Path(__file__).parents[2] / "docs" / "protocols" / "ticket.md"


def ticket(role="worker", uses=None, expires_s=3600.0, addresses=(ADDRESS,)):
    return create_ticket(ROOT, GRID, addresses, role, uses, expires_s, NOW)


def judged(text, now=NOW, root=ROOT, grid=GRID):
    return verify(read_ticket(text).token, public_key(root), grid, now)


@given(
    st.sampled_from(["worker", "submitter"]),
    st.none() | st.integers(1, 10**9),
    st.none() | st.integers(1, 10**9),
    st.lists(st.text("/ip46tcp.:0123456789", min_size=1, max_size=60), max_size=ADDRESSES_MAX).map(tuple),
)
def test_what_goes_in_comes_out(role, uses, expires_s, addresses):
    text = ticket(role, uses, expires_s, addresses)
    assert re.fullmatch("p2pgrid1[a-z2-7]+", text)
    read, grant = read_ticket(text), judged(text)
    assert (read.coordinator, read.addresses) == (GRID, addresses)
    assert (grant.role, grant.uses) == (role, uses)
    assert grant.expires == (math.inf if expires_s is None else NOW + expires_s)
    assert re.fullmatch("[0-9a-f]{32}", grant.token_id)
    assert judged(text, now=NOW + (expires_s or 10**9) - 1) == grant


def test_tickets_alike_are_told_apart_and_a_secret_is_not_shown():
    one, two = ticket(), ticket()
    assert judged(one).token_id != judged(two).token_id
    assert read_ticket(one).token not in repr(read_ticket(one))


@given(st.sampled_from("\n\r\t "), st.integers(1, 80))
def test_however_it_was_wrapped(space, width):
    text = ticket()
    wrapped = space.join(text[i : i + width] for i in range(0, len(text), width))
    assert read_ticket(f" {wrapped.upper()}\n") == read_ticket(text)


# One for all examples: each is made with fresh randomness, and Hypothesis replays its choices.
ONE = ticket()


@given(st.data())
def test_a_cut_ticket_says_so(data):
    text = ONE
    cut = data.draw(st.integers(len("p2pgrid1"), len(text) - 2))
    with pytest.raises(Misused, match="cut off"):
        read_ticket(text[:cut])


@given(st.data())
def test_a_changed_character_is_noticed(data):
    text = ONE
    place = data.draw(st.integers(len("p2pgrid1") + 11, len(text) - 2))
    other = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz234567").filter(lambda c: c != text[place]))
    with pytest.raises(Misused):
        read_ticket(text[:place] + other + text[place + 1 :])


@given(st.text() | st.text("abcdefghijklmnopqrstuvwxyz234567").map("p2pgrid1".__add__) | st.binary().map(
    lambda noise: "p2pgrid1" + base64.b32encode(noise).decode().rstrip("=")))  # fmt: skip
def test_noise_is_misused_and_nothing_worse(noise):
    with pytest.raises(Misused):
        read_ticket(noise)


def test_a_body_of_another_kind_is_misused():
    for body in (b"\xc0", b"\x83\xa1c\xa1x\xa1a\x90\xa1t\xc4\x00", b"\x91" * 5000):
        data = len(body).to_bytes(2, "big") + digest(body)[:4] + body
        with pytest.raises(Misused, match="does not know"):
            read_ticket("p2pgrid1" + base64.b32encode(data).decode().rstrip("="))


def test_expired_foreign_and_forged_tokens_are_refused():
    text = ticket(expires_s=60)
    judged(text, now=NOW + 59)
    with pytest.raises(NotAuthorised, match="expired on 2027-01-15 08:01 UTC"):
        judged(text, now=NOW + 60)
    with pytest.raises(NotAuthorised, match="another grid"):
        judged(text, grid=OTHER_GRID)
    with pytest.raises(NotAuthorised, match="did not make"):
        judged(text, root=b"\7" * 32)
    forged = create_ticket(b"\7" * 32, GRID, [ADDRESS], "submitter", None, None, NOW)
    with pytest.raises(NotAuthorised, match="did not make"):
        judged(forged)


@given(st.text(max_size=400) | st.binary(max_size=300).map(lambda b: base64.urlsafe_b64encode(b).decode()))
def test_a_token_of_noise_is_not_authorised(noise):
    with pytest.raises(NotAuthorised):
        verify(noise, public_key(ROOT), GRID, NOW)


def test_a_token_too_long_is_not_even_read():
    with pytest.raises(NotAuthorised, match="too long"):
        verify("A" * 10_000_000, public_key(ROOT), GRID, NOW)


def narrowed(text, code):
    keys = biscuit_auth.PublicKey.from_bytes(public_key(ROOT), biscuit_auth.Algorithm.Ed25519)
    token = biscuit_auth.Biscuit.from_base64(read_ticket(text).token, keys)
    return token.append(biscuit_auth.BlockBuilder(code)).to_base64()


def test_a_bearer_may_narrow_a_token_but_not_widen_it():
    text = ticket("worker", uses=1, expires_s=3600)
    sooner = datetime.fromtimestamp(NOW + 60, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    short = narrowed(text, f"check if time($t), $t < {sooner};")
    grant = verify(short, public_key(ROOT), GRID, NOW)
    assert grant == judged(text)  # the same token_id: its uses are counted together
    with pytest.raises(NotAuthorised, match="narrowed"):
        verify(short, public_key(ROOT), GRID, NOW + 61)
    greedy = narrowed(text, 'role("submitter"); uses(1000); expires(2099-01-01T00:00:00Z);')
    assert verify(greedy, public_key(ROOT), GRID, NOW) == grant
    elsewhere = narrowed(text, f'grid("{OTHER_GRID}");')
    with pytest.raises(NotAuthorised):
        verify(elsewhere, public_key(ROOT), OTHER_GRID, NOW)


def test_what_makes_no_sense_is_misused():
    for wrong in (
        {"role": "owner"},
        {"uses": 0},
        {"expires_s": 0.0},
        {"expires_s": -1.0},
        {"expires_s": 1e18},
    ):
        with pytest.raises(Misused):
            ticket(**wrong)


def test_the_page_is_right():
    """The vector of docs/protocols/ticket.md, read from the page."""
    page = PAGE.read_text()
    text = re.search(r"```ticket\n(.*?)```", page, re.S).group(1)
    read = read_ticket(text)
    assert read.coordinator == re.search(r"coordinator `(\w+)`", page).group(1) == GRID
    assert list(read.addresses) == re.findall(r"address `(\S+)`", page)
    root = bytes.fromhex(re.search(r"root public key `(\w+)`", page).group(1))
    assert root == public_key(ROOT)
    grant = verify(read.token, root, GRID, NOW)
    assert (grant.role, grant.uses, grant.expires) == ("worker", 3, NOW + 3600)
    assert grant.token_id == re.search(r"token id `(\w+)`", page).group(1)


# --- identity ------------------------------------------------------------------------------


def test_a_key_is_made_once_and_kept(tmp_path):
    folder = tmp_path / "data" / "node"
    made = Identity.load_or_create(folder)
    assert Identity.load_or_create(folder) == made
    assert len(made.seed) == 32
    assert made.seed.hex() not in repr(made)
    assert stat.S_IMODE((folder / IDENTITY_FILE).stat().st_mode) == 0o600
    assert load_or_create_root(folder) == load_or_create_root(folder) != made.seed
    assert sorted(p.name for p in folder.iterdir()) == ["identity.key", "root.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_may_read_is_refused(tmp_path, mode):
    Identity.load_or_create(tmp_path)
    (tmp_path / IDENTITY_FILE).chmod(mode)
    with pytest.raises(Misconfigured, match="chmod 600"):
        Identity.load_or_create(tmp_path)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_file_that_is_no_key_is_refused_and_left_alone(tmp_path, size):
    path = tmp_path / IDENTITY_FILE
    path.touch(0o600)
    path.write_bytes(b"x" * size)
    with pytest.raises(Misconfigured, match="not a key"):
        Identity.load_or_create(tmp_path)
    assert path.read_bytes() == b"x" * size


def test_a_folder_that_cannot_be_is_misconfigured(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Misconfigured):
        Identity.load_or_create(tmp_path / "file" / "below")
    (tmp_path / IDENTITY_FILE).mkdir()
    with pytest.raises(Misconfigured):
        Identity.load_or_create(tmp_path)


def test_who_comes_second_takes_the_key_of_who_came_first(tmp_path, monkeypatch):
    real = os.link

    def late(draft, path):
        path.write_bytes(b"f" * 32)  # somebody was faster
        path.chmod(0o600)
        real(draft, path)

    monkeypatch.setattr(os, "link", late)
    assert Identity.load_or_create(tmp_path).seed == b"f" * 32
    assert [p.name for p in tmp_path.iterdir()] == [IDENTITY_FILE]


def test_the_peer_id_is_the_one_of_the_specification():
    # RFC 8032's first test vector, as every libp2p writes it
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    assert Identity(seed).peer.startswith("12D3KooW")
    assert len(Identity(seed).peer) == 52
    assert peer_id(bytes(32)) == "12D3KooW9pNAk8aiBuGVQtWRdbkLmo5qVL3e2h5UxbN2Nz9ttwiw"
