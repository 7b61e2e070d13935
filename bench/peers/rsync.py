"""Be rsync in the bench: a daemon at the origin; a worker finds what it has by rolling checksums.

The workers read the origin's file; what they have of an old version they tell it by checksums of
blocks, so the origin reads and compares for each of them.  A file that came is checked as a whole.
"""

from __future__ import annotations

from typing import ClassVar

from bench.lab import Host
from bench.peers import Peer
from bench.peers.debian import absent, give_old, wait_open

PORT = 873

CONFIG = """\
pid file = {home}/rsyncd.pid
log file = {home}/rsyncd.log
address = {address}
use chroot = no
[files]
    path = {root}
    read only = yes
    uid = root
    gid = root
"""


class Rsync(Peer):
    name: ClassVar[str] = "rsync"

    @classmethod
    def absent(cls) -> str | None:
        return absent("rsync")

    def prepare(self) -> None:
        give_old(self.bout, self.bout.file.name)

    def serve(self) -> None:
        origin = self.bout.origin
        config = origin.folder / "rsyncd.conf"
        config.write_text(
            CONFIG.format(home=origin.folder, address=origin.address, root=self.bout.file.parent)
        )
        origin.start(["rsync", "--daemon", "--no-detach", "--config", config, "--port", PORT])
        wait_open(origin, PORT)

    def fetch(self, worker: Host) -> None:
        source = f"rsync://{self.bout.origin.address}:{PORT}/files/{self.bout.file.name}"
        worker.run(["rsync", "--ignore-times", source, worker.folder / self.bout.file.name])
