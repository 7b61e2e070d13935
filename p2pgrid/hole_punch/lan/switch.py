"""Decide where each frame of one segment goes: to a guest here, to a node that has one, or nowhere.

Pure.  A switch in every node, its own guests at its ports, and a link to each other node of the group:

    guest ──┐                       ┌── guest
    guest ──┤ switch ═══ link ═══ switch
                  ╚═════ link ═════ switch ── guest

Nothing is learned.  An ordinary switch learns from frames who is where, and floods what it does not
know yet; here the coordinator says at which node each task runs, and a guest's address follows from
its place in the job (`segment.py`).  So there is nothing to poison, to age or to flood, and who sends with
an address that is not his is not heard: a guest has one, a node those of the guests it runs.

Loops cannot be: what came over a link only ever goes to guests here (split horizon in a full mesh).
Broadcasts hardly cross links: who has an address (ARP), what is mine (DHCP) and where is a name (DNS) are
answered on the spot.  What is flooded all the same is counted against its sender, each copy (a token bucket).

A frame comes as `length u32, frame`, as QEMU writes it, and goes on as it came: many at a time, and those
in a row for the same place as one piece.  So most frames cost one look into a table.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Mapping

import attrs

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.lan import dhcp, names
from p2pgrid.hole_punch.lan import packets as p
from p2pgrid.hole_punch.lan.aliases import Aliases, is_alias
from p2pgrid.hole_punch.lan.segment import (
    FRAME_MAX,
    FRAME_MIN,
    SERVER_IP,
    SERVER_MAC,
    Segment,
    mac_of,
    place_of_ip,
    place_of_mac,
)
from p2pgrid.ids import PeerId


@attrs.frozen
class Up:
    """The node itself, where it is the other end of a connection of the guest at this place."""

    place: int


Way = int | PeerId | Up
"""A guest here, by its place; the node to which a link leads; or this one."""
Delivery = tuple[Way, bytes]
"""Frames, each after its length, that go one way."""

TCP = 6
LENGTH = struct.Struct("!I")
LENGTH_MAX = 4096 + 65536
"""Bytes that QEMU may write as one frame (its NET_BUFSIZE); with more, what comes is out of step."""
HEAD = p.ETHERNET.size
FLOOD_RATE, FLOOD_BURST = 500.0, 2000.0
"""Copies of flooded frames a second, by one guest: IPv6's and multicast's chatter, and no storm."""
ASK_RATE, ASK_BURST = 2000.0, 2000.0
"""Questions a second that one guest is answered: each costs as much as a hundred frames."""


@attrs.define
class Bucket:
    """What somebody may do a second, and at once (a token bucket)."""

    rate: float
    burst: float
    _left: float = attrs.field(init=False)
    _filled: float | None = None

    def __attrs_post_init__(self) -> None:
        self._left = self.burst

    def take(self, count: int, now: float) -> bool:
        """Whether `count` more are allowed; all of them or none."""
        if self._filled is not None:
            self._left = min(self.burst, self._left + self.rate * max(0.0, now - self._filled))
        self._filled = now
        if count > self._left:
            return False
        self._left -= count
        return True


class Switch:
    """The machine: `forward` is its door for frames; who is where is told by the others."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.aliases = Aliases()
        """What lies beyond the LAN."""
        self.counts: Counter[str] = Counter()
        """Frames that were passed on, by "forwarded" and "flooded"; "answered"; and dropped, by why."""
        self._guests: set[int] = set()
        """Places of the guests here."""
        self._nodes: dict[PeerId, frozenset[int]] = {}
        """Of the others, by where they run."""
        self._at: dict[int, PeerId] = {}
        self._known: dict[Way, dict[bytes, Way]] = {}
        """For each source: where frames with this head (to, from, kind) go."""
        self._floods: dict[int, Bucket] = {}
        self._asks: dict[int, Bucket] = {}

    # --- who is where -----------------------------------------------------------------------

    @property
    def guests(self) -> frozenset[int]:
        return frozenset(self._guests)

    @property
    def nodes(self) -> tuple[PeerId, ...]:
        """The others of the group; what they have at once is counted by their number of links."""
        return tuple(self._nodes)

    def attach(self, place: int) -> None:
        """A guest is plugged in here; wherever else it is said to be, it is no more."""
        assert 0 <= place < len(self.segment.indices)
        self._guests.add(place)
        self._settle()

    def detach(self, place: int) -> None:
        self._guests.discard(place)
        self._settle()

    def set_members(self, members: Mapping[PeerId, Iterable[int]]) -> None:
        """These nodes, and no others, run these tasks of the group."""
        room = len(self.segment.indices)
        self._nodes = {peer: frozenset(q for q in places if q < room) for peer, places in members.items()}
        self._settle()

    def _settle(self) -> None:
        self._at = {q: peer for peer, places in self._nodes.items() for q in places if q not in self._guests}
        self._known = {guest: {} for guest in self._guests}
        self._known |= {peer: {} for peer in self._nodes}
        for buckets in (self._floods, self._asks):
            for place in [q for q in buckets if q not in self._guests and q not in self._at]:
                del buckets[place]

    # --- frames -------------------------------------------------------------------------------

    def forward(self, source: Way, data: bytes, now: float) -> tuple[int, list[Delivery]]:
        """Take the frames in `data`: how many bytes of it were whole frames, and what goes where.

        Raises `BadFrame` where it is no row of frames at all.
        """
        known = self._known.get(source)
        if known is None:
            self.counts["from a stranger"] += 1
            return len(data), []
        out: list[Delivery] = []
        at = start = passed = 0
        way: Way | None = None
        end = len(data)
        while at + 4 <= end:
            (length,) = LENGTH.unpack_from(data, at)
            after = at + 4 + length
            if after > end:
                if length > LENGTH_MAX:
                    raise BadFrame(why=f"an Ethernet frame of {length} bytes")
                break
            fits = HEAD <= length <= FRAME_MAX
            here = known.get(data[at + 4 : at + 4 + HEAD]) if fits else None
            if here is None or here != way:
                if way is not None:
                    out.append((way, data[start:at]))
                start, way = at, here
                if here is None:
                    out += self._consider(source, known, data[at + 4 : after], now)
            passed += here is not None
            at = after
        if way is not None:
            out.append((way, data[start:at]))
        self.counts["forwarded"] += passed
        return at, out

    def _drop(self, why: str) -> list[Delivery]:
        self.counts[why] += 1
        return []

    def _consider(self, source: Way, known: dict[bytes, Way], frame: bytes, now: float) -> list[Delivery]:
        """Where a frame goes that is not one of many like it."""
        if not FRAME_MIN <= len(frame) <= FRAME_MAX:
            return self._drop("malformed")
        to, mac, kind = p.ETHERNET.unpack_from(frame)
        place = place_of_mac(mac)
        if place is None or self._owner(place) != source:
            return self._drop("spoofed")
        here = place == source
        if kind == p.ARP:
            return self._arp(place, frame, now, here=here)
        if here and (answered := self._asked(place, to, kind, frame, now)) is not None:
            return answered
        if to[0] & 1:
            return self._flood(place, frame, now, here=here)
        way = self._way(to, place, here=here)
        if way is None:
            return self._drop("to nobody")
        if kind in (p.IPV4, p.IPV6):
            known[frame[:HEAD]] = way
        self.counts["forwarded"] += 1
        return [(way, _whole(frame))]

    def _owner(self, place: int | None) -> Way | None:
        """Who speaks for `place`: the guest here, or the node where it runs."""
        if place is None:
            return None
        return place if place in self._guests else self._at.get(place)

    def _way(self, to: bytes, place: int, *, here: bool) -> Way | None:
        """To whom a frame from `place` for `to` goes; what came over a link goes to guests here only."""
        target = place_of_mac(to)
        way = None if target in (None, place) else self._owner(target)
        return way if here or way == target else None

    def _flood(self, place: int, frame: bytes, now: float, *, here: bool) -> list[Delivery]:
        ways: list[Way] = [guest for guest in self._guests if guest != place]
        if here:
            ways += self._nodes
        if not self._floods.setdefault(place, Bucket(FLOOD_RATE, FLOOD_BURST)).take(max(1, len(ways)), now):
            return self._drop("flooded too much")
        self.counts["flooded"] += 1
        whole = _whole(frame)
        return [(way, whole) for way in ways]

    # --- what the switch answers itself ---------------------------------------------------------

    def _may_ask(self, place: int, now: float) -> bool:
        return self._asks.setdefault(place, Bucket(ASK_RATE, ASK_BURST)).take(1, now)

    def _answer(self, place: int, kind: int, body: bytes) -> list[Delivery]:
        self.counts["answered"] += 1
        return [(place, _whole(p.ethernet(mac_of(place), SERVER_MAC, kind, body)))]

    def _arp(self, place: int, frame: bytes, now: float, *, here: bool) -> list[Delivery]:
        """Who has this address?  Of guests we know it; of addresses that they took themselves we do not."""
        arp = p.read_arp(frame[HEAD:])
        if arp is None:
            return self._drop("malformed")
        owner = place_of_ip(arp.ip)
        if arp.mac != mac_of(place) or owner not in (None, place) or arp.ip == SERVER_IP:
            return self._drop("spoofed")
        asked = place_of_ip(arp.wanted_ip)
        if here and asked == place:
            return []  # of its own address all others know, and nobody else has it
        mine = arp.wanted_ip == SERVER_IP or is_alias(arp.wanted_ip)
        if here and arp.operation == p.REQUEST and (asked is not None or mine):
            if not self._may_ask(place, now):
                return self._drop("asked too much")
            if asked is not None and self._owner(asked) is None:
                return self._drop("to nobody")
            mac = SERVER_MAC if asked is None else mac_of(asked)
            reply = p.Arp(p.REPLY, mac, arp.wanted_ip, arp.mac, arp.ip)
            return self._answer(place, p.ARP, reply.encode())
        if frame[0] & 1:
            return self._flood(place, frame, now, here=here)
        way = self._way(frame[:6], place, here=here)
        return self._drop("to nobody") if way is None else [(way, _whole(frame))]

    def _asked(self, place: int, to: bytes, kind: int, frame: bytes, now: float) -> list[Delivery] | None:
        """What the guest is told where it asks the switch; None where the frame is for others."""
        mine = to == SERVER_MAC
        if not mine and not (to == p.BROADCAST and kind == p.IPV4):
            return None
        if mine and kind == p.IPV4 and len(frame) > HEAD + 9 and frame[HEAD + 9] == TCP:
            self.counts["forwarded"] += 1
            return [(Up(place), _whole(frame))]
        asked = p.read_datagram(frame[HEAD:]) if kind == p.IPV4 else None
        answer = None
        if asked is not None and asked.port == dhcp.SERVER_PORT and asked.source_port == dhcp.CLIENT_PORT:
            mine = True
            answer = dhcp.answer(self.segment, place, asked) if self._may_ask(place, now) else None
        elif mine and asked is not None and (asked.to, asked.port) == (SERVER_IP, names.PORT):
            answer = names.answer(self.segment, asked, self.aliases) if self._may_ask(place, now) else None
        if answer is not None:
            return self._answer(place, p.IPV4, answer.encode())
        return self._drop("asked in vain") if mine else None

    def check(self) -> None:
        """Everything that is promised of the tables."""
        assert set(self._known) == self._guests | set(self._nodes)
        assert not self._guests & set(self._at)
        for source, known in self._known.items():
            for head, way in known.items():
                to, mac, kind = p.ETHERNET.unpack(head)
                place, target = place_of_mac(mac), place_of_mac(to)
                assert kind in (p.IPV4, p.IPV6)
                assert self._owner(place) == source != way == self._owner(target)
                assert source in self._guests or way in self._guests, "from a link to a link"
        assert self._floods.keys() | self._asks.keys() <= self._guests | set(self._at)


def _whole(frame: bytes) -> bytes:
    return LENGTH.pack(len(frame)) + frame
