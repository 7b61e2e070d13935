"""Which URL is an origin, which frames are asked of it together, and what its answers are worth."""

import random
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.errors import Misused
from p2pgrid.ids import Cid, PeerId
from p2pgrid.transfer.lastresort import NEED, WINDOW, Slowness
from p2pgrid.transfer.ranges import (
    LOOKS,
    RUN_MAX,
    is_origin,
    lot_size,
    owner,
    parse_origin,
    pause,
    pick,
    redirected,
    wrong_part,
    wrong_status,
)

CID = Cid(0x71, bytes(32))
NAME = str(CID)


@pytest.mark.parametrize(
    ("url", "shown", "target"),
    [
        ("http://disks.example", "http://disks.example", f"/packs/{NAME}"),
        ("http://disks.example:80/", "http://disks.example", f"/packs/{NAME}"),
        ("HTTPS://Disks.Example:8443/a/b//", "https://disks.example:8443/a/b", f"/a/b/packs/{NAME}"),
        ("https://h/a%20b", "https://h/a%20b", f"/a%20b/packs/{NAME}"),
        ("https://h/ä", "https://h/%C3%A4", f"/%C3%A4/packs/{NAME}"),
        ("https://bücher.example/x", "https://xn--bcher-kva.example/x", f"/x/packs/{NAME}"),
        ("http://[::1]:8080/x", "http://[::1]:8080/x", f"/x/packs/{NAME}"),
        (
            "https://blob.example/c?sv=1&sig=a%2Fb",
            "https://blob.example/c",
            f"/c/packs/{NAME}?sv=1&sig=a%2Fb",
        ),
        ("https://ann:p%40ss@h/x", "https://h/x", f"/x/packs/{NAME}"),
    ],
)
def test_an_origin_is_a_folder_on_a_web_server(url, shown, target):
    site = parse_origin(url)
    assert site.shown == shown
    assert site.target("packs", CID) == target
    assert is_origin(site.peer)
    assert "ss" not in repr(site)
    assert not is_origin(PeerId("12D3KooWorigin"))


@pytest.mark.parametrize(
    "url",
    [
        "", "disks.example", "file:///srv", "ftp://h/x", "http://", "https:///x", "http://h/#part",
        "http://h/a b", "http://h/a\r\nX: y", "http://h:99999/", "http://h:x/", "http://[::1/", "http://h\x00/",
        "http://ann:secret@h/", "http://h_/\n", "javascript:1", "http://" + "h" * 300,
        "http://h/" + "x" * 3000,
    ],
)  # fmt: skip
def test_anything_else_is_misused(url):
    with pytest.raises(Misused):
        parse_origin(url)


@given(st.text(max_size=60))
def test_no_text_surprises_the_parser(text):
    for url in (text, f"http://{text}", f"https://h/{text}"):
        try:
            site = parse_origin(url)
        except Misused:
            continue
        line = site.target("objects", CID) + site.authority
        assert line.isascii()
        assert line.isprintable()
        assert " " not in line
        assert len(site.peer) <= 64


@st.composite
def packs(draw):
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=700))
    count = len(lengths)
    wanted = draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count))
    return [0, *accumulate(lengths)], sorted(wanted)


@given(packs(), st.integers(1, RUN_MAX), st.randoms(use_true_random=False))
def test_a_run_is_wanted_and_one_range(pack, most, rng):
    offsets, wanted = pack
    run = pick(wanted, offsets, rng, most)
    assert 1 <= len(run) <= most
    assert set(run) <= set(wanted)
    assert all(offsets[b] == offsets[a + 1] and a < b for a, b in pairwise(run))
    assert len({index // lot_size(len(offsets) - 1) for index in run}) == 1


@given(packs(), st.integers(1, 8), st.integers(0, 2**32))
def test_lots_have_one_owner_each_and_all_are_found(pack, people, seed):
    offsets, wanted = pack
    peers = [PeerId(f"peer {n}") for n in range(people)]
    left, rng = {peer: list(wanted) for peer in peers}, random.Random(seed)
    got: list[int] = []
    for peer in peers:
        while left[peer] and (
            run := pick(left[peer], offsets, rng, RUN_MAX, lambda lot, peer=peer: owner(lot, peers) == peer)
        ):
            got += run
            left[peer] = [index for index in left[peer] if index not in run]
    assert len(offsets) // lot_size(len(offsets) - 1) <= LOOKS
    assert sorted(got) == wanted


def test_who_joins_takes_lots_and_moves_none_between_the_others():
    before, after = [PeerId("a"), PeerId("b")], [PeerId("a"), PeerId("b"), PeerId("c")]
    for lot in range(1000):
        assert owner(lot, after) in (owner(lot, before), "c")


def header(**said):
    return {name.replace("_", "-"): value for name, value in said.items()}.get


def test_a_part_is_exactly_what_was_asked_for():
    good = {"Content_Range": "bytes 10-19/100", "Content_Length": "10"}
    assert wrong_part(header(**good), 10, 10, 100) == ""
    assert wrong_part(header(Content_Range="bytes 10-19/*"), 10, 10, 100) == ""
    assert wrong_part(header(**good, Content_Encoding="identity"), 10, 10, 100) == ""
    for wrong in (
        *({"Content_Range": f"bytes {part}"} for part in (
            "10-18/100", "9-19/100", "10-19/101", "10-19/100 ", "1\u0660-19/100", "*/100", f"10-19/{'9' * 30}"
        )),
        {"Content_Range": "items 10-19/100"}, {"Content_Length": "11"}, {"Content_Length": "-1"},
        {"Content_Encoding": "br"},
    ):  # fmt: skip
        assert wrong_part(header(**(good | wrong)), 10, 10, 100), wrong
    assert wrong_part(header(), 10, 10, 100)


@given(st.text(max_size=40), st.text(max_size=20), st.text(max_size=20))
def test_what_a_server_says_is_repeated_in_ascii_only(part, length, encoding):
    said = wrong_part(header(Content_Range=part, Content_Length=length, Content_Encoding=encoding), 0, 1, 2)
    assert said.isascii()
    assert said.isprintable()


def test_a_status_is_explained():
    assert wrong_status(206, 206) == ""
    assert wrong_status(200, 206) == "it ignores Range requests (200 instead of 206)"
    assert wrong_status(404, 200) == "it answers 404 Not Found"
    assert wrong_status(599, 200) == "it answers 599"


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/y", "/y"), ("y?z", "/a/y?z"), ("https://h/y", "/y"), ("https://H:443/y", "/y"), ("//h/y", "/y"),
        ("https://h", "/"), ("/ü", "/%C3%BC"),
        ("http://h/y", None), ("https://h:444/y", None), ("https://other/y", None), ("//other/y", None),
        ("file:///etc/passwd", None), ("https://h:x/", None), ("", None), (None, None), ("ftp://h/", None),
        ("https://h@other/", None),
    ],
)  # fmt: skip
def test_a_redirect_stays_on_its_server(location, target):
    assert redirected(parse_origin("https://h/a"), "/a/x", location) == target


@given(st.text(max_size=60))
def test_no_location_leads_astray(location):
    there = redirected(parse_origin("https://h/a"), "/a/x", location)
    assert there is None or (
        there.startswith("/") and there.isascii() and there.isprintable() and " " not in there
    )


@given(st.integers(1, 2000), st.none() | st.text(max_size=6) | st.integers(0, 10**6).map(str))
def test_a_pause_grows_and_is_bounded(failures, told):
    assert 1 <= pause(failures, told) <= 60
    assert pause(failures) <= pause(failures + 1)


def test_a_pause_is_as_long_as_it_asked_for():
    assert [pause(n) for n in (1, 2, 3)] == [1, 2, 4]
    assert pause(1, "30") == 30
    assert pause(1, "Fri, 31 Dec 1999 23:59:59 GMT") == 1


def test_peers_are_slow_when_the_rest_would_take_them_too_long():
    def after(seconds: float, rate: float, lacking: int = 10**9) -> bool:
        slowness, now, slow = Slowness(), 0.0, False
        while now <= seconds:
            slow = slowness.look(now, int(now * rate), lacking)
            now += 0.5
        return slow

    enough = 10**9 / NEED
    assert not after(WINDOW + 5, 1.1 * enough)
    assert after(WINDOW + 5, 0.9 * enough)
    assert not after(WINDOW - 1, 0)
    assert after(WINDOW + 1, 0)
    assert not after(WINDOW + 5, 1000, lacking=1000)
