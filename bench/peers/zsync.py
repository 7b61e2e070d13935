"""Be zsync in the bench: rolling checksums made once, a static web server, Range requests.

The worker does the comparing, so the origin's cost does not grow with what they have.
The whole file is checked (SHA-1) in the end.
"""

from __future__ import annotations

from typing import ClassVar

from bench.lab import Host
from bench.peers import Bout, Peer
from bench.peers.debian import absent, give_old
from bench.peers.nginx import PORT, serve_files


class Zsync(Peer):
    name: ClassVar[str] = "zsync"

    def __init__(self, bout: Bout) -> None:
        super().__init__(bout)
        self.root = bout.origin.folder / "www"
        self.root.mkdir()
        (self.root / bout.file.name).symlink_to(bout.file)

    @classmethod
    def absent(cls) -> str | None:
        return absent("zsync", "zsyncmake", "nginx")

    def prepare(self) -> None:
        give_old(self.bout, "old")

    def publish(self) -> None:
        file = self.root / self.bout.file.name
        made = ["zsyncmake", "-u", file.name, "-o", self.root / "file.zsync", file]
        self.bout.origin.run(made)

    def serve(self) -> None:
        serve_files(self.bout.origin, self.root)

    def fetch(self, worker: Host) -> None:
        known = ["-i", worker.folder / "old"] if self.bout.old else []
        url = f"http://{self.bout.origin.address}:{PORT}/file.zsync"
        worker.run(["zsync", "-q", *known, "-o", self.output(worker), url], cwd=worker.folder)
