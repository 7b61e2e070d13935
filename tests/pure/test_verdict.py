"""Does the sentence say what the facts mean, and does the advice help?"""

from __future__ import annotations

import json

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.hole_punch.netlink import Route
from p2pgrid.hole_punch.netwatch import Net
from p2pgrid.node import show_netcheck
from p2pgrid.node.netcheck import exit_code, here, report
from p2pgrid.node.verdict import Facts, Observer, nat_name, verdict

OWN = "192.168.1.7"
HOME = Facts(
    bound=(("0.0.0.0", 4001),), hosts=(OWN,), gateway="192.168.1.1", own=OWN, unmapped="pcp: no answer"
)


def coordinator(seen: str = "", port: int = 0, **facts) -> Observer:
    where = (seen, port) if seen else None
    return Observer(
        "hub", "coordinator", **{"address": ("11.0.0.1", 4321), "delay": 0.02, "seen": where, **facts}
    )


def relay(seen: str = "", port: int = 0, **facts) -> Observer:
    return attrs.evolve(coordinator(seen, port, **facts), name="relay", role="relay")


def home(*observers: Observer, **facts) -> Facts:
    return attrs.evolve(HOME, observers=observers, **facts)


GONE = {"delay": None, "why": "no answer"}
EASY = (coordinator("11.9.9.9", 4001), relay("11.9.9.9", 4001))
HARD = (coordinator("11.9.9.9", 4001), relay("11.9.9.9", 5002))

TABLE = [
    (home(*EASY), "easy", "Behind a NAT that punches well", "switch on PCP"),
    (home(*HARD), "hard", "Behind a symmetric NAT", "switch on PCP"),
    (home(*HARD, mapping_wanted=False), "hard", "symmetric", "port_mapping=on"),
    (home(*HARD, ipv6=True), "hard", "Over IPv6", "switch on"),
    (home(HARD[0]), "unknown", "unknown kind", "no relay answers"),
    (home(attrs.evolve(HARD[0], relays=True)), "unknown", "unknown kind", "switch on PCP"),
    (home(*EASY, unmapped="pcp: … another NAT stands before it"), "easy", "punches well", "the provider"),
    (home(*EASY, mapped=("11.9.9.9", 4001), how="pcp"), "mapped", "lets others in (pcp)", ""),
    (home(*HARD, mapped=("11.9.9.9", 4001), how="upnp"), "mapped", "lets others in (upnp)", ""),
    (home(attrs.evolve(EASY[0], called=True), EASY[1]), "called", "Reachable directly", "switch on"),
    (home(coordinator(OWN, 4001), relay(OWN, 4001)), "open", "nothing stands between", ""),
    (home(coordinator(OWN, 4001)), "open", "nothing stands between", ""),
    (home(coordinator(OWN, 4001, called=False)), "easy", "firewall that punches well", ""),
    (
        home(*EASY[:1], attrs.evolve(EASY[1], called=False), mapped=("11.9.9.9", 1), how="pcp"),
        "easy",
        "NAT",
        "see its",
    ),
    (home(coordinator(), own="11.5.5.5", hosts=("11.5.5.5",)), "open", "whole internet's", ""),
    (home(coordinator(**GONE), relay(address=("11.0.0.2", 443))), "only-443", "Only port 443", ""),
    (
        home(coordinator(address=("11.0.0.2", 443)), relay(**GONE)),
        "only-443",
        "Only port 443",
        "no relay answers",
    ),
    (home(coordinator(**GONE), relay(**GONE)), "cut-off", "Nobody of the grid answers", "no answer"),
    (home(own="", gateway=""), "cut-off", "No network", "online"),
    (home(coordinator(), running=False), "unknown", "while a daemon runs", "p2pnode join"),
    (home(coordinator(**GONE), running=False), "cut-off", "Nobody", "online"),
    (home(own="", hosts=("2001:db8::7",), ipv6=True), "unknown", "Over IPv6", "no relay answers"),
]


@pytest.mark.parametrize(("facts", "kind", "sentence", "advice"), TABLE)
def test_the_table(facts: Facts, kind: str, sentence: str, advice: str):
    said = verdict(facts)
    assert said.kind == kind
    assert sentence in said.sentence
    assert advice in "\n".join(said.advice)
    assert said.advice or not advice
    assert said.exit_code == (6 if kind == "cut-off" else 0)


def test_a_coordinator_that_relays_is_a_relay():
    assert "no relay" not in " ".join(verdict(home(attrs.evolve(HARD[0], relays=True))).advice)


def test_who_is_reachable_gets_no_advice():
    for facts, kind, _, advice in TABLE:
        if kind in ("open", "mapped"):
            assert not verdict(facts).advice
            assert not advice


def test_the_nat_has_its_name():
    assert nat_name(home(*EASY)) == "mapping endpoint-independent"
    assert nat_name(home(*HARD)) == "mapping address-dependent or worse (symmetric)"
    assert nat_name(home(coordinator(OWN, 4001))) == "none"
    assert nat_name(home(EASY[0])).startswith("not known")
    assert "from any port" in nat_name(home(attrs.evolve(EASY[0], called=True), EASY[1]))
    assert "only what was asked for" in nat_name(home(attrs.evolve(EASY[0], called=False), EASY[1]))
    assert "no IPv4" in nat_name(home(own=""))


addresses = st.sampled_from([("11.9.9.9", 4001), ("11.9.9.9", 4002), (OWN, 4001), ("2001:db8::7", 4001)])
maybe = st.none() | addresses
observers = st.builds(
    Observer,
    st.just("x"),
    st.sampled_from(["coordinator", "relay"]),
    st.booleans(),
    st.none() | st.sampled_from([("11.0.0.1", 443), ("11.0.0.1", 4321)]),
    st.none() | st.just(0.1),
    seen=maybe,
    called=st.sampled_from([None, True, False]),
    why=st.sampled_from(["", "no answer"]),
)
all_facts = st.builds(
    Facts,
    st.booleans(),
    hosts=st.just((OWN,)),
    gateway=st.sampled_from(["", "192.168.1.1"]),
    own=st.sampled_from(["", OWN, "11.5.5.5"]),
    ipv6=st.booleans(),
    mapped=maybe,
    observers=st.lists(observers, max_size=4).map(tuple),
)


@given(all_facts)
def test_there_is_always_a_sentence(facts: Facts):
    said = verdict(facts)
    assert said.sentence.endswith(".")
    assert all(advice and not advice.endswith(".") for advice in said.advice)
    assert nat_name(facts)
    if facts.observers and all(o.delay is None for o in facts.observers):
        assert said.exit_code == 6


def test_a_server_without_a_default_route_has_its_address_all_the_same():
    own = here(Net(frozenset(["10.0.0.1", "11.5.5.5", "2001:db8::7"])))
    assert (own.own, own.gateway, own.ipv6) == ("11.5.5.5", "", False)
    assert here(Net(frozenset(["10.0.0.1"]))).own == ""
    routed = here(Net(frozenset([OWN]), Route("192.168.1.1", OWN, 2), Route("fe80::1", "2001:db8::7", 2)))
    assert (routed.own, routed.gateway, routed.ipv6) == (OWN, "192.168.1.1", False)


def test_a_person_reads_the_verdict_first():
    facts = home(attrs.evolve(EASY[0], name="12D3KooWabcdefgh", way="direct"), relay(**GONE))
    lines = show_netcheck.netcheck(report(facts)).splitlines()
    assert lines[0] == "Behind a NAT of unknown kind: fewer than two observers could be asked."
    assert "observer  …abcdefgh  coordinator  20.0 ms  direct  sees 11.9.9.9:4001" in lines
    assert any(line.startswith("observer") and line.endswith("no answer") for line in lines)
    assert lines[-1].startswith("to do ")


@given(all_facts)
def test_whatever_was_found_can_be_shown(facts: Facts):
    told = json.loads(json.dumps(report(facts)))
    assert show_netcheck.netcheck(told).splitlines()[0] == told["sentence"]
    assert exit_code(told) == verdict(facts).exit_code
