"""Is what was heard of peers remembered, bounded, and believed in the right order?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.hole_punch import addressbook
from p2pgrid.hole_punch.addressbook import CIRCUITS_MAX, KNOWN_MAX, AddressBook
from p2pgrid.hole_punch.path import ADDRESSES_MAX, Circuit, Way, circuit_from_multiaddr, circuit_to_multiaddr
from p2pgrid.ids import PeerId

ME, A, B = PeerId("me"), PeerId("a"), PeerId("b")

peers = st.text("abcdef123", min_size=1, max_size=5).map(PeerId)
hosts = st.ip_addresses().filter(lambda ip: not ip.is_unspecified and not ip.is_multicast).map(str)
addresses = st.tuples(hosts, st.integers(1, 65535))


@given(peers, addresses)
def test_a_circuit_is_the_same_after_a_multiaddr(relay: PeerId, address: tuple[str, int]) -> None:
    circuit = Circuit(relay, address)
    assert circuit_from_multiaddr(circuit_to_multiaddr(circuit)) == circuit


@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from(["", "ip4", "1.2.3.4", "tcp", "7", "tls", "p2p", "x"])).map("/".join)
)
def test_what_is_no_circuit_is_none(noise: str) -> None:
    circuit = circuit_from_multiaddr(noise)
    assert circuit is None or circuit_from_multiaddr(circuit_to_multiaddr(circuit)) == circuit


@pytest.mark.parametrize(
    "told",
    [
        f"10.0.0.1:{'1' * 5000}",  # more digits than Python makes a number of
        f"[fe80::1%{'a' * 100}]:7",  # a zone that is no name
        "[fe80::1%x\0y]:7",
        "10.0.0.1:000007",
    ],
)
def test_no_address_that_a_peer_can_tell_breaks_whoever_reads_or_dials_it(told: str) -> None:
    book = AddressBook(ME)
    host, _, port = told.rpartition(":")
    multiaddr = f"/ip6/{host.strip('[]')}/tcp/{port}/tls"
    book.hear(A, [told, multiaddr, f"{multiaddr}/p2p/{B}/p2p-circuit"], [])
    book.learn(A, [multiaddr, f"{multiaddr}/p2p/{B}/p2p-circuit"])
    book.learn(A, [f"/ip4/10.0.0.1/tcp/7/tls/p2p/{'x' * 100_000}/p2p-circuit"])
    assert book.told(A) == []


def test_addresses_and_circuits_are_replaced_each_by_their_own() -> None:
    book = AddressBook(ME)
    book.learn(
        A,
        [
            "/ip4/10.0.0.1/tcp/7/tls",
            "/ip4/10.0.0.9/tcp/9/tls/p2p/r/p2p-circuit",
            "/ip4/1.1.1.1/tcp/1",
            "noise",
        ],
    )
    assert book.told(A) == ["/ip4/10.0.0.1/tcp/7/tls", "/ip4/10.0.0.9/tcp/9/tls/p2p/r/p2p-circuit"]
    book.hear(A, ["10.0.0.2:7"], ["/ip4/192.0.2.1/tcp/999/tls"])
    assert book.of(A).addresses == [("10.0.0.2", 7), ("192.0.2.1", 7)]
    assert [c.relay for c in book.of(A).circuits] == ["r"]
    book.forget(A)
    assert book.told(A) == []


def test_nobody_is_reached_through_himself_or_through_us() -> None:
    book = AddressBook(ME)
    book.learn(A, [f"/ip4/10.0.0.9/tcp/9/tls/p2p/{relay}/p2p-circuit" for relay in (A, ME, B)])
    assert [c.relay for c in book.of(A).circuits] == [B]


def test_it_does_not_grow_for_ever(monkeypatch) -> None:
    monkeypatch.setattr(addressbook, "KNOWN_MAX", 10)
    book = AddressBook(ME)
    for number in range(20):
        book.note(PeerId(str(number)), [("10.0.0.1", port) for port in range(1, 100)],
                  [Circuit(PeerId(f"r{n}"), ("10.0.0.2", 7)) for n in range(50)])  # fmt: skip
    assert book.told(PeerId("9")) == []
    known = book.of(PeerId("10"))
    assert (len(known.addresses), len(known.circuits)) == (ADDRESSES_MAX, CIRCUITS_MAX)
    assert KNOWN_MAX > 1000


def test_a_relay_that_was_needed_again_and_again_is_asked_at_once() -> None:
    book = AddressBook(ME)
    book.note(A, [("10.0.0.1", 7)])
    for _ in range(3):
        book.won(A, Way.RELAYED)
    assert book.of(A).relayed == 3
    book.won(A, Way.DIRECT)
    assert book.of(A).relayed == 0
    book.won(B, Way.RELAYED)  # of whom nothing is known
