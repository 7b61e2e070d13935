"""Is a disk had from an origin when no peer helps, from one that misbehaves, too, and only then?"""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import attrs
import pytest
import trio

from p2pgrid.dht.store import Store
from p2pgrid.errors import Misused
from p2pgrid.hole_punch.rates import Limits
from p2pgrid.ids import PeerId
from p2pgrid.transfer import lastresort, objects, origin
from p2pgrid.transfer.exchange import Exchange, Progress, open_exchange
from p2pgrid.transfer.origin import CONNECTIONS, Origin, OriginFailed
from tests.certificates import Certificate, self_signed
from tests.memory_network import MemoryNetwork, MemoryWorld, open_world
from tests.origin_server import Request, Server, files_of, served
from tests.small_disks import SmallDisk, small_disk

DISK = small_disk([1, 0, 2, 3, 1, 0, *range(4, 90)], tail=1000)
SIZE = sum(map(len, DISK.frames))
GRACE = lastresort.GRACE


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a real server gets in seconds, in tenths."""
    monkeypatch.setattr(lastresort, "GRACE", 0.1)
    monkeypatch.setattr(lastresort, "LOOK", 0.02)
    monkeypatch.setattr(lastresort, "pause", lambda failures, told: 0.02)


@attrs.frozen
class Node:
    network: MemoryNetwork
    store: Store
    exchange: Exchange


@contextlib.asynccontextmanager
async def open_nodes(root: Path, *names: str) -> AsyncIterator[list[Node]]:
    with trio.fail_after(100):
        async with open_world() as world, contextlib.AsyncExitStack() as stack:
            yield [await stack.enter_async_context(open_node(world, name, root)) for name in names]


@contextlib.asynccontextmanager
async def open_node(world: MemoryWorld, name: str, root: Path) -> AsyncIterator[Node]:
    network, rng = world.join(name), random.Random(name)
    with Store(root / name, min_free=0) as store:
        async with open_exchange(network, network.index, store, (("127.0.0.1", 0),), rng=rng) as exchange:
            yield Node(network, store, exchange)


def hold(node: Node, indices: range | None = None) -> None:
    DISK.put_objects(node.store)
    shelf = node.store.begin(DISK.datum)
    for index in indices if indices is not None else range(len(DISK.frames)):
        shelf.put_frame(index, DISK.frames[index])


def is_whole(node: Node, disk: SmallDisk = DISK) -> bool:
    shelf = node.store.shelf(disk.pack)
    return shelf is not None and shelf.complete and shelf.read(0, len(disk.plain)) == disk.plain


async def until(true: Callable[[], object]) -> None:
    """Look again and again; the test's own time is the bound."""
    while not true():  # noqa: ASYNC110  (threads of sockets are waited for)
        await trio.sleep(0.01)


def know(node: Node, other: Node) -> list[PeerId]:
    node.network.learn(other.network.me, other.network.addresses)
    return [other.network.me]


def name_of(server: Server) -> PeerId:
    return PeerId(f"origin 127.0.0.1:{server.server_address[1]}")


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return self_signed(tmp_path)


# --- when all is well ----------------------------------------------------------------------


async def test_a_disk_comes_from_an_origin_alone(tmp_path: Path) -> None:
    with served(files_of(DISK)) as server:
        async with open_nodes(tmp_path, "alone") as (alone,):
            reports: list[Progress] = []
            fetched = await alone.exchange.fetch(DISK.datum, (), reports.append, origins=[server.url + "/"])
            assert is_whole(alone)
            assert fetched.bytes_by_peer == {name_of(server): SIZE}
            assert reports[-1].bytes_done == SIZE
        assert server.sent == SIZE
        assert server.connections <= CONNECTIONS
        assert len(server.ranges) < len(DISK.frames) / 2


async def test_a_disk_comes_over_tls_from_one_that_is_trusted(
    tmp_path: Path, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.file))
    with served(files_of(DISK), tls=certificate.server()) as server:
        async with open_nodes(tmp_path, "alone") as (alone,):
            await alone.exchange.fetch(DISK.datum, origins=[server.url])
            assert is_whole(alone)


async def test_a_living_swarm_leaves_the_origin_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lastresort, "GRACE", GRACE)
    with served(files_of(DISK)) as server:
        async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
            hold(putter)
            fetched = await worker.exchange.fetch(DISK.datum, know(worker, putter), origins=[server.url])
            assert is_whole(worker)
            assert fetched.bytes_by_peer == {putter.network.me: SIZE}
        assert server.asked == []


async def test_only_what_no_peer_has_is_asked_of_the_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lastresort, "GRACE", GRACE)
    with served(files_of(DISK)) as server:
        async with open_nodes(tmp_path, "part", "worker") as (part, worker):
            hold(part, range(70))
            fetched = await worker.exchange.fetch(DISK.datum, know(worker, part), origins=[server.url])
            assert is_whole(worker)
            lacking = sum(map(len, DISK.frames[70:]))
            assert fetched.bytes_by_peer == {part.network.me: SIZE - lacking, name_of(server): lacking}
        assert not any("/objects/" in path for path, _ in server.asked)


async def test_workers_share_out_what_the_origin_has_to_send(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lastresort, "GRACE", GRACE)  # they have met by then
    monkeypatch.setattr(lastresort, "YIELD", 10.0)  # nobody's turn is taken because this machine is busy
    with served(files_of(DISK)) as server:
        async with open_nodes(tmp_path, "a", "b", "c") as workers:
            for worker in workers:
                for other in workers:
                    if worker is not other:
                        await worker.exchange.session(*know(worker, other))
            async with trio.open_nursery() as nursery:
                for worker in workers:
                    peers = [p for other in workers if other is not worker for p in know(worker, other)]
                    complete = worker.exchange.fetch
                    nursery.start_soon(lambda f=complete, p=peers: f(DISK.datum, p, origins=[server.url]))
            assert all(map(is_whole, workers))
        assert server.sent < 1.3 * SIZE


async def test_while_peers_are_slow_the_origin_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lastresort, "WINDOW", 0.3)
    with served(files_of(DISK)) as server:
        async with open_nodes(tmp_path, "putter", "worker") as (putter, worker):
            hold(putter)
            shelf = putter.store.shelf(DISK.pack)
            assert shelf is not None
            get_frame, gate = shelf.get_frame, threading.Event()

            def slow(index: int) -> bytes:
                gate.wait(5)
                return get_frame(index)

            monkeypatch.setattr(shelf, "get_frame", slow)
            try:
                await worker.exchange.fetch(DISK.datum, know(worker, putter), origins=[server.url])
            finally:
                gate.set()
            assert is_whole(worker)
            assert server.sent > 0.9 * SIZE


async def test_a_second_fetch_brings_its_origin_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "SEARCH", 0.1)
    with served(files_of(DISK)) as server:
        async with open_nodes(tmp_path, "alone") as (alone,), trio.open_nursery() as nursery:
            nursery.start_soon(alone.exchange.fetch, DISK.datum)
            await trio.testing.wait_all_tasks_blocked(0.05)
            await alone.exchange.fetch(DISK.datum, origins=[server.url])
            assert is_whole(alone)


# --- when it misbehaves --------------------------------------------------------------------


def bad_status(status: int, **headers: str):
    return lambda r: (r.answer(status, b"no", **headers), True)[1]


def wrong_bytes(r: Request) -> bool:
    r.server.files = {path: bytes(len(data)) for path, data in r.server.files.items()}
    r.serve()
    return True


def dawdle(r: Request) -> bool:
    r.server.stopped.wait(10)
    return True


def drip(r: Request) -> bool:
    r.send_response(200)
    r.end_headers()
    while not r.server.stopped.wait(0.1):
        r.wfile.write(b"x")
    return True


def raw(data: bytes):
    return lambda r: (r.say(data), True)[1]


def tampered(**more):
    return lambda r: (r.serve(**more), True)[1]


PACK = f"/packs/{DISK.pack}"
MISCHIEF = {
    "it answers 404 Not Found": bad_status(404),
    "it answers 403 Forbidden": bad_status(403),
    "it answers 500 Internal Server Error": bad_status(500),
    "it answers 503 Service Unavailable": bad_status(503, Retry_After="1"),
    "it answers 799": bad_status(799),
    "its file is too short (416)": bad_status(416),
    "it ignores Range requests (200 instead of 206)": bad_status(200),
    "it redirects to another server ('file:///etc/passwd')": bad_status(302, Location="file:///etc/passwd"),
    "it redirects to another server ('http://192.0.2.1/x')": bad_status(301, Location="http://192.0.2.1/x"),
    "it redirects to another server (None)": bad_status(307),
    "it redirects again and again": bad_status(302, Location=PACK),
    "it hung up amid an answer": tampered(cut=slice(0, 100)),
    "it sends wrong bytes for chunk": wrong_bytes,
    "it answers another range than was asked for ('')": tampered(Content_Range=""),
    f"its file has 7 bytes instead of {SIZE}": tampered(Content_Range="bytes 0-6/7"),
    "it answers bytes 1-2 instead of": tampered(Content_Range=f"bytes 1-2/{SIZE}"),
    "it answers in an encoding ('gzip')": tampered(Content_Encoding="gzip"),
    "it announces another length than its range has ('99999999')": tampered(Content_Length="99999999"),
    "it does not speak HTTP": raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "it does not speak HTTP (LineTooLong)": raw(b"HTTP/1.1 " + b"x" * 70_000),
    "it was silent for": dawdle,
}


@pytest.mark.parametrize("why", MISCHIEF)
async def test_what_is_wrong_with_it_is_said_and_it_is_tried_again(
    tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trick, bad = MISCHIEF[why], True
    if trick is dawdle:
        monkeypatch.setattr(origin, "PATIENCE", 0.5)
    files = files_of(DISK)

    def packs_only(request: Request) -> bool:
        return bad and request.path == PACK and trick(request)

    with served(files, packs_only) as server:
        async with open_nodes(tmp_path, "alone") as (alone,), trio.open_nursery() as nursery:
            troubles: list[str] = []

            def watch(progress: Progress) -> None:
                troubles.extend(progress.troubles.values())

            async def complete() -> None:
                await alone.exchange.fetch(DISK.datum, (), watch, origins=[server.url])
                nursery.cancel_scope.cancel()

            nursery.start_soon(complete)
            await until(lambda: any(why in trouble for trouble in troubles))
            shelf = alone.store.shelf(DISK.pack)
            assert shelf is not None
            assert not shelf.complete
            bad, server.files = False, files
            await trio.sleep_forever()
        assert shelf.complete


async def test_wrong_bytes_in_one_place_cost_that_place_only(tmp_path: Path) -> None:
    files = files_of(DISK)
    at = sum(map(len, DISK.frames[:50]))
    files[PACK] = files[PACK][:at] + b"\0" * 10 + files[PACK][at + 10 :]
    with served(files) as server:
        async with open_nodes(tmp_path, "alone", "holder") as (alone, holder):
            hold(holder, range(50, 51))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: alone.exchange.fetch(DISK.datum, origins=[server.url]))
                await until(lambda: alone.store.shelf(DISK.pack))
                shelf = alone.store.shelf(DISK.pack)
                assert shelf is not None
                await until(lambda: shelf.count >= len(DISK.frames) - 1)
                assert not shelf.holds(50)
                nursery.start_soon(alone.exchange.fetch, DISK.datum, know(alone, holder))
            assert is_whole(alone)


async def test_objects_are_believed_as_little_as_frames(tmp_path: Path) -> None:
    cid = DISK.datum
    with served({f"/objects/{cid}": b"something else"}) as server:
        there = Origin(server.url)
        with pytest.raises(OriginFailed, match="not what its name says"):
            await there.get_object(cid)
        server.files = {f"/objects/{cid}": bytes(5 << 20)}
        with pytest.raises(OriginFailed, match="not what its name says"):
            await there.get_object(cid)
        server.files = files_of(DISK)
        assert await there.get_object(cid) == DISK.objects[-1]
        there.close()


async def test_one_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "PATIENCE", 0.5)
    monkeypatch.setattr(origin, "RATE_MIN", 1 << 20)
    with served(files_of(DISK), drip) as server, trio.fail_after(10):
        there = Origin(server.url)
        with pytest.raises(OriginFailed, match="less than 1024 KiB/s"):
            await there.get_object(DISK.datum)
        there.close()


async def test_a_connection_that_the_server_closed_meanwhile_is_no_failure() -> None:
    with served(files_of(DISK)) as server:
        there = Origin(server.url)
        await there.get_object(DISK.datum)

        def hang_up(request: Request) -> bool:
            request.close_connection = True
            return server.connections == 1

        server.trick = hang_up
        await there.get_object(DISK.datum)
        assert server.connections == 2
        there.close()


async def test_a_redirect_on_the_same_server_is_followed() -> None:
    def moved(request: Request) -> bool:
        if request.path.startswith("/old/"):
            request.answer(301, b"", Location=request.path.removeprefix("/old"))
            return True
        return False

    with served(files_of(DISK), moved) as server:
        there = Origin(server.url + "/old")
        assert await there.get_object(DISK.datum) == DISK.objects[-1]
        there.close()


@pytest.mark.parametrize("tls", [True, False])
async def test_who_is_not_trusted_is_not_asked(certificate: Certificate, tls: bool) -> None:
    with served(files_of(DISK), tls=certificate.server() if tls else None) as server:
        there = Origin(f"https://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(OriginFailed, match="certificate is not trusted" if tls else "TLS failed"):
            await there.get_object(DISK.datum)
        assert server.asked == []
        there.close()


async def test_a_certificate_for_another_host_is_refused(certificate: Certificate) -> None:
    with served(files_of(DISK), tls=certificate.server()) as server:
        there = Origin(
            f"https://localhost:{server.server_address[1]}",
            ssl.create_default_context(cafile=certificate.file),
        )
        with pytest.raises(OriginFailed, match="certificate is not trusted"):
            await there.get_object(DISK.datum)
        there.close()


async def test_nobody_there_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        there = Origin(f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(OriginFailed, match="refuses connections"):
            await there.get_object(DISK.datum)


async def test_a_name_and_a_password_go_to_the_server_and_nowhere_else(certificate: Certificate) -> None:
    heard: list[str | None] = []

    def listen(request: Request) -> bool:
        heard.append(request.headers.get("Authorization"))
        request.answer(404, b"")
        return True

    with served({}, listen, certificate.server()) as server:
        url = f"https://ann:geheim@127.0.0.1:{server.server_address[1]}/x"
        there = Origin(url, ssl.create_default_context(cafile=certificate.file))
        with pytest.raises(OriginFailed) as failed:
            await there.get_object(DISK.datum)
        there.close()
    assert heard == ["Basic YW5uOmdlaGVpbQ=="]
    assert "geheim" not in str(failed.value) + repr(there.site)


async def test_a_signature_goes_with_every_request_and_is_not_shown(tmp_path: Path) -> None:
    signed = "sv=2024-11-04&Policy=ey_J-~x&sig=a%2Fb%2Bc%3D"

    def check(request: Request) -> bool:
        path, _, query = request.path.partition("?")
        if query != signed:
            request.answer(403, b"")
            return True
        request.path = path
        return False

    with served(files_of(DISK), check) as server:
        async with open_nodes(tmp_path, "alone") as (alone,):
            fetched = await alone.exchange.fetch(DISK.datum, origins=[f"{server.url}/?{signed}"])
            assert is_whole(alone)
            assert fetched.bytes_by_peer == {name_of(server): SIZE}
        there = Origin(f"{server.url}?{signed.replace('2024', '2023')}")
        with pytest.raises(OriginFailed, match="403 Forbidden") as failed:
            await there.get_object(DISK.datum)
        there.close()
        assert "sig" not in str(failed.value) + repr(there.site)


async def test_the_owners_caps_hold_for_origins_too(tmp_path: Path) -> None:
    with served(files_of(DISK)) as server:
        async with open_nodes(tmp_path, "alone") as (alone,):
            alone.exchange.links.rates.set(Limits(down=SIZE))
            began = trio.current_time()
            await alone.exchange.fetch(DISK.datum, origins=[server.url])
            assert trio.current_time() - began > 0.8
            assert is_whole(alone)


async def test_nothing_is_asked_while_the_owner_allows_nothing(tmp_path: Path) -> None:
    with served(files_of(DISK)) as server:
        async with open_nodes(tmp_path, "alone") as (alone,), trio.open_nursery() as nursery:
            alone.exchange.links.pause("on battery")
            nursery.start_soon(lambda: alone.exchange.fetch(DISK.datum, origins=[server.url]))
            await trio.sleep(0.5)
            assert server.asked == []
            nursery.cancel_scope.cancel()


async def test_a_fetch_that_is_cancelled_leaves_nothing_open(tmp_path: Path) -> None:
    with served(files_of(DISK), lambda r: r.path == PACK and dawdle(r)) as server:
        async with open_nodes(tmp_path, "alone") as (alone,):
            with trio.move_on_after(0.4) as scope:
                await alone.exchange.fetch(DISK.datum, origins=[server.url])
            assert scope.cancelled_caught
            assert server.ranges
        assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0


async def test_what_is_no_url_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    async with open_nodes(tmp_path, "alone") as (alone,):
        with pytest.raises(Misused):
            await alone.exchange.fetch(DISK.datum, origins=["file:///srv/disks"])
        assert alone.exchange._downloads == {}
