"""Run a node of another libp2p implementation as a process that is told what to do, a JSON object a line.

What it is made of is installed or built once, into the user's cache, under the name of its lock; without
the means to do so its tests are skipped, and the reason says what was missing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from p2pgrid.hole_punch.channel import plain

PATIENCE = 60  # seconds for one answer; only a broken node takes so long


@attrs.define
class Foreign:
    """A node of another implementation; `ask` may be called by many tasks at once."""

    process: trio.Process
    numbers: Any = attrs.field(factory=itertools.count)
    waiting: dict[int, trio.Event] = attrs.field(factory=dict)
    answers: dict[int, dict[str, Any]] = attrs.field(factory=dict)
    peer: str = ""
    addresses: list[str] = attrs.field(factory=list)

    async def ask(self, op: str, **args: Any) -> Any:
        """What `op` comes to.  Raises `Failed` when the node says that it failed."""
        number = next(self.numbers)
        done = self.waiting[number] = trio.Event()
        assert self.process.stdin is not None
        await self.process.stdin.send_all(json.dumps({"id": number, "op": op, **args}).encode() + b"\n")
        with trio.fail_after(PATIENCE):
            await done.wait()
        answer = self.answers.pop(number)
        if "error" in answer:
            raise Failed(f"{op}: {answer['error']}")
        return answer.get("result")

    async def listen(self) -> None:
        assert self.process.stdout is not None
        rest = b""
        async for part in self.process.stdout:
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                answer = json.loads(line)
                self.answers[answer["id"]] = answer
                self.waiting.pop(answer["id"]).set()
        for number, done in self.waiting.items():
            self.answers[number] = {"error": "the node ended"}
            done.set()


class Failed(Exception):
    """What a foreign node was asked for did not come about."""


@asynccontextmanager
async def running(command: Sequence[str | Path], **start: Any) -> AsyncIterator[Foreign]:
    """A node, started and listening; it ends with its standard input, as it does if the test dies."""
    process = await trio.lowlevel.open_process(
        [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    node = Foreign(process)
    try:
        with plain():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(node.listen)
                told = await node.ask("start", **start)
                node.peer, node.addresses = told["peer"], told["addresses"]
                yield node
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            assert process.stdin is not None
            await process.stdin.aclose()
            with trio.move_on_after(5):
                await process.wait()
            process.kill()
            await process.wait()


def prepared(name: str, lock: Sequence[Path], make: Callable[[Path], None]) -> Path:
    """The folder in the cache that `make` filled beside copies of `lock`; made anew when one changed."""
    stamp = hashlib.sha256(b"".join(path.read_bytes() for path in lock)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "p2pgrid" / "interop"
    folder = cache / f"{name}-{stamp}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            draft = Path(scratch) / name
            draft.mkdir()
            for path in lock:
                shutil.copy(path, draft)
            make(draft)
            for old in cache.glob(f"{name}-*"):
                shutil.rmtree(old, ignore_errors=True)
            try:
                draft.rename(folder)
            except OSError:  # another run was faster
                assert folder.exists()
    return folder


def tried(command: Sequence[str], folder: Path, patience: float) -> None:
    """Run `command`; a test that needs it is skipped if it fails, as it does without a network."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=patience)
    except subprocess.TimeoutExpired:
        pytest.skip(f"`{' '.join(command)}` took more than {patience:.0f} s")
    if done.returncode:
        said = " / ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        pytest.skip(f"`{' '.join(command)}` failed (no network?): {said}")
