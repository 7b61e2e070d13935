"""Is a neighbour known from a stranger by addresses, and does where links are taken survive its multiaddr?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.hole_punch.path import from_multiaddr, is_near, to_multiaddr


@pytest.mark.parametrize(
    ("far", "own", "near"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("192.168.1.5", "192.168.1.9", True),
        ("9.9.9.9", "192.168.1.9", False),
        ("::ffff:9.9.9.9", "::ffff:192.168.1.9", False),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("fd00::1", "fd00:1::2", True),
        ("2a01:4f8:1:2::a", "2a01:4f8:1:2::b", True),
        ("2a01:4f8:1:2::a", "2a01:4f8:1:3::b", False),
    ],
)
def test_who_is_near(far: str, own: str, near: bool) -> None:
    assert is_near(far, own) is near


@given(
    st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).filter(
        lambda ip: not (ip.is_unspecified or ip.is_multicast)
    ),
    st.integers(1, 65535),
)
def test_where_links_are_taken_comes_back_from_its_multiaddr(ip: object, port: int) -> None:
    assert from_multiaddr(to_multiaddr((str(ip), port))) == (str(ip), port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/ip4/10.0.0.1/tcp/1",
        "/ip4/10.0.0.1/tcp/0/tls",
        "/ip4/host/tcp/1/tls",
        "/dns4/a.b/tcp/1/tls",
        "noise",
    ],
)
def test_other_multiaddrs_are_not_taken(text: str) -> None:
    assert from_multiaddr(text) is None
