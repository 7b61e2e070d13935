"""Say in a sentence how well others can link to this node, and what would help.

Pure: facts in, words out.  What is a fact and what only follows from it is kept apart: `netcheck.py`
looks, this decides.  Kinds, best first:

    open       others dial this computer: it has a public address, or nothing stands between
    mapped     others dial the router, which sends them on
    called     others dial where observers see us, as one of them tried
    easy       a firewall, or a NAT that maps all alike: punching works with all but symmetric ones
    hard       a NAT that maps each peer elsewhere ("symmetric"): punching fails with others like it
    unknown    fewer than two observers: it may be either
    only-443   nothing but port 443 goes out: links are relayed
    cut-off    nobody answers

An observer that tried to dial us and did not get in counts for more than what follows from addresses
or what a router says.  IPv6 is told beside all this: where both have it there is no NAT.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from p2pgrid.hole_punch.nat import Mapping, mapping_of
from p2pgrid.hole_punch.outside import is_outside
from p2pgrid.hole_punch.path import Address

HTTPS = 443
UNREACHABLE = 6
"""Exit code of a node that nobody answers."""


@attrs.frozen
class Observer:
    """A member that this node asked: the coordinator, or a relay."""

    name: str
    role: str
    """"coordinator" or "relay"."""
    relays: bool = False
    """Whether this node is reached through it; a coordinator may be a relay, too."""
    address: Address | None = None
    """Where it answered, or where it was dialled in vain."""
    delay: float | None = None
    """Seconds there and back; None: it did not answer."""
    way: str = ""
    """How the link to it goes: "direct", "punched", …; empty: there is none."""
    seen: Address | None = None
    """Where it sees our link port."""
    called: bool | None = None
    """Whether it reached us there by itself, from another port; None: it was not asked, or could not tell."""
    why: str = ""
    """Why it did not answer."""


@attrs.frozen
class Facts:
    """What could be found out."""

    running: bool = True
    """Whether a daemon runs: without one, nobody can be asked what they see."""
    bound: tuple[Address, ...] = ()
    """Where links are accepted."""
    hosts: tuple[str, ...] = ()
    """Addresses of this computer, but for loopback."""
    gateway: str = ""
    own: str = ""
    """Our address towards the IPv4 internet, or one of the whole internet's."""
    ipv6: bool = False
    """Whether there is a way to the IPv6 internet, and an address of it here."""
    mapped: Address | None = None
    """Where the router lets others in."""
    how: str = ""
    unmapped: str = ""
    """Why the router does not."""
    mapping_wanted: bool = True
    observers: tuple[Observer, ...] = ()
    hairpin: bool | None = None
    """Whether this node reaches itself where others see it; None: not tried."""

    @property
    def seen(self) -> list[Address]:
        return [o.seen for o in self.observers if o.seen is not None]

    @property
    def mapping(self) -> Mapping:
        return mapping_of(self.seen, self.hosts)

    @property
    def relays(self) -> list[Observer]:
        return [o for o in self.observers if (o.role == "relay" or o.relays) and o.delay is not None]

    @property
    def unmediated(self) -> bool:
        """Whether whoever looked sees this computer's own address."""
        return bool(self.seen) and all(h in self.hosts or h.startswith("127.") for h, _ in self.seen)

    @property
    def public(self) -> bool:
        """Whether others know this computer by an address of its own."""
        return self.unmediated or (bool(self.own) and is_outside(self.own))

    @property
    def called(self) -> bool | None:
        """Whether any observer that tried got in; None: none tried."""
        tried = [o.called for o in self.observers if o.called is not None]
        return any(tried) if tried else None


@attrs.frozen
class Verdict:
    kind: str
    sentence: str
    advice: tuple[str, ...] = ()
    exit_code: int = 0


def verdict(facts: Facts) -> Verdict:
    """How well others can link to a node of which these are the facts."""
    kind = _kind(facts)
    return Verdict(
        kind, _sentence(kind, facts), tuple(_advice(kind, facts)), UNREACHABLE * (kind == "cut-off")
    )


def nat_name(facts: Facts) -> str:
    """What stands between, in the words of RFC 4787."""
    if not facts.own and not facts.seen:
        return "none: there is no IPv4"
    if facts.public:
        return "none" + ", but a firewall" * (facts.called is False)
    if facts.mapping is Mapping.UNKNOWN:
        return "not known: fewer than two observers told what they see"
    independent = facts.mapping is Mapping.INDEPENDENT
    maps = "endpoint-independent" if independent else "address-dependent or worse (symmetric)"
    filters = "lets in whom it knows, from any port" if facts.called else "lets in only what was asked for"
    return f"mapping {maps}" + (f", filtering: {filters}" if facts.called is not None else "")


def _kind(facts: Facts) -> str:
    answered = [o for o in facts.observers if o.delay is not None]
    lost = [o for o in facts.observers if o.delay is None]
    if (facts.observers and not answered) or not (facts.own or facts.ipv6):
        return "cut-off"
    if facts.public and facts.called is not False:
        return "open"
    if facts.mapped is not None and facts.called is not False:
        return "mapped"
    if (
        answered
        and all(_port(o) == HTTPS for o in answered)
        and any(_port(o) not in (HTTPS, 0) for o in lost)
    ):
        return "only-443"
    if facts.called:
        return "called"
    if facts.public:
        return "easy"
    return {Mapping.INDEPENDENT: "easy", Mapping.DEPENDENT: "hard", Mapping.UNKNOWN: "unknown"}[facts.mapping]


def _port(observer: Observer) -> int:
    return observer.address[1] if observer.address is not None else 0


def _sentence(kind: str, facts: Facts) -> str:
    six = facts.ipv6 and kind in ("easy", "hard", "unknown", "only-443")
    beside = " Over IPv6, links to others who have it can be direct." if six else ""
    match kind:
        case "open" if facts.unmediated and not is_outside(facts.own):
            return "Reachable directly by everybody who was asked: nothing stands between."
        case "open":
            return "Reachable directly: this computer has an address of the whole internet's."
        case "mapped":
            return f"Reachable directly: the router lets others in ({facts.how})."
        case "called":
            return "Reachable directly by those this node has talked to, and it punches well."
        case "easy" if facts.public:
            return "Behind a firewall that punches well: links to most others are direct."
        case "easy":
            return f"Behind a NAT that punches well: links to most others are direct.{beside}"
        case "hard":
            return f"Behind a symmetric NAT: links to others behind one like it are relayed.{beside}"
        case "only-443":
            return f"Only port 443 goes out of this network: links are relayed.{beside}"
        case "cut-off" if not (facts.own or facts.ipv6):
            return "No network: there is no way to the internet from this computer."
        case "cut-off":
            return "Nobody of the grid answers."
    if not facts.running:
        return f"What stands between can only be told while a daemon runs here.{beside}"
    return f"Behind a NAT of unknown kind: fewer than two observers could be asked.{beside}"


def _advice(kind: str, facts: Facts) -> Sequence[str]:
    advice: list[str] = []
    if kind == "cut-off":
        why = "; ".join(dict.fromkeys(o.why for o in facts.observers if o.why))
        advice.append(f"see whether this computer is online{f' ({why})' if why else ''}")
        return advice
    if not facts.running:
        advice.append("start the daemon with `p2pnode join`, and ask again")
    if facts.mapped is not None and facts.called is False:
        advice.append(
            "the router says that it lets others in, but an observer did not get in: see its firewall"
        )
    elif kind in ("easy", "hard", "unknown", "called") and not facts.public:
        if not facts.mapping_wanted:
            advice.append("`p2pnode prefs port_mapping=on` has the router let others in")
        elif "another NAT" in facts.unmapped:
            advice.append(
                "the provider has a NAT of its own: only they can give you a public address, or IPv6"
            )
        elif facts.gateway:
            advice.append("switch on PCP, NAT-PMP or UPnP in the router, and others can dial this node")
    if kind in ("hard", "only-443", "unknown") and facts.running and not facts.relays:
        advice.append("no relay answers, and this node needs one: `p2pnode relay` makes a willing node one")
    if kind == "only-443" and not any(_port(relay) == HTTPS for relay in facts.relays):
        advice.append("have a relay listen at port 443")
    return advice
