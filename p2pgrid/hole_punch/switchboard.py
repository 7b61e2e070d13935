"""Hand what a link brings to the service that its first byte names.

A link carries several services side by side, each with a range of message kinds of its own:

    1-31 transfer · 32-39 the link itself · 40-47 punching · 48-63 relays · 64-79 streams · 80-95 LAN
    96-103 membership · 104-107 calling

When a link has room, services are asked for more in the order of falling kinds: what somebody waits
for at a terminal goes before disks.
"""

from __future__ import annotations

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.link import Link, Receive, Receiver

TRANSFER = range(1, 32)
PUNCHING = range(40, 48)
RELAYING = range(48, 64)
STREAMS = range(64, 80)
LAN = range(80, 96)
MEMBERSHIP = range(96, 104)
CALLING = range(104, 108)


class Switchboard:
    """The services of one node's links; a `Receive`."""

    def __init__(self) -> None:
        self.services: dict[range, Receive] = {}

    def serve(self, kinds: range, receive: Receive) -> None:
        """From now on `receive` makes what takes messages of `kinds`, once for each link."""
        assert all(set(kinds).isdisjoint(other) for other in self.services), f"{kinds} are served already"
        assert 0 < kinds.start < kinds.stop <= 256
        self.services[kinds] = receive
        self.services = dict(sorted(self.services.items(), key=lambda row: -row[0].start))

    def __call__(self, link: Link) -> Receiver:
        return _Desk(link, self)


class _Desk:
    """One link's services; a `Receiver`.  One that is offered later than the link is there all the same."""

    def __init__(self, link: Link, board: Switchboard) -> None:
        self._link = link
        self._board = board
        self._by_kind: list[Receiver | None] = [None] * 256
        self._receivers: dict[range, Receiver] = {}
        for kinds in board.services:
            self._open(kinds)

    def _open(self, kinds: range) -> Receiver:
        receiver = self._receivers[kinds] = self._board.services[kinds](self._link)
        for kind in kinds:
            self._by_kind[kind] = receiver
        return receiver

    def _late(self, kind: int) -> Receiver:
        for kinds in self._board.services:
            if kind in kinds:
                return self._open(kinds)
        raise BadFrame(why=f"a message of kind {kind}, which nobody here serves")

    def received(self, message: memoryview) -> None:
        receiver = self._by_kind[message[0]] or self._late(message[0])
        receiver.received(message)

    def drained(self) -> float | None:
        least: float | None = None
        for kinds in self._board.services:
            if kinds in self._receivers:
                wait = self._receivers[kinds].drained()
                if wait is not None and (least is None or wait < least):
                    least = wait
        return least

    def left(self, why: str) -> None:
        for receiver in self._receivers.values():
            receiver.left(why)
