"""Say what stands between a host and the internet: what maps, what filters, what theory says of two.

Pure.  Kinds after RFC 4787; the rules are nftables'.
"""

from __future__ import annotations

import enum

import attrs

PORT = 4001
"""Where the hosts of homes listen: what a router remaps is this one and the seven above it."""
REMAPPED = 30000
"""What is added to the port."""


class Filtering(enum.IntEnum):
    """Who may send to a mapped address."""

    NOBODY_ASKED = 0
    """Anybody, and there need be no mapping: nothing filters."""
    ENDPOINT = 1
    """Anybody, once something was sent from there."""
    ADDRESS = 2
    """Whoever was sent something from there."""
    PORT = 3
    """The same, from that port."""


@attrs.frozen
class Nat:
    """What stands between a host and the internet."""

    name: str
    filtering: Filtering = Filtering.PORT
    independent: bool = True
    """Whether all destinations see the same mapped address."""
    remaps: bool = False
    """Whether the mapped port is another one."""
    carrier: bool = False
    """Whether a second NAT, the carrier's, comes behind the home's."""
    hairpin: bool = False
    """Whether hosts inside may use each other's mapped addresses, and may not reach each other otherwise."""
    ipv4: bool = True
    ipv6: bool = False
    """Without a NAT, but what was not asked for is dropped."""
    only_443: bool = False
    """Whether nothing goes out but to TCP port 443."""
    resets: bool = False
    """Whether what was not asked for is answered with a reset, and not dropped."""
    strict: bool = False
    """Whether a connection's first packet is never let in, even from where something was sent to."""

    def __str__(self) -> str:
        return self.name


PUBLIC = Nat("public", Filtering.NOBODY_ASKED, ipv6=True)
FULL_CONE = Nat("full-cone", Filtering.ENDPOINT)
ADDRESS_RESTRICTED = Nat("address-restricted", Filtering.ADDRESS)
PORT_RESTRICTED = Nat("port-restricted")
REMAP = Nat("fixed-remap", remaps=True)
SYMMETRIC = Nat("symmetric", independent=False)
CGNAT = Nat("cgnat", carrier=True)
HAIRPIN = Nat("hairpin", Filtering.ENDPOINT, hairpin=True)
ONLY_443 = Nat("only-443", only_443=True)
IPV6_ONLY = Nat("ipv6-only", ipv4=False, ipv6=True)
DUAL = Nat("symmetric-and-ipv6", independent=False, ipv6=True)
STRICT = Nat("strict", strict=True)
RESETTING = Nat("resetting", resets=True)

KINDS = (
    PUBLIC,
    FULL_CONE,
    ADDRESS_RESTRICTED,
    PORT_RESTRICTED,
    REMAP,
    SYMMETRIC,
    CGNAT,
    HAIRPIN,
    ONLY_443,
    IPV6_ONLY,
)


def direct_is_possible(a: Nat, b: Nat, *, udp: bool = False) -> bool:
    """Whether a host behind `a` and one behind `b`, each of its own, can come to talk directly.

    A's packets reach B if B's mapped address can be known, and B's router lets A in because B has sent
    to where A's packets come from, as far as it looks at that.
    """
    if a.only_443 or b.only_443:  # nobody listens at 443
        return False
    if a.ipv6 and b.ipv6:
        return True
    if not (a.ipv4 and b.ipv4):
        return False
    if a.strict and b.strict and not udp:  # neither lets the other's first packet in
        return False
    return any(
        to.independent and (to.filtering < Filtering.PORT or of.independent) for of, to in ((a, b), (b, a))
    )


def nat_rules(nat: Nat, outside: str) -> str:
    """What a router maps; ports are kept unless it remaps them or chooses them at random."""
    to_mapped = f"meta l4proto {{ tcp, udp }} ip daddr {outside}"
    if nat.filtering is Filtering.ADDRESS:
        to_mapped += " meta l4proto . th dport . ip saddr @met"
    open_to_all = (
        ""
        if nat.filtering is Filtering.PORT
        else f"{to_mapped} dnat ip to meta l4proto . th dport map @mapped"
    )
    maps = "masquerade" if nat.independent else "masquerade random,fully-random"
    remap = ""
    if nat.remaps:
        ports = ", ".join(f"{PORT + k} : {PORT + k + REMAPPED}" for k in range(8))
        remap = "\n".join(
            f'oifname "wan" meta l4proto {proto} snat ip to {outside} : {proto} sport map {{ {ports} }}'
            for proto in ("tcp", "udp")
        )
    return f"""
table ip nat {{
    map mapped {{ type inet_proto . inet_service : ipv4_addr . inet_service; flags dynamic; timeout 5m; }}
    set met {{ type inet_proto . inet_service . ipv4_addr; flags dynamic; timeout 5m; }}
    chain note {{
        type filter hook postrouting priority srcnat - 10;
        oifname != "wan" accept
        ct state != new accept
        meta l4proto != {{ tcp, udp }} accept
        update @mapped {{ meta l4proto . th sport : ip saddr . th sport }}
        update @met {{ meta l4proto . th sport . ip daddr }}
    }}
    chain back {{
        type nat hook prerouting priority dstnat;
        {open_to_all}
    }}
    chain out {{
        type nat hook postrouting priority srcnat;
        {remap}
        oifname "wan" {maps}
        {f'iifname "lan*" oifname "lan*" ct status dnat snat ip to {outside}' if nat.hairpin else ""}
    }}
}}
"""


def filter_rules(nat: Nat) -> str:
    """What a router lets through."""
    out = 'iifname "lan*" accept'
    if nat.only_443:
        out = 'iifname "lan*" tcp dport 443 accept'
    elif nat.hairpin:
        out = 'iifname "lan*" oifname "wan" accept'
    strict = 'iifname "wan" tcp flags & (syn | ack) == syn drop' if nat.strict else ""
    refuse = 'iifname "wan" meta l4proto tcp reject with tcp reset' if nat.resets else ""
    return f"""
table inet filter {{
    chain in {{
        type filter hook input priority 0; policy drop;
        {strict}
        ct state established,related accept
        iifname "lo" accept
        iifname "lan*" accept
        meta l4proto ipv6-icmp accept
        {refuse}
    }}
    chain through {{
        type filter hook forward priority 0; policy drop;
        {strict}
        ct state established,related accept
        ct status dnat accept
        {out}
        {refuse}
    }}
}}
"""
