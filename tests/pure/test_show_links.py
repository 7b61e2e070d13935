"""What a person reads of links and pings."""

import pytest

from p2pgrid.node import show, show_links
from p2pgrid.node.links import summary

ANN = "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"
BOB = "12D3KooWJWoaqZhDaoEFshF7Rh1bpY9ohihFhzcW6d69Lr2NASuq"


def link(**more):
    return {
        "peer": ANN,
        "way": "direct",
        "via": None,
        "near": True,
        "connected": True,
        "since": 200.0,
        "sent": 3 << 20,
        "received": 100,
        "delay": 0.00042,
    } | more


def ping(number=1, seconds=0.0412, way="direct", **more):
    return {
        "number": number, "seconds": seconds, "way": way, "via": None, "near": False, "why": "", "after": 0.0
    } | more  # fmt: skip


LOST = {"seconds": None, "way": None, "near": None, "why": "no answer in 3 s"}


def status(*links):
    return {
        "name": "me", "peer": BOB, "roles": ["worker"], "grid": ANN, "connected": True, "running": [],
        "received": {}, "served": {}, "holds": [], "paused": "", "links": list(links),
    }  # fmt: skip


def test_a_status_without_links_says_nothing_of_them():
    assert "LINK" not in show.status(status())


def test_each_link_is_a_row():
    said = show.status(status(link(), link(peer=BOB, way="relayed", via=ANN, near=False, delay=None)))
    one, other = said.split("\n")[-2:]
    assert one.split() == [ANN, "direct,", "near", "3:20", "3.0", "MiB", "100", "B", "0.4", "ms"]
    assert f"relayed via …{ANN[-8:]}" in other
    assert other.endswith("-")


def test_a_link_that_looks_for_another_way_is_told_so():
    assert "lost (direct, near), looking for another" in show.status(status(link(connected=False)))


def test_a_pause_is_told():
    assert "paused   lunch" in show.status(status() | {"paused": "lunch"})


@pytest.mark.parametrize(
    ("seconds", "said"), [(None, "-"), (0.00042, "0.4 ms"), (0.0999, "99.9 ms"), (0.25, "250 ms")]
)
def test_delays(seconds, said):
    assert show_links.delay(seconds) == said


def test_a_ping_tells_the_way_and_where_it_changed():
    relayed = ping(way="relayed", via=ANN)
    assert show_links.pinged(relayed, None) == f"  1  relayed via …{ANN[-8:]}  41.2 ms"
    assert show_links.pinged(ping(2, way="relayed", via=ANN), relayed).endswith("41.2 ms")
    line = show_links.pinged(ping(3, 0.02, "punched", after=1.84), relayed)
    assert line == f"  3  punched  20.0 ms  (was relayed via …{ANN[-8:]}, 1.8 s after the start)"
    assert show_links.pinged(ping() | LOST, None) == "  1  no answer: no answer in 3 s"


def test_what_pings_come_to():
    rows = [
        ping(1, 0.3, "relayed", via=ANN),
        ping(2) | LOST,
        ping(3, 0.1, "punched", after=2.5),
        ping(4, 0.2, "punched", after=3.0),
    ]
    v = summary(rows)
    assert v == {
        "answered": 3, "way": "punched", "via": None, "min": 0.1, "median": 0.2, "max": 0.3,
        "direct_after": 2.5,
    }  # fmt: skip
    said = show_links.ping(v | {"pings": rows})
    assert said == "3 of 4 answered; least / median / most 100 ms / 200 ms / 300 ms; punched"


def test_when_nobody_answers():
    v = summary([ping() | LOST])
    assert (v["answered"], v["way"], v["min"], v["direct_after"]) == (0, None, None, None)
    assert show_links.ping(v | {"pings": [LOST]}) == "none of 1 answered"


def test_what_was_only_relayed_was_never_direct():
    assert summary([ping(way="relayed", via=ANN)])["direct_after"] is None
