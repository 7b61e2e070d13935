"""Do names on the grid say what they say, in any case, and nothing else?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.errors import Misused
from p2pgrid.ids import PeerId
from p2pgrid.node.proxy.names import _BASE58, GridName, is_grid, label, parse, peer_of

PEER = PeerId("12D3KooWGzNcWmLv2ABRMYHcJaEjVVqTqRu9vZbWdWHKhSHiYzeM")
JOB = "abcdefgh23"


@pytest.mark.parametrize(
    ("host", "port", "meaning"),
    [
        (f"8080.{JOB}.grid", 80, GridName(8080, JOB)),
        (f"8080.{JOB.upper()}.GRID.", 80, GridName(8080, JOB)),
        (f"{JOB}.grid", 80, GridName(80, JOB)),
        (f"22.3.{JOB}.grid", 80, GridName(22, JOB, 3)),
        (f"22.task3.{JOB}.grid", 80, GridName(22, JOB, 3)),
        (f"task3.{JOB}.grid", 80, GridName(80, JOB, 3)),
        ("8000.lab-pc_1.grid", 1, GridName(8000, "lab-pc_1")),
        ("owner.grid", 8000, GridName(8000, "owner")),
        (f"{label(PEER)}.grid", 9, GridName(9, label(PEER))),
    ],
)
def test_names_mean_what_the_page_says(host: str, port: int, meaning: GridName) -> None:
    assert parse(host, port) == meaning


@pytest.mark.parametrize(
    "host",
    [
        *("grid", ".grid", "a..grid", "0.a.grid", "65536.a.grid", "x.a.grid", "1.2.lab.grid", "-a.grid"),
        *(f"1.2.3.{JOB}.grid", f"task.{JOB}.grid", "task3.lab.grid", "ü.grid", "a.grid.com", "a b.grid"),
        "٣.a.grid",  # digits of another script
        "8080." * 60 + "grid",
    ],
)
def test_other_names_are_refused(host: str) -> None:
    with pytest.raises(Misused):
        parse(host, 80)


@given(st.text(max_size=80), st.sampled_from(["", ".grid"]))
def test_noise_is_only_ever_misused(text: str, end: str) -> None:
    try:
        found = parse(text + end, 80)
    except Misused:
        return
    assert is_grid(text + end)
    assert 0 < found.port < 65536


@given(st.binary(min_size=32, max_size=32))
def test_a_peer_id_is_spelled_in_one_label(key: bytes) -> None:
    number, text = int.from_bytes(b"\x24\x08\x01\x12\x20" + key, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = _BASE58[digit] + text
    peer = PeerId("1" + text)
    assert len(label(peer)) <= 63
    assert peer_of(label(peer)) == peer
    assert parse(f"80.{label(peer).upper()}.grid", 1).peer == peer


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz234567", max_size=63))
def test_no_two_labels_are_one_peer(text: str) -> None:
    peer = peer_of(text)
    assert peer is None or label(peer) == text
