"""Read objects and frames from an origin: any HTTP(S) server that has the files (`ranges.py`).

    trio:    get_object, get_frames ──> a connection, kept alive ──> cancelled: its socket is shut
    thread:  request ─> status, headers ─> body, a frame at a time ─> `take`

One request a thread, `CONNECTIONS` at most, a frame in memory each.  Nothing waits for ever: a
silent server is given up after `PATIENCE`, one that only drips when its time is over.  Nothing is
believed: objects are compared with their names here, frames in `take`.  A redirect is followed
on the same server only, TLS certificates are checked; the environment may name a proxy (`webproxy.py`).
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeVar

import attrs
import outcome
import trio

from p2pgrid import __version__
from p2pgrid.dht.manifest import OBJECT_MAX, verified
from p2pgrid.errors import BadObject, ChunkCorrupt, Misused, WorldError
from p2pgrid.hole_punch.rates import LinkRates, Rates
from p2pgrid.ids import Cid
from p2pgrid.transfer.ranges import parse_origin, redirected, wrong_part, wrong_status
from p2pgrid.transfer.webproxy import Proxy, proxy_for

T = TypeVar("T")

CONNECTIONS = 4
"""Requests at once to one origin, of one fetch."""
CONNECT_PATIENCE = 15.0
"""Seconds for the name, the connection and TLS."""
PATIENCE = 15.0
"""Seconds of silence."""
RATE_MIN = 8 << 10
"""Bytes per second: below that an origin is of no use."""
REDIRECTS_MAX = 3
NAP = 0.05
"""Seconds that a thread which may not read sleeps before it sees whether it is still wanted."""
RECORD = 64 << 10
"""Bytes read at once: what a cap is counted in."""

Take = Callable[[int, memoryview], None]
"""Keeps the frame of an index; it is gone afterwards.  Raises `ChunkCorrupt` for a wrong one."""


@attrs.frozen(kw_only=True, slots=False)
class OriginFailed(WorldError):
    """An origin does not give what was asked of it."""

    exit_code = 6
    origin: str
    why: str
    again: str | None = None
    """Its own `Retry-After`."""


class Origin:
    """One server.  Runs in trio; closed by `close` when nobody uses it any more."""

    def __init__(self, url: str, tls: ssl.SSLContext | None = None, rates: Rates | None = None) -> None:
        """`rates`: what this node's owner allows.  Raises `Misused` for what is no URL of ours."""
        self.site = parse_origin(url)
        self._rates = rates or Rates()
        self._tls = tls
        self._room = trio.CapacityLimiter(CONNECTIONS)
        self._idle: list[_Connection] = []
        self._headers = {"User-Agent": f"p2pgrid/{__version__}", "Accept-Encoding": "identity"}
        if self.site.authorization:
            self._headers["Authorization"] = self.site.authorization

    async def get_object(self, cid: Cid) -> bytes:
        """The object, compared with its name.  Raises `OriginFailed`."""

        def read(answer: http.client.HTTPResponse, connection: _Connection) -> bytes:
            self._expect(answer, 200)
            body = answer.read(OBJECT_MAX + 1)
            connection.rates.read(len(body), time.monotonic())
            if answer.length and len(body) <= OBJECT_MAX:
                raise self._failed("it hung up amid an answer")
            try:
                return verified(cid, body)
            except BadObject:
                raise self._failed(f"object {cid} there is not what its name says") from None

        return await self._ask("objects", cid, {}, read, PATIENCE + OBJECT_MAX / RATE_MIN)

    async def get_frames(self, pack: Cid, run: Sequence[int], offsets: Sequence[int], take: Take) -> None:
        """Give the frames of `run`, which lie side by side, to `take`, in the request's thread.

        `offsets` has where each frame of the pack begins, and the end.  Raises `OriginFailed`, and
        what `take` raises; what it was given before is kept.
        """
        first, last = offsets[run[0]], offsets[run[-1] + 1]
        size = last - first

        def read(answer: http.client.HTTPResponse, connection: _Connection) -> None:
            self._expect(answer, 206)
            if why := wrong_part(answer.getheader, first, size, offsets[-1]):
                raise self._failed(why)
            for index in run:
                frame = memoryview(bytearray(offsets[index + 1] - offsets[index]))
                if not connection.fill(answer, frame):
                    raise self._failed("it hung up amid an answer")
                try:
                    take(index, frame)
                except ChunkCorrupt:
                    raise self._failed(f"it sends wrong bytes for chunk {index}") from None

        part = {"Range": f"bytes={first}-{last - 1}"}
        await self._ask("packs", pack, part, read, PATIENCE + size / RATE_MIN)

    def close(self) -> None:
        """Close what is open; no request is under way."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    # --- in trio --------------------------------------------------------------------------

    async def _ask(
        self,
        kind: Literal["objects", "packs"],
        cid: Cid,
        headers: dict[str, str],
        read: Callable[[http.client.HTTPResponse, _Connection], T],
        patience: float,
    ) -> T:
        """One request and its redirects; `read` has the body, in a thread."""
        target, headers = self.site.target(kind, cid), self._headers | headers
        async with self._room:
            for _ in range(REDIRECTS_MAX + 1):
                result = await self._once(target, headers, read, patience)
                if not isinstance(result, _Elsewhere):
                    return result
                target = result.target
        raise self._failed("it redirects again and again")

    async def _once(
        self,
        target: str,
        headers: dict[str, str],
        read: Callable[[http.client.HTTPResponse, _Connection], T],
        patience: float,
    ) -> T | _Elsewhere:
        while True:
            used = bool(self._idle)
            connection = self._idle.pop() if used else await self._connect()
            try:
                with trio.move_on_after(patience):
                    done = await connection.run(partial(self._talk, connection, target, headers, read))
                    return done.unwrap()
                raise self._failed(f"it sends less than {RATE_MIN >> 10} KiB/s")
            except (ConnectionError, ssl.SSLEOFError) as gone:
                if not used or connection.answered:
                    raise self._failed(_explained(gone)) from None
                # The server closed it while nobody used it: again, on another one.
            except (OSError, http.client.HTTPException) as wrong:
                raise self._failed(_explained(wrong)) from None
            finally:
                if connection.reusable:
                    self._idle.append(connection)
                else:
                    connection.close()

    async def _connect(self) -> _Connection:
        """Whoever waits no longer leaves a thread that closes what it made."""
        proxy = self._proxy()
        connection = _Connection(self._plain(proxy), self._rates.link(private=True), proxy)
        by = f"by the proxy {proxy.shown}: " if proxy else ""
        try:
            with trio.move_on_after(CONNECT_PATIENCE):
                await trio.to_thread.run_sync(  # type: ignore[call-arg]  # the stubs are older
                    connection.open, abandon_on_cancel=True
                )
                return connection
        except (OSError, http.client.HTTPException) as wrong:
            raise self._failed(by + _explained(wrong)) from None
        finally:
            if connection.sock is None:
                connection.close()
        raise self._failed(f"{by}it cannot be reached within {CONNECT_PATIENCE:.0f} s")

    def _proxy(self) -> Proxy | None:
        try:
            return proxy_for(self.site, os.environ)
        except Misused as wrong:
            raise self._failed(wrong.why) from None

    def _plain(self, proxy: Proxy | None) -> http.client.HTTPConnection:
        site, by = self.site, proxy or self.site
        if site.scheme == "http":
            return http.client.HTTPConnection(by.host, by.port, timeout=CONNECT_PATIENCE)
        if self._tls is None:
            self._tls = ssl.create_default_context()
        made = http.client.HTTPSConnection(by.host, by.port, timeout=CONNECT_PATIENCE, context=self._tls)
        if proxy:
            made.set_tunnel(site.host, site.port, proxy.headers | {"User-Agent": self._headers["User-Agent"]})
        return made

    # --- in a request's thread --------------------------------------------------------------

    def _talk(
        self,
        connection: _Connection,
        target: str,
        headers: dict[str, str],
        read: Callable[[http.client.HTTPResponse, _Connection], T],
    ) -> T | _Elsewhere:
        connection.reusable = connection.answered = False
        there = target
        if connection.proxy and self.site.scheme == "http":  # which reads the request, and asks in its stead
            there, headers = f"http://{self.site.authority}{target}", headers | connection.proxy.headers
        connection.http.request("GET", there, headers=headers)
        with connection.http.getresponse() as answer:
            connection.answered = True
            if answer.status in (301, 302, 303, 307, 308):
                return self._elsewhere(target, answer.getheader("Location"))
            result = read(answer, connection)
            # All of it was read: the next request finds the connection clean.
            connection.reusable = not answer.read(1) and not answer.will_close
            return result

    def _elsewhere(self, target: str, location: str | None) -> _Elsewhere:
        there = redirected(self.site, target, location)
        if there is None:
            raise self._failed(f"it redirects to another server ({ascii(location)[:100]})")
        return _Elsewhere(there)

    def _expect(self, answer: http.client.HTTPResponse, status: int) -> None:
        if why := wrong_status(answer.status, status):
            raise self._failed(why, answer.getheader("Retry-After"))

    def _failed(self, why: str, again: str | None = None) -> OriginFailed:
        return OriginFailed(origin=self.site.shown, why=why, again=again)


@attrs.frozen
class _Elsewhere:
    """It is found under this target."""

    target: str


class _Connection:
    """A connection that a thread uses and trio may end."""

    def __init__(
        self, plain: http.client.HTTPConnection, rates: LinkRates, proxy: Proxy | None = None
    ) -> None:
        self.http = plain
        self.proxy = proxy
        self.rates = rates
        """What may be read; there is nothing to send that would hurt anybody."""
        self._shut = False
        self.http.auto_open = 0
        self.sock: socket.socket | None = None
        self._lock = threading.Lock()
        self._closed = False
        self.reusable = self.answered = False

    def open(self) -> None:
        self.http.connect()
        with self._lock:
            if self._closed:  # nobody waits for it any more
                self.http.close()
            else:
                self.sock = self.http.sock
                self.sock.settimeout(PATIENCE)

    def fill(self, answer: http.client.HTTPResponse, space: memoryview) -> bool:
        """Read as much as there is `space` for, no faster than is allowed; False: it ended before."""
        while space and not self._shut:
            if wait := self.rates.may_read(time.monotonic()):
                time.sleep(min(wait, NAP))
                continue
            count = answer.readinto(space[:RECORD])
            if not count:
                break
            self.rates.read(count, time.monotonic())
            space = space[count:]
        return not space

    async def run(self, work: Callable[[], T]) -> outcome.Value[T] | outcome.Error:
        """What `work` came to, in a thread; it is over when this returns, cancelled or not."""
        done: outcome.Value[T] | outcome.Error | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._shut_when_cancelled, lambda: done is None)
            done = await trio.to_thread.run_sync(outcome.capture, work)
            nursery.cancel_scope.cancel()
        assert done is not None
        return done

    async def _shut_when_cancelled(self, busy: Callable[[], bool]) -> None:
        try:
            await trio.sleep_forever()
        finally:
            if busy() and self.sock is not None:
                self._shut = True
                with contextlib.suppress(OSError):  # not TLS's own: its thread still reads
                    socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self.sock is not None:
                self.http.close()


def _explained(error: OSError | http.client.HTTPException) -> str:
    """What went wrong with a connection, for people."""
    match error:
        case ssl.SSLCertVerificationError():
            return f"its certificate is not trusted: {error.verify_message}"
        case ssl.SSLError():
            return f"TLS failed: {(error.reason or 'the connection ended').lower().replace('_', ' ')}"
        case socket.gaierror():
            return f"its name cannot be looked up: {error.strerror}"
        case TimeoutError():
            return f"it was silent for {PATIENCE:.0f} s"
        case ConnectionRefusedError():
            return "it refuses connections"
        case http.client.RemoteDisconnected() | http.client.IncompleteRead():
            return "it hung up amid an answer"
        case http.client.HTTPException():
            return f"it does not speak HTTP ({type(error).__name__})"
        case _:
            return error.strerror or str(error) or type(error).__name__
