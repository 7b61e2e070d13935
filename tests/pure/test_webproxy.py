"""Which proxy an origin is reached by, for each way in which the environment may say it."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.errors import Misused
from p2pgrid.transfer.ranges import parse_origin
from p2pgrid.transfer.webproxy import proxy_for

P = "http://gate.example:3128"


@pytest.mark.parametrize(
    ("url", "environ", "shown"),
    [
        ("https://h/x", {}, None),
        ("https://h/x", {"https_proxy": ""}, None),
        ("https://h/x", {"https_proxy": P}, P),
        ("https://h/x", {"HTTPS_PROXY": P}, P),
        ("https://h/x", {"https_proxy": "http://a:1", "HTTPS_PROXY": P}, "http://a:1"),
        ("https://h/x", {"http_proxy": P}, None),
        ("http://h/x", {"http_proxy": P}, P),
        ("http://h/x", {"all_proxy": P, "https_proxy": "http://a:1"}, P),
        ("https://h/x", {"https_proxy": "gate.example:3128"}, P),
        ("https://h/x", {"https_proxy": "http://gate.example"}, "http://gate.example:80"),
        ("https://h/x", {"https_proxy": "http://[fd00::1]:8"}, "http://[fd00::1]:8"),
        ("https://h/x", {"https_proxy": "http://ann:geheim@a:1"}, "http://a:1"),
    ],
)
def test_a_scheme_has_its_proxy(url, environ, shown):
    found = proxy_for(parse_origin(url), environ)
    assert (found.shown if found else None) == shown
    assert "geheim" not in repr(found)


@pytest.mark.parametrize(
    "said", ["socks5://a:1", "https://a:1", "http://", "http://a:x", "http://[a", "http://a..b"]
)
def test_what_is_no_http_proxy_is_said_and_not_gone_past(said):
    with pytest.raises(Misused, match="all_proxy"):
        proxy_for(parse_origin("https://h/x"), {"all_proxy": said})


@pytest.mark.parametrize(
    ("url", "listed", "past"),
    [
        ("https://h.example/x", "*", True),
        ("https://h.example/x", "h.example", True),
        ("https://h.example/x", "other, H.Example ,", True),
        ("https://h.example/x", "example", True),
        ("https://h.example/x", ".example", True),
        ("https://h.example/x", "*.example", True),
        ("https://h.example/x", "h.example:443", True),
        ("https://h.example/x", "h.example:80", False),
        ("https://h.example/x", "ample", False),
        ("https://h.example/x", "g.h.example", False),
        ("https://h.example/x", "", False),
        ("https://10.1.2.3/x", "10.0.0.0/8", True),
        ("https://10.1.2.3/x", "10.1.2.3", True),
        ("https://10.1.2.3/x", "10.1.2.3:443", True),
        ("https://10.1.2.3/x", "11.0.0.0/8", False),
        ("https://10.1.2.3/x", "2.3", False),
        ("https://[fd00::1]/x", "fd00::/8", True),
        ("https://[fd00::1]:8/x", "[fd00::1]:8", True),
        ("https://[fd00::1]/x", "10.0.0.0/8", False),
        ("https://127.0.0.1/x", "", True),
        ("https://[::1]/x", "", True),
        ("https://localhost/x", "", True),
    ],
)
def test_no_proxy_names_those_that_are_asked_themselves(url, listed, past):
    assert (proxy_for(parse_origin(url), {"https_proxy": P, "NO_PROXY": listed}) is None) == past


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_text_surprises_it(said, listed):
    with contextlib.suppress(Misused):
        proxy_for(parse_origin("https://h.example/x"), {"https_proxy": said, "no_proxy": listed})
