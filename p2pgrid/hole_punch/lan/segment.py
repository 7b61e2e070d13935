"""Tell the address and the name of each guest of a LAN from its place in the job alone.

Pure.  Whoever knows the job knows all of them, so nobody has to be asked and no two guests collide:

    MAC    02:70:32 and the place, 3 bytes       locally administered (IEEE 802c)
    IPv4   10.77.A.B, A = 1 + place // 254, B = 1 + place % 254        mask 255.255.0.0
    name   task7.JOB.grid, by the task's index; the switch itself is lan.JOB.grid, 10.77.0.1

Segments never meet, so all of them use the same addresses.  No host is .0 or .255, which some
programs refuse although the mask allows them.
"""

from __future__ import annotations

from functools import cached_property

import attrs
from blake3 import blake3

from p2pgrid.errors import Misused

MAC_START = b"\x02\x70\x32"
SERVER_MAC = MAC_START + b"\xff\xff\xff"
"""What a guest takes for the machine that gives out addresses and names: the switch in its node."""
SERVER_IP = bytes((10, 77, 0, 1))
MASK = bytes((255, 255, 0, 0))
BROADCAST_IP = bytes((10, 77, 255, 255))
ROW = 254
PLACES_MAX = ROW * ROW

MTU = 1500
"""Bytes of a packet in a frame: what every guest can do whatever it was told, and what no driver splits."""
ETHERNET = 14
VLAN = 4
FRAME_MIN, FRAME_MAX = ETHERNET, ETHERNET + VLAN + MTU
"""Bytes of a frame, without its checksum, which no virtual card sends."""
NUMBER = 8
"""Bytes by which nodes tell segments apart."""


def mac_of(place: int) -> bytes:
    assert 0 <= place < PLACES_MAX
    return MAC_START + place.to_bytes(3, "big")


def place_of_mac(mac: bytes) -> int | None:
    """Whose it is; None where it is none of a guest's."""
    place = int.from_bytes(mac[3:], "big")
    return place if mac[:3] == MAC_START and place < PLACES_MAX else None


def ip_of(place: int) -> bytes:
    assert 0 <= place < PLACES_MAX
    return bytes((10, 77, 1 + place // ROW, 1 + place % ROW))


def place_of_ip(ip: bytes) -> int | None:
    """Whose it is; None where it is none of a guest's."""
    if ip[:2] != b"\x0a\x4d" or not (1 <= ip[2] <= ROW and 1 <= ip[3] <= ROW):
        return None
    return (ip[2] - 1) * ROW + ip[3] - 1


def text_of_mac(mac: bytes) -> str:
    return mac.hex(":")


def text_of_ip(ip: bytes) -> str:
    return ".".join(map(str, ip))


@attrs.frozen
class Segment:
    """The LAN of one group of guests: of a job, whose id names it.

    `indices` are those of its tasks, in the job's order; a guest's place is its task's place among them.
    """

    group: str
    indices: tuple[int, ...]

    def __attrs_post_init__(self) -> None:
        if len(self.indices) > PLACES_MAX:
            raise Misused(why=f"a LAN has room for {PLACES_MAX} tasks, and the job has {len(self.indices)}")

    @cached_property
    def number(self) -> bytes:
        """How nodes name the segment to each other."""
        return blake3(b"p2pgrid lan 1\0" + self.group.encode()).digest(NUMBER)

    @cached_property
    def domain(self) -> str:
        return f"{self.group}.grid".lower()

    @cached_property
    def _places(self) -> dict[int, int]:
        return {index: place for place, index in enumerate(self.indices)}

    def place(self, index: int) -> int | None:
        """Of the task with this index."""
        return self._places.get(index)

    def host(self, place: int) -> str:
        """The first label of a guest's name."""
        return f"task{self.indices[place]}"

    def address(self, name: str) -> bytes | None:
        """The IPv4 address of a name, whole or its first label; None where there is none such."""
        label = name.lower().removesuffix("." + self.domain)
        if label == "lan":
            return SERVER_IP
        digits = label.removeprefix("task")
        if label == digits or not (digits.isascii() and digits.isdigit() and len(digits) <= 10):
            return None
        place = self.place(int(digits)) if digits == str(int(digits)) else None
        return None if place is None else ip_of(place)

    def name(self, ip: bytes) -> str | None:
        """The whole name of an address."""
        if ip == SERVER_IP:
            return f"lan.{self.domain}"
        place = place_of_ip(ip)
        return None if place is None or place >= len(self.indices) else f"{self.host(place)}.{self.domain}"
