"""`p2pgrid`: put disks on the grid, run them, bring results home.

A thin client of the daemon behind `--data-dir`: it imports neither trio nor libp2p.
With no daemon there, the commands that need one start an embedded grid and say so.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from p2pgrid import __version__
from p2pgrid.errors import Misused
from p2pgrid.node import api, launch, show
from p2pgrid.node.console import (
    Bars,
    default_home,
    emit,
    parse_duration,
    parse_size,
    run_app,
    say,
)

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
Json = Annotated[bool, Parameter(name="--json", negative="", help="One JSON document on stdout.")]


def _home(given: Path | None) -> Path:
    return given.absolute() if given else default_home()


def _ask(home: Path | None, op: str, **args: Any) -> Any:
    return api.call(_home(home), op, args)


# --- the grid -----------------------------------------------------------------------------


@app.command
def coordinator(
    *,
    data_dir: Home = None,
    listen: Annotated[
        str | None, Parameter(help="ADDRESS:PORT for other nodes [0.0.0.0:4321, or as before].")
    ] = None,
    db: Annotated[
        str | None, Parameter(help="Ledger, sqlite:///FILE [in the data directory, or as before].")
    ] = None,
    lease: Annotated[
        str | None, Parameter(help="Silence after which a worker's task runs elsewhere [30s, or as before].")
    ] = None,
) -> int:
    """Run a coordinator here, in the foreground, until Ctrl-C."""
    asked = {"listen": listen, "ledger": launch.ledger_path(db), "lease": lease and launch.lease(lease)}
    from p2pgrid.node.daemon import run_coordinator

    return run_coordinator(_home(data_dir), **{k: v for k, v in asked.items() if v is not None})


@app.command
def down(*, data_dir: Home = None) -> int:
    """End the daemon of this data directory (the embedded grid)."""
    launch.stop(_home(data_dir))
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
    made = _ask(data_dir, "token_create", role=role, uses=uses, expires=parse_duration(expires))
    emit(made, as_json, lambda v: str(v["ticket"]))
    return 0


# --- disks --------------------------------------------------------------------------------


@app.command
def put(
    path: Path,
    /,
    *,
    name: Annotated[str | None, Parameter(help="A name for it [the file's].")] = None,
    replica: Annotated[int, Parameter(help="Copies wished for; -1 for every worker.")] = 1,
    wait: Annotated[bool, Parameter(negative="", help="Wait until the wished copies stand.")] = False,
    data_dir: Home = None,
    as_json: Json = False,
) -> int:
    """Cut a disk image (VDI, qcow2, VMDK, raw) into verified chunks and seed it."""
    home = _home(data_dir)
    launch.ensure(home)
    with Bars() as bars:
        done = api.call(
            home,
            "put",
            {"path": str(path.absolute()), "name": name, "replica": replica, "wait": wait},
            lambda e: bars.show(e["phase"], e["done"], e["total"], e.get("note", "")),
        )
    emit(done, as_json, show.put)
    return 0


@app.command
def get(
    which: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="The file to write.")],
    form: Annotated[str | None, Parameter(name="--format", help="vdi, raw, qcow2 or vmdk.")] = None,
    data_dir: Home = None,
    as_json: Json = False,
) -> int:
    """Write a disk back to a file: byte-identical in the format that was put."""
    home = _home(data_dir)
    launch.ensure(home)
    with Bars() as bars:
        done = api.call(
            home,
            "get",
            {"disk": which, "out": str(output.absolute()), "format": form},
            lambda e: bars.show(e["phase"], e["done"], e["total"], e.get("note", "")),
        )
    emit(done, as_json, show.get)
    return 0


@disk.command(name="ls")
def disk_ls(*, data_dir: Home = None, as_json: Json = False) -> int:
    """List the disks."""
    emit(_ask(data_dir, "disk_ls"), as_json, show.disks)
    return 0


@disk.command(name="show")
def disk_show(which: str = "", /, *, data_dir: Home = None, as_json: Json = False) -> int:
    """Show one disk: its chunks, who holds it."""
    emit(_ask(data_dir, "disk_show", disk=which), as_json, show.disk)
    return 0


@disk.command(name="verify")
def disk_verify(
    which: str = "",
    /,
    *,
    repair: Annotated[bool, Parameter(help="Fetch what is bad again from peers.")] = True,
    data_dir: Home = None,
    as_json: Json = False,
) -> int:
    """Hash every chunk held here, of DISK or of everything; fetch what is bad again from peers."""
    with Bars() as bars:
        done = api.call(
            _home(data_dir),
            "disk_verify",
            {"disk": which, "repair": repair},
            lambda e: bars.show(e["phase"], e["done"], e["total"], e.get("note", "")),
        )
    emit(done, as_json, show.verified)
    return 0 if done["bad"] == done["repaired"] else 7


@disk.command(name="rm")
def disk_rm(which: str, /, *, data_dir: Home = None, as_json: Json = False) -> int:
    """Forget a disk; every member drops it."""
    emit(_ask(data_dir, "disk_rm", disk=which), as_json, lambda v: f"removed {v['name'] or v['disk']}")
    return 0


# --- jobs ---------------------------------------------------------------------------------


def _indices(text: str) -> list[int]:
    """'0-99', '3' or '1,4-6' as task indices."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise Misused(why=f"--array {text!r}: write 0-99 or 1,4-6")
        found += range(int(first), int(last if dash else first) + 1)
    if not found or len(found) > 100_000:
        raise Misused(why=f"--array {text!r} names {len(found)} tasks; between 1 and 100000 are possible")
    return sorted(set(found))


@app.command
def run(
    which: str = "",
    /,
    *,
    script: Annotated[Path, Parameter(help="Runs in the guest at the end of boot, as /context/context.sh.")],
    inputs: Annotated[
        list[Path] | None, Parameter(name="--in", help="A file or folder to find in /context.", negative="")
    ] = None,
    output: Annotated[
        Path | None, Parameter(name=["--output", "-o"], help="Folder for the results [JOB in this folder].")
    ] = None,
    array: Annotated[str, Parameter(help="Task indices, 0-99; each finds its own in $P2PGRID_INDEX.")] = "0",
    ram: Annotated[str, Parameter(help="Memory of the VM.")] = "512M",
    cpus: Annotated[int, Parameter(help="Processors of the VM.")] = 1,
    time: Annotated[str, Parameter(help="Wall time after which the VM is ended.")] = "1h",
    scratch: Annotated[str, Parameter(help="Size of /scratch.")] = "8G",
    net: Annotated[str, Parameter(help="none (the guest has no network).")] = "none",
    needs: Annotated[
        list[str] | None, Parameter(help="A sharing that the worker must have.", negative="")
    ] = None,
    name: Annotated[str, Parameter(help="A name for the job.")] = "",
    detach: Annotated[
        bool, Parameter(name=["--detach", "-d"], negative="", help="Print the job's id alone.")
    ] = False,
    data_dir: Home = None,
    as_json: Json = False,
) -> int:
    """Boot a disk on volunteers, run a script in each guest, bring /scratch home.

    With no DISK, the one last put.  In the foreground the exit code is the guest's (the
    first that is not 0), 125 when the grid failed.
    """
    if net != "none":
        raise Misused(why=f"--net {net!r}: this version gives guests no network; only 'none' is possible")
    home = _home(data_dir)
    launch.ensure(home)
    spec: dict[str, Any] = {
        "disk": which,
        "script": str(script.absolute()),
        "inputs": [str(p.absolute()) for p in inputs or []],
        "array": _indices(array),
        "memory": parse_size(ram),
        "cpus": cpus,
        "time_limit": parse_duration(time),
        "scratch": parse_size(scratch),
        "needs": needs or [],
        "name": name,
    }
    if detach:
        emit(api.call(home, "submit", spec), as_json, lambda v: str(v["job"]))
        return 0
    view = _attended(home, spec)
    folder = (output or Path(view["job"])).absolute()
    brought = api.call(home, "job_results", {"job": view["job"], "out": str(folder)})
    emit({**view, "results": brought["folder"]}, as_json, show.finished)
    return show.exit_code(view)


def _attended(home: Path, spec: dict[str, Any]) -> Any:
    """A job that lives as long as this command: the daemon cancels it when we hang up, however we end."""
    job = ""

    def watch(event: dict[str, Any]) -> None:
        nonlocal job
        if "job" in event:
            job = event["job"]
            say(f"job {job}: {len(spec['array'])} task(s) of {event['disk_name']}")
        else:
            bars.show(event["phase"], event["done"], event["total"], event.get("note", ""))

    try:
        with Bars() as bars:
            return api.call(home, "run", spec, watch)
    except KeyboardInterrupt:
        if job:
            say(f"job {job} is being cancelled")
        raise


def _wait(home: Path, number: str, patience: float | None = None) -> Any:
    with Bars() as bars:
        return api.call(
            home,
            "job_wait",
            {"job": number, "patience": patience},
            lambda e: bars.show(e["phase"], e["done"], e["total"], e.get("note", "")),
        )


@job.command(name="ls")
def job_ls(*, data_dir: Home = None, as_json: Json = False) -> int:
    """List the jobs."""
    emit(_ask(data_dir, "job_ls"), as_json, show.jobs)
    return 0


@job.command(name="show")
def job_show(number: str, /, *, data_dir: Home = None, as_json: Json = False) -> int:
    """Show a job's tasks: where they run, how they ended."""
    emit(_ask(data_dir, "job_show", job=number), as_json, show.job)
    return 0


@job.command(name="logs")
def job_logs(
    number: str,
    /,
    *,
    index: Annotated[int, Parameter(help="Which task of an array.")] = 0,
    data_dir: Home = None,
) -> int:
    """Print the console of a task that has ended."""
    sys.stdout.write(_ask(data_dir, "job_logs", job=number, index=index)["console"])
    return 0


@job.command(name="wait")
def job_wait(
    number: str,
    /,
    *,
    timeout: Annotated[str | None, Parameter(help="Give up waiting after this long (exit 5).")] = None,
    data_dir: Home = None,
    as_json: Json = False,
) -> int:
    """Wait until every task of a job has ended and its results are home."""
    view = _wait(_home(data_dir), number, parse_duration(timeout) if timeout else None)
    emit(view, as_json, show.job)
    return show.exit_code(view)


@job.command(name="cancel")
def job_cancel(number: str, /, *, data_dir: Home = None, as_json: Json = False) -> int:
    """Cancel what has not ended; running VMs are stopped."""
    emit(_ask(data_dir, "job_cancel", job=number), as_json, show.job)
    return 0


@job.command(name="results")
def job_results(
    number: str,
    /,
    *,
    output: Annotated[
        Path | None, Parameter(name=["--output", "-o"], help="Folder [JOB in this folder].")
    ] = None,
    data_dir: Home = None,
    as_json: Json = False,
) -> int:
    """Write the results that are home to a folder, one sub-folder a task."""
    folder = (output or Path(number)).absolute()
    emit(_ask(data_dir, "job_results", job=number, out=str(folder)), as_json, show.results)
    return 0


@node.command(name="ls")
def node_ls(*, data_dir: Home = None, as_json: Json = False) -> int:
    """List the members of the grid."""
    emit(_ask(data_dir, "node_ls"), as_json, show.nodes)
    return 0


@template.command(name="build")
def template_build(
    kind: str,
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


def main() -> int:
    """The console script."""
    return run_app(app, "p2pgrid", __version__)


if __name__ == "__main__":
    sys.exit(main())
