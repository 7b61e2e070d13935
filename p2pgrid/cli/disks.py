"""Offer the commands about disks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from p2pgrid.cli.app import (
    Disk,
    DiskOrLast,
    Home,
    Json,
    Origin,
    app,
    ask,
    disk,
    home_of,
    origins_of,
    watched,
)
from p2pgrid.node import launch, show
from p2pgrid.node.console import (
    emit,
)


@app.command
def put(
    path: Annotated[Path, Parameter(name="FILE", help="The disk image.")],
    /,
    *,
    name: Annotated[str | None, Parameter(help="A name for it [the file's].")] = None,
    replica: Annotated[int, Parameter(help="Copies wished for; -1 for every worker.")] = 1,
    wait: Annotated[bool, Parameter(negative="", help="Wait until the wished copies stand.")] = False,
    export: Annotated[
        Path | None, Parameter(help="Folder to write it to, too, as an origin for --origin.")
    ] = None,
    skip_free: Annotated[
        bool, Parameter(negative="", help="Leave out what the guest's ext4 file systems have freed.")
    ] = False,
    parent: Annotated[
        str,
        Parameter(help="The DISK that this one is told by: auto, whichever here resembles it most, or none."),
    ] = "auto",
    data_dir: Home = None,
    as_json: Json = False,
) -> int:
    """Cut a disk image (VDI, qcow2, VMDK, raw) into verified chunks and seed it."""
    home = home_of(data_dir)
    launch.ensure(home)
    where = str(export.absolute()) if export else None
    wishes = {"name": name, "replica": replica, "wait": wait, "export": where, "skip_free": skip_free}
    done = watched(home, "put", as_json, path=str(path.absolute()), parent=parent, **wishes)
    emit(done, as_json, show.put)
    return 0


@app.command
def get(
    which: Disk,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="The file to write.")],
    form: Annotated[str | None, Parameter(name="--format", help="vdi, raw, qcow2 or vmdk.")] = None,
    origin: Origin = None,
    data_dir: Home = None,
    as_json: Json = False,
) -> int:
    """Write a disk back to a file: byte-identical in the format that was put."""
    home, origins = home_of(data_dir), origins_of(origin)
    launch.ensure(home)
    done = watched(home, "get", as_json, disk=which, out=str(output.absolute()), format=form, origins=origins)
    emit(done, as_json, show.get)
    return 0


@disk.command(name="ls")
def disk_ls(*, data_dir: Home = None, as_json: Json = False) -> int:
    """List the disks."""
    emit(ask(data_dir, "disk_ls"), as_json, show.disks)
    return 0


@disk.command(name="show")
def disk_show(which: DiskOrLast = "", /, *, data_dir: Home = None, as_json: Json = False) -> int:
    """Show one disk: its chunks, who holds it."""
    emit(ask(data_dir, "disk_show", disk=which), as_json, show.disk)
    return 0


@disk.command(name="verify")
def disk_verify(
    which: Annotated[str, Parameter(name="DISK", help="Its name or CID [all that is held].")] = "",
    /,
    *,
    repair: Annotated[bool, Parameter(help="Fetch what is bad again from peers.")] = True,
    data_dir: Home = None,
    as_json: Json = False,
) -> int:
    """Hash every chunk held here, of DISK or of everything; fetch what is bad again from peers."""
    done = watched(home_of(data_dir), "disk_verify", as_json, disk=which, repair=repair)
    emit(done, as_json, show.verified)
    return 0 if done["bad"] == done["repaired"] else 7


@disk.command(name="export")
def disk_export(
    which: Disk,
    folder: Annotated[Path, Parameter(name="DIR", help="The folder to write to; it may hold others.")],
    /,
    *,
    origin: Origin = None,
    data_dir: Home = None,
    as_json: Json = False,
) -> int:
    """Write a disk as files that any web server can offer: an origin for --origin."""
    home, origins = home_of(data_dir), origins_of(origin)
    done = watched(home, "disk_export", as_json, disk=which, out=str(folder.absolute()), origins=origins)
    emit(done, as_json, show.exported)
    return 0


@disk.command(name="rm")
def disk_rm(which: Disk, /, *, data_dir: Home = None, as_json: Json = False) -> int:
    """Forget a disk; every member drops it."""
    emit(ask(data_dir, "disk_rm", disk=which), as_json, lambda v: f"removed {v['name'] or v['disk']}")
    return 0
