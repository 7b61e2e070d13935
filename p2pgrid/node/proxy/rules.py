"""Decide who may reach what through this node.

Pure.  The node that is reached decides, by what it knows itself: which guests run here, by whose order and
what their job accepts; what its owner exposes, and to which job; who asks (the link proves it), and whether
the coordinator says that this peer runs the job in whose name it asks.  What no rule allows is denied.

    a job accepts      PORT             from its submitter's node
                       PORT:job         from guests of the same job, too
                       PORT:JOB         from guests of that job
    an owner exposes   PORT or HOST:PORT to guests of one job
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import attrs
import msgspec
from msgspec import Meta

from p2pgrid.errors import BadFrame, Misused
from p2pgrid.ids import PeerId

Port = Annotated[int, Meta(ge=1, le=65535)]
JobId = Annotated[str, Meta(max_length=64)]
Net = Literal["tcp", "udp"]
TARGET_MAX = 512
SAME = "job"
_PAIR = re.compile(r"(?:([0-9]{1,5}):)?([0-9]{1,5})")
_ACCEPT = re.compile(r"([0-9]{1,5})(?::([a-z0-9]{1,64}))?")


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a stream is opened to: MessagePack, at most 512 bytes."""

    port: Port
    job: JobId = ""
    """Of a guest of this job; empty: what the node exposes."""
    index: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    """The guest of which task, if that matters."""
    caller: JobId = ""
    """In the name of which job, since one of its guests asks; empty: of the asking node's owner."""
    net: Net = "tcp"


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Target)


def encode(target: Target) -> bytes:
    return _encoder.encode(target)


def decode(raw: bytes) -> Target:
    """Raises `BadFrame`."""
    if len(raw) > TARGET_MAX:
        raise BadFrame(why="a target that is too long")
    try:
        return _decoder.decode(raw)
    except msgspec.MsgspecError as broken:
        raise BadFrame(why=str(broken)) from None


@attrs.frozen
class Accept:
    """One rule of a job: who may reach which port of its guests."""

    port: int
    who: str = ""
    """Empty: only who submitted it; `job`: its own guests, too; else another job's."""


def parse_accept(text: str) -> Accept:
    """Raises `Misused`."""
    found = _ACCEPT.fullmatch(text.lower())
    if found is None or not 0 < int(found[1]) < 65536:
        raise Misused(why=f"{text[:80]!r} is not PORT, PORT:job or PORT:JOB, such as 22 or 8080:job")
    return Accept(int(found[1]), found[2] or "")


def parse_port_pair(text: str) -> tuple[int, int]:
    """`3333:22` is port 3333 here and 22 there; `22` any port here.  Raises `Misused`."""
    found = _PAIR.fullmatch(text)
    here, there = (int(found[1] or 0), int(found[2])) if found else (0, 0)
    if here > 65535 or not 0 < there < 65536:
        raise Misused(why=f"{text[:80]!r} is not PORT or HERE:PORT, such as 3333:22")
    return here, there


@attrs.frozen
class Exposure:
    """One rule of an owner: guests of `to` may reach this as `port` of this node."""

    port: int
    to: str
    host: str = ""
    """Empty: this machine itself, of which the owner has named this one port."""
    at: int = 0
    """The port there, where it is another one."""


@attrs.frozen
class HereGuest:
    """A guest that runs here."""

    job: str
    index: int
    submitter: PeerId
    accepts: tuple[Accept, ...] = ()


@attrs.frozen
class Ask:
    """Before this can be decided, the coordinator has to say who runs `job`."""

    job: str


@attrs.frozen
class Denied:
    why: str


Allowed = HereGuest | Exposure
Runs = Mapping[str, frozenset[PeerId]]
"""Who runs which job, as far as the coordinator was asked."""


def decide(
    peer: PeerId, target: Target, guests: Iterable[HereGuest], exposures: Iterable[Exposure], runs: Runs
) -> Allowed | Ask | Denied:
    """What `peer` is connected to."""
    if target.job:
        return _guest(peer, target, guests, runs)
    for exposure in exposures:
        if exposure.port == target.port and exposure.to == target.caller and target.caller:
            return _runs(peer, target.caller, runs) or exposure
    return Denied(f"port {target.port} is not exposed to you here")


def _guest(peer: PeerId, target: Target, guests: Iterable[HereGuest], runs: Runs) -> Allowed | Ask | Denied:
    here = [guest for guest in guests if guest.job == target.job and target.index in (None, guest.index)]
    if not here:
        return Denied(
            f"no guest of {target.job} runs here" + ("" if target.index is None else " as that task")
        )
    guest = min(here, key=lambda guest: guest.index)
    accepts = [rule for rule in guest.accepts if rule.port == target.port]
    if not accepts:
        return Denied(f"{target.job} accepts nobody at port {target.port}")
    if not target.caller:
        return guest if peer == guest.submitter else Denied("you did not submit that job")
    named = {guest.job if rule.who == SAME else rule.who for rule in accepts}
    if target.caller not in named:
        return Denied(f"{target.job} does not accept guests of {target.caller} at port {target.port}")
    return _runs(peer, target.caller, runs) or guest


def _runs(peer: PeerId, job: str, runs: Runs) -> Ask | Denied | None:
    """What stands against it that `peer` asks in the name of `job`."""
    if job not in runs:
        return Ask(job)
    return None if peer in runs[job] else Denied(f"you do not run {job}")
