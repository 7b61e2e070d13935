"""Is a silent peer noticed in time, and a quiet one left alone?  An hour takes no time here."""

from __future__ import annotations

import contextlib
import itertools
import types
from collections.abc import Callable, Iterator

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.hole_punch import keeping
from p2pgrid.hole_punch.keeping import COME_BACK, ECHO, GONE, LOOK, QUIET_IDLE, Vigil
from p2pgrid.hole_punch.link import LOW
from p2pgrid.hole_punch.negotiation import NEGOTIATION_PATIENCE
from p2pgrid.hole_punch.reactor import READ
from p2pgrid.hole_punch.streams import flow as flow_module
from p2pgrid.hole_punch.streams import messages as m
from p2pgrid.hole_punch.streams.carrier import Carrier
from p2pgrid.hole_punch.streams.window import Pool

PROMISED = 30.0
"""Seconds until a program is told that the peer of its connection is dead."""
PROBE = 13
"""Bytes of a probe, or an echo."""
HOUR = 3600.0


@attrs.define
class Peer:
    """The other end of a path: what came of it until now, and what was done."""

    echo: float = 0.1
    """Seconds that an echo takes."""
    traffic: Callable[[float], int] = lambda now: 0
    """Bytes that came until `now`, besides."""
    dies: float = float("inf")
    vigil: Vigil = attrs.field(factory=Vigil)
    probes: list[float] = attrs.field(factory=list)

    def heard(self, now: float) -> int:
        until = min(now, self.dies)
        return (
            self.traffic(until)
            + PROBE * sum(sent + self.echo <= until for sent in self.probes[-3:])
            + (PROBE * max(0, len(self.probes) - 3))
        )

    def look(self, now: float) -> str:
        done = self.vigil.look(self.heard(now), PROBE * len(self.probes), now)
        if done == "probe":
            self.probes.append(now)
        return done


def looks(begin: float, late: Iterator[float] | None = None) -> Iterator[float]:
    """Times of looks, each up to a moment late."""
    now = begin
    while True:
        yield now
        now += LOOK + (next(late) if late is not None else 0.0)


def test_an_idle_hour_is_a_probe_now_and_then_and_nothing_else() -> None:
    peer = Peer()
    done = {peer.look(now) for now in itertools.takewhile(lambda now: now < HOUR, looks(0.0))}
    assert done == {"", "probe"}
    assert HOUR / (QUIET_IDLE + 3 * LOOK) < len(peer.probes) < HOUR / QUIET_IDLE + keeping.IDLE
    assert 2 * PROBE * len(peer.probes) < 10_000, "bytes an hour, both ways"


@given(
    st.floats(0.0, 1e6),
    st.lists(st.tuples(st.floats(0.01, 200.0), st.integers(1, 100_000)), max_size=20),
    st.floats(0.0, 300.0),
    st.floats(0.0, ECHO - LOOK),
    st.floats(0.0, 0.2),
)
def test_whoever_dies_is_given_up_in_time_whatever_was_before(
    begin: float, traffic: list[tuple[float, int]], rest: float, echo: float, late: float
) -> None:
    times = list(itertools.accumulate((gap for gap, _ in traffic), initial=begin))[1:]
    dies = (times[-1] if times else begin) + rest

    def came(until: float) -> int:
        return sum(size for at, (_, size) in zip(times, traffic, strict=True) if at <= until)

    peer = Peer(echo, came, dies)
    sought = None
    for now in looks(begin, itertools.repeat(late)):
        done = peer.look(now)
        if now < dies:
            assert done in ("", "probe")
        elif done == "regain" and sought is None:
            sought = now
        elif done == "give up":
            break
        assert now < dies + PROMISED
    assert now < dies + PROMISED - 1
    assert sought is not None
    assert now - sought > 5, "there was time to find another path"


def test_a_connection_that_breaks_is_given_up_in_time() -> None:
    """One attempt to have another, which takes no longer than any, and the time the peer has to come."""
    assert NEGOTIATION_PATIENCE + COME_BACK < PROMISED
    assert GONE + 2 * LOOK < PROMISED


@given(st.floats(0.0, 100.0), st.floats(4.0, 1e5))
def test_who_stood_still_itself_asks_before_it_gives_up(before: float, still: float) -> None:
    peer = Peer()
    for now in itertools.takewhile(lambda now: now <= before, looks(0.0)):
        assert peer.look(now) in ("", "probe")
    now += still
    done = [peer.look(at) for at in itertools.takewhile(lambda at: at < now + 60, looks(now))]
    assert set(done) <= {"", "probe"}
    dead = Peer(dies=before)
    for at in itertools.takewhile(lambda at: at <= before, looks(0.0)):
        dead.look(at)
    done = [dead.look(at) for at in itertools.takewhile(lambda at: at < now + 60, looks(now))]
    asked = [what for what in done if what]
    assert asked[:2] == ["probe", "regain"]
    assert "give up" in asked


@attrs.define(eq=False)
class Quiet:
    """A link that only says what it was given to send."""

    sent: list[bytes] = attrs.field(factory=list)
    queued: int = 0
    low: int = LOW

    def send(self, *pieces: bytes) -> None:
        self.sent.append(b"".join(pieces))

    def beside(self, flow: object) -> None:
        """Its turns are given by hand."""


class Nobody:
    """A node without programs."""

    def __init__(self) -> None:
        self.pool, self.lock = Pool(), contextlib.nullcontext()

    def datagrams(self, target: bytes) -> bool:
        return target == b"datagrams"

    def answered(self, *_: object) -> None:
        """Nobody waits for it."""


class Socket:
    """Of a program that does nothing."""

    closed = False

    def setblocking(self, blocking: bool) -> None:
        assert not blocking

    def recv(self, most: int) -> bytes:
        raise BlockingIOError

    def close(self) -> None:
        self.closed = True


def test_an_idle_stream_wants_nothing_and_says_nothing_for_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(flow_module, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    link = Quiet()
    carrier = Carrier(link, Nobody())  # type: ignore[arg-type]
    flows = [carrier.open(target) for target in (b"bytes", b"datagrams")]
    for flow in flows:
        flow.attach(Socket())  # type: ignore[arg-type]
        carrier.received(memoryview(m.encode(m.Opened(flow.stream.key, 0, b""))))
    stream, datagrams = flows
    said = len(link.sent)
    while clock[0] < HOUR:
        assert stream.turn(False) == (False, None, READ), "no clock of its own"
        assert carrier.drained() is None
        clock[0] += 1.0
    assert len(link.sent) == said
    carrier._mux.check()
    assert datagrams.turn(False) is None, "these have one"
