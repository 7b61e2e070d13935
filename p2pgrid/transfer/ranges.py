"""Say where an origin keeps what, which run of frames to ask of it, and whether its answer is one.

Pure.  An origin is a folder on any HTTP server (`dht/export.py` writes it):

    ORIGIN/objects/CID    a manifest object
    ORIGIN/packs/CID      a pack: its frames in index order, nothing between them

so a run of frames is one byte range (RFC 9110, section 14).  What a server answers is hostile
until its bytes are verified; here only what would make reading it pointless is found.
"""

from __future__ import annotations

import base64
import re
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from typing import Literal
from urllib.parse import quote, unquote, urljoin, urlsplit

import attrs

from p2pgrid.errors import Misused
from p2pgrid.ids import Cid, PeerId
from p2pgrid.transfer.rarity import Chance

RUN_MIN, RUN_MAX = 4, 32
"""Frames of a lot, which is what one request asks for: 4 MiB of a large disk."""
SPREAD = 64
"""Lots of a pack, if they are not too long or too short."""
LOOKS = 256
"""Lots looked at for one that is ours to ask for."""
TEXT_MAX = 2048
"""Characters of an origin's URL."""

Header = Callable[[str], str | None]
"""A header of an answer by its name."""


@attrs.frozen
class Site:
    """Where an origin is."""

    scheme: Literal["http", "https"]
    host: str
    port: int
    path: str
    """Begins with a slash or is empty; ends without one."""
    query: str = attrs.field(repr=False)
    """Goes with every request: some stores' keys do."""
    authorization: str | None = attrs.field(repr=False)

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def shown(self) -> str:
        """For people and logs: without what is secret."""
        return f"{self.scheme}://{self.authority}{self.path}"

    @property
    def peer(self) -> PeerId:
        """Under which name its bytes are counted among those of peers."""
        return PeerId(f"origin {self.authority}"[:64])

    def target(self, kind: Literal["objects", "packs"], cid: Cid) -> str:
        return f"{self.path}/{kind}/{cid}" + (f"?{self.query}" if self.query else "")


PORTS = {"http": 80, "https": 443}


def is_origin(peer: PeerId) -> bool:
    """Whether bytes "of a peer" are an origin's."""
    return peer.startswith("origin ")


def parse_origin(text: str) -> Site:
    """The origin that a person named.  Raises `Misused`."""
    try:
        parts = urlsplit(text)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except (ValueError, UnicodeError):
        raise Misused(why=f"--origin {text[:100]!r} is not a URL") from None
    scheme = parts.scheme
    if scheme not in ("http", "https") or not host or parts.fragment or len(text) > TEXT_MAX:
        raise Misused(why=f"--origin {text[:100]!r}: write http(s)://HOST/FOLDER")
    if not HOST.fullmatch(host) or any(c <= " " or c == "\x7f" for c in text):
        raise Misused(why=f"--origin {text[:100]!r}: there are characters in it that a URL has not")
    secret = None
    if parts.username is not None:
        if scheme == "http":
            raise Misused(why="--origin: a password would be read by everybody on the way; use https")
        words = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        secret = "Basic " + base64.b64encode(words).decode()
    safe = "/%:@!$&'()*+,;=~"
    return Site(
        "https" if scheme == "https" else "http",
        host,
        port or PORTS[scheme],
        quote(parts.path.rstrip("/"), safe=safe),
        quote(parts.query, safe=safe + "?"),
        secret,
    )


HOST = re.compile(r"[0-9A-Za-z._:-]{1,253}")
"""What a name or address that can be asked for is made of."""


# --- what to ask -----------------------------------------------------------------------


def pick(
    candidates: Sequence[int],
    offsets: Sequence[int],
    rng: Chance,
    most: int = RUN_MAX,
    mine: Callable[[int], bool] | None = None,
) -> list[int]:
    """A run of `candidates` (ascending) within one lot, whose frames lie side by side; at most `most`.

    `offsets` has where each frame begins, and the end.  With `mine` only lots are taken for which
    it holds; the run is empty where none is found.
    """
    lot = lot_size(len(offsets) - 1)
    at = rng.randrange(len(candidates))
    for _ in range(LOOKS):
        number = candidates[at] // lot
        if mine is None or mine(number):
            return _stretch(
                candidates, bisect_left(candidates, number * lot), offsets, (number + 1) * lot, most
            )
        at = bisect_left(candidates, (number + 1) * lot)
        at = at if at < len(candidates) else 0
    return []


def lot_size(count: int) -> int:
    """Frames of a lot: `count` frames are shared out in about `SPREAD` lots, if they are not too many."""
    return max(RUN_MIN, min(RUN_MAX, count // SPREAD))


def owner(lot: int, peers: Iterable[PeerId]) -> PeerId:
    """Who asks for this lot first; the same for everybody who knows these peers (Thaler, 1998)."""
    return max(peers, key=lambda peer: (zlib.crc32(f"{lot} {peer}".encode()), peer))


def _stretch(candidates: Sequence[int], at: int, offsets: Sequence[int], stop: int, most: int) -> list[int]:
    run = [candidates[at]]
    for index in candidates[at + 1 : at + most]:
        if index >= stop or offsets[index] != offsets[run[-1] + 1]:
            break
        run.append(index)
    return run


# --- what an answer is worth -------------------------------------------------------------


def wrong_status(status: int, expected: int) -> str:
    """Why an answer with this status is none; empty where it is."""
    if status == expected:
        return ""
    if status == HTTPStatus.OK:
        return "it ignores Range requests (200 instead of 206)"
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return "its file is too short (416)"
    try:
        return f"it answers {status} {HTTPStatus(status).phrase}"
    except ValueError:
        return f"it answers {status}"


def wrong_part(header: Header, first: int, count: int, size: int) -> str:
    """Why a 206 is not the `count` bytes from `first` on of a file of `size`; empty where it is."""
    if (encoding := header("Content-Encoding")) not in (None, "", "identity"):
        return f"it answers in an encoding ({ascii(encoding)[:40]})"
    told = header("Content-Range") or ""
    match = _RANGE.fullmatch(told)
    if not match:
        return f"it answers another range than was asked for ({ascii(told)[:60]})"
    start, end, whole = int(match[1]), int(match[2]), match[3]
    if whole != "*" and int(whole) != size:
        return f"its file has {int(whole)} bytes instead of {size}"
    if (start, end) != (first, first + count - 1):
        return f"it answers bytes {start}-{end} instead of {first}-{first + count - 1}"
    length = header("Content-Length")
    if length is not None and (not _NUMBER.fullmatch(length) or int(length) != count):
        return f"it announces another length than its range has ({ascii(length)[:40]})"
    return ""


_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII)
_NUMBER = re.compile(r"\d{1,18}", re.ASCII)


def redirected(site: Site, target: str, location: str | None) -> str | None:
    """The target on the same server that a redirect names; None where it leads elsewhere.

    Another server is another origin: who runs this one may not choose whom we talk to.
    """
    try:
        parts = urlsplit(urljoin(f"{site.scheme}://{site.authority}{target}", location or ""))
        port = parts.port or PORTS.get(parts.scheme)
    except ValueError:
        return None
    if not location or (parts.scheme, parts.hostname, port) != (site.scheme, site.host.lower(), site.port):
        return None
    path = quote(parts.path, safe="/%:@!$&'()*+,;=~") or "/"
    return path + (f"?{quote(parts.query, safe='/%:@!$&*+,;=~?')}" if parts.query else "")


def pause(failures: int, told: str | None = None, least: float = 1.0, most: float = 60.0) -> float:
    """Seconds before an origin that failed `failures` times in a row is asked again.

    `told`: its own `Retry-After`, as far as it is a number of seconds.
    """
    own = min(least * 2.0 ** min(failures - 1, 20), most)
    if told is not None and _NUMBER.fullmatch(told):
        return min(max(own, float(told)), most)
    return own
