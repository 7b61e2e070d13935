"""Is a job that cannot be refused before anything is put or made known?"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from p2pgrid.dht.manifest import Tree
from p2pgrid.dht.publish import publish_tree
from p2pgrid.errors import Conflict, Misused, NotAuthorised
from p2pgrid.node import disks, jobs
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.job import JobSpec
from p2pgrid.transfer.peering import Fetched
from tests.lone_node import Lone, open_lone
from tests.shell.test_attempt import a_disk
from tests.small_disks import small_disk


async def told(event: dict[str, Any]) -> None:
    raise AssertionError(f"nothing is to be told: {event}")


def script(folder: Path) -> Path:
    path = folder / "job.sh"
    path.write_bytes(b"#!/bin/sh\n")
    return path


def untouched(lone: Lone) -> bool:
    return lone.node.store.held() == []


async def test_inputs_that_no_worker_takes_are_refused_before_they_are_put(tmp_path):
    huge = tmp_path / "in"
    huge.mkdir()
    with (huge / "hole").open("wb") as file:
        file.truncate(10 << 40)
    async with open_lone(tmp_path / "home") as lone:
        for inputs in ([huge], [huge / "hole"]):
            with pytest.raises(Misused, match="4 GiB"):
                await jobs._put_inputs(lone.node, script(tmp_path), inputs)
        assert untouched(lone)
        assert list((lone.node.home / "tmp").iterdir()) == []


async def test_inputs_that_were_dropped_by_an_old_order_are_put_once_more(tmp_path):
    async with open_lone(tmp_path / "home") as lone:

        def put(record: Any) -> None:
            if len(lone.calls.known) == 1:
                lone.node.store.drop(lone.node.store.held()[0].datum)

        lone.calls.put_too = put
        record = await jobs._put_inputs(lone.node, script(tmp_path), [])
        assert lone.node.complete(record.datum)
        assert [known.datum for known in lone.calls.known] == [record.datum]


async def test_a_disk_that_was_dropped_by_an_old_order_is_put_once_more(tmp_path):
    async def hear(event: dict[str, Any]) -> None:
        pass

    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1000) + b"x" * 24)
    async with open_lone(tmp_path / "home") as lone:

        def put(record: Any) -> None:
            if len(lone.calls.known) == 1:
                lone.node.store.drop(lone.node.store.held()[0].datum)

        lone.calls.put_too = put
        made = await disks.put(lone.node, {"path": str(image), "name": "d"}, hear)
        assert lone.node.complete(made["disk"])
        assert [known.datum for known in lone.calls.known] == [made["disk"]] * 2


async def test_who_is_no_submitter_is_told_so_before_anything_is_cut(tmp_path):
    async with open_lone(tmp_path / "home") as lone:
        a_disk(lone, tmp_path)
        lone.node.store.drop(lone.node.store.held()[0].datum)
        lone.node.roles = ("worker",)
        with pytest.raises(NotAuthorised):
            await disks.put(lone.node, {"path": str(tmp_path / "disk.raw")}, told)
        with pytest.raises(NotAuthorised):
            await jobs.submit(lone.node, {"disk": "d", "script": str(script(tmp_path)), "inputs": []}, told)
        assert untouched(lone)


async def test_one_bad_result_spoils_no_other(tmp_path):
    results = [a_result(tmp_path, f"r{n}") for n in range(3)]
    async with open_lone(tmp_path / "home") as lone:
        made = [publish_tree(lone.node.store, folder, lone.node.identity.signing_key) for folder in results]
        bad = lone.node.store.shelf(Tree.decode(lone.node.store.get_object(made[1].datum)).pack)
        with (bad._folder / "frames").open("r+b") as frames:
            frames.write(b"\0" * 40)
        lone.node.coordinator = SimpleNamespace(job=answering(*(str(m.datum) for m in made)))
        out = tmp_path / "out"
        brought = await jobs.results(lone.node, {"job": "j", "out": str(out)}, told)
        assert (brought["tasks"], [t["index"] for t in brought["failed"]]) == (2, [1])
        assert sorted(p.name for p in out.iterdir()) == ["0", "2"]
        assert (out / "2" / "answer").read_bytes() == b"r2" * 100_000
        with pytest.raises(Conflict, match="0; name another"):
            await jobs.results(lone.node, {"job": "j", "out": str(out)}, told)


def a_result(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    (folder / name / "answer").write_bytes(name.encode() * 100_000)
    return folder / name


def answering(*data: str) -> Any:
    tasks = [
        SimpleNamespace(index=n, outcome=SimpleNamespace(result=SimpleNamespace(datum=datum)))
        for n, datum in enumerate(data)
    ]

    async def job(which: str) -> Any:
        return SimpleNamespace(tasks=tasks)

    return job


@pytest.mark.parametrize("held", [True, False], ids=["somebody has it", "nobody has it"])
async def test_what_no_member_has_is_brought_here_from_the_origin_that_a_submitter_names(tmp_path, held):
    asked: list[tuple[str, ...]] = []
    datum = str(small_disk([1, 2]).datum)

    async def fetch(which: Any, peers: Any, progress: Any, most: Any, origins: Any = ()) -> Fetched:
        asked.append(tuple(origins))
        return Fetched({}, 0, 0, 0.0)

    async def providers(which: str) -> tuple[m.Provider, ...]:
        return (m.Provider("12D3", ()),) if held else ()

    async def hear(event: dict[str, Any]) -> None:
        pass

    async with open_lone(tmp_path / "home") as lone:
        lone.node.exchange = SimpleNamespace(fetch=fetch)
        lone.node.coordinator = SimpleNamespace(providers=providers)
        view: Any = SimpleNamespace(record=SimpleNamespace(datum=datum))
        await jobs._bring(lone.node, view, ["https://h/d"], hear)
    assert asked == ([] if held else [("https://h/d",)])
    assert "origins" not in JobSpec.__struct_fields__, "no worker is ever told"
