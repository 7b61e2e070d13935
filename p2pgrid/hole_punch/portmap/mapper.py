"""Decide what to ask of the gateway, so that a port of ours can be reached from outside.

A machine, pure: what is heard comes in, what to ask goes out.

    Placed ──> asking ──answer──> mapped ──half its life──> renewing ──answer──> mapped
                 │ silence, refusal                            │ lapsed
                 v                                             v
               the next way: PCP, NAT-PMP, UPnP             asking, from the first way
                 │ none left
                 v
               resting, then asking again

A gateway whose epoch jumps has forgotten its mappings (RFC 6887, 8.5): they are renewed at once.
An external address that is private itself means that there is one more NAT, which no gateway
of ours can open: the mapping is given back, and there is none.
"""

from __future__ import annotations

import math

import attrs

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.outside import is_outside
from p2pgrid.hole_punch.path import Address
from p2pgrid.hole_punch.portmap.messages import (
    NONCE,
    OK,
    PCP_RESULTS,
    PMP_RESULTS,
    UNSUPPORTED_VERSION,
    Answer,
    PcpAnnounced,
    PcpMapped,
    PmpAddress,
    PmpMapped,
    decode,
    pcp_map,
    pmp_ask_address,
    pmp_map,
)
from p2pgrid.machine import Tick

PCP, PMP, UPNP = "pcp", "nat-pmp", "upnp"
WAYS = (PCP, PMP, UPNP)

LIFETIME = 1200
"""Seconds that a mapping is asked for: what a node that dies leaves behind is soon gone."""
LIFETIME_MAX = 86400
"""Seconds; a gateway that promises more is asked again after half of this."""
SILENCES = (0.25, 0.5, 1.0)
"""Seconds to wait for an answer to each attempt; a gateway is next door."""
RENEWAL_SILENCE_MAX = 64.0
UPNP_PATIENCE = 12.0
"""Seconds after which the story of UPnP must have said how it ended."""
UPNP_AGAIN = 15.0
"""Seconds before a mapping that could not be renewed is tried again, until it lapses."""
REST, REST_MAX = 60.0, 3600.0
"""Seconds before everything is tried again, and what that grows to."""
CONFLICTS_MAX = 4
"""Other ports tried where a gateway's port is taken."""


# --- events -----------------------------------------------------------------------------


@attrs.frozen
class Place:
    """Where this computer is: its gateway, and its own address towards it."""

    gateway: str
    own: str


@attrs.frozen
class Placed:
    """We are there; where we were before, too: this computer slept, or something else has changed."""

    place: Place | None


@attrs.frozen
class Heard:
    """A datagram of the gateway's, from the port it was asked at."""

    data: bytes


@attrs.frozen
class NobodyThere:
    """The gateway has nobody at the port it was asked at."""


@attrs.frozen
class Announced:
    """What the gateway told everybody."""

    data: bytes


@attrs.frozen
class UpnpMapped:
    external: Address
    lifetime: int


@attrs.frozen
class UpnpFailed:
    why: str
    conflict: bool = False
    """The port is taken by somebody else."""


@attrs.frozen
class Left:
    """The mapping is wanted no more; the last event."""


Event = Placed | Heard | NobodyThere | Announced | UpnpMapped | UpnpFailed | Left | Tick


# --- effects ----------------------------------------------------------------------------


@attrs.frozen
class Ask:
    """Send a datagram to the gateway."""

    data: bytes


@attrs.frozen
class AskUpnp:
    """Have the gateway's UPnP service map `external`; it answers with `UpnpMapped` or `UpnpFailed`."""

    place: Place
    external: int
    lifetime: int


@attrs.frozen
class ReleaseUpnp:
    external: int


@attrs.frozen
class Tell:
    """Tell what is mapped now."""

    address: Address | None
    how: str
    why: str
    """Why nothing is mapped; empty while it is, or is being tried."""


Effect = Ask | AskUpnp | ReleaseUpnp | Tell


def forgotten(before: tuple[int, float], epoch: int, now: float) -> bool:
    """Whether a gateway that told epoch and time `before` has lost its state since (RFC 6887, 8.5)."""
    then, at = before
    if epoch < then - 1:
        return True
    theirs, ours = epoch - then, now - at
    return ours + 2 < theirs - theirs / 16 or theirs + 2 < ours - ours / 16


@attrs.define
class Mapper:
    """One TCP port of one computer."""

    port: int
    nonce: bytes
    """Random; who does not know it cannot remove the mapping (PCP)."""
    ways: tuple[str, ...] = WAYS
    lifetime: int = LIFETIME
    deadline: float = math.inf
    place: Place | None = None
    address: Address | None = None
    """What is mapped to our port."""
    how: str = ""
    _placed: bool = False
    """Whether it was told at all where we are."""
    _way: int = 0
    """Which of `ways` is asked, or has mapped."""
    _attempts: int = 0
    """Questions without an answer; 0 where nothing is asked."""
    _asking: bytes = b""
    _lapses: float = -math.inf
    _conflicts: int = 0
    _rest: float = REST
    _epoch: tuple[int, float] | None = None
    _outside: str = ""
    """The gateway's external address, as NAT-PMP told it for the question under way."""
    _wished: int = 0
    """The external port that is asked for."""
    _whys: list[str] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        assert len(self.nonce) == NONCE
        assert self.ways
        assert set(self.ways) <= set(WAYS)
        self._wished = self.port

    def check(self) -> None:
        """Assert every invariant."""
        assert (self.address is None) == (not self.how)
        assert self.address is None or is_outside(self.address[0])
        assert self.place is not None or self.address is None
        assert self.place is None or is_outside(self.place.own) or self.deadline < math.inf
        assert 0 <= self._way < len(self.ways)

    def step(self, event: Event, now: float) -> list[Effect]:
        match event:
            case Placed(place):
                same, self._placed = self._placed and place == self.place, True
                return self._doubt(now) if same else self._move(place, now)
            case Left():
                return self._release()
            case _ if self.place is None or is_outside(self.place.own):
                return []
            case Tick():
                return self._go_on(now) if now >= self.deadline else []
            case Announced(data):
                return self._listen(data, now)
            case Heard(data):
                return self._hear(data, now)
            case NobodyThere() if self._asked(PCP, PMP) and self.address is None:
                return self._give_up("nobody answers", now)  # a gateway that is being restarted is waited for
            case UpnpMapped(external, lifetime):
                return self._gain(external, lifetime, now) if self._asked(UPNP) else []
            case UpnpFailed(why, conflict):
                return self._upnp_failed(why, conflict, now) if self._asked(UPNP) else []
        return []

    # --- what is asked ------------------------------------------------------------------

    def _asked(self, *ways: str) -> bool:
        return self._attempts > 0 and self.ways[self._way] in ways

    def _move(self, place: Place | None, now: float) -> list[Effect]:
        """Somewhere else nothing of what was known holds."""
        self.place, self._epoch, self.deadline, self._rest = place, None, math.inf, REST
        self._attempts, self.address, self.how, self._wished = 0, None, "", self.port
        if place is None:
            return [Tell(None, "", "there is no gateway to be asked")]
        if is_outside(place.own):
            return [Tell(None, "", "this computer's own address is public: nothing is to be mapped")]
        return [Tell(None, "", ""), *self._begin(now)]

    def _begin(self, now: float) -> list[Effect]:
        self._way, self._conflicts = 0, 0
        self._whys.clear()
        return self._question(now)

    def _question(self, now: float) -> list[Effect]:
        """Begin to ask the present way."""
        assert self.place is not None
        self._attempts, self._outside = 0, ""
        if self.ways[self._way] == UPNP:
            self._attempts, self.deadline = 1, now + UPNP_PATIENCE
            return [AskUpnp(self.place, self._wished, self.lifetime)]
        self._asking = pmp_ask_address() if self.ways[self._way] == PMP else self._pcp(self.lifetime)
        return self._send(now)

    def _pcp(self, lifetime: int) -> bytes:
        assert self.place is not None
        wish = self.address or ("0.0.0.0" if "." in self.place.own else "::", self._wished)
        return pcp_map(self.place.own, self.nonce, self.port, wish, lifetime)

    def _send(self, now: float) -> list[Effect]:
        silence = SILENCES[0] * 2**self._attempts
        self._attempts += 1
        self.deadline = now + min(silence, RENEWAL_SILENCE_MAX)
        if self.address is not None:
            self.deadline = min(self.deadline, self._lapses)
        return [Ask(self._asking)]

    def _go_on(self, now: float) -> list[Effect]:
        """The deadline has passed."""
        if self.address is not None:
            if now >= self._lapses:
                return [*self._lose("it lapsed"), *self._begin(now)]
            if self._attempts and self.ways[self._way] != UPNP:
                return self._send(now)
            return self._question(now)  # half of its life is over
        if not self._attempts:
            return self._begin(now)  # rested
        if self.ways[self._way] == UPNP or self._attempts >= len(SILENCES):
            return self._give_up("no answer", now)
        return self._send(now)

    def _doubt(self, now: float) -> list[Effect]:
        if self.place is None or is_outside(self.place.own):
            return []
        self._rest = REST  # what failed before may not fail any more
        if self._attempts:
            return []
        return self._question(now) if self.address is not None else self._begin(now)

    # --- what is heard ------------------------------------------------------------------

    def _hear(self, data: bytes, now: float) -> list[Effect]:
        try:
            answer = decode(data)
        except BadFrame:
            return []
        if not self._asked(PCP, PMP):
            return []
        self._epoch = answer.epoch, now
        if self.ways[self._way] == PCP:
            return self._hear_pcp(answer, now)
        return self._hear_pmp(answer, now)

    def _hear_pcp(self, answer: Answer, now: float) -> list[Effect]:
        match answer:
            case PcpMapped(result=result) if answer.nonce == self.nonce and answer.internal == self.port:
                if result == OK:
                    return self._gain(answer.external, answer.lifetime, now)
                return self._give_up(PCP_RESULTS.get(result, f"refused ({result})"), now)
            case PcpAnnounced(result=result) | PmpMapped(result=result) | PmpAddress(result=result) if result:
                speaks = "speaks another version" if result == UNSUPPORTED_VERSION else f"refused ({result})"
                return self._give_up(speaks, now)
        return []  # an answer to somebody else, or to nobody

    def _hear_pmp(self, answer: Answer, now: float) -> list[Effect]:
        match answer:
            case PmpAddress(result=result) | PmpMapped(result=result) if result:
                return self._give_up(PMP_RESULTS.get(result, f"refused ({result})"), now)
            case PmpAddress(host=host) if not self._outside:
                if not is_outside(host):
                    return self._rest_from(_one_more(host), now)
                self._outside, self._attempts = host, 0
                self._asking = pmp_map(self.port, self._wished, self.lifetime)
                return self._send(now)
            case PmpMapped(internal=internal) if self._outside and internal == self.port:
                return self._gain((self._outside, answer.external), answer.lifetime, now)
        return []

    def _listen(self, data: bytes, now: float) -> list[Effect]:
        """The gateway announces itself after a start, and when its address has changed."""
        try:
            answer = decode(data)
        except BadFrame:
            return []
        if self.ways[self._way] not in (PCP, PMP) and self.address is not None:
            return []
        moved = (
            isinstance(answer, PmpAddress)
            and self.address is not None
            and answer.host not in ("", self.address[0])
        )
        if moved or self._epoch is None or forgotten(self._epoch, answer.epoch, now):
            self._epoch = answer.epoch, now
            return self._doubt(now)
        return []

    def _upnp_failed(self, why: str, conflict: bool, now: float) -> list[Effect]:
        if conflict and self._conflicts < CONFLICTS_MAX:
            self._wished = self._another_port()
            return self._question(now)
        if self.address is not None:
            self._attempts, self.deadline = 0, min(now + UPNP_AGAIN, self._lapses)
            return []
        return self._give_up(why, now)

    def _another_port(self) -> int:
        pair = self.nonce[2 * self._conflicts : 2 * self._conflicts + 2]
        self._conflicts += 1
        return 1024 + int.from_bytes(pair, "big") % (65536 - 1024)

    # --- what comes of it ---------------------------------------------------------------

    def _gain(self, external: Address, lifetime: int, now: float) -> list[Effect]:
        if not external[1] or lifetime <= 0:
            return self._give_up("granted nothing", now)
        if not is_outside(external[0]):
            way = self.ways[self._way]
            return [*self._undo(way, external[1]), *self._rest_from(_one_more(external[0]), now)]
        before = self.address, self.how
        life = min(lifetime, LIFETIME_MAX)
        self.address, self.how, self._wished = external, self.ways[self._way], external[1]
        self._attempts, self._lapses, self.deadline = 0, now + life, now + life / 2
        self._rest = REST
        return [] if before == (self.address, self.how) else [Tell(self.address, self.how, "")]

    def _give_up(self, why: str, now: float) -> list[Effect]:
        """This way leads nowhere: on to the next, or rest."""
        if self._way + 1 >= len(self.ways):
            return self._rest_from(why, now)
        lost = self._lose(why) if self.address is not None else []
        self._whys.append(f"{self.ways[self._way]}: {why}")
        self._way += 1
        return [*lost, *self._question(now)]

    def _rest_from(self, why: str, now: float) -> list[Effect]:
        """No way leads anywhere, as far as can be told now."""
        whys = "; ".join([*self._whys, f"{self.ways[self._way]}: {why}"])
        self.address, self.how, self._attempts = None, "", 0
        self._way, self._wished = 0, self.port
        self.deadline = now + self._rest
        self._rest = min(2 * self._rest, REST_MAX)
        return [Tell(None, "", whys)]

    def _lose(self, why: str) -> list[Effect]:
        self.address, self.how, self._attempts = None, "", 0
        return [Tell(None, "", why)]

    def _release(self) -> list[Effect]:
        """Give back what there is; what is under way may be granted yet, so it is given back, too."""
        way, self.deadline = self.ways[self._way], math.inf
        wanted = self.address is not None or (self._attempts > 0 and (way != PMP or bool(self._outside)))
        effects = self._undo(way, self._wished) if wanted else []
        self.place, self.address, self.how, self._attempts = None, None, "", 0
        return effects

    def _undo(self, way: str, external: int) -> list[Effect]:
        if way == UPNP:
            return [ReleaseUpnp(external)]
        return [Ask(self._pcp(0) if way == PCP else pmp_map(self.port, 0, 0))]


def _one_more(host: str) -> str:
    return f"the gateway's own address {host} is private: another NAT stands before it"
