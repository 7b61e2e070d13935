"""Name the groups of commands, and what many commands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from p2pgrid import __version__
from p2pgrid.node import api
from p2pgrid.node.console import Bars, default_home

app = App(
    name="p2pgrid",
    version=f"p2pgrid {__version__}",
    help="Run virtual machines on the PCs you already have.",
)
token = app.command(App(name="token", help="Tickets that let others join or submit."))
disk = app.command(App(name="disk", help="Disks on the grid."))
job = app.command(App(name="job", help="Jobs and their results."))
node = app.command(App(name="node", help="Members of the grid."))
template = app.command(App(name="template", help="Bootable disks made from your distribution's packages."))

Home = Annotated[
    Path | None, Parameter(name="--data-dir", help="Everything of one daemon [env: P2PGRID_HOME].")
]
Disk = Annotated[str, Parameter(name="DISK", help="Its name or CID.")]
DiskOrLast = Annotated[
    str, Parameter(name="DISK", help="Its name or CID [the one last put].", show_default=False)
]
Job = Annotated[str, Parameter(name="JOB", help="Its id.")]
Origin = Annotated[
    list[str] | None,
    Parameter(help="URL of an export on a web server, asked for what no peer has.", negative=""),
]
Json = Annotated[bool, Parameter(name="--json", negative="", help="One JSON document on stdout.")]


def home_of(given: Path | None) -> Path:
    """The data directory that was asked for."""
    return given.absolute() if given else default_home()


def origins_of(given: list[str] | None) -> list[str]:
    """The origins that were named.  Raises `Misused` for what is none."""
    if given:
        from p2pgrid.transfer.ranges import parse_origin

        for url in given:
            parse_origin(url)
    return given or []


def ask(home: Path | None, op: str, **args: Any) -> Any:
    """The daemon's answer."""
    return api.call(home_of(home), op, args)


def watched(home: Path, op: str, as_json: bool, **args: Any) -> Any:
    """The daemon's answer, with bars until it comes."""
    with Bars(as_json=as_json) as bars:
        return api.call(home, op, args, bars.event)
