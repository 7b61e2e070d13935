"""Does what a router says by UPnP, well or badly, come to a mapping or to a reason?"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial

import attrs
import pytest
import trio

from p2pgrid.hole_punch.portmap import igd, upnp
from p2pgrid.hole_punch.portmap.mapper import AskUpnp, Place, UpnpFailed, UpnpMapped
from p2pgrid.hole_punch.portmap.upnp import Upnp

HERE = "127.0.0.1"
PLACE = Place(HERE, HERE)
DESCRIPTION = """<root><service><serviceType>urn:schemas-upnp-org:service:WANIPConnection:1</serviceType>
<controlURL>/ctl</controlURL></service></root>"""


def ok(body: str, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def fault(code: int) -> bytes:
    return ok(f"<e><errorCode>{code}</errorCode></e>", "500 Internal Server Error")


@attrs.define
class Router:
    """Answers each call as it is told to."""

    description: bytes = ok(DESCRIPTION)
    answers: dict[str, list[bytes]] = attrs.field(factory=dict)
    """To each action, in turn; the last one again and again."""
    calls: list[tuple[str, str]] = attrs.field(factory=list)

    async def serve(self, stream: trio.SocketStream) -> None:
        data = b""
        with contextlib.suppress(trio.BrokenResourceError):
            while b"</s:Envelope>" not in data and not data.startswith(b"GET"):
                data += await stream.receive_some(4096)
            if data.startswith(b"GET"):
                self.calls.append(("GET", ""))
                await stream.send_all(self.description)
                return
            text = data.decode()
            action = text.partition("#")[2].partition('"')[0]
            self.calls.append((action, text.partition("<NewLeaseDuration>")[2].partition("<")[0]))
            answers = self.answers.get(action, [ok("<e/>")])
            await stream.send_all(answers.pop(0) if len(answers) > 1 else answers[0])


GOOD = {
    "GetSpecificPortMappingEntry": [fault(714)],
    "GetExternalIPAddress": [ok("<e><NewExternalIPAddress>11.3.0.1</NewExternalIPAddress></e>")],
}


@contextlib.asynccontextmanager
async def router(monkeypatch: pytest.MonkeyPatch, **facts) -> AsyncIterator[tuple[Router, Upnp]]:
    facts.setdefault("answers", {})
    made = Router(**{**facts, "answers": {k: list(v) for k, v in {**GOOD, **facts["answers"]}.items()}})
    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, made.serve, 0, host=HERE))

        async def search(place: Place) -> str:
            return f"http://{HERE}:{listener.socket.getsockname()[1]}/root.xml"

        monkeypatch.setattr(upnp, "_search", search)
        yield made, Upnp(4001)
        nursery.cancel_scope.cancel()


async def test_a_port_is_mapped_and_given_back(monkeypatch) -> None:
    async with router(monkeypatch) as (made, service):
        assert await service.map(AskUpnp(PLACE, 4001, 1200)) == UpnpMapped(("11.3.0.1", 4001), 1200)
        await service.map(AskUpnp(PLACE, 4001, 1200))
        await service.release(4001)
        assert [call for call, _ in made.calls].count("GET") == 1, "the service is found once"
        assert made.calls[-1][0] == "DeletePortMapping"


async def test_a_router_that_knows_no_lifetimes_is_asked_for_ever(monkeypatch) -> None:
    answers = {"AddPortMapping": [fault(igd.ONLY_PERMANENT), ok("<e/>")]}
    async with router(monkeypatch, answers=answers) as (made, service):
        assert isinstance(await service.map(AskUpnp(PLACE, 4001, 1200)), UpnpMapped)
        assert [lease for call, lease in made.calls if call == "AddPortMapping"] == ["1200", "0"]


async def test_a_port_of_somebody_elses_is_a_conflict_though_the_router_would_give_it(monkeypatch) -> None:
    theirs = ok("<e><NewInternalClient>192.168.1.9</NewInternalClient></e>")
    async with router(monkeypatch, answers={"GetSpecificPortMappingEntry": [theirs]}) as (made, service):
        failed = await service.map(AskUpnp(PLACE, 4001, 1200))
        assert isinstance(failed, UpnpFailed)
        assert failed.conflict
        assert "AddPortMapping" not in [call for call, _ in made.calls]
    async with router(monkeypatch, answers={"AddPortMapping": [fault(igd.CONFLICT)]}) as (_, service):
        failed = await service.map(AskUpnp(PLACE, 4001, 1200))
        assert isinstance(failed, UpnpFailed)
        assert failed.conflict


BAD: dict[str, Callable[[], dict]] = {
    "a redirect": lambda: {"description": b"HTTP/1.1 302 Found\r\nLocation: http://10.0.0.1/\r\n\r\n"},
    "an endless description": lambda: {"description": ok("<a>" + "x" * (1 << 20))},
    "a length that is a lie": lambda: {
        "description": b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999\r\n\r\n<a"
    },
    "no HTTP": lambda: {"description": b"SSH-2.0-OpenSSH_9.2\r\n\r\n"},
    "endless headers": lambda: {"description": b"HTTP/1.1 200 OK\r\nA: " + b"x" * (1 << 20)},
    "nothing": lambda: {"description": b""},
    "another's control URL": lambda: {
        "description": ok(DESCRIPTION.replace("/ctl", "http://192.168.1.9:80/ctl"))
    },
    "a refusal": lambda: {"answers": {"AddPortMapping": [fault(606)]}},
    "nonsense for an answer": lambda: {"answers": {"AddPortMapping": [ok("<")]}},
}


@pytest.mark.parametrize("what", BAD)
async def test_what_makes_no_sense_is_a_reason(monkeypatch, what: str) -> None:
    async with router(monkeypatch, **BAD[what]()) as (_, service):
        failed = await service.map(AskUpnp(PLACE, 4001, 1200))
        assert isinstance(failed, UpnpFailed)
        assert failed.why
        assert not failed.conflict
        await service.release(4001)


async def test_a_router_that_says_nothing_is_given_up(monkeypatch) -> None:
    monkeypatch.setattr(upnp, "PATIENCE", 0.1)

    async def silent(self: Router, stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(Router, "serve", silent)
    async with router(monkeypatch) as (_, service):
        failed = await service.map(AskUpnp(PLACE, 4001, 1200))
        assert isinstance(failed, UpnpFailed)
        assert "no answer" in failed.why
