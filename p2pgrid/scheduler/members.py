"""Know who belongs to the grid, and what each may do.

Pure.  The owner is a member with every role, without a ticket and for ever.  A ticket is
verified before it comes here; here its uses are counted, one for each peer however often
that peer joins, and a revoked one counts no longer.

A membership that a node can show (`membership.md`) outlives its end here: whoever lost a role is
told of as long as what was issued to it before could still be taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import attrs
from msgspec.msgpack import encode

from p2pgrid.errors import NotAuthorised
from p2pgrid.ids import PeerId, digest
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.facts import Member, Past, Row, TokenRevoked, TokenUse

OWNER_ROLES = frozenset({"coordinator", "worker", "submitter"})
NEEDS: dict[type[Any], str] = {
    **dict.fromkeys((m.Pull, m.Renew, m.Report), "worker"),
    **dict.fromkeys((m.Submit, m.Collect, m.Watch, m.Jobs, m.Cancel, m.Put, m.Draft, m.Forget,
                     m.Data, m.Datum, m.Nodes), "submitter"),
    m.Revoke: "coordinator",
}  # fmt: skip
"""The role that a request needs; any member may ask the rest."""
INSTANT = 0.001
"""Seconds: what is issued tells its time no more exactly."""


class Admission(Protocol):
    """What a verified ticket grants."""

    @property
    def role(self) -> str: ...
    @property
    def token_id(self) -> str: ...
    @property
    def uses(self) -> int | None: ...
    @property
    def expires(self) -> float: ...


class Members:
    """Members by peer."""

    def __init__(self, owner: PeerId, past: Past, rows: list[Row], now: float, told: float) -> None:
        """`told`: seconds for which a revocation counts."""
        self.owner = owner
        self._told = told
        self._rows = rows
        self._members = {member.peer: member for member in past.members}
        self._members.setdefault(owner, Member(owner, "coordinator", {}, (), now))
        self._revoked = {row.token for row in past.revoked}
        self._uses: dict[str, dict[PeerId, None]] = {}
        for use in past.uses:
            self._uses.setdefault(use.token, {})[use.peer] = None
        self.revocations = m.RevocationList("")
        self._list_revocations(now)

    def __iter__(self) -> Iterator[PeerId]:
        return iter(self._members)

    def __getitem__(self, peer: PeerId) -> Member:
        return self._members[peer]

    def name(self, peer: PeerId | None) -> str:
        """What people call `peer`."""
        return self._members[peer].name if peer in self._members else ""

    def roles(self, peer: PeerId) -> frozenset[str]:
        """What `peer` may do now."""
        if peer == self.owner:
            return OWNER_ROLES
        member = self._members.get(peer)
        if member is None:
            return frozenset()
        return frozenset(role for role, token in member.roles.items() if token not in self._revoked)

    def authorise(self, peer: PeerId, request: m.Request) -> None:
        """Whether `peer` may ask this.  Raises `NotAuthorised`."""
        roles = self.roles(peer)
        if not roles:
            raise NotAuthorised(why="this node is not a member of the grid, or its ticket was revoked")
        need = NEEDS.get(type(request))
        if need is not None and need not in roles:
            raise NotAuthorised(why=f"{type(request).__name__.lower()} needs the role of a {need}")

    def join(self, peer: PeerId, request: m.Join, admission: Admission | None, now: float) -> Member:
        """Take `peer` in, or note its new name.  Raises `NotAuthorised`."""
        member = self._members.get(peer)
        roles = dict(member.roles) if member else {}
        if admission is not None:
            self._admit(peer, admission)
            roles[admission.role] = admission.token_id
        elif not self.roles(peer):
            raise NotAuthorised(why="a new member needs a ticket")
        name = request.name or (member.name if member else peer[-8:])
        since, revoked = (member.joined, member.revoked) if member else (now, 0.0)
        # What it gets now is not void, even if our clock was set back; that older ones hold matters no more.
        revoked = revoked if revoked < now - INSTANT else 0.0
        joined = Member(peer, name, roles, request.shares, since, revoked)
        if joined != member:
            self._members[peer] = joined
            self._rows.append(joined)
            if member and member.revoked != revoked:
                self._list_revocations(now)
        return joined

    def _admit(self, peer: PeerId, admission: Admission) -> None:
        if admission.role not in ("worker", "submitter"):
            raise NotAuthorised(why=f"no ticket makes a {admission.role}")
        if admission.token_id in self._revoked:
            raise NotAuthorised(why="the ticket was revoked")
        users = self._uses.get(admission.token_id, {})
        if peer in users:
            return
        if admission.uses is not None and len(users) >= admission.uses:
            raise NotAuthorised(why=f"the ticket was used {len(users)} times, and is good for no more")
        self._uses[admission.token_id] = users | {peer: None}
        self._rows.append(TokenUse(admission.token_id, peer))

    def dismiss(self, peer: PeerId, now: float) -> None:
        """End a membership."""
        self._void(peer, now, roles={})
        self._list_revocations(now)

    def revoke(self, token: str, now: float) -> list[PeerId]:
        """Refuse a ticket from now on; those who joined with it."""
        peers = [peer for peer, member in self._members.items() if token in member.roles.values()]
        if token not in self._revoked:
            self._revoked.add(token)
            self._rows.append(TokenRevoked(token))
            for peer in peers:
                self._void(peer, now)
            self._list_revocations(now)
        return peers

    def _void(self, peer: PeerId, now: float, **change: Any) -> None:
        self._members[peer] = attrs.evolve(self._members[peer], revoked=now, **change)
        self._rows.append(self._members[peer])

    def _list_revocations(self, now: float) -> None:
        """Only where something changed: of what is out of date nobody need be told."""
        lately = [member for member in self._members.values() if member.revoked > max(0.0, now - self._told)]
        lately.sort(key=lambda member: (member.revoked, member.peer))
        told = tuple(m.Revocation(member.peer, member.revoked) for member in lately[-m.REVOCATIONS_MAX :])
        self.revocations = m.RevocationList(digest(encode(told))[:8].hex() if told else "", told)
