"""Be an HTTP proxy that knows where names lead, and lets nobody in without the password it was given."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Asked(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WebProxy

    def log_message(self, *args: object) -> None:
        pass

    def do_CONNECT(self) -> None:
        """Carry bytes that nobody reads here, both ways, until both ends are done."""
        self.close_connection = True
        if not (port := self._port(self.path.rpartition(":")[0])):
            return
        with socket.create_connection(("127.0.0.1", port)) as there:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_carry, args=(there, self.connection))
            back.start()
            _carry(self.connection, there)
            back.join()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if not (port := self._port(parts.hostname)):
            return
        headers = {k: v for k, v in self.headers.items() if k.lower() != "proxy-authorization"}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as there:
            there.request("GET", parts.path, headers=headers)
            answer = there.getresponse()
            body = answer.read()
        self.send_response(answer.status)
        for name in ("Content-Range", "Content-Length"):
            if value := answer.getheader(name):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _port(self, name: str | None) -> int | None:
        """The port that stands for `name`; None where this was refused."""
        self.server.asked.append(f"{self.command} {self.path}")
        if self.server.password and self.headers.get("Proxy-Authorization") != self.server.password:
            self.send_error(407)
        elif name not in self.server.names:
            self.send_error(502)
        else:
            return self.server.names[name]
        return None


def _carry(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


class WebProxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, names: dict[str, int], password: str | None) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.names, self.password = names, password
        self.asked: list[str] = []

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that hung up


@contextlib.contextmanager
def proxied(names: dict[str, int], password: str | None = None) -> Iterator[WebProxy]:
    """A proxy to ports of this computer; `password`: the header that it wants to see."""
    proxy = WebProxy(names, password)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
