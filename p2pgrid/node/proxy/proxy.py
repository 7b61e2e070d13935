"""Connect programs of this node and its guests with what they may reach on the grid, and let others in.

    program ── SOCKS5, forward, guest's network ──> resolve ──> stream ══ link ══> decide ──> guest, or
                                                                                              exposed port

Who asks resolves a name to a node; the node that is reached decides (`rules.py`).  From then on the bytes
move in the links' threads.  Where both ends are at this node there is no link, and two tasks move them.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import attrs
import structlog
import trio

from p2pgrid.errors import GridError, NotFound, PeerError, Unreachable
from p2pgrid.hole_punch.bulk import Links
from p2pgrid.hole_punch.streams.flow import Flow
from p2pgrid.hole_punch.streams.service import Declined, Request, Streams, open_streams
from p2pgrid.ids import PeerId
from p2pgrid.node.proxy.names import OWNER, GridName
from p2pgrid.node.proxy.out import connect_exposed
from p2pgrid.node.proxy.rules import Ask, Exposure, HereGuest, Net, Target, decide, decode, encode
from p2pgrid.node.proxy.splice import Splice
from p2pgrid.scheduler.client import Calls

log = structlog.get_logger(__name__)

FRESH = 2.0
"""Seconds for which it is believed who runs a job; the peer who asks too early is looked up again."""
OPEN_PATIENCE = 20.0
"""Seconds until a program is told that what it asked for cannot be reached."""

Dial = Callable[[int, Net], Awaitable[socket.socket]]
"""A connection to a guest's port, non-blocking.  Raises `OSError`."""
Learn = Callable[[PeerId, Sequence[str]], None]


@attrs.frozen
class _Guest:
    here: HereGuest
    dial: Dial


@attrs.define(eq=False)
class Proxy:
    """See `open_proxy`."""

    me: PeerId
    links: Links
    calls: Calls
    learn: Learn
    streams: Streams = attrs.field(init=False)
    exposures: list[Exposure] = attrs.field(factory=list)
    _guests: dict[tuple[str, int], _Guest] = attrs.field(factory=dict)
    _runs: dict[str, tuple[float, dict[PeerId, tuple[int, ...]]]] = attrs.field(factory=dict)
    _splices: dict[Splice, None] = attrs.field(factory=dict)

    # --- what is here ---------------------------------------------------------------------

    @contextlib.contextmanager
    def guest(self, here: HereGuest, dial: Dial) -> Iterator[None]:
        """A guest that may be reached while inside, as far as its job's rules go."""
        key = here.job, here.index
        self._guests[key] = _Guest(here, dial)
        try:
            yield
        finally:
            del self._guests[key]

    @contextlib.contextmanager
    def exposed(self, exposure: Exposure) -> Iterator[None]:
        self.exposures.append(exposure)
        try:
            yield
        finally:
            self.exposures.remove(exposure)

    def flows(self) -> list[dict[str, Any]]:
        """What is under way, oldest first, for people."""
        now = time.monotonic()
        rows = [
            {
                "who": flow.who or flow.carrier.link.peer,
                "to": describe(decode(flow.target)),
                "peer": flow.carrier.link.peer,
                "way": flow.carrier.link.way.value,
                "opened": "here" if flow.ours else "there",
                "sent": flow.sent,
                "received": flow.got,
                "age": round(now - flow.since, 1),
            }
            for flow in self.streams.flows()
        ]
        return rows + [splice.row(now) for splice in self._splices]

    # --- the side that is reached ---------------------------------------------------------

    async def serve(self, request: Request) -> tuple[socket.socket, bytes]:
        """Connect what a peer asks for, if it may.  Raises `Declined`, `OSError`."""
        try:
            target = decode(request.target)
        except PeerError as wrong:
            raise Declined(code=1, why=str(wrong)) from None
        sock, request.flow.who = await self._connect(request.peer, target)
        return sock, b""

    async def _connect(self, peer: PeerId, target: Target) -> tuple[socket.socket, str]:
        allowed = await self._decided(peer, target)
        who = f"a guest of {target.caller} at {peer}" if target.caller else str(peer)
        if isinstance(allowed, HereGuest):
            return await self._guests[allowed.job, allowed.index].dial(target.port, target.net), who
        return await connect_exposed(allowed, target.net), who

    async def _decided(self, peer: PeerId, target: Target) -> HereGuest | Exposure:
        tries = 0
        while True:
            runs = {job: frozenset(rows) for job, (_, rows) in self._runs.items() if self._fresh(job)}
            here = [guest.here for guest in self._guests.values()]
            verdict = decide(peer, target, here, self.exposures, runs)
            if isinstance(verdict, HereGuest | Exposure):
                return verdict
            if isinstance(verdict, Ask):
                tries += 1
                try:
                    await self.runs(verdict.job)
                except GridError as away:
                    raise Declined(
                        code=2, why=f"who runs {verdict.job} cannot be found out: {away}"
                    ) from None
            elif tries == 0 and target.caller in runs:  # it may have got the job just now
                del self._runs[target.caller]
            else:
                raise Declined(code=2, why=verdict.why)

    def _fresh(self, job: str) -> bool:
        return job in self._runs and trio.current_time() < self._runs[job][0] + FRESH

    async def runs(self, job: str) -> dict[PeerId, tuple[int, ...]]:
        """Who runs which tasks of `job`, from the coordinator; where they are is learned."""
        if not self._fresh(job):
            rows = {}
            for neighbour in await self.calls.neighbours(job):
                peer = PeerId(neighbour.peer)
                if peer != self.me:
                    self.learn(peer, neighbour.addresses)
                rows[peer] = tuple(neighbour.indices)
            for old in [name for name in self._runs if not self._fresh(name)]:
                del self._runs[old]
            self._runs[job] = trio.current_time(), rows
        return self._runs[job][1]

    # --- the side that reaches out --------------------------------------------------------

    async def resolve(self, name: GridName, caller: HereGuest | None, net: Net) -> tuple[PeerId, Target]:
        """Where what is called so is.  Raises `NotFound`, `Unreachable`."""
        said = caller.job if caller is not None else ""
        if name.job is not None:
            rows = await self.runs(name.job)
            for peer, indices in sorted(rows.items(), key=lambda row: row[1]):
                if name.index is None or name.index in indices:
                    return peer, Target(name.port, name.job, name.index, said, net)
            task = "" if name.index is None else f"task {name.index} of "
            raise NotFound(what=f"a guest of {task}job {name.job} that runs now")
        return await self._node(name, caller), Target(name.port, caller=said, net=net)

    async def _node(self, name: GridName, caller: HereGuest | None) -> PeerId:
        if name.label == OWNER and caller is not None:
            return caller.submitter
        if (peer := name.peer) is not None:
            return peer
        for view in await self.calls.nodes():
            if view.name.lower() == name.label:
                self.learn(PeerId(view.peer), view.addresses)
                return PeerId(view.peer)
        raise NotFound(what=f"a node that is called {name.label}")

    async def reach(
        self, name: GridName, caller: HereGuest | None = None, who: str = "", net: Net = "tcp"
    ) -> Reached:
        """A connection to what `name` calls, for `who`.  Raises `Declined`, `NotFound`, `Unreachable`."""
        try:
            with trio.fail_after(OPEN_PATIENCE):
                peer, target = await self.resolve(name, caller, net)
                if peer != self.me:
                    return Reached(self, target, who, await self.streams.open(peer, encode(target), who))
                far, _ = await self._connect(peer, target)
                return Reached(self, target, who, far)
        except trio.TooSlowError:
            raise Unreachable(who=name.label, why=f"no answer in {OPEN_PATIENCE:.0f} s") from None
        except OSError as failed:
            raise Declined(code=5, why=failed.strerror or str(failed)) from None

    @contextlib.contextmanager
    def splicing(self, splice: Splice) -> Iterator[None]:
        self._splices[splice] = None
        try:
            yield
        finally:
            del self._splices[splice]


@attrs.frozen
class Reached:
    """The other end of a connection: a stream, or a socket of this node."""

    proxy: Proxy
    target: Target
    who: str
    far: Flow | socket.socket

    async def carry(self, sock: socket.socket, first: bytes = b"") -> None:
        """Move what `sock` brings, after `first`, and what comes; closes `sock`.

        Over a link that goes on by itself, and this returns at once.
        """
        if isinstance(self.far, socket.socket):
            splice = Splice(self.who, describe(self.target))
            with self.proxy.splicing(splice):
                await splice.run(sock, self.far, first)
        else:
            if first:
                self.far.carrier.send(self.far, first)
            self.far.attach(sock)

    def close(self) -> None:
        if isinstance(self.far, socket.socket):
            self.far.close()
        else:
            self.proxy.streams.close(self.far, "the program is gone")


def describe(target: Target) -> str:
    """For people: what is connected to."""
    end = "" if target.net == "tcp" else "/udp"
    if not target.job:
        return f"port {target.port}{end} of the node"
    index = "" if target.index is None else f".{target.index}"
    return f"port {target.port}{end} of a guest of {target.job}{index}"


@contextlib.asynccontextmanager
async def open_proxy(me: PeerId, links: Links, calls: Calls, learn: Learn) -> AsyncIterator[Proxy]:
    """Reach, and be reached, over `links` while inside."""
    proxy = Proxy(me, links, calls, learn)

    def datagrams(target: bytes) -> bool:
        try:
            return decode(target).net == "udp"
        except PeerError:
            return False

    async with open_streams(links, proxy.serve, datagrams) as proxy.streams:
        yield proxy
