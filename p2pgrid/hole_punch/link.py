"""Move messages between two peers, both ways at once, over one connection after another.

A link is a session: it begins with a TLS connection, and goes on over another one when that one is lost
or a better one was made, without losing a message or bringing one twice (`outbox.py`).  Whoever uses it
need not know.

A turn (`reactor.py`) never blocks: it reads into the buffer of `Framing` what has come, asks the
receiver for more to send, and writes from a queue as much as the socket takes:

    any thread --send--> outbox ---> |  turns in the  | <--TLS--> peer
    receiver <--received, drained--- |  reactor's     |
                                     |  thread        |

Backpressure: nothing that is long is queued before `drained` asks for it, so a slow peer holds
about `LOW` bytes here, and TCP does the rest.  A peer that has us queue more than `QUEUE_MAX`
without reading is not coming back.
"""

from __future__ import annotations

import collections
import contextlib
import socket
import struct
import time
from collections.abc import Callable
from typing import Protocol

import attrs

from p2pgrid.errors import BadFrame, PeerError
from p2pgrid.hole_punch import link_messages as own
from p2pgrid.hole_punch.framing import Framing, header
from p2pgrid.hole_punch.outbox import Again, Outbox
from p2pgrid.hole_punch.path import Way
from p2pgrid.hole_punch.rates import LinkRates
from p2pgrid.hole_punch.reactor import READ, WRITE, Next, Turned
from p2pgrid.hole_punch.tls import READ as AT_ONCE
from p2pgrid.hole_punch.tls import RECORD, Tls
from p2pgrid.ids import PeerId

LOW = 256 << 10
"""Bytes queued below which the receiver is asked for more: a few chunks, so that it chooses late."""
LOW_SECONDS = 0.25
"""Seconds that what is queued may take to be sent, where a rate is capped."""
QUEUE_MAX = 32 << 20
"""Bytes queued beyond which the peer has stopped reading what it asked for."""
BURST = 512 << 10
"""Bytes sent in one turn."""
TCP_INFO_SIZE, RTT_AT, MIN_RTT_AT = 152, 68, 148
"""Bytes of Linux' `tcp_info` that are looked at, and where the delay (µs) lies in it."""
SEAL = 128 << 10
"""Bytes sealed before they are sent: few system calls, and little that can no longer be overtaken."""
ACK_BYTES, ACK_MESSAGES = 1 << 20, 256
"""How much is taken before it is acknowledged: the peer keeps it so long."""
PROBES_MAX = 64
"""Probes that wait for their echo."""
RESUME_PATIENCE = 6.0
"""Seconds until the peer has said where it goes on: it does so at once, unless it is not there."""
RETIRED_MAX = 2
"""Connections that were left and are kept until the peer has left them, too."""


class Receiver(Protocol):
    """Takes what one link brings.  Every call comes in the reactor's thread: other links wait meanwhile."""

    def received(self, message: memoryview) -> None:
        """`message` is good until this returns.  Raising `PeerError` ends the link."""
        ...

    def drained(self) -> float | None:
        """Less than `LOW` bytes wait to be sent: the time to send something long.

        Returns the seconds after which it wants to be called again even if nothing happens.
        """
        ...

    def left(self, why: str) -> None:
        """After the last message; nothing sent from now on arrives.  The last call."""
        ...


Receive = Callable[["Link"], Receiver]
"""Makes the receiver of a new link; called by whoever makes the link, before its first turn."""


Order = tuple[int, str]
"""How many connections a session had before one, and who accepted it.

Both ends go on over the greatest: where each makes one at the same time, and so sees the two come in another
order than its peer, they still come to the same."""


@attrs.frozen(eq=False)
class Path:
    """One connection to the peer, greeted, and how it came about."""

    tls: Tls
    way: Way
    rates: LinkRates
    via: PeerId | None = None
    """The relay, where there is one."""
    preamble: bytes = b""
    """What is said on it before all else."""
    order: Order = (0, "")
    since: float = attrs.field(factory=time.monotonic)


class Link:
    """A session with one peer.  Thread-safe."""

    def __init__(
        self,
        peer: PeerId,
        session: bytes,
        path: Path,
        receive: Receive,
        call: Callable[[Turned], None],
        lost: Callable[[Link], None],
        ended: Callable[[Link], None],
    ) -> None:
        """`call` has the link called for a turn, `lost` hears that it has no connection, `ended` when it
        has had its last turn; both in the reactor's thread."""
        self.peer = peer
        self.session = session
        self.path = path
        """The connection in use, or about to be, or that was the last one."""
        self.heard = 0
        """Bytes that came, over all connections."""
        self.sent = 0
        """Bytes that went."""
        self.delay: float | None = None
        """Seconds that the last echo took, link to link."""
        self._call = call
        self._lost = lost
        self._ended = ended
        self._coming: collections.deque[Path] = collections.deque()
        """Connections to go on over: the last one of them."""
        self._retired: list[Tls] = []
        """Connections to be closed once the reactor does not watch them any more, and the peer has left
        them, too: it must not take their end for a loss."""
        self._tls: Tls | None = None
        self._resuming = False
        """Whether the peer has yet to say where it goes on."""
        self._resume_by = 0.0
        self._framing = Framing()
        self._outbox = Outbox()
        self._pieces: list[bytes] = []
        """Of the message that was taken from the outbox last: what was not begun, in the reverse order."""
        self._begun = memoryview(b"")
        """What is left of the piece that was."""
        self._sealed = 0
        self._unread = True
        """Whether something may have come that was not read: it was too much, or not allowed yet."""
        self._taken = self._acknowledged = self._unacknowledged = 0
        """Messages taken, those of them that the peer was told of, bytes of the others."""
        self._probes: dict[int, tuple[float, Callable[[float], None] | None]] = {}
        self._number = 0
        self._closing = ""
        self._over = False
        self._take_up(path)
        self.receiver = receive(self)

    def __repr__(self) -> str:
        return f"<Link {self.peer} {self.way.value}{' closing: ' + self._closing if self._closing else ''}>"

    @property
    def live(self) -> bool:
        return not self._closing

    @property
    def over(self) -> bool:
        """Whether it has had its last turn."""
        return self._over

    @property
    def connected(self) -> bool:
        """Whether it has a connection just now, or one is about to be taken up."""
        return self._tls is not None or bool(self._coming)

    @property
    def way(self) -> Way:
        """How its present connection came about, or its last one."""
        return self.path.way

    @property
    def near(self) -> bool:
        """Whether its other end is in the same house."""
        return self.path.rates.private

    @property
    def queued(self) -> int:
        """Bytes that wait to be sent."""
        return self._outbox.queued

    @property
    def low(self) -> int:
        """Bytes queued below which the receiver is asked for more: less where a cap makes them wait long."""
        return int(min(LOW, max(RECORD, LOW_SECONDS * self.path.rates.up_rate)))

    def fileno(self) -> int:
        return self._tls.fileno() if self._tls is not None else -1

    def send(self, first: bytes, *rest: bytes, bulk: bool = False, again: Again | None = None) -> None:
        """Queue one whole message; never blocks.  On a link that has ended it is lost.

        What is `bulk` is overtaken by all that is not, so that what peers tell each other is not as late
        as what they send.  `again` makes the message anew for another connection, in the reactor's thread, so
        that nothing long is kept until the peer has it.
        """
        if self._closing or not self._outbox.put(first, rest, bulk=bulk, again=again):
            return
        if self._outbox.queued > QUEUE_MAX:
            self._closing = self._closing or "the peer does not read"
        if not bulk:  # what is long was asked for in a turn, which goes on
            self._call(self)

    def close(self, why: str = "closed here") -> None:
        """End the link soon; `left` is called in the reactor's thread."""
        self._closing = self._closing or why
        self._call(self)

    def wake(self) -> None:
        """Have the receiver asked for more, though nothing happened here."""
        self._call(self)

    def beside(self, other: Turned) -> None:
        """Have `other` have a turn in the thread of this link, which moves bytes for it."""
        self._call(other)

    def go_on(self, path: Path) -> None:
        """Go on over `path`, which the peer does, too; unless it has gone on over a later one."""
        if path.order <= self.path.order:
            path.tls.close()
            return
        self.path = path
        self._coming.append(path)  # the reactor's thread closes those before it: it may be taking one up
        if self._over:
            path.tls.close()
        self._call(self)

    def probe(self, answered: Callable[[float], None] | None = None) -> None:
        """Have the peer answer at once; `answered` hears in the reactor's thread after how many seconds."""
        self._number += 1
        for oldest in list(self._probes)[: -PROBES_MAX + 1]:
            self._probes.pop(oldest, None)
        self._probes[self._number] = time.monotonic(), answered
        self._outbox.say(own.encode(own.PROBE, self._number))
        self._call(self)

    # --- in the reactor's thread ----------------------------------------------------------

    def turn(self, readable: bool) -> Next | None:
        while self._retired and not self._resuming:
            self._retired.pop().abort()  # the peer has moved, too: what lies in there comes again
        then: Next | None = (True, None, 0)  # where the connection is lost: it is closed in the next turn
        try:
            if self._coming:
                self._move()
            if self._tls is None:
                then = (False, None, 0)
            elif not self._closing:
                then = self._go_on(self._tls, readable)
        except EOFError as end:
            if end.args:  # orderly
                self._closing = self._closing or str(end)
            else:
                self._lose()
        except PeerError as wrong:
            self._closing = self._closing or str(wrong)
        except OSError:
            self._lose()
        if self._closing:
            self._say_bye()
            return None
        return then

    def end(self, why: str) -> None:
        self._over = True
        self._closing = self._closing or why
        self._outbox.end()
        while self._coming:
            self._coming.popleft().tls.close()
        for tls in (self._tls, *self._retired):
            if tls is not None:
                tls.close()
        self._tls = None
        self._retired.clear()
        self._ended(self)
        self.receiver.left(self._closing)

    def _take_up(self, path: Path) -> None:
        self._tls = path.tls
        if path.preamble:
            path.tls.seal(path.preamble)
        self._unread = True

    def _move(self) -> None:
        """Leave the connection there was for the one that is coming, and say how far we are."""
        path = self._coming[-1]
        self._drop()
        self._take_up(path)
        while (passed := self._coming.popleft()) is not path:
            passed.tls.close()
        resume = own.encode(own.RESUME, self._taken)
        path.tls.seal(header(len(resume)) + resume)
        self._acknowledged, self._unacknowledged = self._taken, 0
        self._resuming, self._resume_by = True, time.monotonic() + RESUME_PATIENCE
        for number, (_, answered) in list(self._probes.items()):  # what was left brings no echo any more
            if answered is None:
                self._probes.pop(number, None)
            else:
                self._probes[number] = time.monotonic(), answered
                self._outbox.say(own.encode(own.PROBE, number))

    def _drop(self) -> None:
        """What was half read or half sent is void with the connection."""
        if self._tls is not None:
            self._retired.append(self._tls)
            self._tls = None
            if len(self._retired) > RETIRED_MAX:
                self._retired.pop(0).abort()
        self._framing = Framing()
        self._pieces.clear()
        self._begun = memoryview(b"")
        self._sealed = 0
        self._resuming = False
        self._outbox.interrupt()

    def _lose(self) -> None:
        self._drop()
        self._lost(self)

    def _say_bye(self) -> None:
        """End in good order, as far as the socket takes it now: the peer need not look for us."""
        if self._tls is not None:
            with contextlib.suppress(OSError):
                if not self._begun and not self._pieces and not self._resuming:
                    bye = own.bye(self._closing)
                    self._tls.seal(header(len(bye)) + bye)
                self._tls.end()

    def _go_on(self, tls: Tls, readable: bool) -> Next:
        reading, writing = self._waits(tls)
        self._unread |= readable
        if self._unread and not reading:
            self._unread = self._pull(tls)
        more = self._unread and not reading
        again = None
        if self._resuming:
            again = self._resume_by - time.monotonic()
            if again < 0:
                raise TimeoutError("the peer does not go on")
        elif self._outbox.queued < self.low:
            again = self.receiver.drained()
        try:
            sent, blocked = (0, False) if writing else self._push(tls)
        except OSError:  # what the peer has said before lies here still: perhaps that it ends the link
            while self._pull(tls):
                pass
            raise
        goes_on = not blocked and not writing and (sent > 0 or self._outbox.queued > 0) and not self._resuming
        waits = [wait for wait in (again, reading or None, writing or None) if wait is not None]
        wanted = (0 if reading else READ) | (WRITE if blocked else 0)
        return more or goes_on, min(waits, default=None), wanted

    def _waits(self, tls: Tls) -> tuple[float, float]:
        """Seconds until something may be read, and until something may be written."""
        rates = self.path.rates
        if not rates.capped:
            return 0.0, 0.0
        now = time.monotonic()
        if rates.due(now):
            about = tls.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
            if len(about) == TCP_INFO_SIZE:
                delay, base = (struct.unpack_from("I", about, at)[0] / 1e6 for at in (RTT_AT, MIN_RTT_AT))
                rates.observe(delay, base, now)
        return rates.may_read(now), rates.may_send(now) if self.queued else 0.0

    def _push(self, tls: Tls) -> tuple[int, bool]:
        """Seal and send from the queue: how many bytes went, and whether the socket takes no more."""
        sent, rates = 0, self.path.rates
        most, batch = (RECORD, RECORD) if rates.capped else (BURST, SEAL)
        while tls.flush():
            if self._sealed:
                sent += self._sealed
                self.sent += self._sealed
                self._outbox.went(self._sealed)
                self._sealed = 0
            if sent >= most:
                return sent, False
            while self._sealed < batch and (piece := self._piece(batch - self._sealed)):
                tls.seal(piece)
                self._sealed += len(piece)
            if not self._sealed:
                return sent, False
            if most == RECORD:
                rates.sent(self._sealed, time.monotonic())
        return sent, True

    def _piece(self, most: int) -> bytes | memoryview:
        """The next bytes of the outbox: of something long up to `most`, uncopied; else a record's worth,
        if there are as many."""
        parts: list[bytes | memoryview] = []
        room = 0 if self._resuming else RECORD
        while room:
            if not self._begun:
                if not self._pieces:
                    message = self._outbox.next()
                    if message is None:
                        break
                    self._pieces.extend(reversed(message))
                self._begun = memoryview(self._pieces.pop())
            if not parts and len(self._begun) > RECORD:
                room = most
            part, self._begun = self._begun[:room], self._begun[room:]
            if len(part) > RECORD:
                return part
            parts.append(part)
            room -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _pull(self, tls: Tls) -> bool:
        """Read and hand over messages; whether there may be more without waiting for it."""
        rates = self.path.rates
        most = RECORD if rates.capped else AT_ONCE
        space = self._framing.space()
        count = tls.read(space[:most] if most == RECORD else space, most)
        if count:
            self.heard += count
            if most == RECORD:
                rates.read(count, time.monotonic())
        for body in self._framing.filled(count):
            if not body:
                raise BadFrame(why="an empty message")
            if body[0] in own.KINDS:
                self._heed(body)
            elif self._resuming:
                raise BadFrame(why="it goes on before it says where")
            else:
                self.receiver.received(body)
                self._taken += 1
                self._unacknowledged += len(body)
            if self._closing:
                break
        if self._unacknowledged >= ACK_BYTES or self._taken - self._acknowledged >= ACK_MESSAGES:
            self._acknowledged, self._unacknowledged = self._taken, 0
            self._outbox.say(own.encode(own.ACK, self._taken))
        if self._outbox.overdue:
            raise BadFrame(why="the peer does not acknowledge")
        if self._outbox.flooded:
            raise BadFrame(why="the peer asks, and does not read the answers")
        return tls.more

    def _heed(self, body: memoryview) -> None:
        """Do what a message of the peer's link says."""
        kind, count, why = own.decode(body)
        match kind:
            case own.BYE:
                raise EOFError(f"the peer closed the link: {why}" if why else "the peer closed the link")
            case own.RESUME:
                if not self._resuming:
                    raise BadFrame(why="it goes on where nothing was interrupted")
                self._outbox.resume(count)
                self._resuming = False
            case own.ACK:
                self._outbox.acknowledge(count)
            case own.PROBE:
                self._outbox.say(own.encode(own.ECHO, count))
            case own.ECHO if (probe := self._probes.pop(count, None)) is not None:
                asked, answered = probe
                self.delay = time.monotonic() - asked
                if answered is not None:
                    answered(self.delay)
