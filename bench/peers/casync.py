"""Be casync in the bench: content-defined chunks of 64 KiB by zstd, one file each, over HTTP.

The worker cuts what it has by the same rule and fetches the chunks that it does not find
in it.  Chunks are checked by their names (SHA-512/256).
"""

from __future__ import annotations

from typing import ClassVar

from bench.lab import Host
from bench.peers import Bout, Peer
from bench.peers.debian import absent, give_old
from bench.peers.nginx import PORT, serve_files


class Casync(Peer):
    name: ClassVar[str] = "casync"

    def __init__(self, bout: Bout) -> None:
        super().__init__(bout)
        self.root = bout.origin.folder / "www"
        self.root.mkdir()

    @classmethod
    def absent(cls) -> str | None:
        return absent("casync", "nginx")

    def prepare(self) -> None:
        give_old(self.bout, "old")

    def publish(self) -> None:
        words = ["casync", "make", f"--store={self.root / 'store.castr'}", self.root / "file.caibx"]
        self.bout.origin.run([*words, self.bout.file])

    def serve(self) -> None:
        serve_files(self.bout.origin, self.root)

    def fetch(self, worker: Host) -> None:
        base = f"http://{self.bout.origin.address}:{PORT}"
        known = [f"--seed={worker.folder / 'old'}"] if self.bout.old else []
        words = ["casync", "extract", f"--store={base}/store.castr", *known, f"{base}/file.caibx"]
        worker.run([*words, self.output(worker)], cwd=worker.folder)
