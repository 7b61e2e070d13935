"""Tell of a pack while it is being pressed, so that others fetch what there is of it.

    press ──frames──> the pack's file          here: list, draft ──> whoever is told
          └─wrote()─> enough that is new?  ──>       shelf of the series, lent to who asks

The first draft says that there is a series, and comes together with the second one: what is pressed in
less than `PERIOD` is not told of.  Drafts end with `close`: then the pack is here itself, or it failed.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path

import attrs
from nacl.signing import SigningKey

from p2pgrid.dht.content import PAGE_SPAN
from p2pgrid.dht.draft import LISTS_MAX, NONCE_SIZE, Draft
from p2pgrid.dht.flat import Digests
from p2pgrid.dht.growing import GrowingShelf
from p2pgrid.dht.pack import encode_frames
from p2pgrid.dht.signing import signed
from p2pgrid.dht.store import Store
from p2pgrid.errors import NotFound
from p2pgrid.ids import Cid, object_cid

PERIOD = 0.25
"""Seconds between two drafts, at least: each costs every worker two small objects."""
STEP = 2 << 20
"""Bytes of frames that make a new draft worth it."""
SHARE = 64
"""Of a long pack a draft tells this part more than the one before: there are some hundreds at most."""


@attrs.frozen
class Grown:
    """A series of drafts has grown."""

    series: Cid
    newest: Cid
    indices: tuple[int, ...]
    """Frames that are new, and here."""
    most: int
    """Frames that it may come to."""


class Drafting:
    """The drafts of one pack.  `told` is called in the thread that presses; `close` it."""

    def __init__(
        self,
        store: Store,
        key: SigningKey,
        most: int,
        told: Callable[[Grown], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._key = key
        self._most = most
        self._told = told
        self._now = now
        self._due = now() + PERIOD
        self._bytes = 0
        """Of the frames that were told of."""
        self._shelf: GrowingShelf | None = None

    def close(self) -> None:
        """Nobody is lent anything any more."""
        if self._shelf is not None:
            with contextlib.suppress(NotFound):  # the store was closed first
                self._store.drafts.drop(self._shelf.pack)
            self._shelf = None

    def wrote(
        self, folder: Path, lengths: Sequence[int], digests: bytearray, size: int, absent: Container[int]
    ) -> None:
        """`size` bytes of frames lie in `folder`, or will: those that are `absent` come last."""
        if size - self._bytes < max(STEP, size // SHARE) or self._now() < self._due:
            return
        shelf = self._shelf or self._begin(folder)
        known = shelf.newest.count
        lists = [
            encode_frames(lengths[at : at + PAGE_SPAN], Digests(digests)[at : at + PAGE_SPAN])
            for at in range(known, len(lengths), PAGE_SPAN)
        ]
        names = (*shelf.newest.lists, *map(object_cid, lists))
        if len(names) > LISTS_MAX:
            return
        draft = Draft(shelf.pack, b"", self._most, len(lengths), names, b"")
        data = signed(draft, self._key).encode()
        self._store.drafts.extend(shelf.pack, data, {object_cid(one): one for one in lists})
        fresh = tuple(index for index in range(known, len(lengths)) if index not in absent)
        shelf.wrote(fresh)
        self._bytes, self._due = size, self._now() + PERIOD
        self._told(Grown(shelf.pack, shelf.newest_cid, fresh, self._most))

    def _begin(self, folder: Path) -> GrowingShelf:
        first = Draft(None, secrets.token_bytes(NONCE_SIZE), self._most, 0, (), b"")
        self._shelf = self._store.drafts.lend(folder, signed(first, self._key).encode())
        return self._shelf
