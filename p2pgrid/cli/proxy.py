"""Offer the commands that connect programs of this machine with guests."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from p2pgrid.cli.app import Home, Job, app, home_of, job
from p2pgrid.errors import Misconfigured, Misused
from p2pgrid.node import api
from p2pgrid.node.console import say
from p2pgrid.node.plain import plain

Index = Annotated[int | None, Parameter(help="The guest of which task [any that runs].")]


class _Done(Exception):
    """Ends the call that keeps a forward open."""


@job.command(name="forward")
def job_forward(
    number: Job,
    ports: Annotated[str, Parameter(name="[HERE:]PORT", help="3333:22: port 3333 here, 22 in the guest.")],
    /,
    *,
    index: Index = None,
    bind: Annotated[str, Parameter(help="Address of this machine alone to listen at.")] = "127.0.0.1",
    data_dir: Home = None,
) -> int:
    """Connect a port of this machine with one of a job's guest, until Ctrl-C.

    The job must accept its submitter there: p2pgrid run --accept PORT.
    """
    from p2pgrid.node.proxy.rules import parse_port_pair

    at, port = parse_port_pair(ports)

    def listening(event: dict[str, Any]) -> None:
        host, here = event["listening"]
        say(f"{host}:{here} leads to {plain(event['to'])}; Ctrl-C ends it")

    args = {"job": number, "port": port, "at": at, "index": index, "host": bind}
    return _until_interrupted(home_of(data_dir), "forward", args, listening)


@app.command
def expose(
    ports: Annotated[str, Parameter(name="[HOST:]PORT", help="8000, or example.org:443.")],
    /,
    *,
    to: Annotated[str, Parameter(help="The job whose guests may reach it.")],
    port: Annotated[int | None, Parameter(name="--as", help="The port that they use [the same].")] = None,
    data_dir: Home = None,
) -> int:
    """Let guests of a job reach a port of this machine, or of one host in the open Internet, until Ctrl-C.

    Guests call it PORT.owner.grid. Nothing else of this machine or its network can be reached.
    """
    host, _, digits = ports.rpartition(":")
    if not (digits.isascii() and digits.isdigit() and 0 < int(digits[:6]) < 65536):
        raise Misused(why=f"{ports!r} is not PORT or HOST:PORT")

    def exposed(event: dict[str, Any]) -> None:
        say(f"guests of {plain(event['to'])} reach {plain(ports)} as {event['names'][0]}; Ctrl-C ends it")

    host = host.removeprefix("[").removesuffix("]")
    args = {"port": port or int(digits), "at": int(digits), "host": host, "to": to}
    return _until_interrupted(home_of(data_dir), "expose", args, exposed)


def _until_interrupted(home: Path, op: str, args: dict[str, Any], on_event: Any) -> int:
    try:
        api.call(home, op, args, on_event)
    except KeyboardInterrupt:
        say("ended")
    return 0


@job.command(name="ssh")
def job_ssh(
    number: Job,
    command: Annotated[
        list[str] | None, Parameter(name="COMMAND", help="Run this there.", negative="")
    ] = None,
    /,
    *,
    user: Annotated[str, Parameter(name=["--user", "-l"], help="Who to be in the guest.")] = "root",
    identity: Annotated[Path | None, Parameter(name=["--identity", "-i"], help="Private key.")] = None,
    port: Annotated[int, Parameter(help="Where sshd listens in the guest.")] = 22,
    index: Index = None,
    data_dir: Home = None,
) -> int:
    """Open a shell in a running guest, whatever stands between: needs ssh here, sshd and --accept 22 there.

    A guest's host key is new each time it boots, and the grid has proved already which node answers, so host
    keys are not remembered. The exit code is that of ssh.
    """
    program = shutil.which("ssh")
    if program is None:
        raise Misconfigured(why="ssh is not installed; install the package openssh-client")
    args = {"job": number, "port": port, "at": 0, "index": index}
    done: list[int] = []

    def connect(event: dict[str, Any]) -> None:
        host, here = event["listening"]
        with tempfile.TemporaryDirectory(prefix="p2pgrid-ssh-") as folder:
            words = [
                program, "-p", str(here), "-l", user,
                "-o", f"UserKnownHostsFile={folder}/known_hosts", "-o", "GlobalKnownHostsFile=/dev/null",
                "-o", "StrictHostKeyChecking=accept-new", "-o", "LogLevel=ERROR", "-o", "CheckHostIP=no",
                *(["-i", str(identity), "-o", "IdentitiesOnly=yes"] if identity else []),
                host, *(command or []),
            ]  # fmt: skip
            done.append(subprocess.run(words, env=os.environ, check=False).returncode)
        raise _Done

    with contextlib.suppress(_Done):
        api.call(home_of(data_dir), "forward", args, connect)
    return done[0] if done else 255
