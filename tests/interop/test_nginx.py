"""Is nginx an origin, over HTTP and HTTPS, with what an export writes?"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from p2pgrid.dht.export import export_datum
from p2pgrid.dht.publish import publish_disk
from p2pgrid.dht.store import Store
from p2pgrid.ids import Cid
from p2pgrid.transfer import lastresort
from p2pgrid.transfer.exchange import Exchange, Fetched, open_exchange
from p2pgrid.transfer.origin import CONNECTIONS, Origin, OriginFailed
from tests.certificates import self_signed
from tests.memory_network import open_world
from tests.small_disks import KEY, chunk

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (apt-get install nginx-light)")

CONFIG = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr;
events {{}}
http {{
  log_format seen "$connection $request_method $uri $status $http_range";
  access_log {folder}/access.log seen;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  gzip on; gzip_types *; gzip_min_length 1;
  server {{ listen 127.0.0.1:{plain}; root {root}; }}
  server {{
    listen 127.0.0.1:{secure} ssl; root {root};
    ssl_certificate {folder}/origin.crt; ssl_certificate_key {folder}/origin.key;
  }}
}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def nginx(folder: Path, root: Path) -> Iterator[tuple[str, str]]:
    """The URLs of a server of what is in `root`."""
    self_signed(folder)
    plain, secure = free_port(), free_port()
    config = folder / "nginx.conf"
    config.write_text(CONFIG.format(folder=folder, root=root, plain=plain, secure=secure))
    assert NGINX is not None
    server = subprocess.Popen([NGINX, "-p", str(folder), "-e", "stderr", "-c", str(config)])
    try:
        for port in (plain, secure):
            await_port(port, server)
        yield f"http://127.0.0.1:{plain}", f"https://127.0.0.1:{secure}"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def await_port(port: int, server: subprocess.Popen[bytes]) -> None:
    while True:
        assert server.poll() is None, "nginx did not start"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except ConnectionRefusedError:
            os.sched_yield()


@contextlib.asynccontextmanager
async def worker(root: Path) -> AsyncIterator[Exchange]:
    async with open_world() as world:
        network = world.join(root.name)
        with Store(root, min_free=0) as store:
            async with open_exchange(network, network.index, store, (("127.0.0.1", 0),)) as exchange:
                yield exchange


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Cid, bytes, Path]:
    """A disk that nobody has any more, and where its files are."""
    plain = b"".join(chunk(seed) for seed in (1, 0, *range(2, 150), 3))
    image = tmp_path / "disk.raw"
    image.write_bytes(plain)
    with Store(tmp_path / "putter", min_free=0) as store:
        made = publish_disk(store, image, KEY)
        export_datum(store, made.datum, tmp_path / "www")
    tmp_path.chmod(0o755)
    return made.datum, plain, tmp_path / "www"


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
async def test_a_disk_comes_from_nginx_alone(
    tmp_path: Path, exported: tuple[Cid, bytes, Path], secure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    datum, plain, root = exported
    monkeypatch.setattr(lastresort, "GRACE", 0.1)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "origin.crt"))
    with nginx(tmp_path, root) as urls:
        with trio.fail_after(60):
            async with worker(tmp_path / "worker") as exchange:
                fetched: Fetched = await exchange.fetch(datum, origins=[urls[secure]])
                assert exchange.store.begin(datum).read(0, len(plain)) == plain
                (source,) = fetched.bytes_by_peer
                assert source == f"origin 127.0.0.1:{urls[secure].rpartition(':')[2]}"
        seen = [line.split() for line in (tmp_path / "access.log").read_text().splitlines()]
    parts = [line for line in seen if "/packs/" in line[2]]
    assert all(status == "206" for _, _, _, status, *_ in parts)
    assert len(parts) < len(plain) / (256 << 10) / 2, "frames are asked for together"
    assert len({line[0] for line in seen}) <= CONNECTIONS, "connections are kept"


async def test_an_untrusted_nginx_is_not_asked(tmp_path: Path, exported: tuple[Cid, bytes, Path]) -> None:
    datum, _, root = exported
    with nginx(tmp_path, root) as (_, secure):
        there = Origin(secure, ssl.create_default_context())
        with pytest.raises(OriginFailed, match="not trusted"):
            await there.get_object(datum)
