"""`p2pnode`: lend this computer to a grid, and keep the say over it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import attrs
from cyclopts import App, Parameter

from p2pgrid import __version__
from p2pgrid.errors import Conflict, GridError, Misused, NotFound, Refused, TimedOut, Unreachable
from p2pgrid.node import api, launch, show, show_links, show_relay
from p2pgrid.node.config import FILE, MEMBERSHIP, TICKET, Config
from p2pgrid.node.console import default_home, emit, parse_size, say, ticket_text
from p2pgrid.node.plain import cleaned

app = App(name="p2pnode", version=f"p2pnode {__version__}", help="Lend this computer to a grid.")

Home = Annotated[
    Path | None, Parameter(name="--data-dir", help="Everything of one daemon [env: P2PGRID_HOME].")
]
Json = Annotated[bool, Parameter(name="--json", negative="", help="One JSON document on stdout.")]


def _home(given: Path | None) -> Path:
    return given.absolute() if given else default_home()


@app.command
def join(
    ticket: Annotated[
        str | None, Parameter(name="TICKET", help="As p2pgrid token create printed it.")
    ] = None,
    /,
    *,
    listen: Annotated[str, Parameter(help="ADDRESS:PORT for other nodes.")] = "0.0.0.0:0",
    link_port: Annotated[
        int | None, Parameter(help="TCP port for links, for a router to be told of [chosen once].")
    ] = None,
    share: Annotated[
        list[str] | None, Parameter(help="Something jobs may need and find here.", negative="")
    ] = None,
    name: Annotated[str | None, Parameter(help="What others call this node [the host's name].")] = None,
    slots: Annotated[int, Parameter(help="How many VMs may run at once.")] = 1,
    quota: Annotated[str | None, Parameter(help="Most the chunk store may take, 20G.")] = None,
    origin: Annotated[
        list[str] | None,
        Parameter(help="URL of an export on a web server, asked for what no peer has.", negative=""),
    ] = None,
    yes: Annotated[bool, Parameter(negative="", help="Do not ask.")] = False,
    foreground: Annotated[bool, Parameter(negative="", help="Stay here until Ctrl-C.")] = False,
    data_dir: Home = None,
    as_json: Json = False,
) -> int:
    """Join a grid with a ticket ("file:PATH" reads it, $P2PGRID_TICKET too); with none, rejoin."""
    home = _home(data_dir)
    if api.daemon_runs(home):
        raise Conflict(what=f"a daemon runs on {home} already; `p2pnode leave` ends its membership")
    text = _ticket_text(ticket)
    before = Config.load(home)
    origins = _origins(origin or ())
    port = 0 if link_port is None else launch.link_port(link_port)
    if text is not None:
        _set_up(home, text, listen, port, tuple(share or ()), name, slots, quota, origins, yes)
    elif before is None:
        raise Misused(why=f"{home} belongs to no grid yet; a ticket is needed (p2pgrid token create)")
    elif origins or port:
        attrs.evolve(before, origins=origins or before.origins, link_port=port or before.link_port).save(home)
    if foreground:
        from p2pgrid.node.daemon import run_stored

        return run_stored(home)
    try:
        launch.spawn(home).ready()
    except (GridError, KeyboardInterrupt):
        if text is not None:  # it was not let in: what was before, is
            (home / TICKET).unlink(missing_ok=True)
            if before is None:
                (home / FILE).unlink(missing_ok=True)
            else:
                before.save(home)
        raise
    emit(api.call(home, "status"), as_json, show.status)
    return 0


def _origins(given: Iterable[str]) -> tuple[str, ...]:
    """What was given, if all are origins.  Raises `Misused`."""
    from p2pgrid.transfer.ranges import parse_origin

    for url in given:
        parse_origin(url)
    return tuple(given)


def _ticket_text(given: str | None) -> str | None:
    given = given or os.environ.get("P2PGRID_TICKET")
    return None if given is None else ticket_text(given)


def _set_up(
    home: Path,
    text: str,
    listen: str,
    link_port: int,
    shares: tuple[str, ...],
    name: str | None,
    slots: int,
    quota: str | None,
    origins: tuple[str, ...],
    yes: bool,
) -> None:
    """Ask the volunteer, then write what the daemon needs to join."""
    from p2pgrid.node.ticket import read_ticket
    from p2pgrid.transfer.ranges import parse_origin

    ticket = read_ticket(text)
    before = Config.load(home)
    if before is not None and before.coordinator != ticket.coordinator:
        raise Conflict(what=f"a membership in another grid, in {home}; p2pnode leave ends it")
    if slots < 1:
        raise Misused(why="--slots is at least 1")
    card = [
        ("Grid", f"coordinator {ticket.coordinator}"),
        ("Wants", f"run VM jobs of the grid's submitters here, {slots} at once, at the lowest priority"),
        ("Disk", f"keep verified chunks, at most {quota or 'what is free less 1 GiB'}, under {home}"),
        (
            "Network",
            "exchange chunks with members of the grid and nobody else; VMs reach other VMs of their job,"
            " and what its rules and members open to them, never this network or the internet",
        ),
        ("Router", "ask it to let members reach this node; p2pnode prefs port_mapping=off ends that"),
        *(("Origin", f"ask {parse_origin(url).shown} for disks where no peer helps") for url in origins),
        ("Leave", "p2pnode leave, at any time"),
    ]
    say(launch.card(card))
    if not yes:
        if not sys.stdin.isatty():
            raise Refused(why="nobody is there to say yes; --yes joins without asking")
        if input("Join? [y/N] ").strip().lower() not in ("y", "yes"):
            raise Refused(why="you said no; nothing was changed")
    Config(
        roles=("worker",),  # the coordinator answers with the ticket's own
        listen=listen,
        link_port=link_port,
        name=name or socket.gethostname(),
        shares=shares,
        slots=slots,
        quota=parse_size(quota) if quota else None,
        coordinator=ticket.coordinator,
        addresses=tuple(ticket.addresses),
        origins=origins,
    ).save(home)
    secret = os.open(home / TICKET, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(secret, "w") as file:
        file.write(text)


@app.command
def status(*, data_dir: Home = None, as_json: Json = False) -> int:
    """Show this node: its grid, what it holds, what it runs."""
    emit(api.call(_home(data_dir), "status"), as_json, show.status)
    return 0


@app.command
def ping(
    peer: Annotated[str, Parameter(name="PEER", help="A node's name or peer id, or coordinator.")],
    /,
    *,
    count: Annotated[
        int | None, Parameter(help="How many times [4; with --until-direct at most 60].", show_default=False)
    ] = None,
    until_direct: Annotated[
        bool, Parameter(negative="", help="Go on until nobody else passes on what travels.")
    ] = False,
    data_dir: Home = None,
    as_json: Json = False,
) -> int:
    """Ping another node over the link to it: a line for each with the way there and the time."""
    answered: list[dict[str, Any]] = []

    def tell(event: dict[str, Any]) -> None:
        row = cleaned(event["ping"])
        if not as_json:
            print(show_links.pinged(row, answered[-1] if answered else None), flush=True)
        if row["seconds"] is not None:
            answered.append(row)

    args = {"peer": peer, "count": count or (60 if until_direct else 4), "until_direct": until_direct}
    if count is not None and count < 1:
        raise Misused(why="--count is at least 1")
    told = api.call(_home(data_dir), "ping", args, tell)
    emit(told, as_json, show_links.ping)
    if not told["answered"]:
        raise Unreachable(who=peer, why=told["pings"][-1]["why"])
    if until_direct and told["way"] == "relayed":
        raise TimedOut(what=f"a way to {peer} that needs no relay; what runs over the link goes on")
    return 0


@app.command
def netcheck(*, data_dir: Home = None, as_json: Json = False) -> int:
    """Say how well others can link to this node: NAT, IPv6, router, relays; and what would help."""
    from p2pgrid.node import netcheck, show_netcheck

    home = _home(data_dir)
    try:
        told = api.call(home, "netcheck")
    except api.NoDaemon:
        told = netcheck.look(home)
    emit(told, as_json, show_netcheck.netcheck)
    return netcheck.exit_code(told)


@app.command
def prefs(
    changes: Annotated[
        list[str] | None, Parameter(name="NAME=VALUE", help="What to change, see below.", negative="")
    ] = None,
    /,
    *,
    window: Annotated[
        list[str] | None,
        Parameter(help='"mon-fri 08:00-18:00 up=1Mbit down=5Mbit", or "22:00-06:00 stop".', negative=""),
    ] = None,
    no_windows: Annotated[bool, Parameter(negative="", help="Forget all windows.")] = False,
    data_dir: Home = None,
    as_json: Json = False,
) -> int:
    """Show or change what this node may move over the network, and when.

    up, down, up_per_link, down_per_link: a rate (20Mbit, 2.5MB) or none. courteous: wan, always or
    never give way to other traffic. on_battery, on_metered: stop or go. --window replaces all windows.
    """
    wanted: dict[str, object] = {}
    for change in changes or ():
        name, equals, value = change.partition("=")
        if not equals:
            raise Misused(why=f"{change!r} is not NAME=VALUE")
        wanted[name.replace("-", "_")] = value
    if window or no_windows:
        wanted["windows"] = list(window or ())
    emit(api.call(_home(data_dir), "prefs", {"changes": wanted}), as_json, show.prefs)
    return 0


@app.command
def relay(
    do: Annotated[
        Literal["status", "on", "off", "default"],
        Parameter(name="DO", help="on, off, default (coordinators relay, others do not), or show."),
    ] = "status",
    /,
    *,
    rate: Annotated[str | None, Parameter(help="Most in all: 50Mbit, 6MB or none.")] = None,
    rate_each: Annotated[str | None, Parameter(help="Most of one circuit.")] = None,
    quota: Annotated[str | None, Parameter(help="Most a day in all: 100G or none.")] = None,
    quota_each: Annotated[str | None, Parameter(help="Most a day of one peer.")] = None,
    circuits: Annotated[int | None, Parameter(help="Most at a time.")] = None,
    circuits_each: Annotated[int | None, Parameter(help="Most at a time of one peer.")] = None,
    data_dir: Home = None,
    as_json: Json = False,
) -> int:
    """Relay for members that cannot reach each other, within limits; or show what is relayed, and which
    relays this node uses.  What passes through is sealed: this node cannot read it.
    """
    changes: dict[str, object] = {
        "rate": rate,
        "rate_each": rate_each,
        "quota": quota,
        "quota_each": quota_each,
        "circuits": circuits,
        "circuits_each": circuits_each,
        "wanted": None if do == "status" else do,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    emit(api.call(_home(data_dir), "relay", {"changes": changes}), as_json, show_relay.relay)
    return 0


proxy = app.command(App(name="proxy", help="Connections between programs and guests."))


@proxy.command(name="status")
def proxy_status(*, data_dir: Home = None, as_json: Json = False) -> int:
    """Show the connections under way: who, to what, by which way, how much, how long."""
    from p2pgrid.node import show_proxy

    emit(api.call(_home(data_dir), "proxy_status"), as_json, show_proxy.status)
    return 0


@proxy.command(name="socks")
def proxy_socks(
    *,
    port: Annotated[int, Parameter(help="Where programs of this machine find it.")] = 1080,
    bind: Annotated[str, Parameter(help="Address of this machine alone to listen at.")] = "127.0.0.1",
    data_dir: Home = None,
) -> int:
    """Serve SOCKS5 to programs of this machine until Ctrl-C: they reach PORT.JOB.grid and the like."""

    def listening(event: dict[str, Any]) -> None:
        host, at = event["listening"]
        print(f"socks5h://{event['user']}:{event['password']}@{host}:{at}", flush=True)
        say("that is the proxy's URL, password included; Ctrl-C ends it")

    try:
        api.call(_home(data_dir), "socks", {"at": port, "host": bind}, listening)
    except KeyboardInterrupt:
        say("ended")
    return 0


@app.command
def leave(
    *,
    keep_chunks: Annotated[
        bool, Parameter(negative="", help="Keep the chunk store for a later grid.")
    ] = False,
    data_dir: Home = None,
) -> int:
    """Leave the grid: running VMs end, their tasks run elsewhere, the daemon stops."""
    home = _home(data_dir)
    if api.daemon_runs(home):
        api.call(home, "leave")
        launch.stop(home)
    elif Config.load(home) is None:
        raise NotFound(what=f"a membership in {home}")
    else:
        say("no daemon runs here: the coordinator will notice by itself that this node is gone")
    for name in (FILE, TICKET, MEMBERSHIP, launch.LOG, f"{launch.LOG}.1"):
        (home / name).unlink(missing_ok=True)
    if not keep_chunks:
        shutil.rmtree(home / "store", ignore_errors=True)
    say("left the grid")
    return 0
