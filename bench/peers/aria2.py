"""Be aria2 in the bench: BitTorrent v1 over plain TCP, peers told by a tracker at the origin.

    python -m bench.peers.aria2 torrent FILE TRACKER OUT     what `publish` runs: SHA-1 of every piece
    python -m bench.peers.aria2 track ADDRESS PEER…          what `serve` runs: the tracker

aria2 learns of peers from trackers, multicast or a DHT only; the tracker tells everyone of all
hosts of the bout, whoever asks.  Seeders do not hash their file; a worker goes on seeding when
it is complete.
"""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from bench.lab import Host
from bench.peers import Bout, Peer
from bench.peers.debian import absent, give_old, wait_open

PORT = 6881
TRACKER = 6969
PIECE = 256 << 10
"""Bytes of a piece; an update that looks for what is still in place gains by small ones."""
MODULE = [sys.executable, "-m", "bench.peers.aria2"]
ROOT = Path(__file__).parents[2]

OPTIONS = (
    *("--no-conf=true", "--quiet=true", "--file-allocation=none", "--enable-dht=false"),
    *("--enable-dht6=false", "--disable-ipv6=true", "--bt-enable-lpd=false", "--enable-peer-exchange=false"),
    *(f"--listen-port={PORT}", "--seed-ratio=0.0", "--bt-request-peer-speed-limit=100M"),
    *("--bt-max-peers=0", "--disk-cache=16M", "--max-overall-upload-limit=0"),
)


class Aria2(Peer):
    name: ClassVar[str] = "aria2"

    def __init__(self, bout: Bout) -> None:
        super().__init__(bout)
        self.torrent = bout.origin.folder / "file.torrent"
        self.seen = bout.origin.folder / "seed"
        self.seen.mkdir()
        (self.seen / bout.file.name).symlink_to(bout.file)

    @classmethod
    def absent(cls) -> str | None:
        return absent("aria2c")

    def prepare(self) -> None:
        give_old(self.bout, self.bout.file.name)

    def publish(self) -> None:
        url = f"http://{self.bout.origin.address}:{TRACKER}/announce"
        self.bout.origin.run([*MODULE, "torrent", self.bout.file, url, self.torrent], cwd=ROOT)

    def serve(self) -> None:
        origin = self.bout.origin
        hosts = [host.address for host in (origin, *self.bout.workers)]
        origin.start([*MODULE, "track", *hosts], cwd=ROOT)
        wait_open(origin, TRACKER)
        unhashed = ["--bt-seed-unverified=true", "--check-integrity=false"]
        origin.start(["aria2c", *OPTIONS, *unhashed, f"--dir={self.seen}", self.torrent])
        wait_open(origin, PORT)

    def fetch(self, worker: Host) -> None:
        hook = worker.folder / "complete"
        hook.write_text("#!/bin/sh\necho complete\n")
        hook.chmod(0o755)
        words = ["aria2c", *OPTIONS, f"--dir={worker.folder}", f"--on-bt-download-complete={hook}"]
        known = ["--check-integrity=true", "--allow-overwrite=true"] if self.bout.old else []
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = worker.start([*words, *known, self.torrent], **pipes)
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            if line.strip() == "complete":
                return
            said.append(line)
        raise RuntimeError(f"aria2c ended with {process.wait()}: {''.join(said[-10:])}")


# --- a torrent ---------------------------------------------------------------------------


def bencode(value: Any) -> bytes:
    match value:
        case bytes():
            return b"%d:%s" % (len(value), value)
        case str():
            return bencode(value.encode())
        case int():
            return b"i%de" % value
        case dict():
            pairs = sorted((key.encode(), each) for key, each in value.items())
            return b"d" + b"".join(bencode(key) + bencode(each) for key, each in pairs) + b"e"
    raise TypeError(type(value))


def make_torrent(file: Path, tracker: str, out: Path) -> None:
    with file.open("rb") as data:
        pieces = b"".join(hashlib.sha1(piece).digest() for piece in iter(lambda: data.read(PIECE), b""))
    info = {"name": file.name, "length": file.stat().st_size, "piece length": PIECE, "pieces": pieces}
    out.write_bytes(bencode({"announce": tracker, "info": info}))


# --- a tracker ---------------------------------------------------------------------------


def track(address: str, peers: list[str]) -> None:
    """Tell every caller of all `peers`, for ever."""
    known = b"".join(socket.inet_aton(peer) + PORT.to_bytes(2, "big") for peer in peers)
    answer = bencode({"interval": 5, "min interval": 1, "complete": 1, "incomplete": 1, "peers": known})

    class Announce(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    ThreadingHTTPServer((address, TRACKER), Announce).serve_forever()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["torrent", file, tracker, out]:
            make_torrent(Path(file), tracker, Path(out))
        case ["track", address, *rest]:
            track(address, [address, *rest])
