"""Name every system that the bench can run, p2pgrid among them, and what each of them has to do.

A *bout* is one run of one system: an origin that has a file, and N workers that want it, each
a host in a network namespace of its own.  The driver makes the hosts, makes one `Peer` for
the bout, and calls it in this order; what is measured is marked:

    Peer(bout)
    prepare()            everything from before the file was known: daemons run; where `bout.old` is, both
                         ends get that version, in the way the system keeps it (from anywhere: not counted)
    publish()            MEASURED on its own: what must be made of `bout.file` before it can be fetched
    serve()              the origin's server runs and can be reached when this returns
    arm(worker)          of each worker: a process that waits for the word, where the system has one
    fetch(worker)        MEASURED: of all workers at one moment, in a thread each; returns when this
                         worker has the whole file, verified as the system verifies it
    output(worker)       when all is measured: compared with `bout.file` byte by byte

What a system starts, it starts by `host.start()` or `host.run()`: in the host's namespace and
accounts (CPU, memory), ended with the bout whatever happens.  Nothing else needs to be taken
down.  Hosts reach each other at `host.address`; every port is free.  `host.folder` is the
host's own scratch, on tmpfs unless the person says otherwise; it is empty when the bout begins and
goes with it.  `bout.file` and `bout.old` lie elsewhere and are only to be read: a server may serve
them from where they are.

To add a system: a class with these verbs in `bench/peers/NAME.py`, and a line in `PEERS`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, ClassVar

import attrs

from bench.lab import Host


@attrs.frozen
class Bout:
    """What one run of one system is about."""

    file: Path
    """What the origin publishes and every worker is to get."""
    old: Path | None
    """The version that every worker has already; None: they have nothing."""
    origin: Host
    workers: list[Host]


class Peer:
    """One system in one bout.  What fails raises: the bout is given up, and told as failed."""

    name: ClassVar[str]
    updates: ClassVar[bool] = True
    """Whether it can do anything with an old version."""

    def __init__(self, bout: Bout) -> None:
        self.bout = bout

    @classmethod
    def absent(cls) -> str | None:
        """Why it cannot run on this machine; None if it can."""
        return None

    def prepare(self) -> None:
        """Be where one is before the file is known: with `bout.old` at both ends, if there is one."""

    def publish(self) -> None:
        """Make of `bout.file` what can be fetched."""

    def serve(self) -> None:
        """Let it be fetched; it can be reached when this returns."""

    def arm(self, worker: Host) -> None:
        """Let `worker` wait for the word."""

    def fetch(self, worker: Host) -> None:
        """Bring the file to `worker`; called in a thread of its own."""
        raise NotImplementedError

    def output(self, worker: Host) -> Path | None:
        """The file that `worker` got, written now where the system keeps it otherwise; None: not compared."""
        return worker.folder / self.bout.file.name

    def facts(self) -> dict[str, Any]:
        """What only the system itself knows, for its JSON line; asked when the last worker is done."""
        return {}


PEERS = {
    "p2pgrid": "bench.ours:P2pgrid",
    "p2pgrid-written": "bench.ours:P2pgridWritten",
    "libtorrent-v1": "bench.torrent:LibtorrentV1",
    "libtorrent-v2": "bench.torrent:LibtorrentV2",
    "libtorrent-v1-enc": "bench.torrent:LibtorrentV1Encrypted",
    "http": "bench.peers.nginx:Http",
    "https": "bench.peers.nginx:Https",
    "aria2": "bench.peers.aria2:Aria2",
    "rsync": "bench.peers.rsync:Rsync",
    "zsync": "bench.peers.zsync:Zsync",
    "casync": "bench.peers.casync:Casync",
}
"""Name to `module:class`, in the order of the tables; a module is loaded when its system is to run."""


def peer(name: str) -> type[Peer]:
    module, _, found = PEERS[name].partition(":")
    made: type[Peer] = getattr(importlib.import_module(module), found)
    return made
