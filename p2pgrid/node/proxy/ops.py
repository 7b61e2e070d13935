"""Answer what a person asks of the proxy: forwards, what is exposed, SOCKS5, and what is under way.

A forward, an exposed port and a SOCKS5 proxy live as long as the command that asked for them: when it
hangs up, they end, and nothing is left.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import attrs
import trio

from p2pgrid.errors import Misused, NotFound
from p2pgrid.node.api import Tell
from p2pgrid.node.proxy.listen import open_forward, open_socks
from p2pgrid.node.proxy.names import GridName, label, parse
from p2pgrid.node.proxy.out import check_host
from p2pgrid.node.proxy.proxy import Proxy
from p2pgrid.node.proxy.rules import Exposure
from p2pgrid.node.proxy.socks import Account

if TYPE_CHECKING:
    from p2pgrid.node.node import Node

Args = dict[str, Any]
LOOPBACK = "127.0.0.1"
USER = "p2pgrid"


def _proxy(node: Node) -> Proxy:
    assert node.proxy is not None, "the daemon opens it before it answers"
    return node.proxy


async def forward(node: Node, args: Args, tell: Tell) -> Any:
    """Connect a port of this machine with one of a job's guest, until whoever asked hangs up."""
    name = _of_job(args["job"], args["port"], args.get("index"))
    await _proxy(node).runs(args["job"])  # is there such a job, and is it ours?
    async with open_forward(_proxy(node), (args.get("host") or LOOPBACK, args["at"]), name) as (host, port):
        await tell({"listening": [host, port], "to": f"port {name.port} of a guest of {name.label}"})
        await trio.sleep_forever()


def _of_job(job: str, port: int, index: int | None) -> GridName:
    name = parse(f"{job}.grid", port)
    if name.job is None:
        raise NotFound(what=f"a job {job}")
    return attrs.evolve(name, index=index)


async def expose(node: Node, args: Args, tell: Tell) -> Any:
    """Let guests of a job reach a port of this machine, or of one host, until whoever asked hangs up."""
    if args["host"]:
        check_host(args["host"])
    job = args["to"].lower()
    await _proxy(node).runs(job)  # only of what we have submitted is it told who runs it
    exposure = Exposure(args["port"], job, args["host"], args["at"])
    if any((e.port, e.to) == (exposure.port, exposure.to) for e in _proxy(node).exposures):
        raise Misused(why=f"port {exposure.port} is exposed to {job} already")
    with _proxy(node).exposed(exposure):
        me = node.network.me
        names = [f"{exposure.port}.owner.grid", f"{exposure.port}.{label(me)}.grid"]
        await tell({"exposed": exposure.port, "to": job, "names": names})
        await trio.sleep_forever()


async def socks(node: Node, args: Args, tell: Tell) -> Any:
    """Serve SOCKS5 at a port of this machine until whoever asked hangs up; the password is new each time."""
    account = Account(USER.encode(), secrets.token_urlsafe(12).encode())
    async with open_socks(_proxy(node), (args.get("host") or LOOPBACK, args["at"]), account) as (host, port):
        await tell({"listening": [host, port], "user": USER, "password": account.password.decode()})
        await trio.sleep_forever()


async def status(node: Node, args: Args, tell: Tell) -> Any:
    """The connections under way, and what is exposed."""
    return {
        "label": label(node.network.me),
        "flows": _proxy(node).flows(),
        "exposed": [
            {"port": e.port, "to": e.to, "host": e.host, "at": e.at or e.port} for e in _proxy(node).exposures
        ],
    }
