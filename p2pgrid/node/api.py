"""Carry a person's wish from the command line to the daemon, and news of it back.

One Unix socket, `HOME/control.sock`; JSON lines; one request a connection:

    -> {"op": "put", "args": {"path": "/home/ann/disk.vdi"}}
    <- {"event": {"phase": "cutting", "done": 1048576, "total": 4194304}}      any number
    <- {"ok": {…}}   or   {"error": {"kind": "NotFound", "exit_code": 3, "message": "…", "advice": "…"}}

Hanging up cancels the operation.  Only the daemon's own user may connect: the folder is
0700 and the peer's uid is checked.  The client half is synchronous and imports neither
trio nor libp2p, so that the command line stays quick.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from p2pgrid.errors import GridError, Misused, WorldError

if TYPE_CHECKING:
    import trio

SOCKET = "control.sock"
LINE_MAX = 16 << 20
"""Bytes. The longest line: the listing of a very long job."""

Tell = Callable[[dict[str, Any]], Awaitable[None]]
"""Sends one event to whoever asked."""
Op = Callable[[dict[str, Any], Tell], Awaitable[Any]]


@attrs.frozen(kw_only=True, slots=False)
class NoDaemon(WorldError):
    """No p2pgrid daemon runs on this data directory."""

    exit_code = 6
    advice = "start one with `p2pgrid coordinator` or `p2pnode join TICKET`, or name another with --data-dir"
    home: str


@attrs.frozen(kw_only=True, slots=False)
class NotPossible(WorldError):
    """The operating system refused it."""

    why: str


@attrs.frozen(kw_only=True, slots=False)
class Told(GridError):
    """The daemon said so."""

    kind: str
    code: int
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return self.message

    @classmethod
    def of(cls, error: Mapping[str, Any]) -> Told:
        """The one in an error answer."""
        return cls(
            kind=error["kind"], code=error["exit_code"], message=error["message"], hint=error["advice"]
        )


@contextlib.contextmanager
def socket_path(home: Path) -> Iterator[str]:
    """A name of the socket in `home` that fits the 108 bytes a socket's name may have."""
    folder = os.open(home, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{SOCKET}"
    finally:
        os.close(folder)


# --- the asking half --------------------------------------------------------------------


def call(
    home: Path, op: str, args: Mapping[str, Any] | None = None, on_event: Callable[[Any], None] | None = None
) -> Any:
    """Ask the daemon of `home` for `op` and wait for the answer; `on_event` sees each event.

    Raises `NoDaemon` when none runs there, and `Told` with the daemon's own error.
    """
    with connected(home) as line, contextlib.suppress(ConnectionError):
        line.sendall(json.dumps({"op": op, "args": dict(args or {})}).encode() + b"\n")
        with line.makefile("rb") as answers:
            for answer in answers:
                match json.loads(answer):
                    case {"event": event}:
                        if on_event:
                            on_event(event)
                    case {"ok": result}:
                        return result
                    case {"error": error}:
                        raise Told.of(error)
    raise Told(
        kind="Ended", code=75, message="The daemon ended while it was working on this", hint="try again"
    )


@contextlib.contextmanager
def connected(home: Path) -> Iterator[socket.socket]:
    """A connection to the daemon of `home`.  Raises `NoDaemon`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        try:
            with socket_path(home) as name:
                line.connect(name)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            raise NoDaemon(home=str(home)) from None
        except PermissionError:
            raise Misused(why=f"the daemon in {home} belongs to another user") from None
        except OSError as refused:
            raise Misused(why=f"{home} is no data directory: {refused.strerror}") from None
        yield line


def daemon_runs(home: Path) -> bool:
    """Whether a daemon answers on `home`."""
    try:
        with connected(home):
            return True
    except NoDaemon:
        return False


# --- the answering half -----------------------------------------------------------------


@contextlib.asynccontextmanager
async def serve_api(home: Path, ops: Mapping[str, Op]) -> AsyncIterator[None]:
    """Answer requests on `home`'s socket while the block runs; the socket goes with it."""
    import trio

    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    (home / SOCKET).unlink(missing_ok=True)
    with socket_path(home) as name:
        await listener.bind(name)
    os.chmod(home / SOCKET, 0o600)
    listener.listen(64)
    streams = [trio.SocketListener(listener)]

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await _answer(stream, ops)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, answer, streams)
            yield
            nursery.cancel_scope.cancel()
    finally:
        (home / SOCKET).unlink(missing_ok=True)


async def _answer(stream: trio.SocketStream, ops: Mapping[str, Op]) -> None:
    import structlog
    import trio

    log = structlog.get_logger()

    async def send(message: dict[str, Any]) -> None:
        await stream.send_all(json.dumps(message).encode() + b"\n")

    async def tell(event: dict[str, Any]) -> None:
        async with lock:
            await send({"event": event})

    lock = trio.Lock()
    try:
        if _uid_of(stream) not in (os.getuid(), 0):
            return
        request = await _line(stream)
        if request is None:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_hang_up, stream, nursery.cancel_scope)
            answer = await _perform(request, ops, tell, log)
            async with lock:
                await send(answer)
            nursery.cancel_scope.cancel()
    except* (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # whoever asked has gone


async def _perform(request: bytes, ops: Mapping[str, Op], tell: Tell, log: Any) -> dict[str, Any]:
    import trio

    try:
        op, args = _asked(request, ops)
        return {"ok": await op(args, tell)}
    except GridError as error:
        return failure(error)
    except (KeyError, TypeError) as broken:  # an argument is missing or of another kind
        return failure(Misused(why=f"the request is not well formed: {broken!r}"))
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        raise
    except OSError as refused:
        return failure(NotPossible(why=str(refused)))
    except Exception as error:  # a request's door: a bug in one answer does not end the daemon
        group = error if isinstance(error, ExceptionGroup) else ExceptionGroup("request", [error])
        known = next((e for e in leaves(group) if isinstance(e, GridError)), None)
        if known is not None:
            return failure(known)
        if group.subgroup((trio.BrokenResourceError, trio.ClosedResourceError)):
            raise
        log.error("request failed", request=request[:200], exc_info=error)
        return failure(GridError(), "An unexpected error in the daemon; its log has the details")


def _asked(request: bytes, ops: Mapping[str, Op]) -> tuple[Op, dict[str, Any]]:
    """The operation and its arguments.  Raises `Misused`."""
    try:
        match json.loads(request):
            case {"op": str(name), "args": dict(args)}:
                pass
            case _:
                raise Misused(why="a request is an object with op and args")
    except (ValueError, RecursionError) as broken:
        raise Misused(why=f"the request is not well formed: {broken!r}") from None
    if name not in ops:
        raise Misused(why=f"this daemon knows no operation {name!r}")
    return ops[name], args


def leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error


def failure(error: GridError, message: str | None = None) -> dict[str, Any]:
    return {
        "error": {
            "kind": type(error).__name__,
            "exit_code": error.exit_code,
            "message": message or str(error),
            "advice": error.advice,
        }
    }


async def _line(stream: trio.SocketStream) -> bytes | None:
    data = bytearray()
    while not data.endswith(b"\n"):
        more = await stream.receive_some(65536)
        if not more or len(data) > LINE_MAX:
            return None
        data += more
    return bytes(data)


async def _until_hang_up(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    """Cancel the operation when whoever asked has hung up."""
    import trio

    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while await stream.receive_some(4096):
            pass
    scope.cancel()


def _uid_of(stream: trio.SocketStream) -> int:
    packed = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", packed)[1])
