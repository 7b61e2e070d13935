"""What a person reads, from the answers as the daemon gives them."""

import pytest

from p2pgrid.node import show

CID = "bafyr4ig4hguceocxyegboyo5otplr2roazurye65n4uolnwjbehm6jeonm"


def task(index=0, state="completed", exit_code=0, **more):
    return {
        "index": index, "state": state, "node": "ann", "exit": exit_code, "attempts": 1, "reason": "",
        "seconds": 1.0, "timings": {}, "sources": {}, "result": None,
    } | more  # fmt: skip


def job(*tasks, state="completed", **more):
    return {
        "job": "abc",
        "name": "",
        "disk": CID,
        "state": state,
        "counts": {},
        "why": "",
        "tasks": list(tasks),
    } | more


@pytest.mark.parametrize(
    ("tasks", "code"),
    [
        ([task()], 0),
        ([task(), task(1, "failed", 7), task(2, "failed", 9)], 7),
        ([task(state="failed", exit_code=None)], 125),
        ([task(state="error", exit_code=None)], 125),
        ([task(state="cancelled", exit_code=None)], 125),
        ([task(), task(1, "failed", 7), task(2, "error", None)], 7),
        ([task(0, "error", None), task(1, "failed", 7)], 125),
    ],
)
def test_run_ends_with_the_first_status_that_is_not_0(tasks, code):
    assert show.exit_code(job(*tasks)) == code


def test_a_job_shows_its_tasks_and_why_it_waits():
    waiting = job(task(0, "pending", None, node="", attempts=0), state="pending", why="no worker is online")
    text = show.job(waiting)
    assert "job abc  pending" in text
    assert "no worker is online" in text
    assert show.job(job(task(reason="it was stopped at its time limit of 1 s"))).endswith("time limit of 1 s")
    assert show.finished(job(task()) | {"results": "/tmp/abc"}).endswith("results: /tmp/abc")


def test_a_disk_put_says_whether_the_same_bytes_come_back():
    put = {
        "disk": CID, "name": "debian", "size": 1 << 30, "chunks": 3, "holes": 4093, "unique_bytes": 786432,
        "wire_bytes": 1000, "format": "qcow2", "exact": True, "freed": 0, "seconds": 0.5,
        "parent": None, "delta_bytes": 0,
    }  # fmt: skip
    assert show.put(put).startswith(f"debian  {CID}\n1.0 GiB in 3 chunks and 4093 holes")
    assert "fresh qcow2" in show.put(put | {"exact": False})
    assert "4.0 KiB that the guest has freed stay behind" in show.put(put | {"exact": False, "freed": 4096})
    assert "fresh qcow2" not in show.put(put)
    assert "on the wire; 0.5 s" in show.put(put)
    upon = put | {"parent": CID, "delta_bytes": 4096}
    assert f"1000 B on the wire, 4.0 KiB for who has {CID[:20]}…; 0.5 s" in show.put(upon)
    got = {"path": "x", "bytes": 1, "format": "raw", "exact": True}
    assert "byte-identical" in show.get(got)
    assert "fresh raw" in show.get(got | {"exact": False})


def test_a_disk_shows_who_holds_it_and_how_much_is_here():
    view = {
        "disk": CID, "content": CID, "name": "d", "size": 4096, "format": "raw", "exact": True,
        "freed": 0, "chunk_size": 262144, "chunks": 2, "holes": 1, "frames": 2, "held": 1, "wire_bytes": 10,
        "holders": [{"peer": "12D3", "name": "ann"}], "parent": None, "delta_bytes": 0,
    }  # fmt: skip
    assert "parent" not in show.disk(view)
    upon = view | {"parent": CID, "delta_bytes": 4096}
    assert f"parent   {CID}: who has it fetches 4.0 KiB" in show.disk(upon)
    assert "held     1 of 2 here" in show.disk(view)
    assert "holder   ann  12D3" in show.disk(view)
    assert "nothing here" in show.disk(view | {"chunks": None})
    assert "freed" not in show.disk(view)
    assert "freed    8.0 KiB of it read as zeros" in show.disk(view | {"freed": 8192})
    row = {"name": "d", "size": 1, "wire_bytes": 1, "holders": 2, "held": 1, "frames": 2, "disk": CID}
    assert "50 %" in show.disks({"disks": [row]})
    assert show.disks({"disks": [row | {"frames": 0}]}).split("\n")[1].split()[-2] == "-"


def test_verify_says_what_was_bad_and_what_became_of_it():
    good = {"datum": CID, "name": "d", "checked": 5, "bad": 0, "repaired": 0}
    assert show.verified({"checked": 5, "data": [good]}) == "all 5 chunks held here are good"
    bad = good | {"bad": 2, "repaired": 1}
    assert show.verified({"checked": 5, "data": [good, bad]}) == (
        "d: 2 bad chunk(s) found, 1 repaired from peers, 1 still missing"
    )


def test_nodes_jobs_results_and_status_are_tables():
    node = {
        "peer": "12D3", "name": "ann", "roles": ["worker"], "state": "away", "running": 0, "shares": [],
        "slots": 1,
    }  # fmt: skip
    assert show.nodes({"nodes": [node]}).split("\n")[1].split() == ["ann", "worker", "away", "0", "-", "12D3"]
    row = {"job": "abc", "name": "", "state": "running", "counts": {"running": 2, "pending": 0}}
    assert show.jobs({"jobs": [row]}).split("\n")[1].split() == ["abc", "-", "running", "2", "running"]
    assert show.results({"folder": "x", "tasks": 1, "files": 2, "bytes": 3}) == "x  1 task(s), 2 file(s), 3 B"
    status = {
        "name": "ann", "peer": "12D3", "roles": ["worker"], "grid": "12D4", "connected": False, "running": [],
        "received": {"p": 5}, "served": {}, "paused": "", "links": [],
        "holds": [{"datum": CID, "chunks": 1, "total": 2, "bytes": 3}],
    }  # fmt: skip
    assert "out of reach" in show.status(status)
    assert "1/2 chunks" in show.status(status)
