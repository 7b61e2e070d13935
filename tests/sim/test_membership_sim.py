"""Whatever the clocks and whoever is away: are members taken, and those who were revoked not for long?

The coordinator's machine, and nodes as each knows things by itself; a network that is either there or not.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import attrs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pgrid.hole_punch.membership import Membership, issue
from p2pgrid.ids import PeerId, digest
from p2pgrid.node.standing import Standing
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.events import Rules
from tests.schedule_history import OWNER, History, Pass

LIFE = 1000.0
ALLOWANCE = LIFE / 10
DRIFT = 1e-4
"""Of a clock that nobody corrects: five times a bad quartz."""
START = 1.8e9
NAMES = [PeerId(name) for name in ("ann", "bob", "cid")]
which = st.sampled_from(range(len(NAMES)))


def sign(statement: bytes, peer: PeerId = OWNER) -> bytes:
    return digest(peer.encode() + statement)


def verify(peer: PeerId, statement: bytes, signature: bytes) -> bool:
    return signature == sign(statement, peer)


@attrs.define(eq=False)
class Computer:
    """A node, its home, and its clocks; what is true of it beside."""

    home: Path
    name: PeerId
    history: History
    standing: Standing = attrs.field(init=False)
    wrong: float = 0.0
    """By how much its wall clock is."""
    rate: float = 1.0
    """Of its quartz."""
    sound: bool = True
    """It knows the time but for drift: it was not started with a clock that had stepped since it heard."""
    stepped: bool = False
    """Its wall clock did since it wrote the time down."""
    heard_at: float = 0.0
    told_at: float = 0.0
    """When it last heard whose memberships are void: with a beat, not when it joins."""
    issued: float | None = None
    """When what it shows was issued."""
    out: float | None = None
    """Since when it is no member."""
    tickets: int = 0

    def boot(self) -> None:
        self.sound &= not self.stepped
        self.standing = Standing.load(
            self.home,
            self.name,
            OWNER,
            verify,
            lambda: (self.history.now - START) * self.rate,
            lambda: START + (self.history.now - START) * self.rate + self.wrong,
        )

    def join(self, ticket: str = "") -> None:
        admission = Pass("worker", f"{self.name}-{self.tickets}") if ticket else None
        welcome = self.history.ask(self.name, m.Join(ticket=ticket), admission)
        if isinstance(welcome, m.Failure):
            assert self.out is not None
            return
        now = self.history.now
        shown = issue(Membership(OWNER, self.name, tuple(welcome.roles), now, now + LIFE), sign)
        self.standing.welcome(attrs_free(welcome, shown))
        self.issued, self.out = now, None
        self.hear()

    def beat(self) -> None:
        """As `holdings.py` and `membership.py` do it."""
        orders = self.history.ask(self.name, m.Beat())
        if isinstance(orders, m.Failure):
            assert self.out is not None
            return
        self.standing.tell(orders.now)
        if orders.revocations != self.standing.revision:
            self.standing.revoke(self.history.ask(self.name, m.Revocations()))
        self.told_at = self.history.now
        self.hear()
        if self.standing.renewal <= self.standing.now():
            self.join()

    def hear(self) -> None:
        self.sound, self.heard_at = True, self.history.now
        self.note()

    def note(self) -> None:
        """As it is done again and again while the daemon lives."""
        if self.standing.unsaved:
            self.standing.save()
        if self.sound:
            self.stepped = False


def attrs_free(welcome: m.Welcome, shown: bytes) -> m.Welcome:
    """With the membership that the coordinator's story adds."""
    return m.Welcome(
        welcome.roles,
        welcome.name,
        welcome.coordinator,
        welcome.beat_interval,
        welcome.lease_ttl,
        welcome.now,
        shown,
    )


class Grid(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="membership-"))
        self.history = History(now=START, rules=Rules(membership=LIFE), check=False)
        self.nodes: list[Computer] = []
        for number, name in enumerate(NAMES):
            home = self.folder / name
            home.mkdir()
            node = Computer(home, name, self.history)
            node.wrong, node.rate = (-5e8, 0.0, 5e8)[number], 1 + DRIFT * (number - 1)
            node.boot()
            node.join("ticket")
            self.nodes.append(node)
        self.away = False

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(seconds=st.sampled_from([0.01, 5.0, 100.0, 499.0, 501.0, 999.0, 1101.0]))
    def time_passes(self, seconds: float) -> None:
        self.history.until(self.history.now + seconds)

    @rule(node=which)
    def beat(self, node: int) -> None:
        if not self.away:
            self.nodes[node].beat()

    @rule()
    def all_beat(self) -> None:
        if not self.away:
            for node in self.nodes:
                node.beat()

    @rule()
    def the_coordinator_goes_or_comes_back(self) -> None:
        self.away = not self.away
        if not self.away:
            self.history.restart()

    @precondition(lambda self: not self.away)
    @rule(node=which)
    def revoke(self, node: int) -> None:
        victim = self.nodes[node]
        if victim.out is None:
            self.history.ask(OWNER, m.Revoke(f"{victim.name}-{victim.tickets}"))
            victim.out = self.history.now

    @precondition(lambda self: not self.away)
    @rule(node=which)
    def let_in_again(self, node: int) -> None:
        if self.nodes[node].out is not None:
            self.history.until(self.history.now + 0.01)  # nobody does that within a millisecond
            self.nodes[node].tickets += 1
            self.nodes[node].join("ticket")

    @rule(node=which, step=st.sampled_from([-1e8, -3600.0, 3600.0, 1e8]))
    def a_clock_steps(self, node: int, step: float) -> None:
        self.nodes[node].wrong += step
        self.nodes[node].stepped = True

    @rule(node=which)
    def a_minute_is_over(self, node: int) -> None:
        self.nodes[node].note()

    @rule(node=which)
    def start_anew(self, node: int) -> None:
        self.nodes[node].boot()

    @invariant()
    def members_are_taken_and_others_are_not(self) -> None:
        now = self.history.now
        for judge in self.nodes:
            for other in self.nodes:
                if judge is other or other.issued is None:
                    continue
                why = judge.standing.allow(other.name, other.standing.shown)
                about = (judge.name, other.name, why)
                knows = other.out is not None and judge.told_at > other.out
                if knows and judge.out is None:
                    assert "revoked" in why or "expired" in why, about
                elif judge.sound and now >= other.issued + LIFE + ALLOWANCE + 1:
                    assert why, about
                elif judge.sound and other.out is None and now < other.issued + LIFE:
                    assert why == "", about
        for node in self.nodes:
            assert not node.sound or abs(node.standing.now() - now) < 1 + 3 * DRIFT * (now - node.heard_at)


Grid.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_grid = Grid.TestCase
