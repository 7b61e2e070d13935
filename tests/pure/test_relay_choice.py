"""Does a node hold the nearest relays that there are, whatever fails?"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.hole_punch.relay.choice import REST_MAX, REST_MIN, SURVEY, WANTED, Choice
from p2pgrid.ids import PeerId

ME = PeerId("me")
relays = st.sets(st.from_regex(r"[a-z]{1,3}", fullmatch=True).map(PeerId), max_size=12).map(
    lambda names: sorted(names - {ME})
)


@given(relays, st.randoms())
def test_the_nearest_of_those_that_answer(known: list[PeerId], rng: object) -> None:
    choice = Choice(ME)
    choice.learn([*known, ME])
    asked = choice.survey(0.0)
    assert len(asked) == min(SURVEY, len(known))
    delays = {relay: float(len(asked) - place) for place, relay in enumerate(asked[1:])}  # the first is away
    chosen = choice.choose(delays)
    assert chosen == sorted(delays, key=lambda relay: delays[relay])[:WANTED]
    assert choice.survey(0.0) == [] or len(chosen) < WANTED
    assert list(choice.held) == chosen


def test_one_that_fails_rests_longer_and_longer_and_is_replaced() -> None:
    choice, (a, b, c) = Choice(ME), map(PeerId, "abc")
    choice.learn([a, b, c])
    assert set(choice.choose(dict.fromkeys(choice.survey(0.0), 1.0))) == {a, b}
    choice.failed(a, 10.0)
    assert choice.survey(10.0) == [c]
    assert choice.choose({c: 5.0}) == [c]
    assert choice.again(10.0) is None
    choice.failed(c, 10.0)
    assert choice.survey(10.0) == []
    assert choice.again(10.0) == REST_MIN
    assert choice.survey(10.0 + REST_MIN) == sorted([a, c], key=choice.survey(10.0 + REST_MIN).index)
    choice.failed(a, 20.0)
    choice.failed(a, 20.0)
    choice.failed(c, 20.0)
    assert choice.again(20.0) == 2 * REST_MIN  # that of c
    for _ in range(40):
        choice.failed(a, 20.0)
    choice.learn([a, b])
    assert choice.again(20.0) == REST_MAX
    choice.worked(a)
    assert choice.survey(20.0) == [a]


def test_who_is_not_told_of_any_more_is_not_asked() -> None:
    choice, (a, b) = Choice(ME), map(PeerId, "ab")
    choice.learn([a])
    choice.failed(a, 0.0)
    choice.learn([b])
    assert choice.survey(1e9) == [b]
    choice.learn([a, b])
    assert choice.survey(0.0) == sorted([a, b], key=choice.survey(0.0).index)


def test_nobody_who_is_reached_anyway_needs_one() -> None:
    choice = Choice(ME, wanted=0)
    choice.learn([PeerId("a")])
    assert choice.survey(0.0) == []
    assert choice.choose({PeerId("a"): 1.0}) == []


def test_nodes_look_at_different_ones_of_many() -> None:
    many = [PeerId(f"relay {n}") for n in range(60)]
    asked: set[PeerId] = set()
    for n in range(30):
        choice = Choice(PeerId(f"node {n}"))
        choice.learn(many)
        asked.update(choice.survey(0.0))
    assert len(asked) > 50
