"""Offer the commands about jobs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from p2pgrid.cli.app import DiskOrLast, Home, Job, Json, app, ask, home_of, job, origins_of, watched
from p2pgrid.errors import Misused
from p2pgrid.node import api, launch, show
from p2pgrid.node.console import (
    Bars,
    emit,
    parse_duration,
    parse_indices,
    parse_size,
    say,
)
from p2pgrid.node.plain import console, plain
from p2pgrid.node.results import check_free


@app.command
def run(
    which: DiskOrLast = "",
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
    net: Annotated[str, Parameter(help="none, or lan: the job's guests, and nobody else.")] = "none",
    accept: Annotated[
        list[str] | None,
        Parameter(help="Who may reach its guests: 22 you, 8080:job they, too; needs --net lan.", negative=""),
    ] = None,
    needs: Annotated[
        list[str] | None, Parameter(help="A sharing that the worker must have.", negative="")
    ] = None,
    name: Annotated[str, Parameter(help="A name for the job.")] = "",
    origin: Annotated[
        list[str] | None,
        Parameter(help="Where no member has the disk, bring it here from this URL first.", negative=""),
    ] = None,
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
    if net not in ("none", "lan"):
        raise Misused(why=f"--net {net!r}: a guest has no network (none), or one with those of its job (lan)")
    home, origins, indices = home_of(data_dir), origins_of(origin), parse_indices(array)
    if output and not detach:
        check_free(output, indices)  # now, not when hours of work would have nowhere to go
    launch.ensure(home)
    spec: dict[str, Any] = {
        "disk": which,
        "script": str(script.absolute()),
        "inputs": [str(p.absolute()) for p in inputs or []],
        "array": indices,
        "memory": parse_size(ram),
        "cpus": cpus,
        "time_limit": parse_duration(time),
        "scratch": parse_size(scratch),
        "needs": needs or [],
        "accept": _rules(accept or [], net),
        "lan": net == "lan",
        "name": name,
        "origins": origins,
    }
    if detach:
        emit(api.call(home, "submit", spec), as_json, lambda v: str(v["job"]))
        return 0
    view = _attended(home, spec, as_json)
    folder = (output or Path(view["job"])).absolute()
    brought = api.call(home, "job_results", {"job": view["job"], "out": str(folder)})
    emit({**view, "results": brought["folder"], "results_failed": brought["failed"]}, as_json, show.finished)
    return show.exit_code(view) or (show.GRID_FAILURE if brought["failed"] else 0)


def _rules(given: list[str], net: str) -> list[str]:
    """What was given to `--accept`, if it can be.  Raises `Misused`."""
    from p2pgrid.node.proxy.rules import parse_accept

    if given and net == "none":
        raise Misused(why="--accept needs --net lan: a guest without a network is reached by nobody")
    return [f"{rule.port}:{rule.who}" if rule.who else str(rule.port) for rule in map(parse_accept, given)]


def _attended(home: Path, spec: dict[str, Any], as_json: bool) -> Any:
    """A job that lives as long as this command: the daemon cancels it when we hang up, however we end."""
    job = ""

    def watch(event: dict[str, Any]) -> None:
        nonlocal job
        if "job" in event:
            job = event["job"]
            say(f"job {job}: {len(spec['array'])} task(s) of {plain(event['disk_name'])}")
        else:
            bars.event(event)

    try:
        with Bars(as_json=as_json) as bars:
            return api.call(home, "run", spec, watch)
    except KeyboardInterrupt:
        if job:
            say(f"job {job} is being cancelled")
        raise


@job.command(name="ls")
def job_ls(*, data_dir: Home = None, as_json: Json = False) -> int:
    """List the jobs."""
    emit(ask(data_dir, "job_ls"), as_json, show.jobs)
    return 0


@job.command(name="show")
def job_show(number: Job, /, *, data_dir: Home = None, as_json: Json = False) -> int:
    """Show a job's tasks: where they run, how they ended."""
    emit(ask(data_dir, "job_show", job=number), as_json, show.job)
    return 0


@job.command(name="logs")
def job_logs(
    number: Job,
    /,
    *,
    index: Annotated[int, Parameter(help="Which task of an array.")] = 0,
    data_dir: Home = None,
    as_json: Json = False,
) -> int:
    """Print the console of a task that has ended, without what would steer your terminal."""
    logs = ask(data_dir, "job_logs", job=number, index=index)
    if as_json:
        emit(logs, as_json, str)
    else:
        sys.stdout.write(console(logs["console"]))
    return 0


@job.command(name="wait")
def job_wait(
    number: Job,
    /,
    *,
    timeout: Annotated[str | None, Parameter(help="Give up waiting after this long (exit 5).")] = None,
    data_dir: Home = None,
    as_json: Json = False,
) -> int:
    """Wait until every task of a job has ended and its results are home."""
    patience = parse_duration(timeout) if timeout else None
    view = watched(home_of(data_dir), "job_wait", as_json, job=number, patience=patience)
    emit(view, as_json, show.job)
    return show.exit_code(view)


@job.command(name="cancel")
def job_cancel(number: Job, /, *, data_dir: Home = None, as_json: Json = False) -> int:
    """Cancel what has not ended; running VMs are stopped."""
    emit(ask(data_dir, "job_cancel", job=number), as_json, show.job)
    return 0


@job.command(name="results")
def job_results(
    number: Job,
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
    brought = ask(data_dir, "job_results", job=number, out=str(folder))
    emit(brought, as_json, show.results)
    return int(brought["failed"][0]["exit_code"]) if brought["failed"] else 0
