"""Be a daemon: open the rooms in order, run the stories of its roles, close all of it again.

    identity, store ─> host ─> index ─> exchange ─> coordinator's own service, or its client
                                          └─> beats · leases · local API      until told to stop

Run as `python -m p2pgrid.node.daemon HOME`; `launch.py` starts it so, and the foreground
commands call `run_stored`.  The word "ready" (or why not) goes to `--ready-fd` as one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, MutableMapping
from pathlib import Path
from typing import Any

import attrs
import structlog
import trio

from p2pgrid.dht.index import open_index
from p2pgrid.dht.store import Store
from p2pgrid.errors import Conflict, GridError, Misconfigured, NotAuthorised, Temporary, Unreachable
from p2pgrid.hole_punch.circuit_relay import open_circuits
from p2pgrid.hole_punch.host import open_host
from p2pgrid.hole_punch.relay.relaying import open_relaying
from p2pgrid.ids import PeerId
from p2pgrid.node import disks, jobs, links
from p2pgrid.node.api import Op, Tell, daemon_runs, failure, leaves, serve_api
from p2pgrid.node.config import TICKET, Config
from p2pgrid.node.console import say
from p2pgrid.node.daemon_log import keep_log_short
from p2pgrid.node.grid import make_ticket, open_grid, ticket_id
from p2pgrid.node.holdings import keep_holding
from p2pgrid.node.identity import Identity
from p2pgrid.node.lan import open_lans
from p2pgrid.node.membership import hear_renewals, keep_membership, keep_standing
from p2pgrid.node.node import Node
from p2pgrid.node.outlook import open_outlook
from p2pgrid.node.paths import keep_paths
from p2pgrid.node.plain import plain
from p2pgrid.node.ports import keep_ports, link_port
from p2pgrid.node.prefs import Prefs
from p2pgrid.node.proxy import ops as proxy
from p2pgrid.node.proxy.proxy import open_proxy
from p2pgrid.node.reach import index_mode, told
from p2pgrid.node.relaying import keep_relaying, relay
from p2pgrid.node.rules import keep_rules, prefs
from p2pgrid.node.standing import Standing
from p2pgrid.node.ticket import read_ticket
from p2pgrid.node.worker import check_programs, sweep, work
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.client import Calls, Coordinator
from p2pgrid.transfer.exchange import open_exchange
from p2pgrid.transfer.ranges import parse_origin
from p2pgrid.vm.qemu import Qemu
from p2pgrid.vm.template import cache_folder

log = structlog.get_logger()

PR_SET_PDEATHSIG = 1
M_ARENA_MAX, ARENAS = -8, 1
"""glibc's heaps: one for each thread keeps for ever what that thread once had, 20 MiB and more each."""
JOIN_TRIES = 3


def run_coordinator(home: Path, **settings: Any) -> int:
    """Coordinate in the foreground; what is not among `settings` stays as `home` was set up before."""
    if daemon_runs(home):
        raise Conflict(what=f"a daemon on {home}; `p2pgrid down` ends it")
    before = Config.load(home) or Config(roles=(), listen="0.0.0.0:4321")
    if before.coordinator is not None:
        raise Misconfigured(why=f"{home} belongs to a node of another grid; use another --data-dir")
    config = attrs.evolve(before, roles=("coordinator", "submitter"), **settings)
    config.multiaddr  # noqa: B018  (is it one?)
    config.save(home)
    return run_stored(home)


def run_stored(home: Path) -> int:
    """Run in the foreground as `home` is set up, until SIGINT or SIGTERM."""
    _log_to_stderr()

    def ready(node: Node) -> None:
        say(f"ready: {node.config.name} ({', '.join(node.roles)}), {node.network.me}")
        for address in node.network.addresses:
            say(f"  {address}")

    wrong: GridError | None = None
    try:
        trio.run(_until_signalled, home, ready)
    except* GridError as group:
        wrong = _first(group)
    if wrong is not None:  # as itself: what is raised within except* becomes a group again
        raise wrong
    return 0


def main() -> int:
    """The detached daemon: its words go to the log, its readiness to a pipe."""
    parser = argparse.ArgumentParser(prog="p2pgrid daemon")
    parser.add_argument("home", type=Path)
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--with-parent", action="store_true")
    asked = parser.parse_args()
    if asked.with_parent:
        _die_with_parent()
    _log_to_stderr()

    def word(said: dict[str, Any]) -> None:
        if asked.ready_fd is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(asked.ready_fd, json.dumps(said).encode() + b"\n")
            os.close(asked.ready_fd)
            asked.ready_fd = None

    code = 0
    try:
        trio.run(_until_signalled, asked.home, lambda node: word({"ready": node.network.me}))
    except* GridError as group:
        first = _first(group)
        log.error("the daemon ends", why=str(first))
        word(failure(first))
        code = first.exit_code
    return code


def _first(group: BaseExceptionGroup[GridError]) -> GridError:
    return next(e for e in leaves(group) if isinstance(e, GridError))


def _die_with_parent() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getppid()
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent or parent == 1:
        sys.exit("the parent was gone already")


def _log_to_stderr() -> None:
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            _plain,
            structlog.processors.LogfmtRenderer(
                key_order=["timestamp", "level", "event"], bool_as_flag=False
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(20),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _plain(logger: Any, method: str, said: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What others wrote does not steer the terminal on which a log is read; a traceback keeps its lines."""
    return {
        key: "\n".join(map(plain, value.split("\n"))) if isinstance(value, str) else value
        for key, value in said.items()
    }


def _stay_small() -> None:
    """Have libraries keep less memory for themselves than they would in a process that works all day."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # it has buffers for each, and we do no algebra
    with contextlib.suppress(AttributeError):  # another libc
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)


async def _until_signalled(home: Path, ready: Any) -> None:
    """The daemon's whole life; SIGINT and SIGTERM end it in good order."""
    _stay_small()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            stopping = trio.Event()

            async def listen() -> None:
                async for number in signals:
                    log.info("stopping", signal=signal.Signals(number).name)
                    stopping.set()
                    nursery.cancel_scope.cancel()

            nursery.start_soon(listen)
            async with open_node(home, stopping) as node:
                ready(node)
                await node.stopping.wait()
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def open_node(home: Path, stopping: trio.Event) -> AsyncIterator[Node]:
    """A node as `home` is set up, joined to its grid and at work until the block is left.

    Whoever leaves the block sets `stopping` before, and a person may set it by the local API.
    """
    config = Config.load(home)
    if config is None:
        raise Misconfigured(why=f"{home} is not set up; join a grid or start a coordinator first")
    for url in config.origins:
        parse_origin(url)  # says what is wrong with it
    async with contextlib.AsyncExitStack() as rooms:
        store = rooms.enter_context(Store(home / "store", config.quota))  # of two daemons one gets it
        sweep(home)
        identity = Identity.load_or_create(home)
        host = await rooms.enter_async_context(open_host(identity.seed, [config.multiaddr]))
        grid = PeerId(config.coordinator) if config.coordinator else host.me
        host.learn(grid, config.addresses)
        await rooms.enter_async_context(open_circuits(host, config.libp2p_places, config.libp2p_relays))
        index = await rooms.enter_async_context(
            open_index(host, index_mode(host.addresses, config.addresses or host.addresses), [grid])
        )
        standing = Standing.load(home, host.me, grid, host.verify)
        exchange = await rooms.enter_async_context(
            open_exchange(
                host,
                index,
                store,
                [(config.host, link_port(config))],
                allow=standing.allow,
                membership=lambda: standing.shown,
                origins=config.origins,
            )
        )
        hear_renewals(exchange.links, standing)
        relaying = await rooms.enter_async_context(open_relaying(exchange.links, host.me, standing.barred))
        standing.bars.append(relaying.service.bar)
        calls: Calls = (
            await rooms.enter_async_context(open_grid(home, config, host))
            if grid == host.me
            else Coordinator(host, grid)
        )
        roles = await _join(home, config, told(exchange.links.addresses, host.addresses), calls, standing)
        node = Node(
            home, config, identity, host, index, store, exchange, calls, grid, roles, stopping, standing
        )
        node.relaying = relaying
        keep_ports(home, config, host, exchange.links)
        node.proxy = await rooms.enter_async_context(
            open_proxy(host.me, exchange.links, calls, exchange.learn)
        )
        node.prefs = Prefs.load(home)
        node.outlook = await rooms.enter_async_context(
            open_outlook(exchange.links, host.me, grid, lambda: node.prefs, node.tell)
        )
        if "worker" in roles:
            node.lans = await rooms.enter_async_context(
                open_lans(host.me, exchange.links, calls, exchange.learn)
            )
        nursery = await rooms.enter_async_context(trio.open_nursery())
        nursery.start_soon(keep_log_short, home)
        nursery.start_soon(keep_holding, node)
        nursery.start_soon(node.keep_announcing)
        nursery.start_soon(keep_rules, node)
        nursery.start_soon(keep_relaying, node)
        nursery.start_soon(keep_paths, node.outlook)
        nursery.start_soon(keep_membership, node)
        nursery.start_soon(keep_standing, node)
        if "worker" in roles:
            check_programs()
            nursery.start_soon(work, node, Qemu(cache_folder()))
        await rooms.enter_async_context(serve_api(home, _ops(node)))
        for held in store.held():
            if held.chunks == held.chunks_total:
                node.announce(str(held.datum))
        yield node
        nursery.cancel_scope.cancel()


async def _join(
    home: Path, config: Config, addresses: tuple[str, ...], calls: Calls, standing: Standing
) -> tuple[str, ...]:
    """Become a member, or say that we are back; a member starts without the coordinator, too."""
    if config.coordinator is None:
        standing.welcome(await calls.join("", config.name, config.shares, addresses))
        return config.roles
    secret = home / TICKET
    token = read_ticket(secret.read_text()).token if secret.exists() else ""
    for attempt in range(JOIN_TRIES):
        try:
            welcome = await calls.join(token, config.name, config.shares, addresses)
        except (Unreachable, Temporary):
            if attempt + 1 < JOIN_TRIES:
                await trio.sleep(1 + attempt)
            elif token:
                raise
        else:
            standing.welcome(welcome)
            secret.unlink(missing_ok=True)
            attrs.evolve(config, roles=tuple(welcome.roles)).save(home)
            return tuple(welcome.roles)
    log.warning("the coordinator is away; starting without it")
    return config.roles


def _ops(node: Node) -> dict[str, Op]:
    """What the command line may ask of this daemon."""

    def bound(op: Any) -> Op:
        async def ask(args: dict[str, Any], tell: Tell) -> Any:
            return await op(node, args, tell)

        return ask

    table: dict[str, Any] = {
        "status": _status,
        "stop": _stop,
        "leave": _leave,
        "prefs": prefs,
        "relay": relay,
        "node_ls": _nodes,
        "netcheck": _netcheck,
        "ping": links.ping,
        "put": disks.put,
        "get": disks.get,
        "disk_ls": disks.ls,
        "disk_show": disks.show,
        "disk_verify": disks.verify,
        "disk_rm": disks.rm,
        "disk_export": disks.export,
        "submit": jobs.submit,
        "run": jobs.run,
        "job_ls": jobs.ls,
        "job_show": jobs.show,
        "job_wait": jobs.wait,
        "job_cancel": jobs.cancel,
        "job_results": jobs.results,
        "job_logs": jobs.logs,
        "forward": proxy.forward,
        "expose": proxy.expose,
        "socks": proxy.socks,
        "proxy_status": proxy.status,
    }
    if node.grid == node.network.me:
        table["token_create"] = _token
        table["token_revoke"] = _revoke
    return {name: bound(op) for name, op in table.items()}


async def _status(node: Node, args: dict[str, Any], tell: Tell) -> Any:
    held = await trio.to_thread.run_sync(node.store.held)
    return {
        "pid": os.getpid(),
        "peer": node.network.me,
        "name": node.config.name,
        "roles": list(node.roles),
        "grid": node.grid,
        "connected": node.connected or node.grid == node.network.me,
        "addresses": list(node.network.addresses),
        "paused": node.exchange.links.paused,
        "membership_ends": node.standing.mine.ends if node.standing.mine is not None else None,
        "links": links.rows(node),
        "running": [f"{r.task} ({r.note})" for r in node.running.values()],
        "received": dict(node.received),
        "served": dict(node.exchange.served),
        "origins": [parse_origin(url).shown for url in node.config.origins],
        "holds": [
            {"datum": str(h.datum), "chunks": h.chunks, "total": h.chunks_total, "bytes": h.bytes}
            for h in held
        ],
    }


async def _netcheck(node: Node, args: dict[str, Any], tell: Tell) -> Any:
    assert node.outlook is not None
    return await node.outlook.check()


async def _stop(node: Node, args: dict[str, Any], tell: Tell) -> Any:
    node.stopping.set()
    return {}


async def _leave(node: Node, args: dict[str, Any], tell: Tell) -> Any:
    # Who is no member any more, or finds nobody there, is gone already; an owner cannot leave.
    with contextlib.suppress(NotAuthorised, Unreachable, Temporary):
        await node.coordinator.leave()
    return {}


async def _nodes(node: Node, args: dict[str, Any], tell: Tell) -> Any:
    return {"nodes": [_row(n) for n in await node.coordinator.nodes()]}


def _row(view: m.NodeView) -> dict[str, Any]:
    return {
        "peer": view.peer,
        "name": view.name,
        "roles": list(view.roles),
        "state": "online" if view.online else "away",
        "age": view.age,
        "shares": list(view.shares),
        "running": len(view.running),
        "slots": view.total.slots,
        "holds": view.holds,
        "status": view.status,
        "addresses": list(view.addresses),
    }


async def _token(node: Node, args: dict[str, Any], tell: Tell) -> Any:
    return make_ticket(node.home, node.network, args["role"], args["uses"], args["expires"])


async def _revoke(node: Node, args: dict[str, Any], tell: Tell) -> Any:
    token = ticket_id(node.home, args["ticket"])
    await node.coordinator.revoke(token)
    return {"token": token}


if __name__ == "__main__":
    sys.exit(main())
