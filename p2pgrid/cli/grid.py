"""Offer the commands that start, join and end grids, and build templates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from p2pgrid.cli.app import Home, Json, Origin, app, ask, home_of, node, origins_of, template, token
from p2pgrid.errors import Misused
from p2pgrid.node import launch, show
from p2pgrid.node.console import (
    Bars,
    emit,
    parse_duration,
    say,
    ticket_text,
)


@app.command
def coordinator(
    *,
    data_dir: Home = None,
    origin: Origin = None,
    listen: Annotated[
        str | None, Parameter(help="ADDRESS:PORT for other nodes [0.0.0.0:4321, or as before].")
    ] = None,
    link_port: Annotated[
        int | None,
        Parameter(help="TCP port for links; 443 is let out almost everywhere [chosen once, or as before]."),
    ] = None,
    db: Annotated[
        str | None, Parameter(help="Ledger, sqlite:///FILE [in the data directory, or as before].")
    ] = None,
    lease: Annotated[
        str | None, Parameter(help="Silence after which a worker's task runs elsewhere [30s, or as before].")
    ] = None,
    membership: Annotated[
        str | None,
        Parameter(help="How long a node passes for a member without asking here [7d, or as before]."),
    ] = None,
    libp2p_places: Annotated[
        int | None,
        Parameter(help="How many other libp2p nodes may be called through this one [0, or as before]."),
    ] = None,
    libp2p_relay: Annotated[
        list[str] | None,
        Parameter(help="libp2p node to be called through, /ip4/…/tcp/…/p2p/ID [or as before].", negative=""),
    ] = None,
) -> int:
    """Run a coordinator here, in the foreground, until Ctrl-C."""
    asked = {
        "listen": listen,
        "link_port": None if link_port is None else launch.link_port(link_port),
        "ledger": launch.ledger_path(db),
        "lease": lease and launch.lease(lease),
        "membership": membership and launch.membership(membership),
        "origins": tuple(origins_of(origin)) or None,
        "libp2p_places": libp2p_places if libp2p_places is None else launch.places(libp2p_places),
        "libp2p_relays": launch.relays(libp2p_relay or ()) or None,
    }
    from p2pgrid.node.daemon import run_coordinator

    return run_coordinator(home_of(data_dir), **{k: v for k, v in asked.items() if v is not None})


@app.command
def down(*, data_dir: Home = None) -> int:
    """End the daemon of this data directory (the embedded grid)."""
    launch.stop(home_of(data_dir))
    say("stopped")
    return 0


@app.command
def demo(
    *,
    workers: Annotated[int, Parameter(help="Worker processes.")] = 3,
    keep: Annotated[bool, Parameter(negative="", help="Keep the demo's folder and say where it is.")] = False,
    as_json: Json = False,
) -> int:
    """The main job on one machine: a disk goes in, VMs boot on workers, results come back."""
    from p2pgrid.node.demo import run_demo

    return run_demo(workers, keep=keep, as_json=as_json)


@token.command(name="create")
def token_create(
    *,
    role: Annotated[str, Parameter(help="worker or submitter.")] = "worker",
    uses: Annotated[int | None, Parameter(help="How many may join with it [unlimited].")] = None,
    expires: Annotated[str, Parameter(help="How long it holds.")] = "24h",
    data_dir: Home = None,
    as_json: Json = False,
) -> int:
    """Print a ticket for `p2pnode join`."""
    made = ask(data_dir, "token_create", role=role, uses=uses, expires=parse_duration(expires))
    emit(made, as_json, lambda v: str(v["ticket"]))
    return 0


@token.command(name="revoke")
def token_revoke(
    ticket: Annotated[str, Parameter(name="TICKET", help="As it was printed, or file:PATH.")],
    /,
    *,
    data_dir: Home = None,
    as_json: Json = False,
) -> int:
    """Refuse a ticket from now on, and everyone who joined with it."""
    revoked = ask(data_dir, "token_revoke", ticket=ticket_text(ticket))
    emit(revoked, as_json, lambda v: f"revoked {v['token']}")
    return 0


@node.command(name="ls")
def node_ls(*, data_dir: Home = None, as_json: Json = False) -> int:
    """List the members of the grid."""
    emit(ask(data_dir, "node_ls"), as_json, show.nodes)
    return 0


@template.command(name="build")
def template_build(
    kind: Annotated[str, Parameter(name="KIND", help="tiny or debian.")],
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="The VDI to write.")],
    package: Annotated[list[str] | None, Parameter(help="A package to add (debian).", negative="")] = None,
    as_json: Json = False,
) -> int:
    """Build a bootable disk, `tiny` (kernel and busybox) or `debian`, from packages."""
    if kind not in ("tiny", "debian"):
        raise Misused(why=f"there is no template {kind!r}; choose tiny or debian")
    from p2pgrid.vm.template import build_template

    with Bars() as bars:
        made = build_template(
            kind,  # type: ignore[arg-type]
            output.absolute(),
            packages=tuple(package or ()),
            progress=lambda what, done, total: bars.show(what, done, total),
        )
    emit(
        {"template": kind, "path": str(made), "size": os.path.getsize(made)},
        as_json,
        lambda v: str(v["path"]),
    )
    return 0
