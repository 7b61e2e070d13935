"""Be one libtorrent node of `swarm.py`: seed a file or fetch it, on loopback, and say when it is done.

    python bench/torrent.py FOLDER TORRENT (seed | fetch)

It says its port and waits for a line with everybody's ports; a fetcher says when it is
complete; both go on until their input ends.  Plain BitTorrent v1 over TCP, not encrypted.
"""

from __future__ import annotations

import json
import sys
import time

import libtorrent as lt

PATIENCE = 900.0
"""Seconds; whoever started it may have been killed."""
SETTINGS = {
    "listen_interfaces": "127.0.0.1:0",
    "allow_multiple_connections_per_ip": True,
    "enable_dht": False,
    "enable_lsd": False,
    "enable_upnp": False,
    "enable_natpmp": False,
    "enable_incoming_utp": False,
    "enable_outgoing_utp": False,
    "alert_mask": lt.alert.category_t.status_notification | lt.alert.category_t.error_notification,
}


def main() -> None:
    folder, torrent, role = sys.argv[1:]
    session = lt.session(SETTINGS)
    wanted = lt.add_torrent_params()
    wanted.ti = lt.torrent_info(torrent)
    wanted.save_path = folder
    wanted.flags &= ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
    if role == "seed":
        wanted.flags |= lt.torrent_flags.seed_mode  # as a putter's store: not hashed again
    handle = session.add_torrent(wanted)
    say(port=session.listen_port())
    ports = json.loads(sys.stdin.readline())
    if role == "fetch":
        for port in ports:
            if port != session.listen_port():
                handle.connect_peer(("127.0.0.1", port))
        limit = time.monotonic() + PATIENCE
        while not handle.status().is_seeding:
            if time.monotonic() > limit:
                sys.exit(f"not complete in {PATIENCE:.0f} s")
            session.wait_for_alert(1000)
            for alert in session.pop_alerts():
                if isinstance(alert, lt.torrent_error_alert | lt.file_error_alert):
                    sys.exit(str(alert))
        say(done=True)
    sys.stdin.read()
    status = handle.status()
    say(sent=status.total_payload_upload, received=status.total_payload_download)


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
