"""Carry the streams of one link: what the link's reactor asks of them, and what people's programs do.

A `Carrier` is the streams' receiver (`link.py`).  The table of streams (`mux.py`) is touched by the reactor's
thread and, to open, answer or give up a stream, by trio's: it has a lock.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

from p2pgrid.hole_punch.streams import mux
from p2pgrid.hole_punch.streams.fair import Fair
from p2pgrid.hole_punch.streams.flow import DatagramFlow, Flow
from p2pgrid.hole_punch.streams.window import Pool

if TYPE_CHECKING:
    from p2pgrid.hole_punch.link import Link
    from p2pgrid.hole_punch.reactor import Turned

AT_ONCE = 8
"""Pieces queued when a link has room: the link asks again."""


class Home(Protocol):
    """What carriers of one node share (`service.py`); all but `datagrams` is called in reactors' threads."""

    pool: Pool
    lock: threading.Lock
    """Of the pool, and of every table of streams."""

    def datagrams(self, target: bytes) -> bool:
        """Whether a stream to `target` is one of datagrams."""
        ...

    def asked(self, flow: Flow) -> None:
        """The other side wants a stream."""
        ...

    def answered(self, flow: Flow, answer: mux.Answered | mux.Declined | None) -> None:
        """It has answered; None: it never will."""
        ...

    def left(self, link: Link) -> None: ...


class Carrier:
    """The streams of one link."""

    def __init__(self, link: Link, home: Home) -> None:
        self.link = link
        self.fair: Fair[Flow] = Fair()
        self.flows: dict[int, Flow] = {}
        self.gone = ""
        """Why there is no link any more."""
        self._home = home
        self._lock = home.lock
        self._mux = mux.Mux(home.pool)

    def call(self, flow: Turned) -> None:
        self.link.beside(flow)

    # --- by trio's thread -----------------------------------------------------------------

    def open(self, target: bytes) -> Flow:
        with self._lock:
            stream, message = self._mux.open(target)
            flow = self._flow(stream, target, ours=True)
            self.link.send(message)  # before another thread's of a higher number
        return flow

    def accept(self, flow: Flow, answer: bytes) -> None:
        with self._lock:
            if flow.stream.state is mux.State.ASKED:
                self.link.send(self._mux.accept(flow.stream, answer))

    def refuse(self, flow: Flow, code: int, why: str) -> None:
        with self._lock:
            if flow.stream.state is mux.State.ASKED:
                self.link.send(self._mux.refuse(flow.stream, code, why))
        self.forget(flow)

    def give_up(self, flow: Flow, why: str) -> None:
        """It is not wanted any more, whatever state it is in."""
        self.reset(flow, why)
        if flow.sock is None:
            self.forget(flow)
        else:
            self.call(flow)

    def _flow(self, stream: mux.Stream, target: bytes, *, ours: bool) -> Flow:
        kind = DatagramFlow if self._home.datagrams(target) else Flow
        flow = self.flows[stream.key] = kind(self, stream, target, ours=ours)
        return flow

    # --- for flows ------------------------------------------------------------------------

    def send(self, flow: Flow, data: bytes) -> None:
        with self._lock:
            if flow.stream.state is mux.State.OVER:
                return
            head = self._mux.send(flow.stream, len(data))
        self.link.send(head, data)

    def taken(self, flow: Flow, count: int) -> None:
        with self._lock:
            credit = self._mux.taken(flow.stream, count)
        if credit is not None:
            self.link.send(credit)

    def finish(self, flow: Flow) -> None:
        with self._lock:
            if flow.stream.state is mux.State.OVER:
                return
            message = self._mux.finish(flow.stream)
        self.link.send(message)

    def reset(self, flow: Flow, why: str) -> None:
        flow.dropped, flow.why = True, flow.why or why
        with self._lock:
            if flow.stream.state is mux.State.OVER:
                return
            message = self._mux.reset(flow.stream, why)
        self.link.send(message)

    def forget(self, flow: Flow) -> None:
        self.flows.pop(flow.stream.key, None)
        with self._lock:
            flow.stream.window.close()

    # --- the link's receiver --------------------------------------------------------------

    def received(self, message: memoryview) -> None:
        with self._lock:
            event = self._mux.received(message)
            if isinstance(event, mux.Asked):
                flow = self._flow(event.stream, event.target, ours=False)
        match event:
            case mux.Arrived(stream, body):
                if (found := self.flows.get(stream.key)) is not None:
                    found.arrived(body)
            case mux.Credited(stream, first):
                if first and (found := self.flows.get(stream.key)) is not None:
                    self.call(found)
            case mux.Asked():
                self._home.asked(flow)
            case mux.Over(refusal):
                self.link.send(refusal)
            case mux.Answered(stream) | mux.Declined(stream):
                if (found := self.flows.get(stream.key)) is not None:
                    found.dropped = isinstance(event, mux.Declined)
                    self._home.answered(found, event)
            case mux.Ended(stream):
                if (found := self.flows.get(stream.key)) is not None:
                    self.call(found)
            case mux.Broken(stream, why):
                if (found := self.flows.get(stream.key)) is not None:
                    self._break(found, why or "reset by the other side")
            case mux.Came(stream, body):
                if (found := self.flows.get(stream.key)) is not None:
                    found.came(body)

    def drained(self) -> float | None:
        queued = self.link.queued
        for _ in range(AT_ONCE):
            flow = self.fair.next()
            if flow is None or not flow.may_send():
                break
            count, dry = flow.pump(queued)
            self.fair.sent(flow, count, dry=dry)
            if dry:
                flow.waiting = False
                self.call(flow)
        return None

    def left(self, why: str) -> None:
        self.gone = why
        with self._lock:
            self._mux.close()
        for flow in list(self.flows.values()):
            self._break(flow, f"the link is gone: {why}")
        self._home.left(self.link)

    def _break(self, flow: Flow, why: str) -> None:
        flow.dropped, flow.why = True, flow.why or why
        self._home.answered(flow, None)
        if flow.sock is not None:
            self.call(flow)
        else:
            self.forget(flow)
