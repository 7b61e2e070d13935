"""Say what is known of a pack while it is still being pressed: a draft, and how drafts may go on.

Pure.  Frames are made in index order, so all that is known of a pack after k frames is the beginning of
what is known at its end.  A *draft* is signed by the putter and names lists of frames (`pack.py`), which
may be short; each later draft of the same put repeats those of the one before and adds some:

    first, no lists <── draft: list, list <── draft: list, list, list <── …      by the first one's name

The first one's name stands for the whole series, wherever a pack's name would.  Who sees two drafts of
one series of which neither goes on from the other knows that their signer lies, and believes none.
No guest ever reads a draft: it has no content, only frames.
"""

from __future__ import annotations

import sys
from array import array
from typing import Any, ClassVar

import attrs

from p2pgrid.dht.content import PAGE_SPAN
from p2pgrid.dht.dagcbor import bounded, decode, encode, need, take
from p2pgrid.dht.pack import FRAME_MAX
from p2pgrid.dht.signing import check_signature
from p2pgrid.errors import VerificationFailed
from p2pgrid.ids import DIGEST_SIZE, Cid

MOST_MAX = 1 << 20
"""Frames of a put that is told of before it ends: 256 GiB of chunks; a claim must not cost others memory."""
LISTS_MAX = 8192
"""Lists of a draft."""
NONCE_SIZE = 32


@attrs.frozen
class Draft:
    """The frames that are known so far."""

    first: Cid | None
    """The series; None in the first draft, whose own name it is."""
    nonce: bytes
    """By which two puts of the same disk differ; empty in all but the first draft."""
    most: int
    """Frames that it may come to."""
    count: int
    """Frames in all its lists."""
    lists: tuple[Cid, ...]
    signer: bytes
    signature: bytes = b""

    DOMAIN: ClassVar[bytes] = b"p2pgrid draft v1\0"

    def fields(self) -> dict[str, Any]:
        return {"v": 1, "kind": "draft", "first": self.first, "nonce": self.nonce, "most": self.most,
                "count": self.count, "lists": list(self.lists), "signer": self.signer}  # fmt: skip

    def encode(self) -> bytes:
        return encode({**self.fields(), "signature": self.signature})

    @classmethod
    def decode(cls, data: bytes) -> Draft:
        """Raises `BadObject` when the signature does not hold, too."""
        first, nonce, most, count, lists, signer, signature = take(
            decode(data), "draft", "first", "nonce", "most", "count", "lists", "signer", "signature"
        )
        most = bounded(most, MOST_MAX, "most")
        count = bounded(count, most, "count")
        need(isinstance(lists, list) and all(isinstance(one, Cid) for one in lists), "lists")
        need(len(lists) <= min(count, LISTS_MAX) and bool(lists) == bool(count), "the number of lists")
        if first is None:
            need(isinstance(nonce, bytes) and len(nonce) == NONCE_SIZE and not lists, "a first draft")
        else:
            need(isinstance(first, Cid) and nonce == b"" and bool(lists), "a later draft")
        draft = cls(first, nonce, most, count, tuple(lists), signer, signature)
        check_signature(draft, signer, signature)
        return draft


def read_list(data: bytes) -> tuple[array[int], bytes]:
    """The lengths of a list's frames, and their digests in a row.  Raises `BadObject`."""
    packed, digests = take(decode(data), "frames", "lengths", "digests")
    need(isinstance(packed, bytes) and isinstance(digests, bytes), "frames")
    need(len(packed) % 4 == 0 and 0 < len(packed) <= 4 * PAGE_SPAN, "the number of frames")
    lengths = array("I", packed)
    if sys.byteorder == "little":
        lengths.byteswap()
    need(0 < min(lengths) <= max(lengths) <= FRAME_MAX, "the length of a frame")
    need(len(digests) == DIGEST_SIZE * len(lengths), "the number of digests")
    return lengths, digests


def going_on(series: Cid, newest: Draft, data: bytes) -> Draft | None:
    """The draft in `data`, where it goes on from `newest` of the same `series`; None where it tells no more.

    Raises `BadObject` for what is no draft of the series, and `VerificationFailed` where its signer
    tells two stories.
    """
    draft = Draft.decode(data)
    ours = draft.first == series and draft.signer == newest.signer and draft.most == newest.most
    need(ours, "a draft of another series")
    both = min(len(draft.lists), len(newest.lists))
    if draft.lists[:both] != newest.lists[:both]:
        raise two_stories(series)
    if len(draft.lists) > both and draft.count > newest.count:
        return draft
    if len(draft.lists) > both or (len(newest.lists) == both and draft.count != newest.count):
        raise two_stories(series)
    return None


def two_stories(series: Cid) -> VerificationFailed:
    return VerificationFailed(
        what=f"draft {series}", why="it does not go on from what its signer told before: it lied"
    )
