"""Give the links of a node their turns, in one thread.

An OpenSSL session must not be used by two threads, and with a thread for each link all of them wait for
one interpreter lock: with eight peers that cost as much as the bytes.  So one thread waits for the
sockets of all its links, and a link that can go on has a turn (`link.py`), which never blocks.

    any thread ──call──> inbox ──┐
    sockets, readable, writable ─┼──> turns ──> Link.turn ──> at once again | at a time | when called
    timers ──────────────────────┘

A computer with many cores has several reactors; a link stays with the one it was given to.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import os
import selectors
import socket
import threading
import time
from typing import Protocol

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

CORES_EACH = 2
REACTORS_MAX = 4

Next = tuple[bool, float | None, int]
"""Whether another turn is wanted at once, the seconds after which one is wanted even if nothing happens,
and what the socket is to be watched for meanwhile (`READ`, `WRITE`)."""


def reactors_wanted() -> int:
    """Reactors of one node: for a part of its computer's cores, as there is a guest to run, too."""
    return max(1, min(REACTORS_MAX, (os.cpu_count() or 1) // CORES_EACH))


class Turned(Protocol):
    """What has turns: a link.  Both calls come in the reactor's thread."""

    @property
    def over(self) -> bool:
        """Whether it had its last turn."""
        ...

    def fileno(self) -> int:
        """Of its socket, which may be another one after a turn; less than 0 while it has none.

        A socket is closed in a later turn than the one in which it was given up.
        """
        ...

    def turn(self, readable: bool) -> Next | None:
        """Go on for a bounded time without waiting; None: it is over."""
        ...

    def end(self, why: str) -> None:
        """There are no turns any more; `why` where the link does not know better."""
        ...


class Reactor:
    """The turns of some links.  `call`, `stop` and `len` may be used by any thread."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._selector.register(self._woken, READ)
        self._inbox: collections.deque[Turned] = collections.deque()
        self._watched: dict[Turned, tuple[int, int]] = {}
        """Each link's socket, and what it is watched for."""
        self._timers: list[tuple[float, int, Turned]] = []
        self._due: dict[Turned, float] = {}
        """When each link wants a turn; a timer of another time is void."""
        self._again: dict[Turned, None] = {}
        self._order = 0
        self._thread = 0
        self._turning: Turned | None = None
        self._asleep = self._stopped = False

    def __len__(self) -> int:
        return len(self._watched)

    def call(self, link: Turned) -> None:
        """Let `link` have a turn soon: its first one, or because there is something to do."""
        if link is self._turning and threading.get_ident() == self._thread:
            return  # what there is to do is done in this turn, or it says that it wants another
        self._inbox.append(link)  # before the look: who falls asleep says so before it looks in here
        if self._asleep:
            self._ring()

    def stop(self) -> None:
        """Let `run` return as soon as no link is left."""
        self._stopped = True
        self._ring()

    def _ring(self) -> None:
        self._asleep = False
        with contextlib.suppress(OSError):  # full of the like already, or over
            self._waker.send(b"\0")

    def run(self) -> None:
        """Be the thread."""
        self._thread = threading.get_ident()
        try:
            while not self._stopped or self._watched or self._inbox:
                for link, readable in self._ready().items():
                    self._turn(link, readable)
        finally:
            for link in {**self._watched, **dict.fromkeys(self._inbox)}:
                link.end("our own mistake")
            self._selector.close()
            self._woken.close()
            self._waker.close()

    def _ready(self) -> dict[Turned, bool]:
        """Wait until a link can go on: those that can, and whether something has come for them."""
        turns = dict.fromkeys(self._again, False)
        self._again = {}
        for key, events in self._selector.select(self._patience(at_once=bool(turns))):
            if key.fileobj is self._woken:
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
            else:
                turns[key.data] = bool(events & READ)
        self._asleep = False
        while self._inbox:
            turns.setdefault(self._inbox.popleft(), False)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            at, _, link = heapq.heappop(self._timers)
            if self._due.get(link) == at:
                turns.setdefault(link, False)
        return turns

    def _patience(self, *, at_once: bool) -> float | None:
        """Seconds to wait for sockets; from here on a call rings."""
        if at_once:
            return 0.0
        self._asleep = True
        if self._inbox or self._stopped:
            return 0.0
        while self._timers and self._due.get(self._timers[0][2]) != self._timers[0][0]:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _turn(self, link: Turned, readable: bool) -> None:
        if link not in self._watched:
            if link.over:
                return  # called once more after its end
            self._watched[link] = -1, 0
        self._turning = link
        then = link.turn(readable)
        self._turning = None
        if then is None:
            self._watch(link, -1, 0)
            del self._watched[link]
            self._due.pop(link, None)
            link.end("")
            return
        again, wait, wanted = then
        fd = link.fileno()
        if (fd, wanted) != self._watched[link]:
            self._watch(link, fd, wanted)
        if again:
            self._again[link] = None
        if wait is None or again:
            self._due.pop(link, None)
        else:
            self._order += 1
            self._due[link] = at = time.monotonic() + wait
            heapq.heappush(self._timers, (at, self._order, link))

    def _watch(self, link: Turned, fd: int, wanted: int) -> None:
        """A selector watches for something or does not know the socket."""
        if fd < 0:
            wanted = 0
        (fd_before, before), self._watched[link] = self._watched[link], (fd, wanted)
        if before and (fd != fd_before or not wanted):
            self._selector.unregister(fd_before)
            before = 0
        if before:
            self._selector.modify(fd, wanted, link)
        elif wanted:
            self._selector.register(fd, wanted, link)
