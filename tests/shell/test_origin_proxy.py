"""Is an origin asked by the proxy that the environment names, and by no other way?"""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trio

from p2pgrid.transfer import lastresort
from p2pgrid.transfer.origin import Origin, OriginFailed
from tests.certificates import NAME, self_signed
from tests.origin_server import files_of, served
from tests.shell.test_exchange import open_nodes
from tests.small_disks import small_disk
from tests.web_proxy import proxied

DISK = small_disk([1, 0, *range(2, 60)], tail=1000)
SIZE = sum(map(len, DISK.frames))
PASSWORD = "Basic YW5uOmdlaGVpbQ=="


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this computer's own environment counts, and a name is looked up by the proxy only."""
    monkeypatch.setattr(lastresort, "GRACE", 0.1)
    monkeypatch.setattr(lastresort, "LOOK", 0.02)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_disk_comes_by_a_proxy(tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = self_signed(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.file))
    tls = certificate.server() if scheme == "https" else None
    with (
        served(files_of(DISK), tls=tls) as server,
        proxied({NAME: server.server_address[1]}, PASSWORD) as proxy,
    ):
        monkeypatch.setenv(f"{scheme}_proxy", f"http://ann:geheim@{proxy.place}")
        async with open_nodes(tmp_path, "worker") as (worker,):
            with trio.fail_after(30):
                await worker.exchange.fetch(DISK.datum, origins=[f"{scheme}://{NAME}"])
            shelf = worker.store.shelf(DISK.pack)
            assert shelf is not None
            assert shelf.read(0, len(DISK.plain)) == DISK.plain
        assert server.sent == SIZE
        if scheme == "https":
            assert set(proxy.asked) == {f"CONNECT {NAME}:443"}  # it sees no more than that
        else:
            assert len(proxy.asked) == len(server.asked)
            assert all(line.startswith(f"GET http://{NAME}/") for line in proxy.asked)


@pytest.mark.parametrize(
    ("variable", "said", "why"),
    [
        ("https_proxy", "http://{place}", "by the proxy http://{place}: .*407"),
        ("https_proxy", "http://127.0.0.1:1", "by the proxy http://127.0.0.1:1: it refuses connections"),
        ("all_proxy", "socks5://{place}", "all_proxy is not http://HOST:PORT"),
    ],
)
async def test_what_is_wrong_with_a_proxy_is_said(
    tmp_path: Path, variable: str, said: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(files_of(DISK)) as server, proxied({NAME: server.server_address[1]}, PASSWORD) as proxy:
        monkeypatch.setenv(variable, said.format(place=proxy.place))
        there = Origin(f"https://{NAME}")
        with pytest.raises(OriginFailed, match=why.format(place=proxy.place)):
            await there.get_object(DISK.datum)
        there.close()
        assert server.asked == []


async def test_what_no_proxy_names_is_asked_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = self_signed(tmp_path)
    with served(files_of(DISK), tls=certificate.server()) as server, proxied({}) as proxy:
        monkeypatch.setenv("https_proxy", proxy.place)
        there = Origin(server.url, ssl.create_default_context(cafile=certificate.file))
        assert await there.get_object(DISK.datum) == DISK.objects[-1]
        there.close()
        assert proxy.asked == []
