"""Join the segments of this node's guests with those of other nodes, over links.

    plug ──> Port ──frames──> Switch ──> Port of another guest here
                                 └────> Link ══> the peer's Switch ──> Port

Who is in a group, and at which node, is told by `set_members`; nobody else is heard, and with nobody told
there is nobody.  A link is made when there is something to send, which waits for it, a little.
What a link does not take is dropped: it is Ethernet, and the guests' own protocols slow down by that.

Frames move in the reactors' threads; all else happens in trio's.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from functools import partial
from typing import Protocol

import attrs
import structlog
import trio

from p2pgrid.errors import BadFrame, Conflict, Unreachable
from p2pgrid.hole_punch.lan import messages
from p2pgrid.hole_punch.lan.messages import Frames, Knock
from p2pgrid.hole_punch.lan.port import BUFFER, Port
from p2pgrid.hole_punch.lan.segment import Segment
from p2pgrid.hole_punch.lan.switch import LENGTH, Delivery, Switch, Up, Way
from p2pgrid.hole_punch.lan.uplink import Accepted, Uplink
from p2pgrid.hole_punch.link import Link, Receive, Receiver
from p2pgrid.hole_punch.reactor import Reactor
from p2pgrid.ids import PeerId

log = structlog.get_logger(__name__)

QUEUED_MAX = 4
"""Times `Link.low` that may wait in a link while more frames are put there: 1 MiB, or what a capped line
takes a second for.  Disks' chunks are counted, too, though frames overtake them: it cannot be much less.
"""
PENDING_MAX = 16 * 1024
"""Bytes of frames that wait for a link to be made."""
DIALS_MAX = 16
"""Links that are being made at once, however many others there are when a guest is plugged in."""
RETRY = 5.0
"""Seconds after which a peer that was not reached is tried again, if there is something for it."""


class Roads(Protocol):
    """What is needed of a node's links (`bulk.py`)."""

    def serve(self, kinds: range, receive: Receive) -> None: ...
    async def link(self, peer: PeerId) -> Link: ...
    def reactor(self) -> Reactor: ...


@attrs.define(eq=False)
class _Group:
    """A segment that has guests here.  `lock` is held where `switch` is used."""

    switch: Switch
    ports: dict[int, Port] = attrs.field(factory=dict)
    uplinks: dict[int, Uplink] = attrs.field(factory=dict)
    lock: threading.Lock = attrs.field(factory=threading.Lock)
    wondering: bool = False
    """Whether somebody spoke who is not known, and nothing was told of members since."""


class Lan:
    """The segments of one node; see `open_lan`."""

    def __init__(self, links: Roads, stranger: Callable[[str], None], nursery: trio.Nursery) -> None:
        self._links = links
        self._stranger = stranger
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._groups: dict[str, _Group] = {}
        self._numbers: dict[bytes, _Group] = {}
        self._roads: dict[PeerId, Link] = {}
        """A link to each peer that has one."""
        self._pending: dict[PeerId, list[tuple[bytes, bytes]]] = {}
        """For peers to whom a link is being made: heads and frames of messages."""
        self._failed: dict[PeerId, float] = {}
        """When peers were last not reached."""
        self._dials = trio.CapacityLimiter(DIALS_MAX)
        self._lock = threading.Lock()
        """Of `_roads`, `_pending` and `_failed`."""
        links.serve(messages.KINDS, self._receive)

    # --- who is in a group --------------------------------------------------------------------

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(self._groups)

    def counts(self, group: str) -> Counter[str]:
        """What became of frames, since the first guest was plugged in; `switch.py`."""
        at = self._groups[group]
        with at.lock:
            return Counter(at.switch.counts)

    def set_members(self, group: str, members: Mapping[PeerId, Iterable[int]]) -> None:
        """These nodes, and no others, run these tasks of the group, by their places in the job.

        What is said of a group that has no guest here is void.
        """
        at = self._groups.get(group)
        if at is None:
            return
        at.wondering = False
        with at.lock:
            before = set(at.switch.nodes)
            at.switch.set_members(members)
            new = set(at.switch.nodes) - before
        for peer in sorted(new):
            self._send(peer, messages.head(Knock, at.switch.segment.number), [])

    @contextlib.asynccontextmanager
    async def plug(
        self, segment: Segment, place: int, accepted: Accepted | None = None
    ) -> AsyncIterator[socket.socket]:
        """A cable for the guest at `place` while inside; its far end, for the hypervisor.

        A frame on it is `length u32, frame`, as QEMU's stream has it.  `accepted` takes the connections that
        the guest makes to its node; `uplink` makes some to the guest.  Raises `Conflict`.
        """
        at = self._groups.get(segment.group)
        if at is None:
            at = self._groups[segment.group] = self._numbers[segment.number] = _Group(Switch(segment))
        if at.switch.segment != segment or place in at.ports:
            raise Conflict(what=f"the LAN {segment.group}, or place {place} in it")
        near, far = _cable()
        reactor, gone = self._links.reactor(), trio.Event()
        port = at.ports[place] = Port(
            near,
            partial(self._from_guest, at, place),
            reactor.call,
            lambda: self._token.run_sync_soon(gone.set),
        )
        if accepted is not None:
            at.uplinks[place] = Uplink(place, port.put, reactor.call, accepted)
        with at.lock:
            at.switch.attach(place)
        reactor.call(port)
        try:
            yield far
        finally:
            if (uplink := at.uplinks.pop(place, None)) is not None:
                uplink.close()
            port.close()
            far.close()
            with trio.CancelScope(shield=True):
                await gone.wait()
            with at.lock:
                at.switch.detach(place)
                del at.ports[place]
            if not at.ports:
                del self._groups[segment.group], self._numbers[segment.number]
            if not self._groups:
                self._failed.clear()

    def uplink(self, group: str, place: int) -> Uplink:
        """This node as the guest at `place` sees it."""
        return self._groups[group].uplinks[place]

    def name_of(self, group: str, ip: bytes) -> str | None:
        """The name beyond the LAN to which this address was given."""
        at = self._groups.get(group)
        return None if at is None else at.switch.aliases.name_of(ip)

    # --- frames, in the reactors' threads -------------------------------------------------------

    def _from_guest(self, at: _Group, place: int, data: bytes) -> int:
        return self._pass(at, place, data)

    def _pass(self, at: _Group, source: Way, data: bytes) -> int:
        with at.lock:
            taken, deliveries = at.switch.forward(source, data, time.monotonic())
        if len(deliveries) == 1:
            ((way, frames),) = deliveries
            self._deliver(at, way, [frames])
        elif deliveries:
            for way, pieces in _by_way(deliveries).items():
                self._deliver(at, way, pieces)
        return taken

    def _deliver(self, at: _Group, way: Way, pieces: list[bytes]) -> None:
        if isinstance(way, Up):
            if (uplink := at.uplinks.get(way.place)) is not None:
                uplink.frames(b"".join(pieces))
        elif isinstance(way, int):
            port = at.ports.get(way)
            if port is None or not port.put(pieces[0] if len(pieces) == 1 else b"".join(pieces)):
                self._lost(at, pieces, "the guest does not read")
        elif not self._send(way, messages.head(Frames, at.switch.segment.number), pieces):
            self._lost(at, pieces, "the link is full")

    def _lost(self, at: _Group, pieces: list[bytes], why: str) -> None:
        with at.lock:
            at.switch.counts[why] += sum(map(_frames_in, pieces))

    def _send(self, peer: PeerId, head: bytes, pieces: list[bytes]) -> bool:
        """Send frames to `peer`, over a link that is made if need be; False where they are lost."""
        link = self._roads.get(peer)
        if link is not None and link.live:
            if link.queued > QUEUED_MAX * link.low:
                return False
            link.send(head, *pieces, again=_never)
            return True
        with self._lock:
            waiting = self._pending.get(peer)
            if waiting is None:
                if time.monotonic() < self._failed.get(peer, float("-inf")) + RETRY:
                    return False
                waiting = self._pending[peer] = []
                self._token.run_sync_soon(self._want, peer)
            frames = b"".join(pieces)
            if sum(len(others) for _, others in waiting) + len(frames) > PENDING_MAX:
                return False
            waiting.append((head, frames))
        return True

    # --- links ------------------------------------------------------------------------------------

    def _want(self, peer: PeerId) -> None:
        self._nursery.start_soon(self._reach, peer)

    async def _reach(self, peer: PeerId) -> None:
        """Have a link to `peer`, and send what waits for it."""
        link: Link | None = None
        try:
            async with self._dials:
                link = await self._links.link(peer)
        except Unreachable as away:
            log.info("no link to a node of the same LAN", peer=peer, why=away.why)
        finally:
            with self._lock:
                if link is None:
                    self._failed[peer] = time.monotonic()
                else:
                    self._failed.pop(peer, None)
                    self._roads[peer] = link
                waiting = self._pending.pop(peer, [])
        if link is not None:
            for head, frames in waiting:
                link.send(head, frames, again=_never)

    def _receive(self, link: Link) -> Receiver:
        with self._lock:
            self._roads[link.peer] = link
        return _Switchside(self, link)

    def _left(self, link: Link) -> None:
        with self._lock:
            if self._roads.get(link.peer) is link:
                del self._roads[link.peer]

    def _from_link(self, peer: PeerId, message: messages.Message) -> None:
        at = self._numbers.get(message.segment)
        if at is None:
            return  # its last guest here has just ended, or it never had one: then nobody is told that
        if peer not in at.switch.nodes and not at.wondering:
            at.wondering = True  # cleared where members are told
            self._token.run_sync_soon(self._stranger, at.switch.segment.group)
        if isinstance(message, Frames) and self._pass(at, peer, message.data) != len(message.data):
            raise BadFrame(why="a cut frame of the LAN")


@attrs.frozen
class _Switchside:
    """What one link brings for the LAN; a `Receiver`."""

    lan: Lan
    link: Link

    def received(self, message: memoryview) -> None:
        self.lan._from_link(self.link.peer, messages.decode(message))

    def drained(self) -> float | None:
        return None

    def left(self, why: str) -> None:
        self.lan._left(self.link)


@contextlib.asynccontextmanager
async def open_lan(links: Roads, stranger: Callable[[str], None]) -> AsyncIterator[Lan]:
    """Segments for guests, over `links`, while inside; leave every `plug` before, and this before the links.

    `stranger` is told, in trio's thread, of a group in which somebody speaks who is not a member, and then
    not again before `set_members`: it is time to ask the coordinator.
    """
    async with trio.open_nursery() as nursery:
        yield Lan(links, stranger, nursery)
        nursery.cancel_scope.cancel()


def _cable() -> tuple[socket.socket, socket.socket]:
    near, far = socket.socketpair()
    for end in (near, far):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    return near, far


def _frames_in(data: bytes) -> int:
    count = at = 0
    while at < len(data):
        at += LENGTH.size + LENGTH.unpack_from(data, at)[0]
        count += 1
    return count


def _by_way(deliveries: list[Delivery]) -> dict[Way, list[bytes]]:
    ways: dict[Way, list[bytes]] = {}
    for way, frames in deliveries:
        ways.setdefault(way, []).append(frames)
    return ways


def _never() -> None:
    """Frames are not sent once more on another connection."""
