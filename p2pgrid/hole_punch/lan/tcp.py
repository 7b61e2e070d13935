"""Be the other end of a guest's TCP connections: the node, at an address of its LAN.

Pure.  RFC 9293, as far as two ends of one cable need it: nothing is reordered, little is ever lost (a guest
that does not read), so what is lost is sent again from the oldest byte on (go back N), by a timer that
doubles.  One `Connection` for each; frames in, frames out, the time is told.

    opened here:  SYN ──> <── SYN, ACK ──> ACK        opened there:  <── SYN  SYN, ACK ──> <── ACK

A guest's window is kept, and ours is what the program's socket here still takes.
"""

from __future__ import annotations

import collections
import struct

import attrs

from p2pgrid.hole_punch.lan.packets import IPV4, TTL, ethernet

TCP = 6
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
MSS = 1460
"""Bytes of data in one frame."""
WINDOW = 256 << 10
"""Bytes that we take beyond what the program here has taken."""
SCALE = 3
INFLIGHT_MAX = 256 << 10
"""Bytes under way to a guest: less than what waits at its port before frames are lost."""
AGAIN_MIN, AGAIN_MAX = 1.0, 16.0
"""Seconds until what was not acknowledged is sent again; a guest that is paused is not gone."""
TRIES = 8
_HEAD = struct.Struct("!BBHHHBBH4s4s")
_TCP = struct.Struct("!HHIIBBHHH")
_MASK = 0xFFFFFFFF


@attrs.frozen
class Ends:
    """Who talks with whom; `ours` is the node's address."""

    mac: bytes
    our_mac: bytes
    theirs: bytes
    their_port: int
    ours: bytes
    our_port: int


@attrs.frozen
class Segment:
    seq: int
    ack: int
    flags: int
    window: int
    data: bytes
    options: bytes = b""


def read(frame: bytes) -> tuple[Ends, Segment] | None:
    """A TCP segment in an Ethernet frame; None for all else.  It came by memory: no sum is looked at."""
    ip = frame[14:]
    if len(ip) < 40 or frame[12:14] != b"\x08\x00" or ip[0] != 0x45 or ip[9] != TCP:
        return None
    length, fragment = struct.unpack_from("!H2xH", ip, 2)
    if fragment & 0x3FFF or not 40 <= length <= len(ip):
        return None
    port, our_port, seq, ack, offset, flags, window, _, _ = _TCP.unpack_from(ip, 20)
    start = 20 + (offset >> 4) * 4
    if not 40 <= start <= length:
        return None
    ends = Ends(frame[6:12], frame[:6], bytes(ip[12:16]), port, bytes(ip[16:20]), our_port)
    return ends, Segment(seq, ack, flags, window, bytes(ip[start:length]), bytes(ip[40:start]))


def frame(ends: Ends, segment: Segment) -> bytes:
    """The whole Ethernet frame, from us to the guest."""
    size = 20 + len(segment.options)
    assert size % 4 == 0
    pseudo = ends.ours + ends.theirs + struct.pack("!HH", TCP, size + len(segment.data))
    fields = (
        ends.our_port,
        ends.their_port,
        segment.seq,
        segment.ack,
        size << 2,
        segment.flags,
        segment.window,
    )
    rest = segment.options + segment.data
    sum_ = _sum(pseudo + _TCP.pack(*fields, 0, 0) + rest)
    head = (0x45, 0, 20 + size + len(segment.data), 0, 0x4000, TTL, TCP)
    ip = _HEAD.pack(*head, _sum(_HEAD.pack(*head, 0, ends.ours, ends.theirs)), ends.ours, ends.theirs)
    return ethernet(ends.mac, ends.our_mac, IPV4, ip + _TCP.pack(*fields, sum_, 0) + rest)


def _sum(data: bytes) -> int:
    """RFC 1071's, by one division: a number modulo 65535 is the sum of its 16-bit digits."""
    total = int.from_bytes(data + b"\0" if len(data) & 1 else data, "big") % 0xFFFF
    return 0xFFFF - total if total else 0 if any(data) else 0xFFFF


def refusal(ends: Ends, segment: Segment) -> bytes | None:
    """What answers a segment for which there is no connection."""
    if segment.flags & RST:
        return None
    if segment.flags & ACK:
        return frame(ends, Segment(segment.ack, 0, RST, 0, b""))
    length = len(segment.data) + bool(segment.flags & SYN) + bool(segment.flags & FIN)
    return frame(ends, Segment(0, (segment.seq + length) & _MASK, RST | ACK, 0, b""))


def _less(one: int, other: int) -> bool:
    return ((one - other) & _MASK) >> 31 == 1


@attrs.define(eq=False)
class Connection:
    """One connection; everything is in the guest's order.  `out` are frames to be sent, by who empties it."""

    ends: Ends
    number: int
    """Our first sequence number, which nobody can guess."""
    out: list[bytes] = attrs.field(factory=list)
    came: collections.deque[bytes] = attrs.field(factory=collections.deque)
    """Data for the program here."""
    open: bool = False
    """Both ends have agreed."""
    ended: bool = False
    """The guest sends no more."""
    over: str = ""
    """Why there is no connection any more."""
    _una: int = 0
    _next: int = 0
    _expects: int = 0
    _window: int = 0
    """What the guest takes beyond `_una`."""
    _scale: int = 0
    _mss: int = 536
    _ours: int = WINDOW
    """What we take."""
    _told: int = 0
    """Up to where we said that we take."""
    _sent: collections.deque[tuple[int, int, bytes]] = attrs.field(factory=collections.deque)
    """Not acknowledged: sequence number, flags, data."""
    _finished: bool = False
    _due: float | None = None
    _tries: int = 0

    # --- opening --------------------------------------------------------------------------

    def connect(self, now: float) -> None:
        """Open it from here."""
        self._una = self._next = self.number
        self._emit(SYN, b"", now)

    def accept(self, syn: Segment, now: float) -> None:
        """Open it as the guest wishes."""
        self._una = self._next = self.number
        self._hear_syn(syn)
        self._emit(SYN | ACK, b"", now)

    def _hear_syn(self, syn: Segment) -> None:
        self._expects = (syn.seq + 1) & _MASK
        self._window = syn.window
        at, options = 0, syn.options
        scale = None
        while at + 1 < len(options) and options[at]:
            if options[at] == 1:
                at += 1
                continue
            size = options[at + 1]
            if size < 2:
                break
            if options[at] == 2 and size == 4:
                self._mss = max(64, min(MSS, int.from_bytes(options[at + 2 : at + 4], "big")))
            elif options[at] == 3 and size == 3 and at + 2 < len(options):
                scale = min(14, options[at + 2])
            at += size
        self._scale = -1 if scale is None else scale

    # --- what the program here does -------------------------------------------------------

    @property
    def sendable(self) -> int:
        """Bytes that the guest takes now."""
        if not self.open or self._finished or self.over:
            return 0
        under_way = (self._next - self._una) & _MASK
        return max(0, min(self._window, INFLIGHT_MAX) - under_way)

    def send(self, data: bytes, now: float) -> None:
        assert len(data) <= self.sendable
        for start in range(0, len(data), self._mss):
            self._emit(ACK | PSH, data[start : start + self._mss], now)

    def finish(self, now: float) -> None:
        """Nothing more is sent."""
        if not self._finished and not self.over:
            self._finished = True
            self._emit(FIN | ACK, b"", now)
            self._look()

    def take(self, held: int, now: float) -> None:
        """The program has not taken `held` bytes of what came: that much less may come."""
        self._ours = max(0, WINDOW - held)
        more = (self._expects + self._ours - self._told) & _MASK
        if self.open and not self.over and WINDOW // 2 <= more < 1 << 31:
            self._acknowledge()

    def abort(self, why: str) -> None:
        """Break it off."""
        if not self.over:
            self.out.append(self._frame(self._next, RST | ACK, b""))
            self._end(why)

    # --- time -----------------------------------------------------------------------------

    @property
    def deadline(self) -> float | None:
        """When `tick` is wanted."""
        return self._due

    def tick(self, now: float) -> None:
        """Send once more what was not acknowledged; ask a guest that takes nothing whether it does now."""
        if self._due is None or now < self._due or self.over:
            return
        self._tries += 1
        if self._tries > TRIES:
            self.abort("the guest does not answer")
            return
        budget = INFLIGHT_MAX // 4
        for seq, flags, data in self._sent:
            self.out.append(self._frame(seq, flags, data))
            budget -= len(data)
            if budget <= 0:
                break
        self._due = now + min(AGAIN_MAX, AGAIN_MIN * 2.0**self._tries)

    # --- what the guest sends -------------------------------------------------------------

    def on(self, segment: Segment, now: float) -> None:
        if self.over:
            return
        if segment.flags & RST:
            if segment.seq == self._expects or not self.open:
                self._end("the guest broke it off")
        elif segment.flags & SYN:
            self._on_syn(segment, now)
        elif segment.flags & ACK:
            self._on_ack(segment, now)
            self._on_data(segment)
            self._look()

    def _on_syn(self, segment: Segment, now: float) -> None:
        if self.open or not self._sent:
            self._acknowledge()
        elif not segment.flags & ACK:
            self.tick(now)
        elif segment.ack != (self.number + 1) & _MASK:
            self._end("the guest answers what was not said")
        else:
            self._hear_syn(segment)
            self._on_ack(segment, now)
            self._acknowledge()

    def _on_ack(self, segment: Segment, now: float) -> None:
        ack = segment.ack
        if _less(self._next, ack):
            self._acknowledge()
            return
        if _less(ack, self._una):
            return
        progress = ack != self._una
        self._una = ack
        while self._sent:
            seq, flags, data = self._sent[0]
            end = (seq + len(data) + bool(flags & (SYN | FIN))) & _MASK
            if _less(ack, end):
                break
            self._sent.popleft()
        shift = 0 if segment.flags & SYN else max(0, self._scale)
        self._window = segment.window << shift
        self.open = self.open or progress
        if progress:
            self._tries = 0
            self._due = now + AGAIN_MIN if self._sent else None

    def _on_data(self, segment: Segment) -> None:
        seq, data = segment.seq, segment.data
        if not data and not segment.flags & FIN:
            if _less(seq, self._expects):
                self._acknowledge()  # it asks whether we are there
            return
        old = (self._expects - seq) & _MASK
        if old >= 1 << 31 or old > len(data) or self.ended:
            self._acknowledge()  # something before it was lost, or it came before
            return
        data = data[old:]
        room = (self._told - self._expects) & _MASK
        fits = data[: room if room < 1 << 31 else 0]
        if fits:
            self.came.append(fits)
            self._expects = (self._expects + len(fits)) & _MASK
            self._ours = max(0, self._ours - len(fits))
        if len(fits) == len(data) and segment.flags & FIN:
            self._expects = (self._expects + 1) & _MASK
            self.ended = True
        self._acknowledge()

    # --- frames ---------------------------------------------------------------------------

    def _emit(self, flags: int, data: bytes, now: float) -> None:
        self._sent.append((self._next, flags, data))
        self.out.append(self._frame(self._next, flags, data))
        self._next = (self._next + len(data) + bool(flags & (SYN | FIN))) & _MASK
        if self._due is None:
            self._due, self._tries = now + AGAIN_MIN, 0

    def _acknowledge(self) -> None:
        self.out.append(self._frame(self._next, ACK, b""))

    def _frame(self, seq: int, flags: int, data: bytes) -> bytes:
        self._told = (self._expects + self._ours) & _MASK
        options, window = b"", min(0xFFFF, self._ours >> (SCALE if self._scale >= 0 else 0))
        if flags & SYN:
            window = min(0xFFFF, self._ours)
            options = struct.pack("!BBH", 2, 4, MSS)
            if self._scale >= 0:
                options += bytes((1, 3, 3, SCALE))
        self._told = (self._expects + (window if flags & SYN or self._scale < 0 else window << SCALE)) & _MASK
        ack = self._expects if flags & ACK else 0
        return frame(self.ends, Segment(seq, ack, flags, window, data, options))

    def _look(self) -> None:
        """Over, once both ways have ended and the guest knows."""
        if self.ended and self._finished and not self._sent and not self.over:
            self._end("both ends have finished")

    def _end(self, why: str) -> None:
        self.over = why
        self._due = None
        self._sent.clear()
