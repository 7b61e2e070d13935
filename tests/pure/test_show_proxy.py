"""Does a person see what is under way, and nothing that steers the terminal?"""

from __future__ import annotations

from p2pgrid.node.show_proxy import status

FLOW = {
    "who": "ann\x1b[2J", "to": "port 80 of a guest of webjobwebj", "peer": "12D3", "way": "punched",
    "opened": "there", "sent": 2048, "received": 3 << 20, "age": 61.4,
}  # fmt: skip


def test_connections_and_what_is_exposed_are_shown() -> None:
    exposed = [
        {"port": 8000, "to": "webjobwebj", "host": "", "at": 8000},
        {"port": 443, "to": "webjobwebj", "host": "example.org", "at": 8443},
    ]
    text = status({"label": "abc", "flows": [FLOW], "exposed": exposed})
    assert "\x1b" not in text
    for word in ("ann", "port 80 of a guest of webjobwebj", "punched", "in", "61 s", "2.0 KiB", "3.0 MiB"):
        assert word in text, text
    assert "port 8000 is exposed to webjobwebj" in text
    assert "example.org:8443" in text
    assert text.endswith("this node's label: abc")


def test_nothing_under_way_is_said() -> None:
    assert status({"label": "abc", "flows": [], "exposed": []}).startswith("no connections")
