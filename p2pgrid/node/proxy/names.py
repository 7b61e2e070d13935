"""Read the names by which programs call what is on the grid.

Pure.  A name ends in `.grid`; case does not matter, and a last dot is allowed:

    8080.JOB.grid           port 8080 of a guest of that job
    8080.3.JOB.grid         of the guest of its task 3; `task3` is understood, too
    8000.NODE.grid          port 8000 of a node, where it is exposed
    8000.owner.grid         of the node from which the job was submitted in whose guest this is asked

Without a port the one is meant that the program connects to.  JOB is a job's id; NODE a node's name
or its peer id as `label` spells it, since base58 tells upper from lower case and names do not.
"""

from __future__ import annotations

import base64
import re

import attrs

from p2pgrid.errors import Misused
from p2pgrid.ids import PeerId

SUFFIX = ".grid"
NAME_MAX = 253
OWNER = "owner"
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_JOB = re.compile(r"[a-z2-7]{10}")
_PEER_BYTES = 38
"""An Ed25519 key as a peer id: multihash 00 24, then 36 bytes of key."""


@attrs.frozen
class GridName:
    """What a name says."""

    port: int
    label: str
    """A job's id, a node's name or spelled peer id, or `owner`."""
    index: int | None = None
    """Which task of a job, if that was said."""

    @property
    def job(self) -> str | None:
        return self.label if _JOB.fullmatch(self.label) else None

    @property
    def peer(self) -> PeerId | None:
        return peer_of(self.label)


def is_grid(host: str) -> bool:
    return host.lower().removesuffix(".").endswith(SUFFIX)


def parse(host: str, port: int) -> GridName:
    """The meaning of `host`, to whose `port` a program connects.  Raises `Misused`."""
    plain = host.lower().removesuffix(".")
    if len(host) > NAME_MAX or not is_grid(host):
        raise Misused(why=f"{host[:80]!r} is no name on the grid, which ends in {SUFFIX}")
    labels = plain.removesuffix(SUFFIX).split(".")
    if not all(map(_LABEL.fullmatch, labels)):
        raise Misused(why=f"{host[:80]!r} is not a name: its labels are of a-z, 0-9, - and _")
    *before, label = labels
    numbers = [_number(host, text) for text in before]
    found = GridName(port, label)
    if found.job is not None and len(numbers) == 2:
        return attrs.evolve(found, port=_port(host, numbers[0]), index=numbers[1])
    if found.job is not None and len(numbers) == 1 and before[0].startswith("task"):
        return attrs.evolve(found, index=numbers[0])
    if len(numbers) > 1 or (before and before[0].startswith("task")):
        raise Misused(
            why=f"{host[:80]!r}: it is PORT.NODE{SUFFIX}, PORT.JOB{SUFFIX} or PORT.TASK.JOB{SUFFIX}"
        )
    return attrs.evolve(found, port=_port(host, numbers[0] if numbers else port))


def _number(host: str, text: str) -> int:
    digits = text.removeprefix("task")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 10):
        raise Misused(why=f"{host[:80]!r}: {text!r} is neither a port nor a task's number")
    return int(digits)


def _port(host: str, port: int) -> int:
    if not 0 < port < 65536:
        raise Misused(why=f"{host[:80]!r}: there is no port {port}")
    return port


def label(peer: PeerId) -> str:
    """A peer id as a label: its bytes in base32, in lower case and without padding."""
    number = 0
    for character in peer:
        number = number * 58 + _BASE58.index(character)
    return base64.b32encode(number.to_bytes(_PEER_BYTES, "big")).decode().rstrip("=").lower()


def peer_of(text: str) -> PeerId | None:
    """The peer id that `label` spelled so; None where it is no such spelling."""
    try:
        raw = base64.b32decode(text.upper() + "=" * (-len(text) % 8))
    except ValueError:
        return None
    if len(raw) != _PEER_BYTES or raw[:2] != b"\0\x24":
        return None
    number, found = int.from_bytes(raw, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        found = _BASE58[digit] + found
    peer = PeerId("1" + found)
    return peer if label(peer) == text else None
