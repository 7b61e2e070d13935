"""Drive a `Schedule` as a coordinator would: steps, a ledger, answers by call, restarts."""

from __future__ import annotations

from typing import Any

import attrs

from p2pgrid.ids import Cid, PeerId, digest
from p2pgrid.machine import Tick
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.events import Answer, Called, Event, Rules, Save
from p2pgrid.scheduler.job import ResultTree
from p2pgrid.scheduler.schedule import Schedule
from tests.memory_ledger import MemoryLedger

OWNER = PeerId("owner")


@attrs.frozen
class Pass:
    """A verified ticket."""

    role: str
    token_id: str = "token"
    uses: int | None = None
    expires: float = 1e12


def cid(name: str) -> str:
    return str(Cid(0x71, digest(name.encode())))


def tree(name: str) -> ResultTree:
    return ResultTree(cid(name), size=10, wire_bytes=10)


class History:
    """One grid over time; `now` only grows."""

    def __init__(self, now: float = 1000.0, rules: Rules | None = None, *, check: bool = True) -> None:
        self.now = now
        self.ledger = MemoryLedger()
        self.rules = rules or Rules()
        self.check = check
        self.answers: dict[int, m.Reply] = {}
        self.calls = 0
        self.restart()

    def restart(self) -> None:
        """Kill the coordinator and start it again with what it had saved."""
        self.schedule = Schedule(OWNER, self.ledger.past(), self.now, self.rules)

    def feed(self, event: Event) -> list[Answer]:
        effects = self.schedule.step(event, self.now)
        self.ledger.keep([e.row for e in effects if isinstance(e, Save)])
        answers = [e for e in effects if isinstance(e, Answer)]
        for answer in answers:
            assert answer.call not in self.answers, "a call is answered twice"
            self.answers[answer.call] = answer.reply
        if self.check:
            self.schedule.check()
        return answers

    def call(self, peer: str, request: m.Request, admission: Pass | None = None) -> int:
        self.calls += 1
        self.feed(Called(self.calls, PeerId(peer), request, self.calls.to_bytes(7, "little"), admission))
        return self.calls

    def ask(self, peer: str, request: m.Request, admission: Pass | None = None) -> Any:
        """The answer, or None while the call waits."""
        return self.answers.get(self.call(peer, request, admission))

    def until(self, when: float) -> None:
        """Let time pass, ringing at every deadline."""
        while self.schedule.deadline <= when:
            self.now = max(self.now, self.schedule.deadline)
            self.feed(Tick())
        self.now = max(self.now, when)
