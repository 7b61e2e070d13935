"""Answer the calls of nodes: save what the schedule decided, then say so.

The story of a coordinator.  Calls wait in an inbox; each turn takes all that are there,
steps the machine for each, saves the rows of all in one transaction, and only then answers
any of them.  Whoever got an answer can rely on it after any kill; whoever got none asks
again.  That order is why this is not `drive`, which performs effects side by side.

    call -> inbox -> step, step, step -> save (one fsync) -> answer, answer, answer

Time comes from here, never from a node: the wall clock is read once, at the start, and
then moved on by the monotonic clock, so that a clock that jumps ends no lease.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from time import time
from typing import Any

import attrs
import msgspec
import structlog
import trio

from p2pgrid.errors import BadFrame, GridError, Unreachable
from p2pgrid.hole_punch.membership import Membership, issue
from p2pgrid.ids import PeerId
from p2pgrid.machine import Tick
from p2pgrid.net import Channel, Network
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.client import LocalCoordinator
from p2pgrid.scheduler.events import Answer, Called, Event, Hung, Rules, Save, Undelivered
from p2pgrid.scheduler.facts import Ledger, LedgerStuck, Row
from p2pgrid.scheduler.members import Admission
from p2pgrid.scheduler.schedule import Schedule

log = structlog.get_logger(__name__)

Verify = Callable[[str, PeerId, float], Admission]
"""What a ticket grants to a peer at a time (wall clock).  Raises `NotAuthorised`."""

INBOX_MAX = 1024
"""Calls that wait for one turn; more wait in their channels, which slows their callers."""
SAVE_AGAIN = 1.0
"""Seconds until a ledger that could not be written is tried again."""
REQUEST_PATIENCE = 10.0
"""Seconds in which a caller must have sent its request."""


@attrs.define(eq=False)
class _Waiting:
    """A call under way."""

    done: trio.Event = attrs.field(factory=trio.Event)
    reply: m.Reply | None = None


class Desk:
    """Where calls come in, from the network and from this process."""

    def __init__(
        self,
        verify: Verify,
        seal: Callable[[PeerId, m.Welcome], m.Welcome],
        clock: Callable[[], float],
        chance: Callable[[int], bytes],
    ) -> None:
        self._verify = verify
        self._seal = seal
        self._clock = clock
        self._chance = chance
        self._post, self.inbox = trio.open_memory_channel[Event](INBOX_MAX)
        self._waiting: dict[int, _Waiting] = {}
        self._last_call = 0

    def local(self, me: PeerId) -> LocalCoordinator:
        """The coordinator as its own daemon calls it."""
        return LocalCoordinator(self.answer, me)

    async def answer(self, peer: PeerId, request: m.Request) -> m.Reply:
        """The reply to `request` of `peer`; cancelling the call takes it back."""
        admission = None
        if isinstance(request, m.Join) and request.ticket:
            try:
                admission = self._verify(request.ticket, peer, self._clock())
            except GridError as error:
                return m.failure(error)
        self._last_call += 1
        call = self._last_call
        waiting = self._waiting[call] = _Waiting()
        try:
            await self._post.send(Called(call, peer, request, self._chance(7), admission))
            await waiting.done.wait()
        except trio.Cancelled:
            self._tell(Hung(call))
            if isinstance(waiting.reply, m.Grant):
                self._tell(Undelivered(waiting.reply.task, waiting.reply.epoch))
            raise
        finally:
            del self._waiting[call]
        assert waiting.reply is not None
        reply = waiting.reply
        return self._seal(peer, reply) if isinstance(reply, m.Welcome) else reply

    def deliver(self, call: int, reply: m.Reply) -> bool:
        """Give the caller its reply; False where nobody waits any more."""
        waiting = self._waiting.get(call)
        if waiting is None:
            return False
        waiting.reply = reply
        waiting.done.set()
        return True

    async def serve(self, channel: Channel) -> None:
        """Answer one channel: one request, one reply."""
        reply: m.Reply | None = None
        try:
            with trio.move_on_after(REQUEST_PATIENCE) as patience:
                request = await channel.receive(m.Request)
            if patience.cancelled_caught:
                return
            reply = await self.answer(channel.peer, request)
            await channel.send(reply)
        except BadFrame as broken:
            log.warning("a peer sent a bad request", peer=channel.peer, why=broken.why)
        except Unreachable:
            if isinstance(reply, m.Grant):
                self._tell(Undelivered(reply.task, reply.epoch))

    def _tell(self, event: Event) -> None:
        """Post `event` if there is room: it only saves a lease's time to live."""
        try:
            self._post.send_nowait(event)
        except trio.WouldBlock:
            log.info("the inbox is full", event_lost=type(event).__name__)


async def serve_coordinator(
    network: Network,
    ledger: Ledger,
    verify: Verify,
    *,
    owner: PeerId,
    clock: Callable[[], float] = time,
    chance: Callable[[int], bytes] = secrets.token_bytes,
    rules: Rules | None = None,
    check: bool = False,
    task_status: Any = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer calls until cancelled; `task_status` is told the `Desk` for calls of this process.

    With `check`, every invariant is asserted after each turn.
    """
    started, ticked = clock(), trio.current_time()
    rules = rules or Rules()

    def seal(peer: PeerId, welcome: m.Welcome) -> m.Welcome:
        """With the membership that goes with it: only here is a key to sign it."""
        until = welcome.now + rules.membership
        shown = issue(Membership(owner, peer, tuple(welcome.roles), welcome.now, until), network.sign)
        return msgspec.structs.replace(welcome, membership=shown)

    desk = Desk(verify, seal, clock, chance)
    schedule = Schedule(owner, await ledger.load(), started, rules)
    network.serve(m.PROTOCOL, desk.serve)
    task_status.started(desk)
    undelivered: list[Event] = []
    while True:
        events = undelivered or await _turn(desk.inbox, ticked + (schedule.deadline - started))
        now = started + (trio.current_time() - ticked)
        if events == [Tick()]:
            now = max(now, schedule.deadline)  # the deadline has passed, whatever rounding says
        effects = [effect for event in events for effect in schedule.step(event, now)]
        rows = [effect.row for effect in effects if isinstance(effect, Save)]
        if rows:
            await _save(ledger, rows)
        unheard = [e.reply for e in effects if isinstance(e, Answer) and not desk.deliver(e.call, e.reply)]
        undelivered = [Undelivered(r.task, r.epoch) for r in unheard if isinstance(r, m.Grant)]
        if check:
            schedule.check()


async def _save(ledger: Ledger, rows: list[Row]) -> None:
    """Keep `rows`, however long that takes: on a full disk all answers wait for somebody to make room.

    Callers give up meanwhile and ask again; what they asked was decided already, and is found decided.
    """
    is_stuck = False
    while True:
        try:
            await ledger.save(rows)
        except LedgerStuck as stuck:
            if not is_stuck:
                log.error("the ledger cannot be written; no call is answered until it can", why=stuck.why)
            is_stuck = True
            await trio.sleep(SAVE_AGAIN)
        else:
            if is_stuck:
                log.info("the ledger can be written again")
            return


async def _turn(inbox: trio.MemoryReceiveChannel[Event], deadline: float) -> list[Event]:
    """All events that wait, at least one; a `Tick` when the deadline passes first."""
    events: list[Event] = []
    with trio.move_on_at(deadline):
        events.append(await inbox.receive())
    while events and len(events) < INBOX_MAX:
        try:
            events.append(inbox.receive_nowait())
        except trio.WouldBlock:
            break
    return events or [Tick()]
