"""Tell from where others see this node what stands between, and where two nodes may meet.

Pure.  What a NAT does is told apart as in RFC 4787, but only as far as it can be seen from inside: two
observers that see the same address and port have an endpoint-*independent* mapping before them, so a third
will see the same; observers that disagree have a *dependent* one ("symmetric"), and what the next will
see nobody knows.  Who may answer is not seen, it is found out by trying.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterable, Sequence

import attrs

from p2pgrid.hole_punch.outside import is_outside
from p2pgrid.hole_punch.path import Address

CANDIDATES_MAX = 16
"""Candidates that one side tells: a computer has a few addresses; a longer list is a mistake or an attack."""
NEAR_V4 = 24
"""Bits that the addresses of one house's network have in common."""


class Mapping(enum.IntEnum):
    """How the link port is mapped, in IPv4."""

    UNKNOWN = 0
    """Fewer than two have looked."""
    INDEPENDENT = 1
    """All see the same; or there is no NAT."""
    DEPENDENT = 2
    """Each sees something else."""


class Source(enum.IntEnum):
    """How an address is known; the more reliable, the earlier."""

    LOCAL = 0
    """One of this computer's."""
    MAPPED = 1
    """A router was asked for it (PCP, NAT-PMP, UPnP)."""
    OBSERVED = 2
    """Somebody sees it."""


class Hope(enum.IntEnum):
    """What theory says of a meeting (Ford, Srisuresh, Kegel: Peer-to-Peer Communication, 2005)."""

    NONE = 0
    """Neither can know where the other will come from."""
    FAINT = 1
    """It depends on the other's NAT: it may let in whoever comes from the right host."""
    GOOD = 2


@attrs.frozen
class Candidate:
    """An address at which the link port may be reached."""

    source: Source
    address: Address


@attrs.frozen
class Stance:
    """How one node stands in the internet: what it tells a peer, to be dialled."""

    mapping: Mapping = Mapping.UNKNOWN
    candidates: tuple[Candidate, ...] = ()

    def hosts(self, *sources: Source) -> set[str]:
        return {c.address[0] for c in self.candidates if c.source in sources}

    @property
    def open(self) -> bool:
        """Whether it has an IPv4 address of the whole internet's, its own or mapped by its router."""
        return any(is_outside(h) and ":" not in h for h in self.hosts(Source.LOCAL, Source.MAPPED))

    @property
    def ipv6(self) -> bool:
        return any(is_outside(h) and ":" in h for h in self.hosts(Source.LOCAL))


def mapping_of(observed: Iterable[Address], own: Iterable[str] = ()) -> Mapping:
    """What observers, one address each, have before them; `own` are this computer's hosts."""
    seen = [address for address in observed if ":" not in address[0] and is_outside(address[0])]
    if any(host in set(own) for host, _ in seen):
        return Mapping.INDEPENDENT
    if len(seen) < 2:
        return Mapping.UNKNOWN
    return Mapping.INDEPENDENT if len(set(seen)) == 1 else Mapping.DEPENDENT


def stance(
    bound: Sequence[Address],
    interfaces: Iterable[str],
    observed: Sequence[Address],
    mapped: Iterable[Address],
) -> Stance:
    """What a node that listens at `bound` is to tell of itself.

    `interfaces` are its hosts in text, `observed` what observers told, one each, `mapped` what routers gave.
    """
    own = [host for host in interfaces if not _useless(host)]
    local: list[Address] = []
    for host, port in bound:
        if ipaddress.ip_address(host).is_unspecified:
            local += [(h, port) for h in own if (":" in h) == (":" in host)]
        elif not _useless(host):
            local.append((host, port))
    found: dict[Address, Source] = {}
    for source, addresses in (
        (Source.LOCAL, _outside_first(local)),
        (Source.MAPPED, mapped),
        (Source.OBSERVED, observed),
    ):
        for address in addresses:
            found.setdefault(address, source)
    candidates = sorted(
        (Candidate(s, a) for a, s in found.items()), key=lambda c: not is_outside(c.address[0])
    )
    return Stance(mapping_of(observed, own), tuple(candidates[:CANDIDATES_MAX]))


def hope(a: Stance, b: Stance) -> Hope:
    """What theory says of a meeting of the two."""
    if (a.ipv6 and b.ipv6) or a.open or b.open:
        return Hope.GOOD
    dependent = (a.mapping is Mapping.DEPENDENT) + (b.mapping is Mapping.DEPENDENT)
    return (Hope.GOOD, Hope.FAINT, Hope.NONE)[dependent]


def targets(own: Stance, theirs: Stance) -> tuple[Address, ...]:
    """Where to dial the other, best first.

    Addresses within some network are left out unless both seem to be in it: a stranger may have them in ours.
    """
    mine = {c.address for c in own.candidates}
    families = {":" in host for host, _ in mine}
    local = own.hosts(Source.LOCAL)
    ours, others = _seen(own), _seen(theirs)
    neighbours = bool(ours & others) or not (ours and others)
    found: dict[Address, None] = {}
    for candidate in sorted(theirs.candidates, key=lambda c: c.source):
        host = candidate.address[0]
        if candidate.address in mine or (":" in host) not in families or _useless(host):
            continue
        if is_outside(host) or neighbours or any(_one_network(host, here) for here in local):
            found[candidate.address] = None
    return tuple(found)[:CANDIDATES_MAX]


def _seen(stance: Stance) -> set[str]:
    """The IPv4 addresses that others see it come from: they tell one house from another."""
    return {host for host in stance.hosts(*Source) if ":" not in host and is_outside(host)}


def _useless(host: str) -> bool:
    ip = ipaddress.ip_address(host.partition("%")[0])
    return ip.is_loopback or ip.is_link_local or ip.is_unspecified or ip.is_multicast or "%" in host


def _outside_first(addresses: Iterable[Address]) -> list[Address]:
    return sorted(addresses, key=lambda address: not is_outside(address[0]))


def _one_network(a: str, b: str) -> bool:
    one, other = ipaddress.ip_address(a), ipaddress.ip_address(b)
    if one.version != other.version:
        return False
    rest = 32 - NEAR_V4 if one.version == 4 else 64
    return int(one) >> rest == int(other) >> rest
