"""Is everything denied that no rule allows, however it is asked for?"""

from __future__ import annotations

import ipaddress
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.errors import BadFrame, Misused
from p2pgrid.ids import PeerId
from p2pgrid.node.proxy.addresses import closed, odd_number
from p2pgrid.node.proxy.rules import (
    Accept,
    Ask,
    Denied,
    Exposure,
    HereGuest,
    Target,
    decide,
    decode,
    encode,
    parse_accept,
)

ANN, BOB, EVE = PeerId("ann"), PeerId("bob"), PeerId("eve")
GUESTS = (
    HereGuest("web", 0, ANN, (Accept(8080, "job"), Accept(22), Accept(9000, "other"))),
    HereGuest("web", 1, ANN, (Accept(8080, "job"), Accept(22))),
    HereGuest("mute", 0, ANN),
)
EXPOSED = (Exposure(8000, "web"), Exposure(443, "web", "example.org"))
RUNS = {"web": frozenset({BOB}), "other": frozenset({EVE}), "mute": frozenset[PeerId]()}


@pytest.mark.parametrize(
    ("peer", "target", "what"),
    [
        (ANN, Target(22, "web"), GUESTS[0]),
        (ANN, Target(22, "web", 1), GUESTS[1]),
        (ANN, Target(8080, "web"), GUESTS[0]),
        (BOB, Target(8080, "web", caller="web"), GUESTS[0]),
        (EVE, Target(9000, "web", caller="other"), GUESTS[0]),
        (BOB, Target(8000, caller="web"), EXPOSED[0]),
        (BOB, Target(443, caller="web"), EXPOSED[1]),
    ],
)
def test_what_a_rule_allows_is_allowed(peer: PeerId, target: Target, what: object) -> None:
    assert decide(peer, target, GUESTS, EXPOSED, RUNS) == what


@pytest.mark.parametrize(
    ("peer", "target"),
    [
        (ANN, Target(23, "web")),
        (ANN, Target(22, "web", 2)),
        (ANN, Target(22, "mute")),
        (ANN, Target(22, "nowhere")),
        (BOB, Target(22, "web")),
        (BOB, Target(22, "web", caller="web")),
        (BOB, Target(8080, "web")),
        (EVE, Target(8080, "web", caller="web")),
        (EVE, Target(8080, "web", caller="other")),
        (BOB, Target(9000, "web", caller="web")),
        (ANN, Target(8000)),
        (BOB, Target(8000)),
        (BOB, Target(8001, caller="web")),
        (EVE, Target(8000, caller="web")),
        (EVE, Target(8000, caller="other")),
        (BOB, Target(8000, caller="mute")),
    ],
)
def test_what_no_rule_allows_is_denied(peer: PeerId, target: Target) -> None:
    assert isinstance(decide(peer, target, GUESTS, EXPOSED, RUNS), Denied)


def test_in_whose_name_is_asked_is_never_believed_but_looked_up() -> None:
    assert decide(BOB, Target(8080, "web", caller="web"), GUESTS, EXPOSED, {}) == Ask("web")
    assert decide(BOB, Target(8000, caller="web"), GUESTS, EXPOSED, {}) == Ask("web")
    assert isinstance(decide(BOB, Target(8000, caller="any"), GUESTS, EXPOSED, {}), Denied)


ids = st.sampled_from(["", "web", "other", "mute", "nowhere"])
peers = st.sampled_from([ANN, BOB, EVE])
targets = st.builds(
    Target, st.sampled_from([22, 443, 8000, 8080, 9000]), ids, st.sampled_from([None, 0, 1]), ids
)


@given(peers, targets)
def test_nothing_else_is_ever_allowed(peer: PeerId, target: Target) -> None:
    found = decide(peer, target, GUESTS, EXPOSED, RUNS)
    if isinstance(found, HereGuest):
        assert found.job == target.job
        whos = {rule.who for rule in found.accepts if rule.port == target.port}
        if target.caller:
            assert peer in RUNS[target.caller]
            assert target.caller in whos or ("job" in whos and target.caller == found.job)
        else:
            assert whos
            assert peer == found.submitter
    elif isinstance(found, Exposure):
        assert not target.job
        assert found.to == target.caller
        assert peer in RUNS[target.caller]


@given(targets)
def test_targets_are_read_as_they_are_written(target: Target) -> None:
    assert decode(encode(target)) == target


@given(st.binary(max_size=600))
def test_noise_is_no_target(noise: bytes) -> None:
    try:
        decode(noise)
    except BadFrame:
        return


@pytest.mark.parametrize(
    ("text", "rule"), [("22", Accept(22)), ("8080:job", Accept(8080, "job")), ("1:AbC23", Accept(1, "abc23"))]
)
def test_rules_are_spelled_so(text: str, rule: Accept) -> None:
    assert parse_accept(text) == rule


@pytest.mark.parametrize(
    "text", ["", "0", "65536", "22:", ":job", "x", "22:a b", "-1", "22:job:x", "٣", "1e3"]
)
def test_other_rules_are_refused(text: str) -> None:
    with pytest.raises(Misused):
        parse_accept(text)


# --- addresses ----------------------------------------------------------------------------

CLOSED = re.findall(
    r"\S+",
    """
    0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.127.255.255 127.0.0.1 127.255.255.254
    169.254.0.1 169.254.169.254 172.16.0.1 172.31.255.255 192.168.0.1 192.0.0.1 192.0.2.1 198.18.0.1
    198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
    :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:0:0
    64:ff9b::7f00:1 64:ff9b::a00:1 2002:7f00:1:: 2002:a00:1:: 2002:c0a8:101::1
    2001:0:53aa:64c:0:7f:80ff:fffe fe80::1 fe80::1%eth0 fec0::1 fc00::1 fd12::1 ff02::1 100::1 2001:db8::1
    64:ff9b:1::1 4000::1 2001:10::1
""",
)
OPEN = re.findall(
    r"\S+",
    """
    1.1.1.1 9.255.255.255 11.0.0.1 100.63.255.255 100.128.0.1 126.1.1.1 128.0.0.1 172.15.255.255 172.32.0.1
    192.167.1.1 192.169.1.1 223.255.255.255 2606:4700::1111 2a00:1450:4001::1 ::ffff:1.1.1.1 64:ff9b::101:101
    2002:101:101::1
""",
)


@pytest.mark.parametrize("address", CLOSED)
def test_what_is_not_the_open_internet_is_closed(address: str) -> None:
    assert closed(address)


@pytest.mark.parametrize("address", OPEN)
def test_the_open_internet_is_open(address: str) -> None:
    assert not closed(address)


@given(st.ip_addresses(v=4))
def test_no_private_address_is_open_in_any_spelling(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    spellings = [
        str(address),
        f"::ffff:{address}",
        str(ipaddress.IPv6Address((0x64FF9B << 96) | number)),
        str(ipaddress.IPv6Address((0x2002 << 112) | (number << 80) | 1)),
    ]
    why = [bool(closed(text)) for text in spellings]
    assert len(set(why)) == 1
    if address.is_private or address.is_loopback or address.is_link_local or not address.is_global:
        assert why[0] or address in ipaddress.ip_network("192.0.0.0/24")


@given(st.ip_addresses(v=6))
def test_no_private_ipv6_address_is_open(address: ipaddress.IPv6Address) -> None:
    if not address.is_global and address.sixtofour is None:
        assert closed(str(address))


@given(st.text(max_size=40))
def test_noise_is_closed(text: str) -> None:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        assert closed(text)


@pytest.mark.parametrize(
    "host",
    ["127.1", "2130706433", "0x7f000001", "0177.0.0.1", "017700000001", "127.0.1", "0X7F.1", "0", "1.", "0x"],
)
def test_numbers_that_are_addresses_to_some_are_seen(host: str) -> None:
    assert odd_number(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "example.org", "1.example", "8080.abc.grid", "a1", ""])
def test_names_and_addresses_are_no_odd_numbers(host: str) -> None:
    assert not odd_number(host)
