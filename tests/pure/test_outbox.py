"""Does every message arrive once and in order, wherever connections are cut?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.framing import HEADER
from p2pgrid.hole_punch.outbox import KEPT_MAX, Outbox

KINDS = st.sampled_from(["talk", "bulk", "long"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KINDS),
        st.tuples(st.just("move"), st.integers(1, 5)),
        st.tuples(st.just("acknowledge"), st.just(0)),
        st.tuples(st.just("cut"), st.integers(0, 4)),
    ),
    max_size=60,
)


class Peer:
    """Takes what comes, and counts."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []

    def take(self, pieces: tuple[bytes, ...]) -> None:
        whole = b"".join(pieces)
        assert int.from_bytes(whole[:HEADER], "big") == len(whole) - HEADER
        self.taken.append(whole[HEADER:])


@given(STEPS)
def test_every_message_arrives_once_and_in_order(steps: list[tuple[str, int | str]]) -> None:
    box, peer = Outbox(), Peer()
    put: dict[str, list[bytes]] = {"talk": [], "bulk": [], "long": []}

    def move(most: int) -> None:
        for _ in range(most):
            pieces = box.next()
            if pieces is None:
                break
            box.went(sum(map(len, pieces)))
            peer.take(pieces)

    for step, argument in steps:
        match step:
            case "put":
                name = f"{argument} {len(put[argument])}".encode()
                put[argument].append(name)
                again = (lambda name=name: (name[:3], name[3:])) if argument == "long" else None
                assert box.put(name, (), bulk=argument != "talk", again=again)
            case "move":
                move(argument)
            case "acknowledge":
                box.acknowledge(len(peer.taken))
            case "cut":  # what was sent last is lost on the way
                for _ in range(argument):
                    if box.next() is None:
                        break
                box.say(b"void with the connection")
                box.interrupt()
                box.resume(len(peer.taken))
        assert box.count >= len(peer.taken)
    move(len(steps))
    assert box.queued == 0
    for kind, names in put.items():
        assert [name for name in peer.taken if name.startswith(kind.encode())] == names
    box.acknowledge(len(peer.taken))
    assert box.waiting == 0
    assert not box.overdue


def test_talk_overtakes_bulk_and_the_links_own_words_overtake_all() -> None:
    box = Outbox()
    box.put(b"bulk", (), bulk=True, again=None)
    box.put(b"talk", (), bulk=False, again=None)
    box.say(b"own")
    assert [b"".join(box.next() or ())[HEADER:] for _ in range(3)] == [b"own", b"talk", b"bulk"]
    assert box.count == 2  # its own words are not counted


def test_what_is_not_worth_sending_again_is_not() -> None:
    box = Outbox()
    box.put(b"gone", (), bulk=True, again=lambda: None)
    box.put(b"there", (), bulk=True, again=None)
    assert box.next()
    assert box.next()
    box.interrupt()
    box.resume(0)
    assert b"".join(box.next() or ())[HEADER:] == b"there"
    assert box.queued == HEADER + 5
    box.acknowledge(1)


def test_what_is_long_is_made_again_when_its_turn_comes() -> None:
    """A peer that has taken much, and says that it has nothing, does not have all of it made at once."""
    box, made = Outbox(), 0

    def again() -> tuple[bytes, ...]:
        nonlocal made
        made += 1
        return (b"another, shorter",)

    for _ in range(1000):
        box.put(b"long" * 1000, (), bulk=True, again=again)
        box.next()
    box.interrupt()
    box.resume(0)
    assert made == 0
    assert box.queued == 1000 * (HEADER + 4000)
    for count in range(1, 1001):
        box.went(len(b"".join(box.next() or ())))
        assert made == count
    assert box.queued == 0


@pytest.mark.parametrize("count", [2, -1, 1 << 40])
def test_nobody_acknowledges_what_was_not_sent(count: int) -> None:
    box = Outbox()
    box.put(b"1", (), bulk=False, again=None)
    assert box.next()
    with pytest.raises(BadFrame):
        box.acknowledge(count)


def test_a_peer_that_never_acknowledges_is_noticed() -> None:
    box, size = Outbox(), 1 << 20
    for _ in range(KEPT_MAX // size):
        box.put(bytes(size), (), bulk=True, again=None)
        box.next()
    assert box.overdue
    box.acknowledge(2)
    assert not box.overdue


def test_nothing_is_taken_after_the_end() -> None:
    box = Outbox()
    box.end()
    assert not box.put(b"1", (), bulk=False, again=None)
    assert box.queued == 0
    assert box.next() is None
