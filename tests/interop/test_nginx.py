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
from tests.grid_processes import p2pgrid, until
from tests.memory_network import open_world
from tests.small_disks import KEY, changed, chunk

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (apt-get install nginx-light)")

CONFIG = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr;
events {{}}
http {{
  log_format seen "$connection $request_method $uri $status $body_bytes_sent $http_range";
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


def log_of(folder: Path) -> list[list[str]]:
    """What was asked: connection, method, path, status, bytes, range."""
    return [line.split() for line in (folder / "access.log").read_text().splitlines()]


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
        seen = log_of(tmp_path)
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


def test_an_update_goes_from_put_to_a_file_by_nginx_alone(tmp_path: Path) -> None:
    """By command lines, the putter down: what is new to who has the old version, all to who has nothing."""
    old = [chunk(seed) for seed in range(1, 60)]
    new = [changed(part, at) if at % 4 == 0 else part for at, part in enumerate(old)] + [chunk(-1)]
    for name, parts in (("old", old), ("new", new)):
        (tmp_path / f"{name}.raw").write_bytes(b"".join(parts))
    www, home = tmp_path / "www", tmp_path / "putter"
    try:
        first = p2pgrid("put", tmp_path / "old.raw", "--export", www, "--json", home=home).json
        put = p2pgrid("put", tmp_path / "new.raw", "--parent", "old.raw", "--json", home=home).json
        assert put["parent"] == first["content"]
        exported = p2pgrid("disk", "export", "new.raw", www, "--json", home=home).json
        assert exported["packs"] == 2
    finally:
        assert p2pgrid("down", home=home).code == 0
    delta, whole = put["delta_bytes"], first["wire_bytes"]
    assert put["wire_bytes"] == whole + delta
    assert 4 * delta < whole + delta
    tmp_path.chmod(0o755)
    with nginx(tmp_path, www) as (url, _):
        for name, steps in (("nothing", {"new": whole + delta}), ("parent", {"old": whole, "new": delta})):
            home = tmp_path / name
            try:
                for version, size in steps.items():
                    seen, out = len(log_of(tmp_path)), tmp_path / f"{name}-{version}.raw"
                    cid = {"old": first, "new": put}[version]["disk"]
                    got = p2pgrid("get", cid, "--origin", url, "-o", out, home=home)
                    assert got.code == 0, got.err
                    assert out.read_bytes() == (tmp_path / f"{version}.raw").read_bytes()

                    def sent(seen: int = seen) -> int:
                        parts = [line for line in log_of(tmp_path)[seen:] if "/packs/" in line[2]]
                        assert {line[3] for line in parts} <= {"206"}
                        return sum(int(line[4]) for line in parts)

                    until(lambda n=size, sent=sent: sent() >= n, "nginx has logged it", 10.0)
                    assert sent() == size
            finally:
                assert p2pgrid("down", home=home).code == 0
