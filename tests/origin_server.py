"""Serve an origin's files over HTTP from memory, as well or as badly as a test wants.

A `Trick` sees each request before it is answered and may answer it itself.
"""

from __future__ import annotations

import contextlib
import re
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.small_disks import SmallDisk

Trick = Callable[["Request"], bool]
"""Answers a request in its own way and returns True, or leaves it alone."""


def files_of(*disks: SmallDisk) -> dict[str, bytes]:
    """What an export of these disks is."""
    from p2pgrid.ids import object_cid

    files = {f"/objects/{object_cid(data)}": data for disk in disks for data in disk.objects}
    return files | {f"/packs/{disk.pack}": b"".join(disk.frames) for disk in disks}


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.connections += 1

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.asked.append((self.path, self.headers.get("Range")))
        try:
            if not (self.server.trick and self.server.trick(self)):
                self.serve()
        except OSError:
            self.close_connection = True

    def serve(self, status: int | None = None, cut: slice | None = None, **headers: str) -> None:
        """As a good server does; `cut` of the body is sent instead of all of it."""
        data = self.server.files.get(self.path)
        if data is None:
            return self.answer(404, b"nothing here")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if asked is None:
            return self.answer(status or 200, data, cut, **headers)
        first, last = int(asked[1]), int(asked[2])
        if first >= len(data):
            return self.answer(416, b"")
        part = data[first : last + 1]
        with self.server.lock:
            self.server.sent += len(part)
        headers.setdefault("Content_Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        return self.answer(status or 206, part, cut, **headers)

    def answer(self, status: int, body: bytes, cut: slice | None = None, **headers: str) -> None:
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(body)))
        for name, value in headers.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[cut] if cut else body)
        if cut:
            self.close_connection = True

    def say(self, raw: bytes) -> None:
        """These bytes, and the end."""
        self.wfile.write(raw)
        self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, files: Mapping[str, bytes], trick: Trick | None, tls: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.files = files
        self.trick = trick
        self.lock = threading.Lock()
        self.asked: list[tuple[str, str | None]] = []
        self.connections = self.sent = 0
        self.stopped = threading.Event()
        self.scheme = "https" if tls else "http"
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_address[1]}"

    @property
    def ranges(self) -> list[str]:
        """The ranges of packs that were asked for."""
        return [part for path, part in self.asked if part is not None]

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that hung up


@contextlib.contextmanager
def served(
    files: Mapping[str, bytes], trick: Trick | None = None, tls: ssl.SSLContext | None = None
) -> Iterator[Server]:
    server = Server(files, trick, tls)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()  # whoever dawdles
        server.shutdown()
        server.server_close()
        thread.join()
