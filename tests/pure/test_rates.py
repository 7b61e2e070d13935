"""Do caps hold over time, and does courtesy give way and come back?"""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pgrid.hole_punch.rates import (
    FILL,
    LOOK_MAX,
    ON_THE_WIRE,
    RATE_MIN,
    RECORD,
    TARGET,
    Courtesy,
    Limits,
    Rates,
)


def moved(rates: Rates, links: int, seconds: float, late: float, up: bool = True) -> list[int]:
    """Bytes that each of `links` greedy links moves, each waking `late` s after it might."""
    ours = [rates.link(private=True) for _ in range(links)]
    totals = [0] * links
    wakes = [(0.0, place) for place in range(links)]
    while True:
        wakes.sort()
        now, place = wakes.pop(0)
        if now >= seconds:
            return totals
        link = ours[place]
        wait = link.may_send(now) if up else link.may_read(now)
        if wait == 0:
            (link.sent if up else link.read)(RECORD, now)
            totals[place] += int(ON_THE_WIRE * RECORD)
            wakes.append((now + 1e-5, place))
        else:
            assert wait <= LOOK_MAX
            wakes.append((now + wait + late, place))


@settings(max_examples=25)
@given(
    rate=st.floats(20_000, 1e6),
    links=st.integers(1, 5),
    late=st.floats(0, FILL / 2),
    up=st.booleans(),
)
def test_a_cap_of_the_node_is_kept_and_used(rate: float, links: int, late: float, up: bool) -> None:
    rates = Rates(Limits(up=rate) if up else Limits(down=rate))
    total = sum(moved(rates, links, 30.0, late, up))
    assert total <= 1.05 * rate * 30 + RECORD * links
    assert total >= 0.95 * rate * 30 - RECORD * links


@settings(max_examples=25)
@given(rate=st.floats(20_000, 1e6), links=st.integers(1, 4))
def test_a_cap_of_each_link_is_kept(rate: float, links: int) -> None:
    for total in moved(Rates(Limits(up_link=rate)), links, 30.0, 0.001):
        assert abs(total - rate * 30) <= 0.05 * rate * 30 + RECORD


def test_new_caps_are_seen_by_who_waits() -> None:
    rates = Rates(Limits(up=RECORD))
    link = rates.link(private=True)
    link.sent(RECORD * 100, 0.0)
    assert link.may_send(0.0) == LOOK_MAX
    rates.set(Limits())
    assert link.may_send(1.0) == 0
    assert not link.capped


def test_nothing_is_saved_up_in_an_idle_hour() -> None:
    rates = Rates(Limits(up=1e6))
    link = rates.link(private=True)
    assert link.may_send(0.0) == 0
    link.sent(RECORD, 3600.0)
    link.sent(int(FILL * 1e6), 3600.0)
    assert link.may_send(3600.0) > 0


def test_within_the_house_nobody_gives_way_unless_told_to() -> None:
    assert not Rates().link(private=True).courteous
    assert Rates().link(private=False).courteous
    assert Rates(Limits(courteous="always")).link(private=True).courteous
    assert not Rates(Limits(courteous="never")).link(private=False).courteous


def path(link_rate: float, others: float, seconds: float, depth: float = 1.0) -> tuple[float, float]:
    """Our share of a path's rate and its mean queue (s), in the second half, beside `others` bytes/s."""
    courtesy, queue, ours, delay = Courtesy(), 0.0, 0.0, 0.0
    step, samples = 0.1, int(seconds / 0.1)
    for sample in range(samples):
        wish = min(courtesy.rate, 4 * link_rate)
        queue = min(max(0.0, queue + (wish + others - link_rate) * step), depth * link_rate)
        sent = min(wish, link_rate - min(others, link_rate) if queue else wish)
        if sample >= samples / 2:
            ours += sent * step / (link_rate * seconds / 2)
            delay += queue / link_rate * step / (seconds / 2)
        courtesy.observe(0.02 + queue / link_rate, 0.02, max(sent, 1.0))
    return ours, delay


def test_alone_a_courteous_link_uses_the_path_and_keeps_its_queue_short() -> None:
    share, queue = path(1e6, 0.0, 60.0)
    assert share > 0.9
    assert queue < 2 * TARGET


def test_a_courteous_link_gives_way_to_others() -> None:
    share, queue = path(1e6, 0.8e6, 60.0)
    assert 0.1 < share <= 0.21
    assert queue < 2 * TARGET


def test_short_buffers_never_make_it_slower() -> None:
    courtesy = Courtesy()
    for _ in range(1000):
        courtesy.observe(0.02 + 0.9 * TARGET, 0.02, 25e6)
    assert courtesy.rate == math.inf


def test_what_gave_way_is_back_soon_when_the_others_have_gone() -> None:
    rates = Rates(Limits(courteous="always"))
    link, now = rates.link(private=True), 0.0

    def send(until: float, delay: float) -> float:
        """Bytes a second that a greedy link sends while the path's delay is `delay`."""
        nonlocal now
        began, sent = now, 0
        while now < until:
            if link.due(now):
                link.observe(delay, 0.02, now)
            wait = link.may_send(now)
            if not wait:
                link.sent(RECORD, now)
                sent += RECORD
            now += wait or RECORD / 5e6
        return sent / (now - began)

    send(10.0, 0.02 + 10 * TARGET)
    assert send(20.0, 0.02 + 10 * TARGET) < 2 * RATE_MIN
    send(35.0, 0.02)
    assert send(40.0, 0.02) > 4e6


def test_beside_a_path_that_is_always_full_something_is_left() -> None:
    courtesy = Courtesy()
    for _ in range(1000):
        courtesy.observe(1.0, 0.02, 1e6)
    assert courtesy.rate == RATE_MIN
