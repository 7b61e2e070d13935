"""Does a whole mesh of switches behave as one: each frame where it belongs, once, and nothing for ever?"""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.hole_punch.lan import packets as p
from p2pgrid.hole_punch.lan.segment import Segment, ip_of, mac_of
from p2pgrid.hole_punch.lan.switch import Switch, Way
from p2pgrid.ids import PeerId

TASKS = 9
SEGMENT = Segment("job1", tuple(range(TASKS)))
homes = st.lists(st.integers(0, 3), min_size=2, max_size=TASKS)
"""For each task, the node that runs it."""


class Mesh:
    """Nodes whose links carry everything at once."""

    def __init__(self, homes: list[int]) -> None:
        self.homes = dict(enumerate(homes))
        self.switches = {PeerId(f"n{home}"): Switch(SEGMENT) for home in homes}
        for place, home in self.homes.items():
            self.switches[PeerId(f"n{home}")].attach(place)
        self.told()

    def told(self) -> None:
        for me, switch in self.switches.items():
            others = {peer: set(other.guests) for peer, other in self.switches.items() if peer != me}
            switch.set_members(others)
            switch.check()

    def send(self, place: int, frame: bytes) -> list[int]:
        """The places that got it, in ascending order; a guest that got it twice is there twice."""
        me = PeerId(f"n{self.homes[place]}")
        got: list[int] = []
        under_way: list[tuple[PeerId, Way, bytes]] = [(me, place, struct.pack("!I", len(frame)) + frame)]
        for at, source, data in under_way:
            taken, deliveries = self.switches[at].forward(source, data, 0.0)
            assert taken == len(data)
            for way, piece in deliveries:
                if isinstance(way, int):
                    got.append(way)
                else:
                    under_way.append((way, at, piece))
            assert len(under_way) <= len(self.switches), "it goes round"
        return sorted(got)


@given(homes, st.data())
def test_a_frame_for_one_reaches_that_one(homes: list[int], data: st.DataObject) -> None:
    mesh = Mesh(homes)
    source, to = (data.draw(st.integers(0, TASKS - 1)) % len(homes) for _ in range(2))
    frame = p.ethernet(mac_of(to), mac_of(source), p.IPV4, b"hello")
    for _ in range(2):  # the second one goes by the table
        assert mesh.send(source, frame) == ([to] if to != source else [])


@given(homes, st.data())
def test_a_frame_for_all_reaches_all_others_once(homes: list[int], data: st.DataObject) -> None:
    mesh = Mesh(homes)
    source = data.draw(st.integers(0, TASKS - 1)) % len(homes)
    frame = p.ethernet(b"\x33\x33\x00\x00\x00\x01", mac_of(source), p.IPV6, b"hello")
    assert mesh.send(source, frame) == [place for place in range(len(homes)) if place != source]


@given(homes, st.data())
def test_a_question_for_an_address_goes_back_to_who_asked_and_nowhere_else(
    homes: list[int], data: st.DataObject
) -> None:
    mesh = Mesh(homes)
    source = data.draw(st.integers(0, TASKS - 1)) % len(homes)
    wanted = data.draw(st.integers(0, TASKS - 1))
    question = p.Arp(p.REQUEST, mac_of(source), ip_of(source), bytes(6), ip_of(wanted)).encode()
    got = mesh.send(source, p.ethernet(p.BROADCAST, mac_of(source), p.ARP, question))
    assert got == ([source] if wanted != source and wanted < len(homes) else [])


@given(homes, st.data())
def test_a_task_that_moves_is_found_again_once_all_are_told(homes: list[int], data: st.DataObject) -> None:
    mesh = Mesh(homes)
    moved, other = 0, 1
    frames = [p.ethernet(mac_of(b), mac_of(a), p.IPV4, b"") for a, b in ((other, moved), (moved, other))]
    assert mesh.send(other, frames[0]) == [moved]
    mesh.switches[PeerId(f"n{homes[moved]}")].detach(moved)
    target = data.draw(st.sampled_from(sorted(mesh.switches)))
    mesh.switches[target].attach(moved)
    mesh.homes[moved] = int(target[1:])
    mesh.told()
    assert mesh.send(other, frames[0]) == [moved]
    assert mesh.send(moved, frames[1]) == [other]
