"""Bring from origins what peers do not bring: the last resort of one fetch.

An origin is asked for

    a chunk (or object) that no connected, answering peer has, once the fetch is `GRACE` old
    any missing chunk, while peers are *slow*: what they brought in the last `WINDOW`
    seconds would take them longer than `NEED` for the rest

and for nothing else, so that with a living swarm it sends nothing.  The swarm (`swarm.py`) does not
know of it: what comes is `Arrived` there, of nobody it asked, and it withdraws what it had asked.
Workers that lack the same chunks share them out without a word (`ranges.owner`), each asks for its
own ones, and has the rest of the others; what they do not get in `YIELD` seconds it asks for, too.

    idle ──> a run of frames ──came──> idle          failed ──> rests 1, 2, 4 … 60 s, then one chunk
"""

from __future__ import annotations

import contextlib
import math
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol

import attrs
import trio

from p2pgrid.dht.shelf import Shelf
from p2pgrid.errors import ChunkCorrupt, GridError, WorldError
from p2pgrid.hole_punch.rates import Rates
from p2pgrid.ids import Cid, PeerId
from p2pgrid.transfer.origin import Origin, OriginFailed
from p2pgrid.transfer.ranges import RUN_MAX, owner, pause, pick
from p2pgrid.transfer.rarity import Chance
from p2pgrid.transfer.session import Wanter
from p2pgrid.transfer.swarm import Arrived, Swarm

GRACE = 3.0
"""Seconds that peers get to be found; and those that are, to say what they have of a pack."""
LOOK = 0.5
"""Seconds between two looks at what is lacking, and a second more for each `LOOK_COST` chunks."""
LOOK_COST = 50_000
LANES = 2
"""Requests for frames at once, of one origin: the next is under way while one is stored."""
YIELD = 2.0
WINDOW = 10.0
NEED = 600.0


class Needy(Protocol):
    """Who fetches."""

    def about(self, shelf: Shelf) -> Wanter:
        """Who is to hear what came of the shelf's pack."""
        ...

    def fail(self, error: GridError) -> None:
        """Nothing more can be stored."""
        ...

    def lacking(self) -> tuple[Shelf, Swarm] | None:
        """What is incomplete, and who brings it; None while it is not known yet."""
        ...

    def paused(self) -> bool:
        """Whether the owner allows nothing to be moved just now."""
        ...

    def peers(self) -> list[PeerId]:
        """Who is connected."""
        ...

    def unheard(self) -> bool:
        """Whether somebody who is connected has yet to say what it has."""
        ...

    def brought(self) -> int:
        """Bytes that peers have brought."""
        ...


@attrs.define(eq=False)
class Course:
    """How it goes with one origin."""

    origin: Origin
    failures: int = 0
    rests_until: float = -math.inf
    why: str = ""
    """What went wrong last; empty where nothing did."""
    wrong: set[int] = attrs.field(factory=set)
    """Chunks of which it sent wrong bytes: asked for when nothing else is left."""

    proved: bool = False
    """Whether its last frames were good."""

    def worked(self) -> None:
        self.failures, self.why = 0, ""

    def failed(self, error: OriginFailed, now: float) -> None:
        """Rest; requests that were under way beside the one that failed count once."""
        self.why, self.proved = error.why, False
        if now >= self.rests_until:
            self.failures += 1
            self.rests_until = now + pause(self.failures, error.again)


@attrs.define(eq=False)
class Slowness:
    """Whether peers are slow, from what they brought in the last `WINDOW` seconds."""

    samples: deque[tuple[float, int]] = attrs.field(factory=deque)

    def look(self, now: float, brought: int, lacking: int) -> bool:
        """`brought`: bytes so far; `lacking`: bytes still to come."""
        self.samples.append((now, brought))
        while len(self.samples) > 2 and self.samples[1][0] <= now - WINDOW:
            self.samples.popleft()
        then, before = self.samples[0]
        return now - then >= WINDOW and (brought - before) * NEED < lacking * (now - then)


class LastResort:
    """The origins of one fetch.  Runs in trio."""

    def __init__(self, needy: Needy, me: PeerId, rng: Chance, rates: Rates) -> None:
        self._needy = needy
        self._rates = rates
        self._me = me
        self._rng = rng
        self._due = trio.current_time() + GRACE
        self._courses: dict[str, Course] = {}
        self._added = trio.Event()
        self._slowness = Slowness()
        self._shelf: Shelf | None = None
        self._hear_until = -math.inf
        self._offsets: Sequence[int] = ()
        self._left = array("I")
        self._look_at = -math.inf
        self._own_at = self._due
        """When something was left that is ours to ask for."""
        self._busy: set[int] = set()

    def add(self, origins: Iterable[str]) -> None:
        """Ask these, too.  Raises `Misused` for what is no URL."""
        for url in origins:
            if url not in self._courses:
                self._courses[url] = Course(Origin(url, rates=self._rates))
                self._added.set()
                self._added = trio.Event()

    def close(self) -> None:
        """Close all connections, once nothing runs any more."""
        for course in self._courses.values():
            course.origin.close()

    def troubles(self) -> dict[str, str]:
        """What went wrong last with each origin that helps no more."""
        return {c.origin.site.shown: c.why for c in self._courses.values() if c.why}

    def shown(self) -> list[str]:
        """The origins there are."""
        return [course.origin.site.shown for course in self._courses.values()]

    # --- objects --------------------------------------------------------------------------

    async def get_object(self, cid: Cid) -> bytes | None:
        """The object, or None where no origin has it now."""
        for course in list(self._courses.values()):
            if trio.current_time() >= max(self._due, course.rests_until) and not self._needy.paused():
                with self._judged(course):
                    return await course.origin.get_object(cid)
        return None  # each rests, or has just failed

    def wait(self, most: float) -> float:
        """Seconds until an origin may be asked for an object, at most `most`."""
        due = min((max(self._due, c.rests_until) for c in self._courses.values()), default=math.inf)
        return min(most, max(due - trio.current_time(), 0.05))

    # --- frames ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Bring frames until cancelled."""
        started: set[str] = set()
        async with trio.open_nursery() as nursery:
            while True:
                for url in self._courses.keys() - started:
                    started.add(url)
                    for _ in range(LANES):
                        nursery.start_soon(self._lane, self._courses[url])
                await self._added.wait()

    async def _lane(self, course: Course) -> None:
        while True:
            await trio.sleep_until(max(self._due, course.rests_until))
            run = [] if self._needy.paused() else self._next(course)
            if not run:
                await trio.sleep(LOOK)
                continue
            assert self._shelf is not None
            self._busy.update(run)
            try:
                await self._bring(course, self._shelf, run)
            finally:
                self._busy.difference_update(run)

    async def _bring(self, course: Course, shelf: Shelf, run: list[int]) -> None:
        peer, wanter = course.origin.site.peer, self._needy.about(shelf)

        def take(index: int, frame: memoryview) -> None:
            try:
                shelf.put_frame(index, frame)
            except ChunkCorrupt:
                course.wrong.add(index)
                raise
            wanter.report(Arrived(peer, index, len(frame)))

        try:
            with self._judged(course):
                await course.origin.get_frames(shelf.pack, run, self._offsets, take)
                course.proved = True
        except WorldError as full:
            self._needy.fail(full)

    @contextlib.contextmanager
    def _judged(self, course: Course) -> Iterator[None]:
        try:
            yield
        except OriginFailed as failed:
            course.failed(failed, trio.current_time())
        else:
            course.worked()

    # --- what to ask for --------------------------------------------------------------------

    def _next(self, course: Course) -> list[int]:
        """The frames to ask of this origin now."""
        self._look()
        shelf, left = self._shelf, self._left
        if shelf is None or not left:
            return []
        fresh = [index for index in left if index not in course.wrong] if course.wrong else left
        most = RUN_MAX if course.proved else 1
        run = self._share(fresh or left, most)
        if not run:
            return []
        at = bisect_left(left, run[0])
        del left[at : at + len(run)]
        return run

    def _share(self, left: Sequence[int], most: int) -> list[int]:
        """A run of what is ours to ask for; of anything, where there was nothing of that for a while."""
        now, peers = trio.current_time(), [self._me, *self._needy.peers()]
        run = pick(left, self._offsets, self._rng, most, lambda lot: owner(lot, peers) == self._me)
        if run:
            self._own_at = now
        elif now >= self._own_at + YIELD:
            run = pick(left, self._offsets, self._rng, most)
        return run

    def _look(self) -> None:
        """See what is lacking, unless that was seen a moment ago."""
        now = trio.current_time()
        lacking = self._needy.lacking()
        if lacking is None or (now < self._look_at and lacking[0] is self._shelf):
            return
        shelf, swarm = lacking
        if shelf is not self._shelf:
            self._shelf, self._offsets = shelf, shelf.frames.offsets()
            self._hear_until = now + GRACE
            self._left = array("I")
            for course in self._courses.values():
                course.wrong.clear()
        if now < self._hear_until and self._needy.unheard():
            return  # of this pack: a parent may have come before, or objects for long
        count = len(shelf.frames.lengths)
        if self._slowness.look(now, self._needy.brought(), shelf.size * swarm.missing // max(1, count)):
            lost: Collection[int] = range(count)
        else:
            lost = swarm.unavailable()
        have = shelf.have()  # the swarm may not have heard yet of what just came
        self._left = array("I", (i for i in lost if i not in self._busy and not have[i >> 3] >> (i & 7) & 1))
        self._look_at = now + LOOK + len(self._left) / LOOK_COST
