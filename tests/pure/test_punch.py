"""Do two machines that punch come to dial at the same moment, give up in time, and never chatter?"""

from __future__ import annotations

import heapq
import ipaddress
import itertools
import math
import random
import re
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.nat import (
    Candidate,
    Hope,
    Mapping,
    Source,
    Stance,
    hope,
    mapping_of,
    stance,
    targets,
)
from p2pgrid.hole_punch.punch import (
    COURTESY,
    PATIENCE,
    SPACING,
    STABLE,
    WINDOW,
    Changed,
    Dial,
    Ended,
    Event,
    Expect,
    Forget,
    Gone,
    Heard,
    Punch,
    Relayed,
    Round,
    Settled,
    Tell,
)
from p2pgrid.hole_punch.punch_messages import Answer, Decline, Go, Message, Offer, decode, encode
from p2pgrid.ids import PeerId
from p2pgrid.machine import Tick

PAGE = Path(__file__).parents[2] / "docs" / "protocols" / "punch.md"

hosts = st.one_of(
    st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(lambda ip: str(ip).partition("%")[0])
)
candidates = st.builds(Candidate, st.sampled_from(Source), st.tuples(hosts, st.integers(1, 65535)))
stances = st.builds(Stance, st.sampled_from(Mapping), st.lists(candidates, max_size=16).map(tuple))
tokens = st.binary(min_size=16, max_size=16)
any_message = st.one_of(
    st.builds(Offer, tokens, stances),
    st.builds(Answer, tokens, tokens, stances),
    st.builds(Go, tokens),
    st.builds(Decline, tokens, st.text(max_size=50)),
)


def home(n: int, mapping: Mapping = Mapping.INDEPENDENT) -> Stance:
    """A node behind the NAT 203.0.113.N."""
    local = Candidate(Source.LOCAL, (f"192.168.{n}.2", 4001))
    return Stance(mapping, (Candidate(Source.OBSERVED, (f"203.0.113.{n}", 4001)), local))


# --- messages -----------------------------------------------------------------------------


@given(any_message)
def test_what_is_encoded_decodes_to_the_same(message: Message):
    assert decode(encode(message)) == message


@given(any_message, st.data())
def test_a_message_cut_or_lengthened_is_a_bad_frame_or_another_reason(message: Message, data: st.DataObject):
    body = encode(message)
    cut = data.draw(st.one_of(st.just(body + b"\0"), st.integers(1, len(body) - 1).map(lambda n: body[:n])))
    try:
        decoded = decode(cut)
    except BadFrame:
        return
    assert isinstance(decoded, Decline)


@given(st.integers(40, 47), st.binary(max_size=200))
def test_noise_is_only_ever_a_bad_frame(kind: int, noise: bytes):
    body = bytes([kind]) + noise
    try:
        message = decode(body)
    except BadFrame:
        return
    assert encode(message) == body


def test_a_reason_that_is_too_long_is_cut_between_characters():
    body = encode(Decline(bytes(16), "ä" * 300))
    assert len(body) <= 217
    assert decode(body) == Decline(bytes(16), "ä" * 100)


def test_the_page_holds_the_vectors():
    token, other = bytes(range(16)), bytes(range(16, 32))
    told = Stance(
        Mapping.INDEPENDENT,
        (
            Candidate(Source.OBSERVED, ("203.0.113.7", 34001)),
            Candidate(Source.LOCAL, ("2001:db8::7", 4001)),
            Candidate(Source.MAPPED, ("203.0.113.7", 4001)),
        ),
    )
    messages = {
        "Offer": Offer(token, told),
        "Answer": Answer(token, other, Stance(Mapping.DEPENDENT, told.candidates[:1])),
        "Go": Go(token),
        "Decline": Decline(token, "there is a direct path"),
    }
    vectors = dict(re.findall(r"^    (\w+) = ((?:[0-9a-f]{2} ?)+)$", PAGE.read_text(), re.M))
    assert vectors.keys() == messages.keys()
    for name, message in messages.items():
        assert bytes.fromhex(vectors[name]) == encode(message), encode(message).hex(" ")
        assert decode(bytes.fromhex(vectors[name])) == message


# --- where this node stands ---------------------------------------------------------------


def test_observers_that_disagree_have_a_symmetric_nat_before_them():
    one, other = ("203.0.113.7", 4001), ("203.0.113.7", 51234)
    assert mapping_of([one]) is Mapping.UNKNOWN
    assert mapping_of([one, one]) is Mapping.INDEPENDENT
    assert mapping_of([one, one, other]) is Mapping.DEPENDENT
    assert mapping_of([one, ("198.51.100.9", 4001)]) is Mapping.DEPENDENT  # a pool of addresses
    assert mapping_of([other], own=["203.0.113.7"]) is Mapping.INDEPENDENT  # no NAT at all
    assert mapping_of([one, ("192.168.1.2", 4001), ("2001:db8::7", 4001)]) is Mapping.UNKNOWN  # others' views


def test_a_node_tells_what_others_can_use():
    interfaces = ["127.0.0.1", "::1", "192.168.1.2", "fe80::1%eth0", "2001:db8::2"]
    seen = [("203.0.113.7", 4001), ("203.0.113.7", 4001)]
    told = stance([("0.0.0.0", 4001), ("::", 4001)], interfaces, seen, [("203.0.113.7", 5001)])
    assert told.mapping is Mapping.INDEPENDENT
    assert [(c.source, c.address) for c in told.candidates] == [
        (Source.LOCAL, ("2001:db8::2", 4001)),
        (Source.MAPPED, ("203.0.113.7", 5001)),
        (Source.OBSERVED, ("203.0.113.7", 4001)),
        (Source.LOCAL, ("192.168.1.2", 4001)),
    ]
    bound = stance([("192.168.1.2", 4001)], interfaces, seen, [])  # nowhere else
    assert bound.hosts(Source.LOCAL) == {"192.168.1.2"}
    assert not bound.ipv6


@given(stances, stances)
def test_theory_is_the_same_for_both(a: Stance, b: Stance):
    assert hope(a, b) is hope(b, a)


def test_theory_hopes_for_what_can_be():
    eim, symmetric = home(1), home(2, Mapping.DEPENDENT)
    assert hope(eim, home(3)) is Hope.GOOD
    assert hope(eim, symmetric) is Hope.FAINT
    assert hope(symmetric, home(3, Mapping.DEPENDENT)) is Hope.NONE
    mapped = attrs.evolve(symmetric, candidates=(Candidate(Source.MAPPED, ("203.0.113.2", 5001)),))
    assert hope(mapped, home(3, Mapping.DEPENDENT)) is Hope.GOOD
    six = Candidate(Source.LOCAL, ("2001:db8::2", 4001))
    dual = [attrs.evolve(home(n, Mapping.DEPENDENT), candidates=(six,)) for n in (1, 2)]
    assert hope(*dual) is Hope.GOOD


@given(stances, stances)
def test_what_is_dialled_is_the_others_and_never_our_own(own: Stance, theirs: Stance):
    chosen = targets(own, theirs)
    assert set(chosen) <= {c.address for c in theirs.candidates} - {c.address for c in own.candidates}
    assert len(set(chosen)) == len(chosen)
    assert {":" in host for host, _ in chosen} <= {":" in c.address[0] for c in own.candidates}
    for host, _ in chosen:
        ip = ipaddress.ip_address(host)
        assert not any((ip.is_loopback, ip.is_link_local, ip.is_multicast, ip.is_unspecified))


def test_addresses_at_home_are_dialled_by_neighbours_only():
    assert targets(home(1), home(2)) == (("203.0.113.2", 4001),)
    neighbour = attrs.evolve(
        home(1), candidates=(home(1).candidates[0], Candidate(Source.LOCAL, ("192.168.9.9", 4002)))
    )
    assert ("192.168.9.9", 4002) in targets(home(1), neighbour)  # one NAT
    here = attrs.evolve(
        home(2), candidates=(*home(2).candidates, Candidate(Source.LOCAL, ("192.168.1.9", 4002)))
    )
    assert ("192.168.1.9", 4002) in targets(home(1), here)  # one network, whatever is outside
    assert (
        targets(home(1), attrs.evolve(home(2), candidates=(Candidate(Source.LOCAL, ("127.0.0.1", 1)),))) == ()
    )


# --- two machines, a relay between, and what theory says of the NATs -----------------------


@attrs.define
class World:
    """Two machines whose messages take `delays` seconds; `works` says whether dialling does."""

    works: bool
    delays: tuple[float, float]
    rng: random.Random
    skew: float = 1000.0
    """The clocks of the two do not agree."""
    now: float = 0.0
    machines: list[Punch] = attrs.field(factory=list)
    queue: list[tuple[float, int, int, Event | Round]] = attrs.field(factory=list)
    order: itertools.count[int] = attrs.field(factory=itertools.count)
    said: list[tuple[float, int, Message]] = attrs.field(factory=list)
    dials: list[tuple[float, int, Round]] = attrs.field(factory=list)
    forgotten: set[bytes] = attrs.field(factory=set)
    settled: float = math.inf

    def __attrs_post_init__(self) -> None:
        for n, name in enumerate("ab"):
            peer = PeerId("ba"[n])
            self.machines.append(Punch(PeerId(name), peer, home(n + 1), self.rng.randbytes))

    def after(self, seconds: float, who: int, what: Event | Round) -> None:
        heapq.heappush(self.queue, (self.now + seconds, next(self.order), who, what))

    def clock(self, who: int) -> float:
        return self.now + who * self.skew

    def step(self, who: int, event: Event) -> None:
        machine = self.machines[who]
        for effect in machine.step(event, self.clock(who)):
            match effect:
                case Tell(message):
                    self.said.append((self.now, who, message))
                    self.after(self.delays[who], 1 - who, Heard(decode(encode(message))))
                case Dial(dialled, wait):
                    self.after(wait, who, dialled)
                case Expect():
                    pass
                case Forget(token):
                    self.forgotten.add(token)
        machine.check()

    def dial(self, who: int, dialled: Round) -> None:
        if dialled.ours in self.forgotten:
            return
        self.dials.append((self.now, who, dialled))
        other = [
            d for t, w, d in self.dials if w != who and d.theirs == dialled.ours and self.now - t < WINDOW
        ]
        if other and self.works:
            for n, each in ((who, dialled), (1 - who, other[0])):
                self.after(0.0, n, Ended(each.ours, True))
                self.after(0.0, n, Settled())
            self.settled = self.now
        else:
            self.after(WINDOW, who, Ended(dialled.ours, False))

    def run(self, until: float) -> None:
        while True:
            deadlines = [m.deadline - who * self.skew for who, m in enumerate(self.machines)]
            soonest = min(deadlines)
            if self.queue and self.queue[0][0] <= soonest:
                if self.queue[0][0] > until:
                    break
                self.now, _, who, what = heapq.heappop(self.queue)
                if isinstance(what, Round):
                    self.dial(who, what)
                else:
                    self.step(who, what)
            elif soonest <= until:
                self.now = max(self.now, soonest)
                who = deadlines.index(soonest)
                before = self.machines[who].deadline
                self.step(who, Tick())
                assert self.machines[who].deadline > before, "a deadline that does not move"
            else:
                break
        self.now = until


seconds = st.floats(0.0, 1.0)
delays = st.tuples(seconds, seconds)


@given(delays, seconds, seconds, st.booleans(), st.integers(0, 2**32).map(random.Random))
def test_a_way_that_works_is_found_at_once_whoever_begins(
    delays: tuple[float, float], first: float, second: float, both: bool, rng: random.Random
):
    world = World(True, delays, rng)
    world.after(first, 0, Relayed())
    world.after(first + second if both else first, 1, Relayed())
    world.run(60.0)
    round_trip = sum(delays)
    assert world.settled <= first + max(second, 0.0) + COURTESY + 2 * round_trip + PATIENCE + SPACING
    times = [t for t, _, d in world.dials]
    assert len(times) == 2
    assert abs(times[0] - times[1]) <= abs(delays[0] - delays[1]) / 2 + 1e-6  # as far as the ways differ
    assert not [said for said in world.said if said[0] > world.settled + round_trip + 1]


@given(delays, st.integers(0, 2**32).map(random.Random))
def test_a_way_that_does_not_work_is_tried_ever_more_rarely(delays: tuple[float, float], rng: random.Random):
    world = World(False, delays, rng)
    for who in (0, 1):
        world.after(0.0, who, Relayed())
    world.run(24 * 3600.0)
    assert 5 <= len(world.dials) / 2 <= 40
    assert len(world.said) <= 160
    last = max(t for t, *_ in world.dials)
    assert last > 20 * 3600.0  # it is never given up


def test_what_theory_rules_out_is_tried_once_an_hour():
    world = World(False, (0.05, 0.05), random.Random(1))
    for who in (0, 1):
        world.step(who, Changed(home(who + 1, Mapping.DEPENDENT)))
        world.step(who, Relayed())
    world.run(3500.0)
    assert len(world.dials) == 2
    assert "symmetric" in world.machines[0].outlook
    world.run(7300.0)
    assert len(world.dials) >= 4


def test_a_change_of_network_begins_anew_at_once():
    world = World(False, (0.05, 0.05), random.Random(1))
    for who in (0, 1):
        world.after(0.0, who, Relayed())
    world.run(5000.0)
    tried = len(world.dials)
    world.works = True
    world.run(5000.0 + 1.0)
    assert len(world.dials) == tried
    world.step(1, Changed(home(7)))
    world.run(5003.0)
    assert world.settled < 5000.0 + 1.0 + COURTESY + 0.3
    dialled = {address for t, who, d in world.dials if who == 0 and t > 5000.0 for address in d.targets}
    assert dialled == {("203.0.113.7", 4001)}


def test_an_attempt_of_another_network_is_given_up_but_not_for_one_more_address():
    punch = Punch(PeerId("a"), PeerId("b"), home(1), random.Random(1).randbytes)
    punch.step(Relayed(), 0.0)
    (tell,) = punch.step(Tick(), 0.0)
    assert isinstance(tell, Tell)
    assert isinstance(tell.message, Offer)
    *_, dial = punch.step(Heard(Answer(tell.message.token, bytes(16), home(2))), 0.1)
    assert isinstance(dial, Dial)
    six = Candidate(Source.LOCAL, ("2001:db8::2", 4001))
    more = attrs.evolve(home(1), candidates=(*home(1).candidates, six))
    assert punch.step(Changed(more), 0.2) == []
    assert punch.step(Changed(home(3)), 0.3) == [Forget(dial.round.ours)]
    assert punch.deadline == 0.3


def test_ports_that_change_behind_a_symmetric_nat_are_no_change():
    punch = Punch(PeerId("a"), PeerId("b"), home(1, Mapping.DEPENDENT), random.Random(1).randbytes)
    punch.step(Relayed(), 0.0)
    assert punch.step(Tick(), 0.0)
    punch.step(Tick(), PATIENCE)
    waits = punch.deadline
    other = attrs.evolve(home(1, Mapping.DEPENDENT), candidates=tuple(
        attrs.evolve(c, address=(c.address[0], 5555)) for c in home(1).candidates))  # fmt: skip
    punch.step(Changed(other), PATIENCE + 1)
    assert punch.deadline == waits
    punch.step(Changed(other, anew=True), PATIENCE + 1)  # the computer has slept: who knows
    assert punch.deadline == PATIENCE + 1


def test_a_path_that_does_not_last_is_a_failure_and_one_that_does_is_forgiven():
    punch = Punch(PeerId("a"), PeerId("b"), home(1), random.Random(1).randbytes)
    at = 0.0
    pauses = []
    for _ in range(3):
        punch.step(Relayed(), at)
        pauses.append(punch.deadline - at)
        punch.step(Settled(), at + 1)
        at += 5
    assert pauses[0] == 0 < pauses[1] < pauses[2]
    punch.step(Relayed(), at + STABLE)
    assert punch.deadline == at + STABLE
    punch.step(Settled(), at + STABLE + 1)
    punch.step(Gone(), at + STABLE + 2)  # nobody needed it any more
    punch.step(Relayed(), at + STABLE + 3)
    assert punch.deadline == at + STABLE + 3


def test_a_link_that_is_gone_is_no_failure():
    punch = Punch(PeerId("a"), PeerId("b"), home(1), random.Random(1).randbytes)
    for at in (0.0, 10.0, 20.0):
        punch.step(Relayed(), at)
        assert punch.deadline == at
        assert punch.step(Tick(), at)
        assert punch.step(Gone(), at + 1) == []
        assert punch.deadline == math.inf


def test_who_has_a_direct_path_says_so():
    punch = Punch(PeerId("a"), PeerId("b"), home(1), random.Random(1).randbytes)
    assert punch.step(Heard(Offer(bytes(16), home(2))), 0.0) == [
        Tell(Decline(bytes(16), "there is a direct path"))
    ]


def test_offers_in_a_row_are_answered_in_measure():
    punch = Punch(PeerId("a"), PeerId("b"), home(1), random.Random(1).randbytes)
    punch.step(Relayed(), 0.0)
    dials = 0
    for n in range(100):
        effects = punch.step(Heard(Offer(n.to_bytes(16, "big"), home(2))), 0.01 * n)
        dials += sum(isinstance(e, Expect) for e in effects)
        punch.check()
    assert dials == 1


def test_no_kind_of_address_in_common_is_said_and_not_dialled():
    six = Stance(Mapping.UNKNOWN, (Candidate(Source.LOCAL, ("2001:db8::7", 4001)),))
    world = World(False, (0.05, 0.05), random.Random(1))
    world.step(1, Changed(six))
    for who in (0, 1):
        world.step(who, Relayed())
    world.run(3000.0)
    assert not world.dials
    assert any(isinstance(m, Decline) and "in common" in m.why for _, _, m in world.said)
    assert len(world.said) < 40


events = st.one_of(
    st.just(Relayed()), st.just(Settled()), st.just(Gone()), st.just(Tick()),
    st.builds(Changed, st.sampled_from([home(1), home(3), home(1, Mapping.DEPENDENT)]), st.booleans()),
    st.builds(Heard, any_message),
    st.builds(Ended, tokens, st.booleans()),
)  # fmt: skip


@given(st.lists(st.tuples(st.floats(0, 10), events), max_size=60), st.integers(0, 2**32).map(random.Random))
def test_no_history_breaks_it(history: list[tuple[float, Event]], rng: random.Random):
    """Whatever comes, each round is expected before it is dialled, and forgotten before the next."""
    punch, now = Punch(PeerId("a"), PeerId("b"), home(1), rng.randbytes), 0.0
    alive: set[bytes] = set()
    names: list[bytes] = []
    for wait, event in history:
        now += wait
        if isinstance(event, Heard) and names and not isinstance(event.message, Offer) and rng.random() < 0.8:
            last = names[-1]  # what is said is about what was offered
            changes = {"round": last} if hasattr(event.message, "round") else {}
            event = Heard(attrs.evolve(event.message, **changes))
        for effect in punch.step(event, now):
            match effect:
                case Tell(Offer(token, _)) | Tell(Answer(token, _, _)):
                    names.append(token)
                case Expect(expected):
                    assert not alive
                    assert expected.targets
                    alive.add(expected.ours)
                case Dial(dialled, after):
                    assert dialled.ours in alive
                    assert 0 <= after <= PATIENCE
                case Forget(token):
                    alive.remove(token)
        punch.check()
        assert punch.deadline > now or not isinstance(event, Tick)


def test_the_page_says_the_figures_of_the_code():
    page = PAGE.read_text()
    for figure in (f"{PATIENCE:g} s", f"{WINDOW:g} s", f"{COURTESY:g} s"):
        assert figure in page, figure


@pytest.mark.parametrize("size", [16, 17])
def test_a_stance_of_more_than_its_most_is_refused(size: int):
    many = tuple(Candidate(Source.LOCAL, ("10.0.0.1", n + 1)) for n in range(size))
    body = encode(Offer(bytes(16), Stance(Mapping.UNKNOWN, many)))
    if size == 16:
        assert decode(body)
    else:
        with pytest.raises(BadFrame):
            decode(body)
