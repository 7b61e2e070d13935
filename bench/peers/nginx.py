"""Be nginx and curl in the bench: one server, every worker fetches the whole file, over HTTP or HTTPS.

Also the web server of those who fetch parts of static files (`zsync.py`, `casync.py`).
Nothing is verified but the length, and over HTTPS what TLS 1.3 sees of the bytes on the wire.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from bench.lab import Host
from bench.peers import Bout, Peer
from bench.peers.debian import absent

PORT = 8080

CONFIG = """\
worker_processes 2;
pid {home}/nginx.pid;
error_log {home}/error.log;
user root;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    max_ranges 100000;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    default_type application/octet-stream;
    server {{
        listen {listen};
        {tls}
        root {root};
    }}
}}
"""


def serve_files(host: Host, root: Path, tls: str = "") -> None:
    """Let nginx serve the files below `root`; its socket is open when this returns."""
    home = host.folder / "nginx"
    home.mkdir()
    config = home / "nginx.conf"
    listen = f"{host.address}:{PORT}{' ssl' if tls else ''}"
    config.write_text(CONFIG.format(home=home, listen=listen, tls=tls, root=root))
    host.run(["nginx", "-q", "-c", config, "-e", home / "error.log"])


class Http(Peer):
    name: ClassVar[str] = "http"
    updates: ClassVar[bool] = False

    @classmethod
    def absent(cls) -> str | None:
        return absent("nginx", "curl")

    def serve(self) -> None:
        serve_files(self.bout.origin, self.bout.file.parent)

    def fetch(self, worker: Host) -> None:
        worker.run([*self._words(), "-o", self._output(worker)])

    def _words(self) -> list[str]:
        return ["curl", "-sSf", f"http://{self.bout.origin.address}:{PORT}/{self.bout.file.name}"]

    def _output(self, worker: Host) -> Path:
        return worker.folder / self.bout.file.name


class Https(Http):
    name: ClassVar[str] = "https"

    def __init__(self, bout: Bout) -> None:
        super().__init__(bout)
        self.key = bout.origin.folder / "key.pem"
        self.certificate = bout.origin.folder / "certificate.pem"

    @classmethod
    def absent(cls) -> str | None:
        return absent("nginx", "curl", "openssl")

    def serve(self) -> None:
        address = self.bout.origin.address
        made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        made += ["-subj", "/CN=origin", "-addext", f"subjectAltName=IP:{address}", "-days", "2"]
        self.bout.origin.run([*made, "-keyout", self.key, "-out", self.certificate])
        tls = f"ssl_certificate {self.certificate}; ssl_certificate_key {self.key}; ssl_protocols TLSv1.3;"
        serve_files(self.bout.origin, self.bout.file.parent, tls)

    def _words(self) -> list[str]:
        url = f"https://{self.bout.origin.address}:{PORT}/{self.bout.file.name}"
        return ["curl", "-sSf", "--cacert", str(self.certificate), url]
