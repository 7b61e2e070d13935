"""Remember how a daemon was set up, so that it starts the same way again."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import attrs

from p2pgrid.errors import Misconfigured, Misused

FILE = "daemon.json"
TICKET = "join.ticket"
MEMBERSHIP = "membership.json"
ROLES = ("coordinator", "submitter", "worker")


@attrs.frozen
class Config:
    """What a daemon is told once; `coordinator` is None where it is its own."""

    roles: tuple[str, ...]
    listen: str = "0.0.0.0:0"
    """ADDRESS:PORT for other nodes; port 0 lets the system choose, and the choice is kept."""
    name: str = attrs.field(factory=socket.gethostname)
    shares: tuple[str, ...] = ()
    slots: int = 1
    """How many VMs may run at once."""
    quota: int | None = None
    """Bytes the chunk store may take; None leaves it to the disk's free space."""
    coordinator: str | None = None
    """Peer id of the grid's coordinator."""
    addresses: tuple[str, ...] = ()
    """Where the coordinator was last reached (multiaddrs)."""
    origins: tuple[str, ...] = ()
    """URLs of folders on web servers, asked for disks where no peer helps; some have passwords in them."""
    ledger: str | None = None
    lease: float = 30.0
    """Seconds that a worker keeps a task without a word to the coordinator; only the coordinator's counts."""
    membership: float = 7 * 86400.0
    """Seconds for which a membership can be shown; only the coordinator's counts."""
    link_port: int = 0
    """The TCP port at which links are taken; 0 lets the system choose."""
    link_port_before: int = 0
    """The one that it chose last."""
    libp2p_places: int = 0
    """Other libp2p nodes that may have a place at this one, to be called through it."""
    libp2p_relays: tuple[str, ...] = ()
    """Other libp2p nodes at which this one has a place (multiaddrs that end in /p2p/ID)."""

    @property
    def multiaddr(self) -> str:
        """`listen` as libp2p writes it."""
        host, _, port = self.listen.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise Misused(why=f"--listen {self.listen!r} is not ADDRESS:PORT")
        host = host.strip("[]")
        return f"/ip{6 if ':' in host else 4}/{host}/tcp/{port}"

    @property
    def host(self) -> str:
        return self.listen.rpartition(":")[0].strip("[]")

    def save(self, home: Path) -> None:
        """Write it to `home`, whole or not at all.  Raises `Misconfigured`."""
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft = home / f"{FILE}.tmp"
            draft.write_text(json.dumps(attrs.asdict(self), indent=2) + "\n")
            os.replace(draft, home / FILE)
        except OSError as refused:
            raise Misconfigured(why=f"cannot keep a daemon's data in {home}: {refused.strerror}") from None

    @classmethod
    def load(cls, home: Path) -> Config | None:
        """The one in `home`, or None.  Raises `Misconfigured` when it cannot be read."""
        try:
            raw: dict[str, Any] = json.loads((home / FILE).read_text())
            facts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
            return cls(**facts)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, AttributeError, OSError) as broken:
            raise Misconfigured(why=f"{home / FILE} cannot be read: {broken}") from None
