"""Keep the streams of one link: which there are, how far each is, and what may be said of it.

Pure.  One `Mux` at each end of a link.  A stream's life, as each end sees it:

    open() ──> OPENING ──Opened──┐              Open ──> ASKED ──accept()──┐
                  └──Refused──> over                       └──refuse()──> over
                                 └────────> OPEN <─────────────────────────┘
                                             └── Fin sent, and Fin received ──> over
    any ── Reset, sent or received ──> over

`received` turns a message into what happened; the other calls return the message to be sent for what
is done here.  Who breaks the rules gets `BadFrame`, and loses the link.
"""

from __future__ import annotations

import enum

import attrs

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.streams import messages as m
from p2pgrid.hole_punch.streams.window import INITIAL, Pool, Window

STREAMS_MAX = 4096
"""Streams of one link that the other side has opened."""
ID_MAX = (1 << 31) - 1


class State(enum.Enum):
    OPENING = "opening"
    ASKED = "asked"
    OPEN = "open"
    OVER = "over"


@attrs.define(eq=False)
class Stream:
    """One end of one stream."""

    key: int
    """Its number, as in messages that come."""
    state: State
    window: Window
    credit: int = INITIAL
    """Bytes that may be sent."""
    finished: bool = False
    """No more data goes."""
    ended: bool = False
    """No more data comes."""

    @property
    def wire(self) -> int:
        """Its number, as in messages that go."""
        return self.key ^ m.OPENER

    @property
    def sendable(self) -> int:
        """Bytes that may be sent now; who was asked has to answer first."""
        return 0 if self.finished or self.state in (State.ASKED, State.OVER) else self.credit


# --- what happened ------------------------------------------------------------------------


@attrs.frozen
class Asked:
    stream: Stream
    target: bytes


@attrs.frozen
class Answered:
    stream: Stream
    answer: bytes


@attrs.frozen
class Declined:
    stream: Stream
    code: int
    why: str


@attrs.frozen
class Arrived:
    stream: Stream
    body: bytes | memoryview


@attrs.frozen
class Credited:
    """More may be sent; `first` where nothing might before."""

    stream: Stream
    first: bool


@attrs.frozen
class Ended:
    stream: Stream


@attrs.frozen
class Broken:
    stream: Stream
    why: str


@attrs.frozen
class Came:
    """A datagram."""

    stream: Stream
    body: bytes | memoryview


@attrs.frozen
class Over:
    """The other side opens more streams than we keep: send it this."""

    message: bytes


Event = Asked | Answered | Declined | Arrived | Credited | Ended | Broken | Came | Over


class Mux:
    """All streams of one link; of two threads one at a time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._next = 0
        self._newest = -1
        """The largest number that the other side has used."""
        self.streams: dict[int, Stream] = {}
        self.theirs = 0

    # --- done here ------------------------------------------------------------------------

    def open(self, target: bytes) -> tuple[Stream, bytes]:
        number, self._next = self._next, self._next + 1
        assert number <= ID_MAX
        stream = Stream(number | m.OPENER, State.OPENING, Window(self._pool))
        self.streams[stream.key] = stream
        return stream, m.encode(m.Open(stream.wire, 0, target))

    def accept(self, stream: Stream, answer: bytes = b"") -> bytes:
        assert stream.state is State.ASKED
        stream.state = State.OPEN
        self._look(stream)
        return m.encode(m.Opened(stream.wire, 0, answer))

    def refuse(self, stream: Stream, code: int, why: str) -> bytes:
        assert stream.state is State.ASKED
        self._forget(stream)
        return m.encode(m.Refused(stream.wire, code, why))

    def send(self, stream: Stream, count: int) -> bytes:
        """What goes before `count` bytes of data."""
        assert 0 < count <= stream.sendable
        stream.credit -= count
        return m.head(m.DATA, stream.wire)

    def taken(self, stream: Stream, count: int) -> bytes | None:
        """The program here has taken `count` bytes that came."""
        credit = stream.window.take(count)
        if not credit or stream.ended or stream.state is State.OVER:
            return None
        return m.encode(m.Credit(stream.wire, credit))

    def finish(self, stream: Stream) -> bytes:
        assert stream.state is not State.OVER
        assert not stream.finished
        stream.finished = True
        self._look(stream)
        return m.encode(m.Fin(stream.wire))

    def reset(self, stream: Stream, why: str) -> bytes:
        assert stream.state is not State.OVER
        self._forget(stream)
        return m.encode(m.Reset(stream.wire, why))

    # --- what came ------------------------------------------------------------------------

    def received(self, raw: memoryview) -> Event | None:
        """What happened, if anything.  Raises `BadFrame`."""
        message = m.decode(raw)
        if message is None:
            return None
        if isinstance(message, m.Open):
            return self._asked(message)
        stream = self.streams.get(message.stream)
        if stream is None:
            return None
        match message:
            case m.Data(_, body):
                self._check_coming(stream)
                stream.window.arrive(len(body))
                return Arrived(stream, body)
            case m.Credit(_, count):
                return self._credited(stream, count)
            case m.Fin():
                self._check_coming(stream)
                stream.ended = True
                stream.window.end()
                self._look(stream)
                return Ended(stream)
            case m.Opened(_, credit, answer):
                self._check_opening(stream)
                stream.state = State.OPEN
                stream.credit += credit
                self._look(stream)
                return Answered(stream, answer)
            case m.Refused(_, code, why):
                self._check_opening(stream)
                self._forget(stream)
                return Declined(stream, code, why)
            case m.Reset(_, why):
                self._forget(stream)
                return Broken(stream, why)
            case m.Datagram(_, body):
                return Came(stream, body)

    def _asked(self, message: m.Open) -> Event:
        number = message.stream
        if number & m.OPENER or number <= self._newest:
            raise BadFrame(why="a stream is opened under a number that is not new")
        self._newest = number
        if self.theirs >= STREAMS_MAX:
            why = f"there are {STREAMS_MAX} streams of yours already"
            return Over(m.encode(m.Refused(number ^ m.OPENER, 1, why)))
        stream = Stream(number, State.ASKED, Window(self._pool), INITIAL + message.credit)
        self.streams[number] = stream
        self.theirs += 1
        return Asked(stream, message.target)

    def _credited(self, stream: Stream, count: int) -> Credited:
        if stream.credit + count > m.CREDIT_MAX:
            raise BadFrame(why="more credit than anybody needs")
        first = not stream.credit
        stream.credit += count
        return Credited(stream, first)

    def _check_coming(self, stream: Stream) -> None:
        if stream.ended:
            raise BadFrame(why="a stream goes on after its end")
        if stream.state is State.OPENING:
            raise BadFrame(why="a stream begins before it is opened")

    def _check_opening(self, stream: Stream) -> None:
        if stream.state is not State.OPENING:
            raise BadFrame(why="a stream is answered twice, or by who asked")

    def _look(self, stream: Stream) -> None:
        """Over, once both ways have ended; what is held here is still the program's to take."""
        if stream.finished and stream.ended and stream.state is State.OPEN:
            self._remove(stream)

    def _forget(self, stream: Stream) -> None:
        self._remove(stream)
        stream.window.close()

    def _remove(self, stream: Stream) -> None:
        stream.state = State.OVER
        del self.streams[stream.key]
        if not stream.key & m.OPENER:
            self.theirs -= 1

    def close(self) -> list[Stream]:
        """The link is gone: the streams that were under way."""
        lost = list(self.streams.values())
        for stream in lost:
            self._forget(stream)
        return lost

    def check(self) -> None:
        for key, stream in self.streams.items():
            assert key == stream.key
            assert stream.state is not State.OVER
            stream.window.check()
        assert self.theirs == sum(not key & m.OPENER for key in self.streams)
