"""Does the mapper end up with what the gateway grants, whatever was lost, refused or forged before?"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import struct

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.outside import is_outside
from p2pgrid.hole_punch.portmap import mapper, messages
from p2pgrid.hole_punch.portmap.mapper import (
    LIFETIME,
    PCP,
    PMP,
    REST_MAX,
    UPNP,
    Announced,
    Ask,
    AskUpnp,
    Heard,
    Left,
    Mapper,
    NobodyThere,
    Place,
    Placed,
    ReleaseUpnp,
    Tell,
    UpnpFailed,
    UpnpMapped,
    forgotten,
)
from p2pgrid.machine import Tick

HOME = Place("192.168.1.1", "192.168.1.7")
NONCE = bytes(range(12))
PORT = 4001


def packed(host: str) -> bytes:
    return ipaddress.IPv6Address(f"::ffff:{host}").packed


def pcp_answer(port: int, lifetime: int, epoch: int, host="11.3.0.1", result=0, nonce=NONCE, inner=PORT):
    head = struct.pack(">BBBBII12x", 2, 129, 0, result, lifetime, epoch)
    return head + struct.pack(">12sB3xHH16s", nonce, 6, inner, port, packed(host))


def pmp_address(epoch: int, host="11.3.0.1", result=0):
    return struct.pack(">BBHI4s", 0, 128, result, epoch, ipaddress.IPv4Address(host).packed)


def pmp_mapped(epoch: int, port: int, lifetime: int, result=0):
    return struct.pack(">BBHIHHI", 0, 130, result, epoch, PORT, port, lifetime)


@attrs.define
class Gateway:
    """A gateway that speaks some of the three, and can be restarted."""

    speaks: frozenset[str]
    host: str = "11.3.0.1"
    lifetime: int = LIFETIME
    born: float = 0.0
    taken: frozenset[int] = frozenset()
    """External ports that others have."""
    table: dict[int, float] = attrs.field(factory=dict)
    """When each of our external ports lapses."""

    def epoch(self, now: float) -> int:
        return int(now - self.born)

    def restart(self, now: float) -> None:
        self.born, self.table = now, {}

    def hear(self, effect, now: float):
        """What it answers, or nothing."""
        match effect:
            case Ask(data) if data[0] == 2:
                return self._hear_pcp(data, now)
            case Ask(data):
                return self._hear_pmp(data, now)
            case AskUpnp(external=port, lifetime=lifetime):
                if UPNP not in self.speaks:
                    return UpnpFailed("no such service")
                if port in self.taken:
                    return UpnpFailed("taken", conflict=True)
                self._grant(port, lifetime, now)
                return UpnpMapped((self.host, port), lifetime)
            case ReleaseUpnp(port):
                self.table.pop(port, None)
        return None

    def _hear_pcp(self, data: bytes, now: float):
        if PCP not in self.speaks:
            if PMP in self.speaks:
                return Heard(struct.pack(">BBHI", 0, 128, 1, self.epoch(now)))
            return NobodyThere()
        lifetime = struct.unpack_from(">I", data, 4)[0]
        nonce, _, inner, port = struct.unpack_from(">12sB3xHH", data, 24)
        assert data[8:24] == packed(HOME.own)
        if not lifetime:
            self.table.clear()
            return Heard(pcp_answer(port, 0, self.epoch(now), "0.0.0.0", 0, nonce, inner))
        granted = port + 1 if port in self.taken else port
        self._grant(granted, lifetime, now)
        return Heard(pcp_answer(granted, self.lifetime, self.epoch(now), self.host, 0, nonce, inner))

    def _hear_pmp(self, data: bytes, now: float):
        if PMP not in self.speaks:
            return NobodyThere()
        if data == b"\0\0":
            return Heard(pmp_address(self.epoch(now), self.host))
        _, _, _, _, port, lifetime = struct.unpack(">BBHHHI", data)
        if not lifetime:
            self.table.clear()
            return Heard(pmp_mapped(self.epoch(now), 0, 0))
        granted = port + 1 if port in self.taken else port
        self._grant(granted, lifetime, now)
        return Heard(pmp_mapped(self.epoch(now), granted, self.lifetime))

    def _grant(self, port: int, lifetime: int, now: float) -> None:
        self.table = {port: now + min(lifetime, self.lifetime)}


def talk(machine: Mapper, gateway: Gateway | None, effects, now: float) -> list[Tell]:
    """Have the gateway answer until both are silent."""
    told = []
    while effects:
        effect, *effects = effects
        machine.check()
        if isinstance(effect, Tell):
            told.append(effect)
        answer = gateway.hear(effect, now) if gateway is not None else None
        if answer is not None:
            effects = [*effects, *machine.step(answer, now)]
            machine.check()
    return told


def let_pass(machine: Mapper, gateway: Gateway | None, now: float, until: float) -> float:
    while machine.deadline <= until:
        now = max(now, machine.deadline)
        talk(machine, gateway, machine.step(Tick(), now), now)
        assert machine.deadline > now, "it would turn on the spot"
    return until


def placed(gateway: Gateway | None, now: float = 0.0, **settings) -> Mapper:
    machine = Mapper(PORT, NONCE, **settings)
    talk(machine, gateway, machine.step(Placed(HOME), now), now)
    return machine


@pytest.mark.parametrize("way", [PCP, PMP, UPNP])
def test_each_way_maps_renews_and_gives_back(way: str):
    gateway = Gateway(frozenset([way]))
    machine = placed(gateway)
    now = let_pass(machine, gateway, 0.0, 20.0)
    assert (machine.address, machine.how) == ((gateway.host, PORT), way)
    for _ in range(50):  # renewed long before it lapses
        now = let_pass(machine, gateway, now, now + LIFETIME / 4)
        assert gateway.table[PORT] > now + LIFETIME / 4
    assert machine.address == (gateway.host, PORT)
    talk(machine, gateway, machine.step(Left(), now), now)
    assert not gateway.table
    assert machine.deadline == math.inf


@pytest.mark.parametrize("way", [PCP, PMP, UPNP])
def test_a_port_that_somebody_else_has_is_not_taken_from_them(way: str):
    gateway = Gateway(frozenset([way]), taken=frozenset([PORT]))
    machine = placed(gateway)
    let_pass(machine, gateway, 0.0, 20.0)
    assert machine.address is not None
    assert machine.address[1] != PORT
    assert list(gateway.table) == [machine.address[1]]


@pytest.mark.parametrize("way", [PCP, PMP])
def test_a_restarted_gateway_is_asked_at_once(way: str):
    gateway = Gateway(frozenset([way]))
    machine = placed(gateway)
    now = let_pass(machine, gateway, 0.0, 100.0)
    announce = pmp_address if way == PMP else lambda epoch: struct.pack(">BBBBII12x", 2, 128, 0, 0, 0, epoch)
    assert not machine.step(Announced(announce(gateway.epoch(now))), now)  # nothing is new
    gateway.restart(now)
    talk(machine, gateway, machine.step(Announced(announce(0)), now), now)
    assert gateway.table == {PORT: now + LIFETIME}
    assert machine.address == (gateway.host, PORT)


def test_a_restarted_gateway_that_announces_nothing_is_noticed_at_the_next_renewal():
    gateway = Gateway(frozenset([PCP]))
    machine = placed(gateway)
    gateway.restart(1.0)
    let_pass(machine, gateway, 1.0, LIFETIME / 2 + 1)
    assert PORT in gateway.table


def test_a_new_external_address_is_told():
    gateway = Gateway(frozenset([PMP]))
    machine = placed(gateway)
    gateway.host = "11.3.0.2"
    told = talk(machine, gateway, machine.step(Announced(pmp_address(10, gateway.host)), 10.0), 10.0)
    assert told == [Tell(("11.3.0.2", PORT), PMP, "")]


@pytest.mark.parametrize("way", [PCP, PMP, UPNP])
@pytest.mark.parametrize("host", ["10.1.2.3", "100.64.0.9", "192.168.0.2", "0.0.0.0"])
def test_a_second_nat_is_said(way: str, host: str):
    gateway = Gateway(frozenset([way]), host=host)
    told: list[Tell] = []
    machine = Mapper(PORT, NONCE, ways=(way,))
    told += talk(machine, gateway, machine.step(Placed(HOME), 0.0), 0.0)
    assert machine.address is None
    assert host in told[-1].why
    assert "another NAT" in told[-1].why
    assert not gateway.table, "what is of no use is given back"


def test_nothing_is_asked_without_a_gateway_or_need():
    machine = Mapper(PORT, NONCE)
    assert machine.step(Placed(None), 0.0)[-1].why
    assert machine.step(Tick(), 100.0) == []
    [tell] = machine.step(Placed(Place("11.3.0.254", "11.3.0.1")), 200.0)
    assert "public" in tell.why
    assert machine.deadline == math.inf
    assert machine.step(Left(), 300.0) == []


def test_silence_is_told_soon_and_asked_again_ever_more_rarely():
    told = []
    machine = Mapper(PORT, NONCE, ways=(PCP, PMP))
    told += talk(machine, None, machine.step(Placed(HOME), 0.0), 0.0)
    asked, now = [], 0.0
    while now < 50_000:
        now = machine.deadline
        effects = machine.step(Tick(), now)
        asked += [now for e in effects if isinstance(e, Ask)]
        told += [e for e in effects if isinstance(e, Tell)]
        if told[-1].why and asked[-1] < 10:
            assert now < 4, "both ways have been tried within seconds"
    assert told[-1].why == "pcp: no answer; nat-pmp: no answer"
    assert len([at for at in asked if at > 10_000]) <= 6 * 40_000 / REST_MAX + 6


def test_another_network_forgets_everything():
    gateway = Gateway(frozenset([PCP]))
    machine = placed(gateway)
    elsewhere = Place("192.168.1.1", "192.168.1.9")
    effects = machine.step(Placed(elsewhere), 5.0)
    assert effects[0] == Tell(None, "", "")
    assert machine.address is None
    assert packed(elsewhere.own) in effects[1].data


def test_the_same_network_after_a_sleep_is_asked_at_once():
    gateway = Gateway(frozenset([PCP]))
    machine = placed(gateway)
    gateway.restart(5.0)
    assert talk(machine, gateway, machine.step(Placed(HOME), 5.0), 5.0) == []
    assert PORT in gateway.table


def test_a_gateway_that_is_away_for_a_moment_keeps_its_mapping_until_that_lapses():
    gateway = Gateway(frozenset([PCP]))
    machine = placed(gateway)
    away = Gateway(frozenset())  # answers that nobody is there
    now = let_pass(machine, away, 0.0, LIFETIME - 1)
    assert machine.address is not None
    now = let_pass(machine, away, now, LIFETIME + 1)
    assert machine.address is None
    let_pass(machine, gateway, now, now + REST_MAX)
    assert machine.address is not None


def test_forgers_get_nowhere():
    machine = placed(None)
    forged = [
        Heard(pcp_answer(PORT, 1200, 9, nonce=bytes(12))),
        Heard(pcp_answer(PORT, 1200, 9, inner=PORT + 1)),
        Heard(pmp_mapped(9, PORT, 1200)),
        UpnpMapped(("11.3.0.1", PORT), 1200),
        UpnpFailed("no"),
    ]
    for event in forged:
        assert machine.step(event, 0.1) == []
    assert machine.address is None


places = st.sampled_from([None, HOME, Place("192.168.1.1", "192.168.1.8"), Place("11.1.1.1", "11.1.1.2")])
hosts = st.sampled_from(["11.3.0.1", "11.3.0.2", "10.0.0.1", "100.64.1.1"])
results = st.sampled_from([0, 0, 0, 1, 2, 3, 8, 12, 13, 77])
epochs, lifetimes = st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 120, 1200, 2**32 - 1])
ports = st.integers(0, 65535)
answers = st.one_of(
    st.builds(pcp_answer, ports, lifetimes, epochs, hosts, results),
    st.builds(pmp_address, epochs, hosts, results),
    st.builds(pmp_mapped, epochs, ports, lifetimes, results),
    st.binary(max_size=80),
)
happenings = st.one_of(
    st.builds(Placed, places),
    st.builds(Heard, answers),
    st.builds(Announced, answers),
    st.just(NobodyThere()),
    st.builds(UpnpMapped, st.tuples(hosts, ports), lifetimes),
    st.builds(UpnpFailed, st.just("no"), st.booleans()),
    st.just(Tick()),
)


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.3, 20.0, 1300.0]), happenings), max_size=60),
    st.sampled_from([PCP, PMP, UPNP]),
)
def test_whatever_happened_a_good_gateway_maps(history, way: str):
    machine, now = Mapper(PORT, NONCE), 0.0
    for pause, event in history:
        now += pause
        while machine.deadline <= now:
            machine.step(Tick(), machine.deadline)
            machine.check()
        for effect in machine.step(event, now):
            if isinstance(effect, Tell):
                assert effect.address is None or is_outside(effect.address[0])
        machine.check()
        assert machine.deadline > now
    gateway = Gateway(frozenset([way]), born=now)
    talk(machine, gateway, machine.step(Placed(None), now), now)
    talk(machine, gateway, machine.step(Placed(HOME), now), now)
    now = let_pass(machine, gateway, now, now + 30)
    assert machine.how == way
    assert machine.address is not None
    assert list(gateway.table) == [machine.address[1]]
    talk(machine, gateway, machine.step(Left(), now), now)
    assert not gateway.table


@given(
    st.sampled_from([PCP, PMP, UPNP]),
    st.lists(st.tuples(st.floats(0.1, 2000), st.sampled_from(["", "restart", "away", "back"])), max_size=30),
    st.randoms(use_true_random=False),
    st.sampled_from([0.0, 0.3, 0.7]),
)
def test_through_loss_and_restarts_no_address_is_told_longer_than_it_was_granted(way, history, rng, loss):
    """And in the end, when nothing is lost any more, there is one."""
    gateway, now, granted = Gateway(frozenset([way])), 0.0, -math.inf
    machine, there = Mapper(PORT, NONCE), True

    def answer(effects) -> None:
        nonlocal granted
        while effects:
            effect, *effects = effects
            heard = gateway.hear(effect, now) if there and rng.random() >= loss else None
            if isinstance(effect, AskUpnp) and heard is None:
                heard = UpnpFailed("no answer")
            if heard is not None and (rng.random() >= loss or way == UPNP):
                effects = [*effects, *machine.step(heard, now)]
                if not isinstance(heard, UpnpFailed):
                    granted = now
            machine.check()

    def run(until: float) -> None:
        nonlocal now
        while machine.deadline <= until:
            now = max(now, machine.deadline)
            answer(machine.step(Tick(), now))
            assert machine.deadline > now
            assert machine.address is None or now < granted + LIFETIME
        now = until

    answer(machine.step(Placed(HOME), now))
    for pause, what in history:
        run(now + pause)
        there = {"away": False, "back": True}.get(what, there)
        if what == "restart":
            gateway.restart(now)
    there, loss = True, 0.0
    answer(machine.step(Placed(HOME), now))
    run(now + LIFETIME + 30)
    assert machine.how == way
    assert machine.address is not None
    assert list(gateway.table) == [machine.address[1]]


@given(st.floats(0, 1e6), st.floats(0, 1e5), st.integers(-1, 1))
def test_a_gateway_whose_clock_is_right_has_forgotten_nothing(uptime: float, pause: float, jitter: int):
    then = (int(uptime), 0.0)
    later = max(0, int(uptime + pause) + jitter)
    assert forgotten(then, later, pause) is (later < then[0] - 1)
    assert forgotten(then, 0, pause) or then[0] <= 1


@given(st.one_of(st.binary(max_size=1200), answers))
def test_noise_is_only_ever_a_bad_frame(data: bytes):
    with contextlib.suppress(BadFrame):
        messages.decode(data)


@given(ports, lifetimes, epochs, hosts)
def test_answers_are_read_as_written(port: int, lifetime: int, epoch: int, host: str):
    read = messages.decode(pcp_answer(port, lifetime, epoch, host))
    assert read == messages.PcpMapped(0, epoch, lifetime, NONCE, PORT, (host, port))
    assert messages.decode(pmp_address(epoch, host)) == messages.PmpAddress(0, epoch, host)
    assert messages.decode(pmp_mapped(epoch, port, lifetime)) == messages.PmpMapped(
        0, epoch, PORT, port, lifetime
    )


def test_requests_are_as_the_standards_draw_them():
    assert messages.pmp_map(0x1234, 0x5678, 7200).hex(" ") == "00 02 00 00 12 34 56 78 00 00 1c 20"
    wanted = (
        "02 01 00 00 00 00 1c 20 00 00 00 00 00 00 00 00 00 00 ff ff c0 a8 01 07"
        " 00 01 02 03 04 05 06 07 08 09 0a 0b 06 00 00 00 0f a1 00 00"
        " 00 00 00 00 00 00 00 00 00 00 ff ff 00 00 00 00"
    )
    assert messages.pcp_map(HOME.own, NONCE, PORT, ("0.0.0.0", 0), 7200).hex(" ") == wanted


def test_what_is_outside():
    for host in ("8.8.8.8", "203.0.113.7", "2001:db8::1", "::ffff:8.8.8.8"):
        assert is_outside(host), host
    for host in ("10.0.0.1", "100.64.0.1", "127.0.0.1", "0.0.0.0", "192.168.9.9", "172.31.0.1", "169.254.1.1",
                 "224.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fd00::1", "ff02::1",
                 "::ffff:10.0.0.1", "", "example.org", "1.2.3"):  # fmt: skip
        assert not is_outside(host), host


def test_the_story_of_upnp_ends_before_the_mapper_stops_waiting_for_it():
    from p2pgrid.hole_punch.portmap import upnp

    assert upnp.PATIENCE < mapper.UPNP_PATIENCE
