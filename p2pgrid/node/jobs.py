"""Answer what a person asks about jobs: submit, list, watch, cancel, bring results home."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs
import trio

from p2pgrid.dht.manifest import Tree, safe_path
from p2pgrid.dht.publish import Published, publish_tree
from p2pgrid.dht.restore import restore_tree
from p2pgrid.errors import (
    Conflict,
    GridError,
    Misused,
    NotAuthorised,
    NotFound,
    Temporary,
    TimedOut,
    Unreachable,
    WorldError,
)
from p2pgrid.ids import Cid, readable_id
from p2pgrid.node import disks
from p2pgrid.node.api import Tell
from p2pgrid.node.attempt import stop_if_cancelled
from p2pgrid.node.disks import Args
from p2pgrid.node.node import OWN, STALL_PATIENCE, Node
from p2pgrid.node.patience import backoff, patiently
from p2pgrid.node.results import check_free
from p2pgrid.node.room import INPUTS_MAX, RESULT_MAX
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.job import FINAL, JobSpec

WATCH = 20.0
"""Seconds that one watch may wait at the coordinator."""
SCRIPT = "context.sh"
ABANDON = 5.0
"""Seconds that the cancelling of a job may take whose submitter hung up."""


@attrs.frozen(kw_only=True, slots=False)
class NoScript(WorldError):
    """The job's script is not there or cannot be read."""

    exit_code: ClassVar[int] = 127
    path: str


@attrs.frozen(kw_only=True, slots=False)
class NoDisk(NotFound):
    """There is no disk of yours on the grid."""

    what: str = "a disk to run"
    advice: ClassVar[str] = "put one first: p2pgrid put DISK"


async def submit(node: Node, args: Args, tell: Tell) -> Any:
    """Make script and inputs a datum, and a job of it."""
    async with _submitted(node, args, tell) as made:
        return made


async def run(node: Node, args: Args, tell: Tell) -> Any:
    """Submit and wait.  The job is cancelled when whoever asked hangs up, but not when this daemon ends."""
    async with _submitted(node, args, tell) as made:
        await tell(made)
        return await wait(node, {"job": made["job"]}, tell)


@contextlib.asynccontextmanager
async def _submitted(node: Node, args: Args, tell: Tell) -> AsyncIterator[dict[str, str]]:
    """A new job; it ends when the block is cancelled."""
    name, spec = await _spec(node, args, tell)
    key = readable_id(secrets.token_bytes(7))  # makes it one job, however often it is said
    try:
        job = await patiently(lambda: node.coordinator.submit(spec, key))
        yield {"job": job, "disk": spec.disk, "disk_name": name}
    except (trio.Cancelled, trio.BrokenResourceError):
        if not node.stopping.is_set():
            with trio.move_on_after(ABANDON) as scope, contextlib.suppress(GridError):
                scope.shield = True
                await node.coordinator.cancel(await node.coordinator.submit(spec, key))
        raise


async def _spec(node: Node, args: Args, tell: Tell) -> tuple[str, JobSpec]:
    """The disk's name, and the job that was asked for; its inputs are put."""
    if "submitter" not in node.roles:
        raise NotAuthorised(why="this node is no submitter")
    try:
        disk = await patiently(lambda: node.resolve(args["disk"]))
    except NotFound:
        if args["disk"]:
            raise
        raise NoDisk from None
    if args.get("origins"):
        await _bring(node, disk, args["origins"], tell)
    inputs = await _put_inputs(node, Path(args["script"]), [Path(p) for p in args["inputs"]])
    return disk.record.name, JobSpec(
        disk=disk.record.datum,
        inputs=inputs.datum,
        name=args["name"],
        array=tuple(args["array"]),
        memory=args["memory"],
        cpus=args["cpus"],
        time_limit=args["time_limit"],
        scratch=args["scratch"],
        needs=tuple(args["needs"]),
        accept=tuple(args.get("accept", ())),
        lan=args.get("lan", False),
    )


async def _bring(node: Node, disk: m.DatumView, origins: Sequence[str], tell: Tell) -> None:
    """Where no member has the disk, have it here, from `origins`, for workers to fetch.

    They are never told of origins that a submitter names: which servers a volunteer's machine talks
    to is its owner's to say.
    """
    datum = disk.record.datum
    if not node.complete(datum) and not await node.providers(datum):
        await disks.fetch(node, datum, tell, origins)


async def _put_inputs(node: Node, script: Path, inputs: list[Path]) -> m.DatumRecord:
    """Make script and inputs a tree that is known to the grid and seeded here."""
    async with node.scratchpad() as folder:
        await trio.to_thread.run_sync(_stage, folder, script, inputs)

        def publish() -> Published:
            return publish_tree(node.store, folder, node.identity.signing_key, stop_if_cancelled)

        made = await trio.to_thread.run_sync(publish)
        record = m.DatumRecord(
            datum=str(made.datum),
            kind="tree",
            content=str(made.content) if made.content else None,
            size=made.size,
            wire_bytes=made.wire_bytes,
        )
        await patiently(lambda: node.coordinator.put(record))
        if not node.complete(record.datum):  # dropped by an order that was given before it was put again
            await trio.to_thread.run_sync(publish)
    node.announce(record.datum)
    return record


def _stage(folder: Path, script: Path, inputs: list[Path]) -> None:
    """Lay out the context disk's files: the script, and each input under its own name."""
    copy = _Copying()
    try:
        copy(script, folder / SCRIPT)
    except OSError as gone:
        raise NoScript(path=f"{script}: {gone.strerror}") from None
    (folder / SCRIPT).chmod(0o755)
    for source in inputs:
        target = folder / source.name
        if not safe_path(source.name):
            raise Misused(why=f"{source.name!r} cannot be the name of an input")
        if target.exists() or source.name in (SCRIPT, "p2pgrid.env"):
            raise Conflict(what=f"an input called {source.name!r}")
        try:
            if source.is_dir():
                shutil.copytree(source, target, copy_function=copy)
            else:
                copy(source, target)
        except (OSError, shutil.Error) as gone:
            raise NotFound(what=f"the input {source}: {gone}") from None


class _Copying:
    """Copy files, in a thread that can be cancelled, and never more bytes than a worker takes."""

    def __init__(self) -> None:
        self._copied = 0

    def __call__(self, source: str | Path, target: str | Path) -> None:
        stop_if_cancelled()
        self._copied += Path(source).stat().st_size
        if self._copied > INPUTS_MAX:
            raise Misused(why=f"script and inputs are more than {INPUTS_MAX >> 30} GiB; put them on a disk")
        shutil.copy(source, target)


async def ls(node: Node, args: Args, tell: Tell) -> Any:
    """All jobs that this node may see."""
    rows = await node.coordinator.jobs()
    return {
        "jobs": [
            {"job": j.job, "name": j.name, "disk": j.disk, "state": j.state, "counts": dict(j.counts)}
            for j in rows
        ]
    }


async def show(node: Node, args: Args, tell: Tell) -> Any:
    """One job with its tasks."""
    return _view(await node.coordinator.job(args["job"]))


def _view(job: m.JobView) -> dict[str, Any]:
    return {
        "job": job.job,
        "name": job.spec.name,
        "disk": job.spec.disk,
        "state": job.state,
        "counts": dict(job.counts),
        "why": job.why,
        "tasks": [
            {
                "index": t.index,
                "state": t.state,
                "node": t.node_name or t.node,
                "exit": t.outcome.exit if t.outcome else None,
                "attempts": t.attempts + t.lost + (1 if t.epoch else 0),
                "reason": t.note or (t.outcome.why if t.outcome and t.outcome.why != "off" else ""),
                "seconds": t.outcome.seconds if t.outcome else None,
                "timings": t.outcome.timings if t.outcome else {},
                "sources": t.outcome.sources if t.outcome else {},
                "result": t.outcome.result.datum if t.outcome and t.outcome.result else None,
            }
            for t in job.tasks
        ],
    }


async def wait(node: Node, args: Args, tell: Tell) -> Any:
    """Tell how a job goes until every task is final, whatever becomes of the coordinator meanwhile."""
    patience = args.get("patience")
    with trio.move_on_after(float("inf") if patience is None else patience):
        version = failures = 0
        notes: dict[int, str] = {}
        while True:
            try:
                view = await node.coordinator.watch(args["job"], version, WATCH if version else 0.0)
                version, failures = view.version, 0
            except (Unreachable, Temporary):
                await tell(
                    {"phase": "job", "done": 0, "total": 1, "note": "the coordinator is away; waiting"}
                )
                await trio.sleep(backoff(failures))
                failures += 1
                continue
            notes |= {t.index: t.note or t.state for t in view.tasks}
            done = sum(n for state, n in view.counts.items() if state in FINAL)
            await tell(
                {"phase": "job", "done": done, "total": len(view.spec.array), "note": _note(view, notes)}
            )
            if view.state in FINAL:
                return _view(await node.coordinator.job(args["job"]))
    raise TimedOut(what=f"job {args['job']}")


def _note(view: m.JobView, notes: dict[int, str]) -> str:
    states = ", ".join(f"{n} {state}" for state, n in view.counts.items() if n)
    busy = Counter(note for note in notes.values() if note not in FINAL and note not in view.counts)
    return f"{states}; {busy.most_common(1)[0][0]}" if busy else f"{states}; {view.why}".rstrip("; ")


async def cancel(node: Node, args: Args, tell: Tell) -> Any:
    """End what has not ended."""
    await node.coordinator.cancel(args["job"])
    return _view(await node.coordinator.job(args["job"]))


async def results(node: Node, args: Args, tell: Tell) -> Any:
    """Write every result that there is to a folder, one sub-folder a task; a bad one spoils no other."""
    out = Path(args["out"])
    view = await node.coordinator.job(args["job"])
    ended = {t.index: t.outcome.result.datum for t in view.tasks if t.outcome and t.outcome.result}
    check_free(out, ended)
    written: list[Tree] = []
    failed: list[dict[str, Any]] = []
    for index, datum in ended.items():
        try:
            tree = await _tree(node, datum)
            os.makedirs(out, exist_ok=True)
            await trio.to_thread.run_sync(
                restore_tree, node.store, Cid.parse(datum), out / str(index), RESULT_MAX, stop_if_cancelled
            )
            written.append(tree)
        except GridError as bad:
            failed.append({"index": index, "why": str(bad), "exit_code": bad.exit_code})
    return {
        "folder": str(out),
        "tasks": len(written),
        "files": sum(not f.path.startswith(OWN + "/") for tree in written for f in tree.files),
        "bytes": sum(f.size for tree in written for f in tree.files),
        "failed": failed,
    }


async def _tree(node: Node, datum: str) -> Tree:
    """A result tree, complete in this store."""
    if not node.complete(datum):
        await node.fetch(datum, await node.providers(datum), patience=STALL_PATIENCE, most=RESULT_MAX)
    return Tree.decode(node.store.get_object(Cid.parse(datum)))


async def logs(node: Node, args: Args, tell: Tell) -> Any:
    """The console of a task that has ended."""
    view = await node.coordinator.job(args["job"])
    task = next((t for t in view.tasks if t.index == args["index"]), None)
    if task is None:
        raise NotFound(what=f"a task {args['index']} of job {args['job']}")
    if task.outcome is None or task.outcome.result is None:
        raise NotFound(what=f"a console of task {args['index']}: it is {task.state} {task.note}".rstrip())
    datum = task.outcome.result.datum
    await _tree(node, datum)
    async with node.scratchpad() as folder:
        await trio.to_thread.run_sync(
            restore_tree, node.store, Cid.parse(datum), folder / "tree", RESULT_MAX, stop_if_cancelled
        )
        try:
            console = (folder / "tree" / OWN / "console.log").read_bytes()
        except FileNotFoundError:
            raise NotFound(what=f"a console in the result of task {args['index']}") from None
    return {"job": args["job"], "index": args["index"], "console": console.decode("utf-8", "replace")}
