"""Decide which circuits a relay carries, how many bytes of each, and who is refused why.

Pure: no clock, no sockets, no chance.  One thread steps it (`relay.py`).

    Said(Reserve)  ──> reserved, until it is not renewed or its link is gone
    Said(Connect)  ──> pending: both ends have a token, good once, for `COME` seconds
    Dialled(token) ──> one end is here ──> both are: Join ──> carried, byte by byte through `room`
                                                                │
    nobody came, declined, quota used up, barred, closed: Cut <─┘ and Tell(Ended) to both, with a reason

A circuit counts for both its peers, and so do its bytes: who calls and who is called hold it open alike.
Bytes are counted as they leave the first end, once, in windows that begin with a peer's first byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import attrs

from p2pgrid.hole_punch.relay.events import (
    Barred,
    Closed,
    Cut,
    Dialled,
    Drop,
    Effect,
    Event,
    Gone,
    Join,
    Left,
    Opened,
    Said,
    Spent,
    Tell,
    Tick,
)
from p2pgrid.hole_punch.relay.limits import Account, Limits, spell
from p2pgrid.hole_punch.relay.messages import (
    TOKEN,
    Asked,
    Connect,
    Connected,
    Decline,
    Ended,
    Incoming,
    Reason,
    Refused,
    Release,
    Reserve,
    Reserved,
    Told,
)
from p2pgrid.ids import PeerId

LIFE = 600.0
"""Seconds that a reservation lasts; its holder renews it at half of them."""
COME = 10.0
"""Seconds in which both ends of a circuit dial in: two round trips, and a lost packet or two."""
ACCOUNTS_SPARE = 64
"""Accounts beyond twice those of peers with circuits, before the old ones are looked for."""


@attrs.define(eq=False)
class _Circuit:
    peers: tuple[PeerId, PeerId]
    """Who called, and who was called."""
    tokens: tuple[bytes, bytes]
    expires: float
    """Until when it may be pending."""
    lines: list[int | None] = attrs.field(factory=lambda: [None, None])

    @property
    def joined(self) -> bool:
        return None not in self.lines

    @property
    def sides(self) -> list[int]:
        """Which sides come one by one: a circuit of a peer with itself there is none."""
        return [side for side in (0, 1) if self.lines[side] is None]


class Circuits:
    """The machine.  Closed until it is opened."""

    def __init__(self) -> None:
        self.limits = Limits()
        self._closed = "this node is no relay"
        self._reserved: dict[PeerId, float] = {}
        """Until when; in the order in which they end."""
        self._circuits: dict[int, _Circuit] = {}
        self._pending: dict[int, None] = {}
        """Circuits that wait for an end, in the order in which they give up."""
        self._tokens: dict[bytes, tuple[int, int]] = {}
        self._of: dict[PeerId, set[int]] = {}
        self._accounts: dict[PeerId, Account] = {}
        self._total = Account()
        self._last = 0
        self._effects: list[Effect] = []

    # --- the door ---------------------------------------------------------------------------

    @property
    def deadline(self) -> float:
        ends = next(iter(self._reserved.values()), math.inf)
        gives_up = next((self._circuits[n].expires for n in self._pending), math.inf)
        return min(ends, gives_up)

    def step(self, event: Event, now: float) -> list[Effect]:
        match event:
            case Said(peer, message, chance, barred):
                self._said(peer, message, chance, barred, now)
            case Left(peer):
                self._reserved.pop(peer, None)
            case Dialled(line, token):
                self._dialled(line, token)
            case Spent(number):
                if number in self._circuits:
                    self._end(number, Reason.QUOTA, self._used_up(self._circuits[number].peers, now))
            case Gone(number, broken):
                self._gone(number, broken)
            case Barred(peer, why):
                if self._reserved.pop(peer, None) is not None:
                    self._tell(peer, Refused(0, Reason.BARRED, why))
                self._end_all(self._of.get(peer, ()), Reason.BARRED, f"{peer}: {why}")
            case Opened(limits):
                self._closed, self.limits = "", limits
            case Closed(why):
                self._close(why)
            case Tick():
                pass
        self._expire(now)
        effects, self._effects = self._effects, []
        return effects

    def room(self, number: int, now: float) -> int:
        """Bytes that circuit `number` may carry on before it is asked again; 0 where it is over."""
        circuit = self._circuits.get(number)
        if circuit is None:
            return 0
        each, all_ = self.limits.quota_each, self.limits.quota
        rooms = [a.room(each, self.limits.window, now) for a in map(self._account, circuit.peers)]
        return min(*rooms, self._total.room(all_, self.limits.window, now))

    def moved(self, number: int, count: int, now: float) -> None:
        """Circuit `number` carried `count` bytes, for which there was room."""
        for account in (*map(self._account, self._circuits[number].peers), self._total):
            account.spend(count, self.limits.window, now)

    # --- what is to be told of it -----------------------------------------------------------

    @property
    def reserved(self) -> list[PeerId]:
        return list(self._reserved)

    @property
    def circuits(self) -> list[tuple[PeerId, PeerId]]:
        """Those that are carried: who called, who was called."""
        return [c.peers for c in self._circuits.values() if c.joined]

    @property
    def closed(self) -> str:
        """Why nothing is relayed; empty: it is."""
        return self._closed

    def total(self, now: float) -> int:
        """Bytes carried in this window."""
        return self._total.spent(self.limits.window, now)

    # --- messages ---------------------------------------------------------------------------

    def _said(self, peer: PeerId, message: Asked, chance: bytes, barred: str, now: float) -> None:
        match message:
            case Reserve():
                self._reserve(peer, barred, now)
            case Release():
                self._reserved.pop(peer, None)
            case Connect(request, wanted):
                no = self._objection(peer, wanted, barred, now)
                if no is None:
                    self._connect(peer, request, wanted, chance, now)
                else:
                    self._tell(peer, Refused(request, *no))
            case Decline(token, why):
                number, side = self._tokens.get(token, (0, 0))
                if number and self._circuits[number].peers[side] == peer:
                    self._end(
                        number, Reason.DECLINED, f"{peer} does not want it: {why or 'it does not say why'}"
                    )

    def _reserve(self, peer: PeerId, barred: str, now: float) -> None:
        known = self._reserved.pop(peer, None) is not None
        if self._closed:
            return self._tell(peer, Refused(0, Reason.NO_RELAY, self._closed))
        if barred:
            return self._tell(peer, Refused(0, Reason.BARRED, barred))
        if not known and len(self._reserved) >= self.limits.reservations:
            return self._tell(
                peer, Refused(0, Reason.FULL, f"it has {self.limits.reservations} reservations already")
            )
        self._reserved[peer] = now + LIFE
        limits = self.limits
        rate = 0 if limits.rate_each == math.inf else int(limits.rate_each)
        return self._tell(
            peer, Reserved(int(LIFE), limits.circuits_each, limits.quota_each or 0, int(limits.window), rate)
        )

    def _objection(self, peer: PeerId, wanted: PeerId, barred: str, now: float) -> tuple[Reason, str] | None:
        """Why there is no circuit for these two."""
        if self._closed:
            return Reason.NO_RELAY, self._closed
        if barred:
            return Reason.BARRED, barred
        if wanted not in self._reserved or wanted == peer:
            return Reason.NOT_HERE, f"{wanted} has no reservation here"
        if len(self._circuits) >= self.limits.circuits:
            return Reason.FULL, f"it carries {self.limits.circuits} circuits already"
        for one in (peer, wanted):
            if len(self._of.get(one, ())) >= self.limits.circuits_each:
                return Reason.TOO_MANY, f"{one} has {self.limits.circuits_each} circuits here already"
        why = self._used_up((peer, wanted), now)
        return (Reason.QUOTA, why) if why else None

    def _connect(self, peer: PeerId, request: int, wanted: PeerId, chance: bytes, now: float) -> None:
        assert len(chance) == 2 * TOKEN
        self._last += 1
        number, tokens = self._last, (chance[:TOKEN], chance[TOKEN:])
        self._circuits[number] = _Circuit((peer, wanted), tokens, now + COME)
        self._pending[number] = None
        for side, token in enumerate(tokens):
            assert token not in self._tokens, "two tokens are the same"
            self._tokens[token] = number, side
        for one in (peer, wanted):
            self._of.setdefault(one, set()).add(number)
        self._close_accounts(now)
        self._tell(peer, Connected(request, tokens[0]))
        self._tell(wanted, Incoming(tokens[1], peer))

    # --- circuits ---------------------------------------------------------------------------

    def _dialled(self, line: int, token: bytes) -> None:
        number, side = self._tokens.pop(token, (0, 0))
        if not number:
            self._effects.append(Drop(line))
            return
        circuit = self._circuits[number]
        circuit.lines[side] = line
        one, other = circuit.lines
        if one is not None and other is not None:
            del self._pending[number]
            self._effects.append(Join(number, (one, other)))

    def _gone(self, number: int, broken: str) -> None:
        circuit = self._circuits.get(number)
        if circuit is None:
            return  # it was cut at the same moment
        self._forget(number)
        if broken:
            for peer, token in zip(circuit.peers, circuit.tokens, strict=True):
                self._tell(peer, Ended(token, Reason.BROKEN, broken))

    def _end(self, number: int, reason: Reason, why: str) -> None:
        """Circuit `number` is over, whether it was carried or pending."""
        circuit = self._circuits[number]
        self._forget(number)
        if circuit.joined:
            self._effects.append(Cut(number))
        else:
            self._effects += [Drop(line) for line in circuit.lines if line is not None]
        for peer, token in zip(circuit.peers, circuit.tokens, strict=True):
            self._tell(peer, Ended(token, reason, why))

    def _end_all(self, numbers: Iterable[int], reason: Reason, why: str) -> None:
        for number in sorted(numbers):
            self._end(number, reason, why)

    def _forget(self, number: int) -> None:
        circuit = self._circuits.pop(number)
        self._pending.pop(number, None)
        for token in circuit.tokens:
            self._tokens.pop(token, None)
        for peer in circuit.peers:
            self._of[peer].discard(number)
            if not self._of[peer]:
                del self._of[peer]

    def _close(self, why: str) -> None:
        assert why
        self._closed = why
        for peer in self._reserved:
            self._tell(peer, Refused(0, Reason.NO_RELAY, why))
        self._reserved.clear()
        self._end_all(self._circuits, Reason.NO_RELAY, why)

    def _expire(self, now: float) -> None:
        while self._pending and self._circuits[number := next(iter(self._pending))].expires <= now:
            circuit = self._circuits[number]
            missing = " and ".join(circuit.peers[side] for side in circuit.sides)
            self._end(number, Reason.NOT_COME, f"{missing} did not dial in within {COME:.0f} s")
        while self._reserved and self._reserved[peer := next(iter(self._reserved))] <= now:
            del self._reserved[peer]
            self._tell(peer, Refused(0, Reason.NOT_HERE, "the reservation was not renewed"))

    # --- accounts ---------------------------------------------------------------------------

    def _account(self, peer: PeerId) -> Account:
        account = self._accounts.get(peer)
        if account is None:
            account = self._accounts[peer] = Account()
        return account

    def _close_accounts(self, now: float) -> None:
        """Forget whose window is over, and who has no circuit."""
        if len(self._accounts) > 2 * len(self._of) + ACCOUNTS_SPARE:
            window = self.limits.window
            self._accounts = {
                peer: account
                for peer, account in self._accounts.items()
                if peer in self._of or account.spent(window, now)
            }

    def _used_up(self, peers: Iterable[PeerId], now: float) -> str:
        """Whose bytes are used up, and until when; nothing where none's are."""
        window = self.limits.window
        for who, account, quota in (
            ("the relay", self._total, self.limits.quota),
            *((peer, self._account(peer), self.limits.quota_each) for peer in peers),
        ):
            if account.room(quota, window, now) == 0:
                again = account.since + window - now
                own = f"the {quota} bytes that {who} may have here in {spell(window)}"
                return f"{own} are used up; again in {spell(again)}"
        return ""

    def _tell(self, peer: PeerId, message: Told) -> None:
        self._effects.append(Tell(peer, message))

    def check(self) -> None:
        """Assert every invariant."""
        assert not self._effects, "a step left something behind"
        assert list(self._reserved.values()) == sorted(self._reserved.values())
        assert [self._circuits[n].expires for n in self._pending] == sorted(
            self._circuits[n].expires for n in self._pending
        )
        assert self._pending.keys() == {n for n, c in self._circuits.items() if not c.joined}
        assert self._tokens == {
            c.tokens[side]: (n, side)
            for n, c in self._circuits.items()
            for side in (0, 1)
            if c.lines[side] is None
        }
        of: dict[PeerId, set[int]] = {}
        for number, circuit in self._circuits.items():
            for peer in circuit.peers:
                of.setdefault(peer, set()).add(number)
        assert of == self._of
        if self._closed:
            assert not self._reserved
            assert not self._circuits
