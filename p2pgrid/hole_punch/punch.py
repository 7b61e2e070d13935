"""Decide when to tell a peer what, and when both dial, so that a direct connection comes about through NATs.

Pure.  One machine for each peer that there is only a relayed path to.  TCP simultaneous open (RFC 9293, 3.5;
RFC 5382): both dial from the port they listen at, so each opens its own NAT for the other; whichever first
packet comes second gets in.

    idle ──Relayed──> waiting ──its time──> offering ──Answer──> dialling ──Ended──> idle, or waiting again
                         │                                          ^
                         └────Offer────> answering ──Go─────────────┘

Clocks need not agree: who offers takes the time until the answer, says Go, and waits half of it before it
dials.  When both offer, the smaller peer id's offer is carried on; the larger holds its own back for a
moment.  An attempt that failed is followed by others ever more rarely, the more so the less theory hopes for
it; when this node's addresses change all begins anew.  A path that did not last counts as a failed attempt.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator

import attrs

from p2pgrid.hole_punch.nat import Hope, Mapping, Stance, hope, targets
from p2pgrid.hole_punch.path import Address
from p2pgrid.hole_punch.punch_messages import TOKEN, Answer, Decline, Go, Message, Offer
from p2pgrid.ids import PeerId
from p2pgrid.machine import Tick

COURTESY = 1.0
"""Seconds that the larger peer id holds its own offer back."""
PATIENCE = 5.0
"""Seconds until an offer is answered, and an answer followed by Go."""
WINDOW = 4.5
"""Seconds of dialling: the kernel sends first packets again after 1 and 3 s."""
SPACING = 1.0
"""Seconds between two offers of a peer that are answered."""
FIRST_PAUSE = {Hope.GOOD: 2.0, Hope.FAINT: 60.0, Hope.NONE: 3600.0}
"""Seconds between the first attempt that failed and the second."""
GROWTH = 3.0
"""By which the pause grows from attempt to attempt."""
LAST_PAUSE = 3600.0
STABLE = 60.0
"""Seconds that a direct path must last to be no failure."""


@attrs.frozen
class Relayed:
    """The peer is reached through a relay only, and a direct path is wanted."""


@attrs.frozen
class Settled:
    """There is a direct path."""


@attrs.frozen
class Gone:
    """There is no link at all: nothing is wanted."""


@attrs.frozen
class Changed:
    """This node's addresses, as they are now."""

    own: Stance
    anew: bool = False
    """The network is another one, or may be, even if the addresses are the same."""


@attrs.frozen
class Heard:
    """The peer said something, over the relay."""

    message: Message


@attrs.frozen
class Ended:
    """Dialling is over: there is a connection, proved and taken into use, or there will be none."""

    token: bytes
    """Ours of that round."""
    opened: bool


Event = Relayed | Settled | Gone | Changed | Heard | Ended | Tick


@attrs.frozen
class Round:
    """One attempt: whom to dial, and what connections are known by."""

    ours: bytes
    theirs: bytes
    targets: tuple[Address, ...]


@attrs.frozen
class Tell:
    """Say it to the peer, over the relay."""

    message: Message


@attrs.frozen
class Expect:
    """Take a connection of this round, should one come."""

    round: Round


@attrs.frozen
class Dial:
    """Dial all targets after so many seconds, and again where that is refused, for `WINDOW`."""

    round: Round
    after: float


@attrs.frozen
class Forget:
    """The round is over; connections that have come of it and are not in use are closed."""

    token: bytes


Effect = Tell | Expect | Dial | Forget


class Phase(enum.Enum):
    OFFERING = "offering"
    ANSWERING = "answering"
    DIALLING = "dialling"


class Punch:
    """The attempts of one pair of nodes, as one of them sees it."""

    def __init__(self, me: PeerId, peer: PeerId, own: Stance, draw: Callable[[int], bytes]) -> None:
        """`draw` gives so many random bytes."""
        self._first = me < peer
        self._own = own
        self._draw = draw
        self._wanted = False
        self._phase: Phase | None = None
        self._ours = b""
        """Of the present attempt: our token, and what the peer calls the round."""
        self._name = b""
        self._round: Round | None = None
        self._begun = self._until = 0.0
        """When the offer was made, and when the present phase is given up."""
        self._hope = Hope.GOOD
        self._failed = 0
        self._next = math.inf
        """When to offer next, if wanted."""
        self._settled: float | None = None
        """Since when there is a direct path."""
        self._answered = -math.inf
        self.attempts = 0
        """Rounds that came to dialling."""

    def __repr__(self) -> str:
        return f"<Punch {self._phase and self._phase.value} wanted={self._wanted} failed={self._failed}>"

    @property
    def deadline(self) -> float:
        if self._phase is not None:
            return self._until
        return self._next if self._wanted else math.inf

    @property
    def outlook(self) -> str:
        """For people: what is being done, or waited for."""
        if self._phase is not None:
            return "punching"
        if not self._wanted or not self._failed:
            return ""
        why = ": both NATs are symmetric" if self._hope is Hope.NONE else ""
        return f"failed {self._failed} times{why}"

    def check(self) -> None:
        assert (self._phase is None) == (not self._ours)
        assert (self._round is not None) == (self._phase in (Phase.ANSWERING, Phase.DIALLING))
        assert self._round is None or (self._round.ours == self._ours and self._round.targets)
        assert self._failed >= 0

    def step(self, event: Event, now: float) -> list[Effect]:
        return list(self._step(event, now))

    def _step(self, event: Event, now: float) -> Iterator[Effect]:
        match event:
            case Relayed() if not self._wanted:
                if self._settled is not None:
                    self._failed = 0 if now - self._settled > STABLE else self._failed + 1
                self._wanted, self._settled = True, None
                self._wait(now, self._pause() if self._failed else 0.0)
            case Settled():
                self._settled = now if self._wanted else self._settled
                self._wanted = False
                yield from self._stop()
            case Gone():
                if self._settled is not None:
                    self._failed = 0
                self._wanted, self._settled = False, None
                yield from self._stop()
            case Changed(own, anew):
                if anew or _hosts(self._own) - _hosts(own):
                    yield from self._stop()  # what was told of this node holds no more
                if anew or _essence(own) != _essence(self._own):
                    self._failed, self._hope = 0, Hope.GOOD
                    self._wait(now, 0.0)
                self._own = own
            case Heard(message):
                yield from self._hear(message, now)
            case Ended(token, opened) if token == self._ours:
                yield from self._stop() if opened else self._fail(now)
            case Tick():
                if self._phase is not None and now >= self._until:
                    yield from self._fail(now)
                if self._phase is None and self._wanted and now >= self._next:
                    yield from self._offer(now)

    def _hear(self, message: Message, now: float) -> Iterator[Effect]:
        match message:
            case Offer():
                yield from self._judge(message, now)
            case Answer(name, token, theirs) if self._phase is Phase.OFFERING and name == self._name:
                self._hope = hope(self._own, theirs)
                if not (places := targets(self._own, theirs)):
                    self._hope = Hope.NONE
                    yield Tell(Decline(name, "we have no kind of address in common"))
                    yield from self._fail(now)
                    return
                self._round = Round(self._ours, token, places)
                wait = (now - self._begun) / 2
                yield Tell(Go(name))
                yield Expect(self._round)
                yield from self._dial(wait, now)
            case Go(name) if self._phase is Phase.ANSWERING and name == self._name:
                yield from self._dial(0.0, now)
            case Decline(name) if self._phase is not None and name == self._name:
                yield from self._fail(now)

    def _offer(self, now: float) -> Iterator[Effect]:
        self._ours = self._name = self._draw(TOKEN)
        self._phase, self._begun, self._until = Phase.OFFERING, now, now + PATIENCE
        yield Tell(Offer(self._ours, self._own))

    def _judge(self, offer: Offer, now: float) -> Iterator[Effect]:
        """Answer an offer, or say why not.  A peer that offers has given up what was under way."""
        if self._phase is Phase.OFFERING and self._first:
            return  # ours goes first, and the peer answers it
        self._hope = hope(self._own, offer.stance)
        places = targets(self._own, offer.stance)
        if not self._wanted or now - self._answered < SPACING or not places:
            why = "too soon after the last" if places else "we have no kind of address in common"
            yield Tell(Decline(offer.token, why if self._wanted else "there is a direct path"))
            return
        yield from self._stop()
        self._answered = now
        self._ours, self._name = self._draw(TOKEN), offer.token
        self._round = Round(self._ours, offer.token, places)
        self._phase, self._until = Phase.ANSWERING, now + PATIENCE
        yield Tell(Answer(offer.token, self._ours, self._own))
        yield Expect(self._round)

    def _dial(self, after: float, now: float) -> Iterator[Effect]:
        assert self._round is not None
        self._phase, self._until = Phase.DIALLING, now + after + 2 * WINDOW  # the story says when it is over
        self.attempts += 1
        yield Dial(self._round, after)

    def _fail(self, now: float) -> Iterator[Effect]:
        yield from self._stop()
        self._failed += 1
        self._wait(now, self._pause())

    def _stop(self) -> Iterator[Effect]:
        """There is no attempt under way any more."""
        if self._round is not None:
            yield Forget(self._round.ours)
        self._phase, self._round, self._ours, self._name = None, None, b"", b""

    def _wait(self, now: float, pause: float) -> None:
        self._next = now + pause + (0.0 if self._first else COURTESY)

    def _pause(self) -> float:
        grown = FIRST_PAUSE[self._hope] * GROWTH ** min(self._failed - 1, 20)
        return float(min(grown, LAST_PAUSE))


def _hosts(stance: Stance) -> set[str]:
    return {candidate.address[0] for candidate in stance.candidates}


def _essence(stance: Stance) -> object:
    """What of it makes another attempt worth while; ports that are another one for everybody do not."""
    addresses = {c.address for c in stance.candidates}
    return stance.mapping, _hosts(stance) if stance.mapping is Mapping.DEPENDENT else addresses
