"""Have a node listen at the same ports after a restart, where members and routers know it.

The port for links is the one that was asked for, or the one that the system chose the first time.  It is
shared among sockets of this node (`SO_REUSEPORT`), so whether somebody else has it must be found out before.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from pathlib import Path

import attrs

from p2pgrid.errors import Misconfigured
from p2pgrid.hole_punch.bulk import Links
from p2pgrid.hole_punch.host import Host
from p2pgrid.node.config import Config


def link_port(config: Config) -> int:
    """Where to take links; 0 lets the system choose.  Raises `Misconfigured` where it cannot be had."""
    wanted = config.link_port or config.link_port_before
    if not wanted:
        return 0
    sock = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    with contextlib.closing(sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((config.host, wanted))
        except OSError as refused:
            if not config.link_port:
                return 0  # somebody else has it now; members hear of another one
            why = "somebody else listens there" if refused.errno == errno.EADDRINUSE else refused.strerror
            raise Misconfigured(why=f"no links at {config.host}:{wanted}: {why}") from None
    return wanted


def keep_ports(home: Path, config: Config, host: Host, links: Links) -> None:
    """Write down the ports that the system chose."""
    stored = Config.load(home) or config
    if stored.listen.endswith(":0"):
        port = host.addresses[0].split("/tcp/")[1].split("/")[0]
        stored = attrs.evolve(stored, listen=stored.listen.removesuffix("0") + port)
    stored = attrs.evolve(stored, link_port_before=links.bound[0][1])
    if stored != config:
        stored.save(home)
