"""Is every kind of NAT in the laboratory what it says: who sees which mapping, who may answer?"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import selectors
import socket
from collections.abc import Iterator

import pytest

from tests.netns.lab import HUB, HUB6, HUB6_TOO, HUB_TOO, Host, Lab, lab, needs_namespaces
from tests.netns.nats import (
    ADDRESS_RESTRICTED,
    CGNAT,
    DUAL,
    FULL_CONE,
    HAIRPIN,
    IPV6_ONLY,
    KINDS,
    ONLY_443,
    PORT,
    PORT_RESTRICTED,
    PUBLIC,
    REMAP,
    REMAPPED,
    RESETTING,
    STRICT,
    SYMMETRIC,
    Filtering,
    Nat,
    direct_is_possible,
)
from tests.netns.spaces import SPACES, inside

pytestmark = needs_namespaces

SHORT = 0.3
"""Seconds after which a first packet has had no answer: here a round trip takes 0.1 ms."""
SENT_AGAIN = 1.3
"""Seconds after which the second one has had none, either: the kernel sends it after 1 s."""
TRANSLATING = (
    FULL_CONE,
    ADDRESS_RESTRICTED,
    PORT_RESTRICTED,
    REMAP,
    SYMMETRIC,
    CGNAT,
    HAIRPIN,
    STRICT,
    RESETTING,
)

Address = tuple[str, int]


@pytest.fixture(scope="module")
def world() -> Iterator[Lab]:
    with lab() as built:
        yield built


@pytest.fixture(scope="module")
def stranger(world: Lab) -> Host:
    return world.home(PUBLIC)


@pytest.fixture
def closing() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def at_hub(world: Lab, address: Address, kind: int, closing: contextlib.ExitStack) -> socket.socket:
    """A socket at one of the hub's addresses, where others see who speaks to them."""

    def make() -> socket.socket:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        sock = closing.enter_context(socket.socket(family, kind))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.settimeout(5.0)
        sock.bind(address)
        if kind == socket.SOCK_STREAM:
            sock.listen()
        return sock

    return world.call(make)


def mapping(world: Lab, host: Host, observer: str, kind: int, closing: contextlib.ExitStack) -> Address:
    """Where an observer sees `PORT` of the host."""
    listening = at_hub(world, (observer, 443), kind, closing)
    if kind == socket.SOCK_DGRAM:
        with host.listen(kind=kind) as sock:
            sock.sendto(b"?", (observer, 443))
            return listening.recvfrom(1)[1][:2]
    with host.dial((observer, 443)):
        accepted, seen = listening.accept()
        accepted.close()
        return seen[:2]


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
@pytest.mark.parametrize("nat", [PUBLIC, *TRANSLATING], ids=str)
def test_two_observers_see_the_mapping_that_the_kind_says(
    world: Lab, closing: contextlib.ExitStack, nat: Nat, kind: int
):
    host = world.home(nat)
    seen, too = (mapping(world, host, observer, kind, closing) for observer in (HUB, HUB_TOO))
    assert seen[0] == too[0] == host.outside
    assert (host.outside == host.ipv4) == (nat is PUBLIC)
    if nat.independent:
        expected = PORT + REMAPPED if nat.remaps or nat.carrier else PORT
        assert seen[1] == too[1] == expected
    else:
        assert seen[1] != too[1]  # chosen of 64,000, so by chance they are alike once in so many runs


@pytest.mark.parametrize("nat", [PUBLIC, *TRANSLATING], ids=str)
def test_datagrams_come_in_from_whom_the_kind_says(
    world: Lab, stranger: Host, closing: contextlib.ExitStack, nat: Nat
):
    host = world.home(nat)
    asked, other_port = (at_hub(world, (HUB, port), socket.SOCK_DGRAM, closing) for port in (443, 444))
    alien = closing.enter_context(stranger.listen(5000, socket.SOCK_DGRAM))
    sock = closing.enter_context(host.listen(kind=socket.SOCK_DGRAM))

    def heard(mapped: Address) -> set[str]:
        """Whose datagrams come in; those of who was asked come last, and end the wait."""
        alien.sendto(b"alien", mapped)
        other_port.sendto(b"other port", mapped)
        asked.sendto(b"asked", mapped)
        heard = set()
        while "asked" not in heard:
            heard.add(sock.recvfrom(32)[0].decode())
        return heard

    unasked = (host.outside, PORT + REMAPPED if nat.remaps or nat.carrier else PORT)
    alien.sendto(b"too early", unasked)
    sock.sendto(b"?", (HUB, 443))
    mapped = asked.recvfrom(1)[1]
    everybody = {0: "too early", 1: "alien", 2: "other port", 3: "asked"}
    assert heard(mapped) == {who for least, who in everybody.items() if least >= nat.filtering}


@pytest.mark.parametrize("nat", [PUBLIC, *TRANSLATING], ids=str)
def test_connections_come_in_from_whom_the_kind_says(
    world: Lab, stranger: Host, closing: contextlib.ExitStack, nat: Nat
):
    host = world.home(nat)
    listening = closing.enter_context(host.listen())
    mapped = mapping(world, host, HUB, socket.SOCK_STREAM, closing)

    def comes_in(sock: socket.socket) -> bool:
        """Whether a first packet is let in; where it must be, there is no hurry."""
        sock.settimeout(5.0 if expected else SHORT)
        try:
            sock.connect(mapped)
        except TimeoutError:
            assert not nat.resets
            return False
        except ConnectionRefusedError:
            assert nat.resets
            return False
        listening.accept()[0].close()
        return True

    expected = nat.filtering <= Filtering.ENDPOINT and not nat.strict
    alien = closing.enter_context(stranger.call(socket.socket))
    assert comes_in(alien) == expected
    expected = nat.filtering <= Filtering.ADDRESS and not nat.strict
    known = closing.enter_context(world.call(socket.socket))
    known.bind((HUB, 445))
    assert comes_in(known) == expected


def crossing(a: Host, b: Host, far_a: Address, far_b: Address, closing: contextlib.ExitStack) -> bool:
    """Whether two hosts that dial each other at once, from where they listen, come to a connection."""
    ready = selectors.DefaultSelector()
    closing.callback(ready.close)
    for host, far in ((a, far_b), (b, far_a)):
        ready.register(closing.enter_context(host.listen()), selectors.EVENT_READ)
        sock = closing.enter_context(host.call(lambda: Host.bound(socket.AF_INET, PORT, socket.SOCK_STREAM)))
        sock.setblocking(False)
        assert sock.connect_ex(far) == errno.EINPROGRESS
        ready.register(sock, selectors.EVENT_WRITE)
    while found := ready.select(SENT_AGAIN):
        for key, _ in found:
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            if key.events & selectors.EVENT_READ or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                return True
            ready.unregister(sock)
    return False


@pytest.mark.parametrize("nat", [PORT_RESTRICTED, STRICT, SYMMETRIC], ids=str)
def test_connections_that_cross_come_about_where_theory_says(
    world: Lab, closing: contextlib.ExitStack, nat: Nat
):
    a, b = world.home(nat), world.home(nat)
    assert crossing(a, b, (a.outside, PORT), (b.outside, PORT), closing) == direct_is_possible(a.nat, b.nat)


def test_one_strict_side_is_made_up_for_by_the_other(world: Lab, closing: contextlib.ExitStack):
    a, b = world.home(STRICT), world.home(PORT_RESTRICTED)
    assert direct_is_possible(a.nat, b.nat)
    assert crossing(a, b, (a.outside, PORT), (b.outside, PORT), closing)


def datagrams_cross(world: Lab, a: Host, b: Host, closing: contextlib.ExitStack) -> bool:
    """Whether two hosts that send to where observers see each other come to hear each other."""
    observer = at_hub(world, (HUB, 443), socket.SOCK_DGRAM, closing)
    socks = [closing.enter_context(host.listen(kind=socket.SOCK_DGRAM)) for host in (a, b)]
    seen = []
    for sock in socks:
        sock.sendto(b"?", (HUB, 443))
        seen.append(observer.recvfrom(1)[1])
        sock.setblocking(False)
    heard = [False, False]
    for _ in range(5):
        for sock, far in zip(socks, reversed(seen), strict=True):
            sock.sendto(b"punch", far)
        for n, sock in enumerate(socks):
            with contextlib.suppress(BlockingIOError):
                seen[1 - n] = sock.recvfrom(5)[1]  # from where it really comes
                heard[n] = True
    return all(heard)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (PORT_RESTRICTED, CGNAT),
        (STRICT, STRICT),
        (SYMMETRIC, ADDRESS_RESTRICTED),
        (SYMMETRIC, PORT_RESTRICTED),
        (SYMMETRIC, SYMMETRIC),
    ],
    ids=str,
)
def test_datagrams_cross_where_theory_says(world: Lab, closing: contextlib.ExitStack, one: Nat, other: Nat):
    a, b = world.home(one), world.home(other)
    assert datagrams_cross(world, a, b, closing) == direct_is_possible(one, other, udp=True)


def reaches(a: Host, address: Address) -> bool:
    try:
        a.dial(address, timeout=SHORT).close()
    except (TimeoutError, ConnectionRefusedError):
        return False
    return True


@pytest.mark.parametrize("nat", [HAIRPIN, PORT_RESTRICTED], ids=str)
def test_neighbours_reach_each_other_by_the_mapping_or_at_home(
    world: Lab, closing: contextlib.ExitStack, nat: Nat
):
    a, b = world.homes(nat, 2)
    closing.enter_context(b.listen(PORT + 1))
    listening = at_hub(world, (HUB, 443), socket.SOCK_STREAM, closing)
    with b.dial((HUB, 443), PORT + 1):
        accepted, mapped = listening.accept()
        accepted.close()
    assert reaches(a, mapped) == nat.hairpin
    assert reaches(a, (b.ipv4, PORT + 1)) != nat.hairpin


def test_a_carrier_has_a_second_nat_behind_the_first(world: Lab, closing: contextlib.ExitStack):
    host = world.home(CGNAT)
    listening = at_hub(world, (HUB, 443), socket.SOCK_STREAM, closing)
    with inside(host.router, socket.socket) as sock:
        sock.connect((HUB, 443))
        accepted, seen = listening.accept()
        accepted.close()
        assert ipaddress.ip_address(sock.getsockname()[0]) in ipaddress.ip_network("100.64.0.0/10")
        assert seen[0] == host.outside


def test_who_comes_second_to_a_port_is_mapped_to_another(world: Lab, closing: contextlib.ExitStack):
    """As Linux does it; so two nodes in one house should not listen at the same port."""
    a, b = world.homes(PORT_RESTRICTED, 2)
    listening = at_hub(world, (HUB, 443), socket.SOCK_STREAM, closing)
    seen = []
    for host in (a, b):
        closing.enter_context(host.dial((HUB, 443)))
        accepted, (_, port) = listening.accept()
        closing.enter_context(accepted)
        seen.append(port)
    assert seen[0] == PORT != seen[1]


def test_nothing_but_443_goes_out(world: Lab, closing: contextlib.ExitStack):
    host = world.home(ONLY_443)
    for port in (443, 4001):
        at_hub(world, (HUB, port), socket.SOCK_STREAM, closing)
    told = at_hub(world, (HUB, 443), socket.SOCK_DGRAM, closing)
    assert reaches(host, (HUB, 443))
    assert not reaches(host, (HUB, 4001))
    with host.listen(kind=socket.SOCK_DGRAM) as sock:
        sock.sendto(b"?", (HUB, 443))
        told.settimeout(SHORT)
        with pytest.raises(TimeoutError):
            told.recv(1)


@pytest.mark.parametrize("nat", [IPV6_ONLY, DUAL], ids=str)
def test_ipv6_has_no_nat_but_lets_in_only_what_was_asked_for(
    world: Lab, stranger: Host, closing: contextlib.ExitStack, nat: Nat
):
    host = world.home(nat)
    for observer in (HUB6, HUB6_TOO):
        assert mapping(world, host, observer, socket.SOCK_STREAM, closing) == (host.ipv6, PORT)
    with host.call(lambda: Host.bound(socket.AF_INET6, PORT, socket.SOCK_STREAM)) as listening:
        listening.listen()
        assert not reaches(stranger, (host.ipv6, PORT))
    if nat is IPV6_ONLY:
        with pytest.raises(OSError, match="unreachable"):
            host.dial((HUB, 443))


def test_theory_is_the_same_both_ways_and_knows_the_hopeless():
    pairs = {(a, b): direct_is_possible(a, b) for a in (*KINDS, STRICT) for b in (*KINDS, STRICT)}
    assert all(pairs[a, b] == pairs[b, a] for a, b in pairs)
    hopeless = {frozenset((a.name, b.name)) for (a, b), possible in pairs.items() if not possible}
    four = [nat.name for nat in (*KINDS, STRICT) if nat.ipv4 and nat not in (PUBLIC, ONLY_443)]
    assert hopeless == {
        *(frozenset((ONLY_443.name, nat.name)) for nat in (*KINDS, STRICT)),
        *(frozenset((IPV6_ONLY.name, name)) for name in four),  # they have no IPv6
        *(
            frozenset((SYMMETRIC.name, nat.name))
            for nat in (SYMMETRIC, PORT_RESTRICTED, REMAP, CGNAT, STRICT)
        ),
        frozenset((STRICT.name,)),
    }
    assert direct_is_possible(STRICT, STRICT, udp=True)


def test_nothing_is_left_of_a_lab_that_failed():
    with contextlib.suppress(ZeroDivisionError), lab() as built:
        names = {built.hub, built.home(CGNAT).space}
        assert names <= {space.name for space in SPACES.iterdir()}
        raise ZeroDivisionError
    assert not any(space.name.startswith(built.prefix) for space in SPACES.iterdir())
