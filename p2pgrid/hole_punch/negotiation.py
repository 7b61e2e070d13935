"""Agree over a control channel on who dials whom, where nobody knows an address that works.

A ── Offer: addresses ───────────────> B
A <── Answer: addresses, or Decline ── B
A ════ TCP, TLS, greeting ═══════════> B      way DIRECT
A ── DialBack ──> B, where A got nowhere:     A <════ TCP, TLS, greeting ════ B   way REVERSE
A <─ Dialled ─── B
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Protocol

import msgspec
import structlog
import trio

from p2pgrid.errors import Unreachable
from p2pgrid.hole_punch.addressbook import AddressBook
from p2pgrid.hole_punch.dialling import Attempt, Dialling
from p2pgrid.hole_punch.greeting import Allow, Verdict
from p2pgrid.hole_punch.link import Link
from p2pgrid.hole_punch.path import Way
from p2pgrid.ids import PeerId
from p2pgrid.net import Channel, Network

log = structlog.get_logger(__name__)

PROTOCOL = "/p2pgrid/link/3"
NEGOTIATION_PATIENCE = 12.0
"""Seconds for all of it: a dial, a dial back, and the messages between."""


class Offer(msgspec.Struct, tag="offer", frozen=True):
    addresses: list[str]
    membership: bytes = b""


class Answer(msgspec.Struct, tag="answer", frozen=True):
    addresses: list[str]
    membership: bytes = b""


class Decline(msgspec.Struct, tag="decline", frozen=True):
    why: str
    busy: bool = False


class DialBack(msgspec.Struct, tag="dial-back", frozen=True):
    pass


class Dialled(msgspec.Struct, tag="dialled", frozen=True):
    ok: bool


class Table(Protocol):
    """What negotiating needs of the links."""

    book: AddressBook

    def told(self) -> list[str]: ...

    def judge(self, peer: PeerId, membership: bytes, attempt: Attempt | None) -> Verdict:
        """What we say to a peer that wants a link."""
        ...

    async def arrival(self, peer: PeerId) -> Link:
        """The link that `peer` is making; the caller bounds the wait."""
        ...


class Negotiation:
    """The control channels on which one node comes to links."""

    def __init__(
        self,
        network: Network,
        table: Table,
        dialling: Dialling,
        allow: Allow,
        membership: Callable[[], bytes],
    ) -> None:
        self.asked_back: set[PeerId] = set()
        """Peers that we asked to dial us."""
        self.answering: dict[PeerId, trio.Event] = {}
        """Peers that are being answered, and when that is over."""
        self._network = network
        self._table = table
        self._dialling = dialling
        self._allow = allow
        self._membership = membership

    async def ask(self, peer: PeerId) -> Link | Verdict:
        """The link that it comes to, or why the peer wants none.  Raises `Unreachable`."""
        channel = await self._network.open(peer, PROTOCOL)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(_close, channel)
            await channel.send(Offer(self._table.told(), self._membership()))
            answer = await channel.receive(Answer | Decline)
            if isinstance(answer, Decline):
                return Verdict(answer.why, answer.busy)
            if why := self._allow(peer, answer.membership):
                raise Unreachable(who=peer, why=why)
            self._table.book.hear(peer, answer.addresses, self._network.addresses_of(peer))
            made = await self._dialling.reach(peer, Attempt())
            if made is not None:
                return made
            self.asked_back.add(peer)
            stack.callback(self.asked_back.discard, peer)
            await channel.send(DialBack())
            if not (await channel.receive(Dialled)).ok:
                raise Unreachable(who=peer, why="neither side can dial the other")
            return await self._table.arrival(peer)

    async def serve(self, channel: Channel) -> None:
        try:
            with trio.move_on_after(NEGOTIATION_PATIENCE):
                await self._answer(channel, await channel.receive(Offer))
        except Unreachable:
            pass  # the channel ended: the other side has its link, or has given up
        except OSError as full:
            log.warning("no link to a peer that asked for one", peer=channel.peer, why=str(full))

    async def _answer(self, channel: Channel, offer: Offer) -> None:
        peer, attempt = channel.peer, Attempt()
        verdict = self._table.judge(peer, offer.membership, None)
        if verdict.why:
            return await channel.send(Decline(verdict.why, verdict.busy))
        done = self.answering[peer] = trio.Event()
        try:
            await channel.send(Answer(self._table.told(), self._membership()))
            # It ends the channel when it has its link.
            await channel.receive(DialBack)
            self._table.book.hear(peer, offer.addresses, self._network.addresses_of(peer))
            await self._dialling.dial(peer, self._table.book.of(peer).addresses, Way.REVERSE, attempt)
            await channel.send(Dialled(isinstance(attempt.made, Link)))
        finally:
            if self.answering.get(peer) is done:
                del self.answering[peer]
            done.set()
        return None


async def _close(channel: Channel) -> None:
    with trio.move_on_after(1) as scope:
        scope.shield = True
        await channel.aclose()
