"""Name the ports through which nodes talk: what any network must offer.

Pure.  `hole_punch/host.py` keeps this contract with libp2p, tests keep it in memory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import msgspec

from p2pgrid.ids import PeerId


class Channel(Protocol):
    """One control stream to an authenticated peer; whole messages, in order."""

    @property
    def peer(self) -> PeerId: ...

    async def send(self, message: msgspec.Struct) -> None:
        """Raises `Unreachable` when the stream broke."""
        ...

    async def receive(self, kind: Any) -> Any:
        """The next message, of type `kind`.

        Raises `BadFrame` for anything else, `Unreachable` when the stream ended.
        """
        ...

    async def aclose(self) -> None: ...


Serve = Callable[[Channel], Awaitable[None]]
"""Serves one incoming channel; it is closed when the call returns."""


class Network(Protocol):
    """Control streams to peers by id, whatever stands between."""

    @property
    def me(self) -> PeerId: ...

    @property
    def addresses(self) -> Sequence[str]:
        """Where this node listens, as multiaddrs that end in /p2p/ME."""
        ...

    def sign(self, statement: bytes) -> bytes:
        """`statement`, which begins with what it is for, signed by this node's key."""
        ...

    def verify(self, peer: PeerId, statement: bytes, signature: bytes) -> bool:
        """Whether `peer` signed `statement`."""
        ...

    def learn(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Remember where `peer` may be reached."""
        ...

    async def open(self, peer: PeerId, protocol: str) -> Channel:
        """Open a control stream.  Raises `Unreachable`."""
        ...

    def serve(self, protocol: str, serve: Serve) -> None:
        """Answer `protocol` with `serve` from now on."""
        ...

    def addresses_of(self, peer: PeerId) -> Sequence[str]:
        """What is known of where `peer` can be reached (learned, identified, or from the DHT)."""
        ...


class Index(Protocol):
    """Who has what, by hints: never the authority for what a disk is."""

    async def provide(self, key: bytes) -> None:
        """Announce that this node holds the object named by CID bytes `key`."""
        ...

    async def withdraw(self, key: bytes) -> None:
        """Announce `key` no more; what others remember of it may take long to fade."""
        ...

    async def find(self, key: bytes, most: int = 20, *, soon: bool = False) -> list[PeerId]:
        """Peers that announced `key`, or some, but `soon`; the network has learned their addresses."""
        ...
