"""Be libtorrent in the bench: BitTorrent v1, v2, and v1 with its encryption, over TCP, well tuned.

One process for each node, started as

    python bench/torrent.py FOLDER TORRENT (seed | fetch) ADDRESS (plain | encrypted)

It says that it is ready and waits for a line with everybody's addresses; a fetcher says when the file is
complete and verified; all go on until their input ends.  The seeder has hashed its file before it is
ready: otherwise it does so piece by piece while it sends.  Peers are told of each other, as by a tracker.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, ClassVar

from bench.lab import Host
from bench.peers import Bout, Peer

PORT = 6881
PATIENCE = 900.0
"""Seconds; whoever started it may have been killed."""


# --- in the driver -----------------------------------------------------------------------


class Libtorrent(Peer):
    """What the three have in common."""

    kind: ClassVar[str]
    piece: ClassVar[int] = 0
    """Bytes; 0: as libtorrent chooses."""
    mode: ClassVar[str] = "plain"

    def __init__(self, bout: Bout) -> None:
        super().__init__(bout)
        self.torrent = bout.origin.folder / "file.torrent"
        self.nodes: dict[Host, subprocess.Popen[str]] = {}

    @classmethod
    def absent(cls) -> str | None:
        found = importlib.util.find_spec("libtorrent")
        return None if found else "libtorrent is not installed (pip install libtorrent)"

    def prepare(self) -> None:
        for worker in self.bout.workers if self.bout.old else ():
            shutil.copyfile(self.bout.old, worker.folder / self.bout.file.name)

    def publish(self) -> None:
        file, size = self.bout.file, (65536 if self.kind == "v2_only" else 262144) if self.bout.old else 0
        make = (
            "import sys, libtorrent as lt; file, folder, out, kind, size = sys.argv[1:];"
            "made = lt.create_torrent(lt.list_files(file), int(size), getattr(lt.create_torrent, kind));"
            "lt.set_piece_hashes(made, folder); open(out, 'wb').write(lt.bencode(made.generate()))"
        )
        self.bout.origin.run([sys.executable, "-c", make, file, file.parent, self.torrent, self.kind, size])

    def serve(self) -> None:
        self._begin(self.bout.origin, self.bout.file.parent, "seed")
        _tell(self.nodes[self.bout.origin], [])

    def arm(self, worker: Host) -> None:
        self._begin(worker, worker.folder, "fetch")

    def fetch(self, worker: Host) -> None:
        others = [host.address for host in (self.bout.origin, *self.bout.workers) if host is not worker]
        _tell(self.nodes[worker], others)
        assert _hear(self.nodes[worker])["done"]

    def _begin(self, host: Host, folder: Path, role: str) -> None:
        words = [sys.executable, "-m", "bench.torrent", folder, self.torrent, role, host.address, self.mode]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.nodes[host] = host.start(words, cwd=Path(__file__).parents[1], **pipes)
        assert _hear(self.nodes[host])["ready"]


class LibtorrentV1(Libtorrent):
    name = "libtorrent-v1"
    kind = "v1_only"


class LibtorrentV2(Libtorrent):
    name = "libtorrent-v2"
    kind = "v2_only"


class LibtorrentV1Encrypted(Libtorrent):
    name = "libtorrent-v1-enc"
    kind = "v1_only"
    mode = "encrypted"


def _hear(node: subprocess.Popen[str]) -> dict[str, Any]:
    assert node.stdout is not None
    line = node.stdout.readline()
    if not line:
        raise RuntimeError(f"a libtorrent node ended: {node.wait()}")
    said: dict[str, Any] = json.loads(line)
    return said


def _tell(node: subprocess.Popen[str], what: Any) -> None:
    pipe: IO[str] | None = node.stdin
    assert pipe is not None
    pipe.write(json.dumps(what) + "\n")
    pipe.flush()


# --- one node ----------------------------------------------------------------------------


def settings(address: str, mode: str) -> dict[str, Any]:
    """Everything that is not needed is off; queues are deep enough for a fast LAN."""
    import libtorrent as lt

    chosen: dict[str, Any] = {
        "listen_interfaces": f"{address}:{PORT}",
        "enable_dht": False,
        "enable_lsd": False,
        "enable_upnp": False,
        "enable_natpmp": False,
        "enable_incoming_utp": False,
        "enable_outgoing_utp": False,
        "connection_speed": 500,
        "unchoke_slots_limit": -1,
        "max_out_request_queue": 1500,
        "max_allowed_in_request_queue": 2000,
        "send_buffer_watermark": 3 << 20,
        "send_buffer_low_watermark": 1 << 20,
        "max_queued_disk_bytes": 16 << 20,
        "alert_mask": lt.alert.category_t.status_notification | lt.alert.category_t.error_notification,
    }
    if mode == "encrypted":
        chosen |= {
            "in_enc_policy": int(lt.enc_policy.forced),
            "out_enc_policy": int(lt.enc_policy.forced),
            "allowed_enc_level": int(lt.enc_level.rc4),
        }
    return chosen


def main() -> None:
    import libtorrent as lt

    folder, torrent, role, address, mode = sys.argv[1:]
    session = lt.session(settings(address, mode))
    wanted = lt.add_torrent_params()
    wanted.ti = lt.torrent_info(torrent)
    wanted.save_path = folder
    wanted.flags &= ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
    if role == "seed":
        complete(session, session.add_torrent(wanted))
    say(ready=True)
    others = json.loads(sys.stdin.readline())
    if role == "fetch":
        handle = session.add_torrent(wanted)
        for other in others:
            handle.connect_peer((other, PORT))
        complete(session, handle)
        say(done=True)
    sys.stdin.read()


def complete(session: Any, handle: Any) -> None:
    """Until all of the file is there and verified; what an old file has of it counts."""
    import libtorrent as lt

    limit = time.monotonic() + PATIENCE
    while not handle.status().is_seeding:
        if time.monotonic() > limit:
            sys.exit(f"not complete in {PATIENCE:.0f} s")
        session.wait_for_alert(200)
        for alert in session.pop_alerts():
            if isinstance(alert, lt.torrent_error_alert | lt.file_error_alert):
                sys.exit(str(alert))


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
