"""Call a coordinator: one method for each request, over the network or in the same process.

Each call opens a channel of its own, sends one request and gets one reply.  Where the
coordinator is away, or does not answer in time, `Unreachable` is raised and the caller
tries again when it likes: every call may be repeated.  Other errors are those the
coordinator raised: `NotAuthorised`, `NotFound`, `Conflict`, `Gone`, `Revoked`, ….
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import attrs
import msgspec
import trio

from p2pgrid import wire
from p2pgrid.errors import BadFrame, Misused, Unreachable
from p2pgrid.ids import PeerId
from p2pgrid.net import Network
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.job import JobSpec, Outcome

ANSWER_MAX = 30.0
"""Seconds beyond its patience that a call may take: a slow fsync, a slow link, a reconnect."""

R = TypeVar("R", bound=m.Reply)


def _checked(request: m.Request) -> m.Request:
    """`request` as the coordinator would read it; raises `Misused` where it would refuse to."""
    try:
        checked: m.Request = wire.decode(wire.encode(request)[wire.HEADER :], m.Request)
    except BadFrame as broken:
        raise Misused(why=broken.why) from None
    return checked


@contextlib.contextmanager
def _answered(coordinator: PeerId, request: m.Request) -> Iterator[None]:
    """Bound the time of a call.  Raises `Unreachable`."""
    bound = ANSWER_MAX + getattr(request, "patience", 0.0)
    with trio.move_on_after(bound) as scope:
        yield
    if scope.cancelled_caught:
        raise Unreachable(who=coordinator, why=f"the coordinator did not answer in {bound:g} s")


class Calls(ABC):
    """The calls, whatever carries them."""

    @abstractmethod
    async def _call(self, request: m.Request) -> m.Reply:
        """Carry `request`; raises `Unreachable`."""

    async def _ask(self, request: m.Request, kind: type[R]) -> R:
        reply = await self._call(_checked(request))
        if isinstance(reply, m.Failure):
            raise m.raised(reply)
        if not isinstance(reply, kind):
            raise BadFrame(why=f"{type(request).__name__} was answered with {type(reply).__name__}")
        return reply

    # every member

    async def join(
        self, ticket: str, name: str, shares: tuple[str, ...] = (), addresses: tuple[str, ...] = ()
    ) -> m.Welcome:
        return await self._ask(m.Join(ticket, name, shares, addresses[: m.ADDRESSES_MAX]), m.Welcome)

    async def beat(self, beat: m.Beat) -> m.Orders:
        return await self._ask(beat, m.Orders)

    async def revocations(self) -> m.RevocationList:
        return await self._ask(m.Revocations(), m.RevocationList)

    async def leave(self) -> None:
        await self._ask(m.Leave(), m.Done)

    async def providers(self, datum: str) -> tuple[m.Provider, ...]:
        return (await self._ask(m.Providers(datum), m.ProviderList)).providers

    # workers

    async def pull(
        self, free: m.Capacity, working: tuple[str, ...] = (), patience: float = 20.0
    ) -> m.Grant | None:
        """One task, or None after `patience` seconds (at most 25)."""
        reply = await self._call(_checked(m.Pull(free, working, patience)))
        match reply:
            case m.Grant():
                return reply
            case m.Nothing():
                return None
            case m.Failure():
                raise m.raised(reply)
            case _:
                raise BadFrame(why=f"Pull was answered with {type(reply).__name__}")

    async def renew(self, task: str, epoch: int, note: str = "") -> m.Lease:
        """Raises `Gone` or `Revoked`: stop the work."""
        return await self._ask(m.Renew(task, epoch, note[:200]), m.Lease)

    async def neighbours(self, job: str) -> list[m.Neighbour]:
        """Who runs tasks of `job` now.  Raises `NotFound` where that is nobody's business here."""
        reply = await self._ask(m.Neighbours(job), m.NeighbourList)
        found = list(reply.neighbours)
        while reply.more:
            reply = await self._ask(m.Neighbours(job, found[-1].peer), m.NeighbourList)
            found += reply.neighbours
        return found

    async def report(self, task: str, epoch: int, outcome: Outcome) -> None:
        """Raises `Gone` or `Revoked`: nobody waits for it, drop the result."""
        await self._ask(m.Report(task, epoch, outcome), m.Done)

    # submitters

    async def submit(self, spec: JobSpec, key: str) -> str:
        """The job's id; the same `key` gives the same job."""
        return (await self._ask(m.Submit(spec, key), m.Done)).id

    async def collect(self, task: str, epoch: int) -> None:
        """Raises `Gone` where another epoch counts now."""
        await self._ask(m.Collect(task, epoch), m.Done)

    async def watch(self, job: str, version: int, patience: float = 20.0) -> m.JobView:
        """What changed after `version`, at most a page of it (see `JobView.more`)."""
        return await self._ask(m.Watch(job, version, patience), m.JobView)

    async def job(self, job: str) -> m.JobView:
        """The job with all its tasks, by index."""
        view = await self.watch(job, 0, 0.0)
        tasks = {t.index: t for t in view.tasks}
        while view.more:
            view = await self.watch(job, view.version, 0.0)
            tasks |= {t.index: t for t in view.tasks}
        return msgspec.structs.replace(view, tasks=tuple(tasks[i] for i in sorted(tasks)))

    async def jobs(self) -> list[m.JobRow]:
        """All jobs that the caller may see, newest first."""
        reply = await self._ask(m.Jobs(), m.JobList)
        jobs = list(reply.jobs)
        while reply.more:
            reply = await self._ask(m.Jobs(jobs[-1].job), m.JobList)
            jobs += reply.jobs
        return jobs

    async def cancel(self, job: str) -> None:
        await self._ask(m.Cancel(job), m.Done)

    async def put(self, record: m.DatumRecord, draft: str | None = None) -> None:
        await self._ask(m.Put(record, draft), m.Done)

    async def draft(self, draft: str, size: int = 0, replica: int = 0, *, over: bool = False) -> None:
        await self._ask(m.Draft(draft, size, replica, over), m.Done)

    async def forget(self, datum: str) -> None:
        await self._ask(m.Forget(datum), m.Done)

    async def datum(self, name: str = "") -> m.DatumView:
        """By CID or name; "" is the disk that the caller put last."""
        return await self._ask(m.Datum(name), m.DatumView)

    async def data(self) -> list[m.DatumView]:
        """All data that the caller may see, newest first."""
        reply = await self._ask(m.Data(), m.DataList)
        data = list(reply.data)
        while reply.more:
            reply = await self._ask(m.Data(data[-1].record.datum), m.DataList)
            data += reply.data
        return data

    async def nodes(self) -> list[m.NodeView]:
        """All members, by peer id."""
        reply = await self._ask(m.Nodes(), m.NodeList)
        nodes = list(reply.nodes)
        while reply.more:
            reply = await self._ask(m.Nodes(nodes[-1].peer), m.NodeList)
            nodes += reply.nodes
        return nodes

    async def revoke(self, token: str) -> None:
        await self._ask(m.Revoke(token), m.Done)


class Coordinator(Calls):
    """The coordinator `peer`, over `network`."""

    def __init__(self, network: Network, peer: PeerId) -> None:
        self.peer = peer
        self._network = network

    async def _call(self, request: m.Request) -> m.Reply:
        with _answered(self.peer, request):
            channel = await self._network.open(self.peer, m.PROTOCOL)
            try:
                await channel.send(request)
                reply: m.Reply = await channel.receive(m.Reply)
                return reply
            finally:
                with trio.move_on_after(1) as closing:
                    closing.shield = True
                    await channel.aclose()


@attrs.define
class LocalCoordinator(Calls):
    """The coordinator that runs in this process, called as `me`."""

    answer: Callable[[PeerId, m.Request], Awaitable[m.Reply]]
    me: PeerId

    async def _call(self, request: m.Request) -> m.Reply:
        with _answered(self.me, request):
            return await self.answer(self.me, request)
