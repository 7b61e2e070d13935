"""Do the swarm's rules hold after any history, and does it always finish in the end?"""

from __future__ import annotations

import math
import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from p2pgrid.ids import PeerId
from p2pgrid.machine import Tick
from p2pgrid.transfer.pace import CHUNKS_MAX, LIGHT, SLACK, SLACK_MIN, slack
from p2pgrid.transfer.partner import REFUSALS_MAX
from p2pgrid.transfer.swarm import (
    Arrived,
    Ask,
    Completed,
    Extended,
    Held,
    Joined,
    Left,
    Refused,
    Rejected,
    Shun,
    Swarm,
    Told,
    Urgent,
    Withdraw,
)

PEERS = [PeerId(name) for name in ("ann", "bob", "cyd", "dee", "eve", "fay")]
SEEDER = PeerId("seeder")


def bitmap(have, count):
    bits = sum(1 << i for i in set(have))
    return bits.to_bytes(-(-count // 8), "little")


class AnyHistory(RuleBasedStateMachine):
    """A model of what was said and asked, beside the swarm."""

    @initialize(data=st.data(), seed=st.integers(0, 2**16), count=st.integers(1, 48))
    def start(self, data, seed, count):
        self.lengths = [1000 + 37 * (i % 5) for i in range(count)]
        self.held = data.draw(st.sets(st.integers(0, count - 1)))
        self.swarm = Swarm(self.lengths, bitmap(self.held, count), random.Random(seed), me=PeerId("me"))
        self.now = 1000.0
        self.have: dict[PeerId, set[int]] = {}
        self.asked: dict[PeerId, list[int]] = {}
        self.withdrawn: list[tuple[PeerId, int]] = []
        self.refused: dict[tuple[PeerId, int], int] = {}
        self.shunned: set[PeerId] = set()
        self.urgent: set[int] = set()
        self.completed = 0
        self.proven: set[PeerId] = set()

    def step(self, event):
        for effect in self.swarm.step(event, self.now):
            match effect:
                case Ask(peer, wanted, urgent):
                    assert wanted
                    assert not urgent or self.urgent >= set(wanted)
                    assert peer in self.have, "only who is here is asked"
                    assert peer not in self.shunned
                    for index in wanted:
                        assert index not in self.held
                        assert index in self.have[peer]
                        if urgent and index in self.asked[peer]:
                            self.asked[peer].remove(index)  # asked for before, but urgent now
                        assert index not in self.asked[peer], "asked once of one peer"
                        assert self.refused.get((peer, index), 0) < REFUSALS_MAX
                        self.asked[peer].append(index)
                    light = sum(self.lengths[i] for i in self.asked[peer]) <= LIGHT + max(self.lengths)
                    few = CHUNKS_MAX if peer in self.proven else 1
                    assert len(self.asked[peer]) <= few or (peer in self.proven and light)
                case Withdraw(peer, index):
                    self.asked[peer].remove(index)
                    self.withdrawn.append((peer, index))
                case Shun(peer, why):
                    assert why
                    assert peer not in self.shunned
                    assert not self.asked.get(peer), "a shunned peer's asks were withdrawn"
                    self.shunned.add(peer)
                    self.forget(peer)
                case Completed():
                    self.completed += 1
        self.swarm.check()
        assert self.completed == (len(self.held) == len(self.lengths))
        assert self.swarm.complete == (self.swarm.missing == 0)
        if not self.completed:
            assert self.swarm.deadline > self.now or self.swarm.deadline == math.inf
            outstanding = any(self.asked.values())
            assert not outstanding or self.swarm.deadline < math.inf
            present = set().union(*self.have.values()) if self.have else set()
            gone = set(self.swarm.unavailable())
            assert gone >= set(range(len(self.lengths))) - self.held - present

    def forget(self, peer):
        self.proven.discard(peer)
        self.have.pop(peer, None)
        self.asked.pop(peer, None)
        for key in [key for key in self.refused if key[0] == peer]:
            del self.refused[key]

    @rule(data=st.data(), peer=st.sampled_from(PEERS), near=st.booleans())
    def joins(self, data, peer, near):
        have = data.draw(st.sets(st.integers(0, len(self.lengths) - 1)))
        if peer not in self.shunned:
            for index in have.copy():
                if self.refused.get((peer, index), 0) >= REFUSALS_MAX:
                    have.discard(index)
            self.have[peer] = have
            self.asked.setdefault(peer, [])
        self.step(Joined(peer, bitmap(have, len(self.lengths)), near))

    @rule(data=st.data(), peer=st.sampled_from(PEERS))
    def tells(self, data, peer):
        told = data.draw(st.lists(st.integers(-1, len(self.lengths)), max_size=8))
        if peer in self.have:
            self.have[peer] |= {i for i in told if self.refused.get((peer, i), 0) < REFUSALS_MAX}
        self.step(Told(peer, told))

    @precondition(lambda self: len(self.lengths) < 60)
    @rule(more=st.integers(0, 5))
    def grows(self, more):
        """Its drafts tell of more chunks; nobody has said yet who has them."""
        fresh = [2000 + i for i in range(more)]
        self.have = {peer: {i for i in have if i < len(self.lengths)} for peer, have in self.have.items()}
        self.lengths = [*self.lengths, *fresh]
        self.completed = self.completed if not more else 0
        self.step(Extended(fresh))

    @rule(peer=st.sampled_from(PEERS))
    def leaves(self, peer):
        self.forget(peer)
        self.step(Left(peer))

    def some_ask(self, data):
        return data.draw(st.sampled_from([(p, i) for p, asked in self.asked.items() for i in asked]))

    @precondition(lambda self: any(self.asked.values()))
    @rule(data=st.data())
    def brings(self, data):
        peer, index = self.some_ask(data)
        self.asked[peer].remove(index)
        self.proven.add(peer)
        self.held.add(index)
        self.step(Arrived(peer, index, self.lengths[index]))

    @precondition(lambda self: self.withdrawn)
    @rule(data=st.data())
    def brings_what_was_withdrawn(self, data):
        peer, index = data.draw(st.sampled_from(self.withdrawn))
        if index in self.asked.get(peer, ()):
            self.asked[peer].remove(index)
        self.proven.add(peer)
        self.held.add(index)
        self.step(Arrived(peer, index, self.lengths[index]))

    @precondition(lambda self: any(self.asked.values()))
    @rule(data=st.data())
    def brings_garbage(self, data):
        peer, index = self.some_ask(data)
        self.step(Rejected(peer, index))
        assert peer in self.shunned

    @precondition(lambda self: any(self.asked.values()))
    @rule(data=st.data())
    def refuses(self, data):
        peer, index = self.some_ask(data)
        self.asked[peer].remove(index)
        times = self.refused[peer, index] = self.refused.get((peer, index), 0) + 1
        if times >= REFUSALS_MAX:
            self.have[peer].discard(index)
        self.step(Refused(peer, index))

    @rule(data=st.data())
    def comes_another_way(self, data):
        held = data.draw(st.lists(st.integers(0, len(self.lengths) - 1), max_size=4))
        self.held |= set(held)
        self.step(Held(held))

    @rule(data=st.data())
    def needs_some_at_once(self, data):
        needed = data.draw(st.lists(st.integers(-1, len(self.lengths)), max_size=3))
        self.urgent |= set(needed)
        self.step(Urgent(needed))
        for index in (self.urgent - self.held) & set(range(len(self.lengths))):
            able = [self.swarm._book.peers[p] for p, have in self.have.items() if index in have]
            answering = [p for p in able if p.pace.rate and not p.stalls]
            assert not answering or any(index in self.asked[p] for p in self.have)

    @rule()
    def waits_for_the_deadline(self):
        if self.swarm.deadline < math.inf:
            self.now = max(self.now, self.swarm.deadline)
        self.step(Tick())

    @rule(seconds=st.floats(0.001, 100))
    def waits(self, seconds):
        self.now += seconds
        self.step(Tick())

    def teardown(self):
        """One honest seeder that answers everything, and the rest silent for good: it finishes."""
        if not hasattr(self, "swarm"):
            return
        count = len(self.lengths)
        self.have[SEEDER], self.asked[SEEDER] = set(range(count)), []
        started = self.now
        self.step(Joined(SEEDER, bitmap(range(count), count)))
        for _ in range(20 * count + 200):
            if self.swarm.complete:
                break
            if self.asked[SEEDER]:
                self.now += 0.01
                index = self.asked[SEEDER].pop(0)
                self.proven.add(SEEDER)
                self.held.add(index)
                self.step(Arrived(SEEDER, index, self.lengths[index]))
            else:
                assert self.swarm.deadline < math.inf, "it would wait for ever"
                self.now = self.swarm.deadline
                self.step(Tick())
        assert self.swarm.complete
        assert self.completed == 1
        assert self.now - started < 120, "and soon"


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


# --- what a reader should know by example ----------------------------------------------


def swarm_of(count, have=(), size=1000, seed=1):
    return Swarm([size] * count, bitmap(have, count), random.Random(seed))


def asks(effects):
    return [(e.peer, i) for e in effects if isinstance(e, Ask) for i in e.indices]


def test_rarest_first():
    swarm = swarm_of(40)
    for name, have in (("ann", range(36)), ("bob", range(20)), ("cyd", range(20))):
        swarm.step(Joined(name, bitmap(have, 40)), 0.0)
    queue = asks(swarm.step(Joined("seeder", bitmap(range(40), 40)), 0.0))
    order = []
    while queue:
        order.append(queue.pop(0)[1])
        now = 0.001 * len(order)
        queue += [
            ask for ask in asks(swarm.step(Arrived("seeder", order[-1], 1000), now)) if ask[0] == "seeder"
        ]
    assert set(order[:4]) == {36, 37, 38, 39}, "what only the seeder has"
    assert set(order[4:20]) <= set(range(20, 36)), "then what one more has"
    assert set(order[20:]) <= set(range(20)) | set(range(20, 36))


def test_a_complete_swarm_says_so_once():
    swarm = swarm_of(3, have=[0, 1, 2])
    assert swarm.complete
    assert swarm.deadline < 0, "a driver comes by at once"
    assert swarm.step(Tick(), 0.0) == [Completed()]
    assert swarm.deadline == math.inf
    assert swarm.step(Tick(), 1.0) == []


def test_nothing_at_all_is_complete():
    swarm = Swarm([], b"", random.Random(1))
    assert swarm.step(Joined("ann", b""), 0.0) == [Completed()]
    assert list(swarm.unavailable()) == []


def test_a_swarm_of_nothing_yet_asks_as_soon_as_there_is_something_and_says_each_time_that_it_is_whole():
    swarm = Swarm([], b"", random.Random(1))
    assert swarm.step(Joined("ann", b"\xff"), 0.0) == [Completed()]  # it knows more than we do
    assert swarm.step(Extended([1000, 1000]), 0.1) == []
    assert list(swarm.unavailable()) == [0, 1]
    ((_, first),) = asks(swarm.step(Joined("ann", b"\xff"), 0.1))
    ((_, second),) = asks(swarm.step(Arrived("ann", first, 1000), 0.2))
    assert Completed() in swarm.step(Arrived("ann", second, 1000), 0.3)
    assert swarm.step(Arrived("ann", 7, 1000), 0.3) == [], "nobody asked for it"
    swarm.step(Extended([1000]), 0.4)
    assert asks(swarm.step(Joined("ann", b"\xff"), 0.4)) == [("ann", 2)]
    swarm.check()


def test_garbage_costs_one_chunk_for_nobody_is_asked_for_two_before_one_was_good():
    swarm = swarm_of(4)
    mine = asks(swarm.step(Joined("liar", bitmap(range(4), 4)), 0.0))
    assert len(mine) == 1
    swarm.step(Joined("ann", bitmap(range(4), 4)), 0.0)
    effects = swarm.step(Rejected("liar", mine[0][1]), 0.1)
    assert Withdraw("liar", mine[0][1]) in effects
    assert Shun("liar", "sent bytes that are not the chunk's") in effects
    assert asks(swarm.step(Joined("liar", bitmap(range(4), 4)), 0.2)) == []
    assert asks(swarm.step(Told("liar", [0]), 0.2)) == []


def test_a_liar_found_late_has_its_asks_taken_over():
    swarm = swarm_of(3)
    (first,) = asks(swarm.step(Joined("liar", bitmap(range(3), 3)), 0.0))
    (second,) = asks(swarm.step(Joined("ann", bitmap(range(3), 3)), 0.0))
    asks(swarm.step(Arrived("liar", first[1], 1000), 0.1))
    assert swarm.missing == 2
    (third,) = {0, 1, 2} - {first[1], second[1]}
    assert asks(swarm.step(Arrived("ann", second[1], 1000), 0.2)) == []
    effects = swarm.step(Rejected("liar", third), 0.3)
    assert effects == [Withdraw("liar", third), Shun("liar", effects[1].why), Ask("ann", (third,))]


def test_of_small_chunks_many_are_outstanding():
    """An update's have a kilobyte each: 64 of them are no window."""
    swarm = swarm_of(2048, size=1000)
    queue = asks(swarm.step(Joined("ann", bitmap(range(2048), 2048)), 0.0))
    now, rounds = 0.0, 0
    while queue:
        now += 0.05  # a round trip
        rounds += 1
        came, queue = queue, []
        for _, index in came:
            queue += asks(swarm.step(Arrived("ann", index, 1000), now))
    assert swarm.complete
    assert rounds < 20  # 64 at a time they were 34
    swarm.check()


def test_the_window_grows_with_the_pace():
    swarm = swarm_of(512, size=64 << 10)
    queue = asks(swarm.step(Joined("ann", bitmap(range(512), 512)), 0.0))
    assert len(queue) == 1
    now, widest = 0.0, 0
    while queue:
        now += (64 << 10) / 100e6  # 100 MB/s
        _, index = queue.pop(0)
        queue += asks(swarm.step(Arrived("ann", index, 64 << 10), now))
        widest = max(widest, len(queue))
    assert swarm.complete
    assert widest == CHUNKS_MAX


def test_near_the_end_every_peer_is_asked_for_little():
    """Whoever turns out to be slower than it was leaves something for the others."""
    swarm, size, now = swarm_of(256, size=64 << 10), 64 << 10, 0.0
    queues: dict[str, list[int]] = {"ann": [], "bob": []}

    def take_in(effects: list) -> None:
        for peer, index in asks(effects):
            queues[peer].append(index)

    for peer in queues:
        take_in(swarm.step(Joined(peer, bitmap(range(256), 256)), now))
    longest: dict[int, int] = {}
    while any(queues.values()):
        now += size / 5e6  # each brings 5 MB/s
        for peer, queue in queues.items():
            if queue:
                take_in(swarm.step(Arrived(peer, queue.pop(0), size), now))
        longest[swarm.missing] = max(map(len, queues.values()))
    assert swarm.complete
    assert max(longest.values()) > 25
    assert max(count for left, count in longest.items() if 16 < left < 24) < 10


@given(missing=st.integers(0, 1 << 40), more=st.integers(0, 1 << 40), rate=st.floats(0, 1e10))
def test_slack_shrinks_with_what_is_missing_and_never_to_nothing(missing: int, more: int, rate: float):
    assert SLACK_MIN <= slack(missing, rate) <= slack(missing + more, rate) <= SLACK


def test_a_silent_peer_is_left_for_an_answering_one():
    swarm = swarm_of(1)
    assert asks(swarm.step(Joined("mute", bitmap([0], 1)), 0.0)) == [("mute", 0)]
    assert asks(swarm.step(Joined("ann", bitmap([0], 1)), 1.0)) == []
    seen = []
    while (now := swarm.deadline) <= 30.0:
        seen += [(now, effect) for effect in swarm.step(Tick(), now)]
    (asked_at, asked), (left_at, left) = seen
    assert asked_at < 3.0, "a second is asked for it when it takes longer than chunks do"
    assert asked == Ask("ann", (0,))
    assert left_at == 30.0, "its patience, while nothing was measured"
    assert left == Withdraw("mute", 0)


def test_a_peer_silent_again_and_again_is_shunned_if_it_is_not_needed():
    swarm = swarm_of(1000)
    swarm.step(Joined("mute", bitmap(range(1000), 1000)), 0.0)
    queue = asks(swarm.step(Joined("ann", bitmap(range(1000), 1000)), 0.0))
    asked_of_mute, now = 0, 0.0
    while "mute" not in swarm._shunned:
        now += 1.0
        effects = swarm.step(Tick(), now) + swarm.step(Arrived("ann", queue.pop(0)[1], 1000), now)
        queue += [ask for ask in asks(effects) if ask[0] == "ann"]
        asked_of_mute += sum(ask[0] == "mute" for ask in asks(effects))
        assert sum(i == queue[0][1] for _, i in queue) == 1
    assert asked_of_mute == 4, "it was tried with one chunk after each rest"
    assert now < 180


def test_the_only_one_to_have_it_is_waited_for():
    swarm = swarm_of(2)
    ((_, first),) = asks(swarm.step(Joined("seeder", bitmap([0, 1], 2)), 0.0))
    now = 0.0
    for _ in range(200):
        now = swarm.deadline
        assert swarm.step(Tick(), now) == [], "neither withdrawn nor shunned: nobody else has it"
    assert now > 600
    assert list(swarm.unavailable()) == [0, 1], "but it does not answer, and that is said"
    assert swarm.step(Arrived("seeder", first, 1000), now + 1) == [Ask("seeder", (1 - first,))]
    assert list(swarm.unavailable()) == []
    assert swarm.step(Arrived("seeder", 1 - first, 1000), now + 2) == [Completed()]


def test_the_last_chunk_is_asked_of_an_idle_peer_when_it_is_overdue():
    swarm = swarm_of(3)
    ((_, slow),) = asks(swarm.step(Joined("slow", bitmap(range(3), 3)), 0.0))
    queue = asks(swarm.step(Joined("fast", bitmap(range(3), 3)), 0.0))
    now = 0.0
    while queue:
        now += 0.1
        queue += asks(swarm.step(Arrived("fast", queue.pop(0)[1], 1000), now))
    effects = []
    while not effects:
        now = swarm.deadline
        effects = swarm.step(Tick(), now)
    assert now < 3
    assert effects == [Ask("fast", (slow,))], "and slow may bring it as well"
    assert swarm.step(Arrived("fast", slow, 1000), now) == [Withdraw("slow", slow), Completed()]


def test_what_waits_behind_another_chunk_is_moved_to_an_idle_peer():
    count, size = 40, 100_000
    swarm = swarm_of(count, size=size)
    queue = asks(swarm.step(Joined("slow", bitmap(range(count), count)), 0.0))
    for now in (4.0, 8.0):  # 25 kB/s
        queue += asks(swarm.step(Arrived("slow", queue.pop(0)[1], size), now))
    assert len(queue) == 2
    fast = asks(swarm.step(Joined("fast", bitmap(range(count), count)), 8.0))
    now, moved, asked = 8.0, [], list(fast)
    while fast or not moved:
        now = now + 0.02 if fast else swarm.deadline
        assert now < 12.0
        effects = swarm.step(Arrived("fast", fast.pop(0)[1], size) if fast else Tick(), now)
        moved += [e.index for e in effects if isinstance(e, Withdraw) and e.peer == "slow"]
        fast += [ask for ask in asks(effects) if ask[0] == "fast"]
        asked += asks(effects)
    assert moved[0] == queue[1][1], (
        "what is on its way from there already is not moved, but may be asked twice"
    )
    assert ("fast", moved[0]) in asked


def test_a_newcomer_is_tried_with_a_chunk_that_waits_elsewhere():
    """The seeder holds back what a neighbour has; nothing is wanted, but the neighbour may be better."""
    count, size = 12, 1000
    swarm = swarm_of(count, size=size)
    queue = asks(swarm.step(Joined("seeder", bitmap(range(count), count)), 0.0))
    for now in (0.01, 0.02):
        queue += asks(swarm.step(Arrived("seeder", queue.pop(0)[1], size), now))
    assert len(queue) == 10, "all that is missing is asked of the seeder"
    assert not asks(swarm.step(Joined("new", bitmap(range(count), count)), 0.03))
    tried = []
    while not tried:
        now = swarm.deadline
        assert now < 0.5, "before the seeder sends it after all"
        tried = asks(swarm.step(Tick(), now))
    [(peer, index)] = tried
    assert peer == "new"
    effects = swarm.step(Arrived("new", index, size), now + 0.005)
    assert Withdraw("seeder", index) in effects
    while swarm.deadline < 0.5:
        effects += swarm.step(Tick(), swarm.deadline)
    assert len([ask for ask in asks(effects) if ask[0] == "new"]) > 3, "it is good: it is asked for more"


def test_unavailable_names_exactly_what_nobody_has():
    swarm = swarm_of(5000, have=[7])
    swarm.step(Joined("ann", bitmap(range(4999), 5000)), 0.0)
    assert list(swarm.unavailable()) == [4999]
    swarm.step(Left("ann"), 0.0)
    assert list(swarm.unavailable()) == [i for i in range(5000) if i != 7]
    assert swarm.deadline == math.inf


@pytest.mark.parametrize("count", [1, 7, 8, 9, 2047, 2048, 2049])
def test_any_count_of_chunks_completes(count):
    swarm = swarm_of(count, have=[0] if count > 1 else [])
    queue = asks(swarm.step(Joined("ann", b"\xff" * 400), 0.0))
    now = 0.0
    while queue:
        now += 0.01
        queue += asks(swarm.step(Arrived("ann", queue.pop(0)[1], 1000), now))
    assert swarm.complete
