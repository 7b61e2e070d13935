"""Do streams keep every byte, their ends and their bounds, after any history?"""

from __future__ import annotations

import collections

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.streams import messages as m
from p2pgrid.hole_punch.streams import mux
from p2pgrid.hole_punch.streams.fair import QUANTUM, Fair
from p2pgrid.hole_punch.streams.mux import Mux, State, Stream
from p2pgrid.hole_punch.streams.window import INITIAL, POOL, WINDOW_MAX, Pool, Window

SIZES = st.sampled_from([1, 100, 5000, 40_000, 250_000])


@attrs.define(eq=False)
class Local:
    """A program's view of one end: counts stand for bytes, which keep their order by themselves."""

    stream: Stream
    sent: int = 0
    got: int = 0
    held: int = 0
    ended: bool = False
    broken: bool = False
    other: Local | None = None


class Side:
    def __init__(self) -> None:
        self.pool = Pool()
        self.mux = Mux(self.pool)
        self.locals: dict[Stream, Local] = {}
        self.out: collections.deque[bytes] = collections.deque()
        self.peer: Side

    def live(self) -> list[Local]:
        return [local for local in self.locals.values() if local.stream.state is not State.OVER]


class Streams(RuleBasedStateMachine):
    """Two ends of one link, everything in between in any order that a link allows."""

    def __init__(self) -> None:
        super().__init__()
        self.sides = Side(), Side()
        for side, other in zip(self.sides, reversed(self.sides), strict=True):
            side.peer = other
        self.opened: dict[bytes, Local] = {}

    def pick(self, data: st.DataObject, side: int, *states: State) -> Local | None:
        found = [local for local in self.sides[side].live() if local.stream.state in states]
        return data.draw(st.sampled_from(found)) if found else None

    sides_at = st.integers(0, 1)

    @rule(at=sides_at)
    def open(self, at: int) -> None:
        side, target = self.sides[at], f"{len(self.opened)}".encode()
        stream, message = side.mux.open(target)
        self.opened[target] = side.locals[stream] = Local(stream)
        side.out.append(message)

    @rule(at=sides_at, data=st.data(), welcome=st.sampled_from([True, True, True, False]))
    def answer(self, at: int, data: st.DataObject, welcome: bool) -> None:
        if (local := self.pick(data, at, State.ASKED)) is None:
            return
        side = self.sides[at]
        if welcome:
            side.out.append(side.mux.accept(local.stream, b"ok"))
        else:
            local.broken = True
            side.out.append(side.mux.refuse(local.stream, 5, "no"))

    @rule(at=sides_at, data=st.data(), size=SIZES, times=st.integers(1, 8))
    def send(self, at: int, data: st.DataObject, size: int, times: int) -> None:
        if (local := self.pick(data, at, State.OPEN, State.OPENING)) is None:
            return
        side = self.sides[at]
        for _ in range(times):
            if count := min(size, local.stream.sendable, m.DATA_MAX):
                side.out.append(side.mux.send(local.stream, count) + bytes(count))
                local.sent += count

    @rule(at=sides_at, data=st.data())
    def finish(self, at: int, data: st.DataObject) -> None:
        local = self.pick(data, at, State.OPEN, State.OPENING)
        if local is not None and not local.stream.finished:
            self.sides[at].out.append(self.sides[at].mux.finish(local.stream))

    @rule(at=sides_at, data=st.data())
    def reset(self, at: int, data: st.DataObject) -> None:
        if (local := self.pick(data, at, State.OPEN, State.OPENING, State.ASKED)) is not None:
            local.broken = True
            self.sides[at].out.append(self.sides[at].mux.reset(local.stream, "enough"))

    @rule(at=sides_at, count=st.integers(1, 20))
    def travel(self, at: int, count: int) -> None:
        for _ in range(min(count, len(self.sides[at].out))):
            self.deliver(self.sides[at])

    @rule(at=sides_at, size=st.sampled_from([1, 1000, 30_000, 10_000_000]))
    def take(self, at: int, size: int) -> None:
        side = self.sides[at]
        for local in side.locals.values():
            count = min(size, local.held)
            if count and not local.broken and local.stream.state is not State.ASKED:
                local.held -= count
                if (credit := side.mux.taken(local.stream, count)) is not None:
                    side.out.append(credit)

    def take_all(self) -> None:
        for at in range(2):
            self.take(at, 1 << 30)

    def deliver(self, sender: Side) -> None:
        side = sender.peer
        event = side.mux.received(memoryview(sender.out.popleft()))
        if event is None:
            return
        assert not isinstance(event, mux.Over)
        local = side.locals.get(event.stream)
        match event:
            case mux.Asked(stream, target):
                other = self.opened[target]
                side.locals[stream] = Local(stream, other=other)
                other.other = side.locals[stream]
                return
        assert local is not None
        match event:
            case mux.Arrived(_, body):
                local.got += len(body)
                local.held += len(body)
            case mux.Ended():
                local.ended = True
            case mux.Broken() | mux.Declined():
                local.broken = True

    @invariant()
    def bounded(self) -> None:
        for side in self.sides:
            side.mux.check()
            extra = sum(local.stream.window.size - INITIAL for local in side.locals.values())
            assert 0 <= side.pool.free == POOL - extra

    @invariant()
    def nothing_is_made_up(self) -> None:
        for side in self.sides:
            for local in side.locals.values():
                if local.other is not None:
                    assert local.got <= local.other.sent

    @precondition(lambda self: any(side.out for side in self.sides))
    @rule()
    def settle(self) -> None:
        self.settled()

    def settled(self) -> None:
        """Everything travels, and programs take all: then what was sent came, and ends are known."""
        self.take_all()
        while any(side.out for side in self.sides):
            for side in self.sides:
                while side.out:
                    self.deliver(side)
            self.take_all()
        for side in self.sides:
            for local in side.locals.values():
                other = local.other
                if other is None or local.broken or other.broken:
                    continue
                assert local.got == other.sent
                assert local.ended == other.stream.finished
                assert not local.held or local.stream.state is State.ASKED

    def teardown(self) -> None:
        self.settled()
        for at in range(2):
            side = self.sides[at]
            for local in side.live():
                if local.stream.state is State.ASKED:
                    side.out.append(side.mux.accept(local.stream))
        self.settled()
        for side in self.sides:  # whoever is open can go on, however it was treated
            for local in side.live():
                assert local.stream.finished or local.stream.sendable >= INITIAL // 2
                if not local.stream.finished:
                    side.out.append(side.mux.finish(local.stream))
        self.settled()
        for side in self.sides:
            assert not side.mux.streams, "a stream is left though both ways have ended"
            for local in side.locals.values():
                local.stream.window.close()
            assert side.pool.free == POOL


Streams.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestStreams = Streams.TestCase


def test_who_sends_more_than_it_may_loses_the_link() -> None:
    ours, theirs = Mux(Pool()), Mux(Pool())
    _, message = ours.open(b"x")
    theirs.received(memoryview(message))
    whole = m.encode(m.Data(0, bytes(INITIAL)))
    theirs.received(memoryview(whole))
    with pytest.raises(BadFrame, match="more than it may"):
        theirs.received(memoryview(m.encode(m.Data(0, b"x"))))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ([m.Open(0, 0, b"x"), m.Fin(0)], m.Data(0, b"x")),
        ([m.Open(0, 0, b"x"), m.Fin(0)], m.Fin(0)),
        ([m.Open(3, 0, b"x")], m.Open(3, 0, b"x")),
        ([m.Open(3, 0, b"x"), m.Reset(3, "")], m.Open(2, 0, b"x")),
        ([], m.Open(m.OPENER, 0, b"x")),
        ([m.Open(0, 0, b"x")], m.Opened(0, 0, b"")),
        ([m.Open(0, 0, b"x")], m.Refused(0, 1, "")),
        ([m.Open(0, m.CREDIT_MAX, b"x")], m.Credit(0, m.CREDIT_MAX)),
    ],
)
def test_what_breaks_the_rules_is_a_bad_frame(first: list[m.Message], then: m.Message) -> None:
    mine = Mux(Pool())
    for message in first:
        mine.received(memoryview(m.encode(message)))
    with pytest.raises(BadFrame):
        mine.received(memoryview(m.encode(then)))


def test_nothing_comes_before_the_answer() -> None:
    mine = Mux(Pool())
    stream, _ = mine.open(b"x")
    for message in (m.Data(stream.key, b"x"), m.Fin(stream.key)):
        with pytest.raises(BadFrame):
            mine.received(memoryview(m.encode(message)))


def test_what_comes_for_a_stream_that_is_over_is_passed_over() -> None:
    mine = Mux(Pool())
    stream, _ = mine.open(b"x")
    mine.reset(stream, "")
    late = (
        m.Opened(stream.key, 0, b""),
        m.Data(stream.key, b"x"),
        m.Credit(stream.key, 1),
        m.Fin(stream.key),
    )
    for message in late:
        assert mine.received(memoryview(m.encode(message))) is None


def test_one_side_keeps_only_so_many_streams() -> None:
    mine = Mux(Pool())
    for number in range(mux.STREAMS_MAX):
        assert isinstance(mine.received(memoryview(m.encode(m.Open(number, 0, b"x")))), mux.Asked)
    event = mine.received(memoryview(m.encode(m.Open(mux.STREAMS_MAX, 0, b"x"))))
    assert isinstance(event, mux.Over)
    assert isinstance(m.decode(memoryview(event.message)), m.Refused)


# --- windows ------------------------------------------------------------------------------


def filled(window: Window, total: int) -> None:
    """A sender that always sends what it may, and a reader that takes it at once."""
    while total > 0:
        count = min(window.granted, 20_000)
        window.arrive(count)
        window.take(count)
        window.check()
        total -= count


def test_a_window_grows_where_the_reader_keeps_up_and_leaves_room_for_others() -> None:
    pool = Pool()
    windows = [Window(pool) for _ in range(200)]
    filled(windows[0], 100 << 20)
    assert windows[0].size == WINDOW_MAX
    for window in windows[1:]:
        filled(window, 100 << 20)
    assert pool.free >= 0
    assert sum(window.size for window in windows) <= 200 * INITIAL + POOL
    assert windows[5].size > INITIAL


def test_a_slow_reader_gives_back_what_others_lack() -> None:
    pool = Pool()
    windows = [Window(pool) for _ in range(8)]
    for window in windows:
        filled(window, 100 << 20)
    slow, free = windows[0], pool.free
    for _ in range(40):
        slow.arrive(slow.granted)
        while slow.held:
            slow.take(min(1000, slow.held))
            if slow.granted:
                slow.arrive(slow.granted)
            if slow.size == INITIAL:
                break
    assert slow.size == INITIAL
    assert pool.free > free


# --- turns --------------------------------------------------------------------------------


def test_who_sends_little_goes_before_who_sends_much() -> None:
    fair: Fair[str] = Fair()
    fair.ready("bulk")
    for _ in range(10):
        assert fair.next() == "bulk"
        fair.sent("bulk", QUANTUM, dry=False)
    fair.ready("typing")
    assert fair.next() == "typing"
    fair.sent("typing", 10, dry=True)
    if fair.next() == "typing":  # in the row now, so that it does not always begin anew
        fair.sent("typing", 0, dry=True)
    assert fair.next() == "bulk"


def test_those_who_send_much_take_turns_by_bytes() -> None:
    fair: Fair[str] = Fair()
    sizes, moved = {"a": 200_000, "b": 20_000, "c": 1000}, collections.Counter[str]()
    for name in sizes:
        fair.ready(name)
    for _ in range(20_000):
        name = fair.next()
        assert name is not None
        fair.sent(name, sizes[name], dry=False)
        moved[name] += sizes[name]
    assert max(moved.values()) < 1.1 * min(moved.values())


def test_many_that_send_little_do_not_stop_the_others() -> None:
    fair: Fair[str] = Fair()
    fair.ready("bulk")
    fair.sent("bulk", QUANTUM, dry=False) if fair.next() else None
    bulk = 0
    for _ in range(1000):
        for number in range(5):
            fair.ready(f"little {number}")
        name = fair.next()
        assert name is not None
        bulk += name == "bulk"
        fair.sent(name, 100, dry=name != "bulk")
    assert bulk > 100


def test_a_stream_that_is_over_is_forgotten() -> None:
    fair: Fair[str] = Fair()
    for name in ("a", "b"):
        fair.ready(name)
    fair.sent("a", QUANTUM, dry=False) if fair.next() == "a" else None
    assert fair.next() == "b"
    for name in ("a", "b", "a"):
        fair.drop(name)
    assert fair.next() is None
    assert len(fair) == 0
