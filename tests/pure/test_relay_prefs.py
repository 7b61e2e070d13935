"""Is a relay what its owner wrote, and shown as it is?"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from p2pgrid.errors import Misconfigured, Misused
from p2pgrid.hole_punch.relay.limits import Limits
from p2pgrid.node import show_relay
from p2pgrid.node.relay_prefs import FILE, RelayPrefs


def test_coordinators_relay_by_default_and_others_do_not() -> None:
    assert RelayPrefs().relays(coordinates=True)
    assert not RelayPrefs().relays(coordinates=False)
    for coordinates in (True, False):
        assert RelayPrefs(wanted="on").relays(coordinates=coordinates)
        assert not RelayPrefs(wanted="off").relays(coordinates=coordinates)


def test_limits_as_they_are_written() -> None:
    assert RelayPrefs().limits() == Limits()
    written = RelayPrefs(
        rate="8Mbit", rate_each="100KB", quota="2G", quota_each="512M", circuits=9, circuits_each=3
    )
    assert written.limits() == Limits(
        circuits=9, circuits_each=3, quota=2 << 30, quota_each=512 << 20, rate=1e6, rate_each=1e5
    )
    assert written.changed({"rate": "none", "quota": "none"}).limits() == Limits(
        circuits=9, circuits_each=3, quota=None, quota_each=512 << 20, rate=math.inf, rate_each=1e5
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"wanted": "maybe"},
        {"rate": "fast"},
        {"rate": 5},
        {"quota": "0"},
        {"quota_each": "much"},
        {"circuits": 0},
        {"circuits": 70_000},
        {"circuits_each": "3"},
        {"colour": "red"},
    ],
)
def test_what_is_not_understood_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(Misused):
        RelayPrefs().changed(settings)


def test_it_is_kept(tmp_path: Path) -> None:
    assert RelayPrefs.load(tmp_path) == RelayPrefs()
    wanted = RelayPrefs(wanted="on", quota="10G")
    wanted.save(tmp_path)
    assert RelayPrefs.load(tmp_path) == wanted


@pytest.mark.parametrize("text", ["", "[]", '{"rate": "fast"}', '{"colour": "red"}', '"on"'])
def test_a_file_that_is_broken_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(Misconfigured, match=FILE):
        RelayPrefs.load(tmp_path)


ANSWER = {
    "on": True,
    "why": "",
    "wanted": "on",
    "limits": {
        "rate": 1e6,
        "rate_each": None,
        "quota": 1 << 30,
        "quota_each": None,
        "circuits": 8,
        "circuits_each": 2,
    },
    "reserved": ["B"],
    "circuits": [{"caller": "A", "called": "B"}],
    "bytes_today": 1 << 20,
    "bytes": 1 << 21,
    "refused": {"quota": 3},
    "uses": [{"relay": "R", "address": "192.0.2.1", "delay": 0.0123}],
    "lost": [{"relay": "R", "peer": None, "why": "it is gone", "age": 4.2}],
}


def test_what_a_person_reads() -> None:
    json.dumps(ANSWER)
    assert show_relay.relay(ANSWER).split("\n") == [
        "relays   for others",
        "limits   8Mbit in all, any rate a circuit; "
        "1.0 GiB a day in all, any amount a peer; 8 circuits, 2 a peer",
        "carried  1.0 MiB today, 2.0 MiB since the start",
        "now      1 circuit(s), 1 peer(s) are reached through it",
        "circuit  A -> B",
        "refused  3 time(s): quota",
        "uses     R  12 ms",
        "lost     R, to us, 4 s ago: it is gone",
    ]
    idle = {**ANSWER, "on": False, "why": "this node is no relay", "wanted": "default", "lost": []}
    assert show_relay.relay(idle).split("\n") == [
        "relays   nothing: this node is no relay (the default of its role)",
        "uses     R  12 ms",
    ]
