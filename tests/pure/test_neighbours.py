"""Who is told which nodes run a job: its submitter, and in a LAN those nodes; and nobody else?"""

from __future__ import annotations

from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.job import JobSpec, Outcome
from tests.schedule_history import History, Pass, cid

DISK = cid("disk")
IDLE = m.Capacity(slots=4, memory=1 << 34, cpus=8, disk=1 << 40)


def grid(*workers: str) -> History:
    history = History()
    history.ask("sub", m.Join("t"), Pass("submitter"))
    history.ask("sub", m.Put(m.DatumRecord(DISK, "disk")))
    for worker in workers:
        history.ask(worker, m.Join("t", addresses=(f"/ip4/10.0.0.1/tcp/4001/p2p/{worker}",)), Pass("worker"))
    return history


def submit(history: History, array: tuple[int, ...], *, lan: bool = True) -> str:
    return history.ask("sub", m.Submit(JobSpec(DISK, array=array, lan=lan), "key")).id


def pull(history: History, worker: str, *working: m.Grant) -> m.Grant:
    return history.ask(worker, m.Pull(IDLE, tuple(g.task for g in working), 0.0))


def runs(history: History, peer: str, job: str) -> dict[str, tuple[int, ...]] | str:
    reply = history.ask(peer, m.Neighbours(job))
    return reply.code if isinstance(reply, m.Failure) else {n.peer: n.indices for n in reply.neighbours}


def test_nodes_of_a_lan_are_told_of_each_other_while_they_run_it():
    history = grid("ann", "bob", "eve")
    job = submit(history, (5, 6, 7))
    assert runs(history, "ann", job) == "NotFound"
    first = pull(history, "ann")
    history.ask("ann", m.Renew(first.task, first.epoch))
    second = pull(history, "ann", first)
    third = pull(history, "bob")
    assert runs(history, "bob", job) == {"ann": (5, 6), "bob": (7,)}
    assert runs(history, "sub", job) == runs(history, "ann", job)
    assert runs(history, "eve", job) == "NotFound"
    assert runs(history, "ann", "other") == "NotFound"
    (found,) = [n for n in history.ask("bob", m.Neighbours(job)).neighbours if n.peer == "ann"]
    assert found.addresses == ("/ip4/10.0.0.1/tcp/4001/p2p/ann",)
    history.ask("bob", m.Report(third.task, third.epoch, Outcome(exit=0, why="off")))
    assert runs(history, "bob", job) == "NotFound", "its part is over"
    assert runs(history, "ann", job) == {"ann": (5, 6)}
    history.ask("ann", m.Report(second.task, second.epoch, Outcome(why="boot", retry=True)))
    assert runs(history, "ann", job) == {"ann": (5,)}


def test_without_a_lan_workers_are_told_nothing():
    history = grid("ann")
    job = submit(history, (0,), lan=False)
    pull(history, "ann")
    assert runs(history, "ann", job) == "NotFound"
    assert runs(history, "sub", job) == {"ann": (0,)}


def test_many_come_in_pages():
    workers = [f"w{n:03}" for n in range(m.PAGE + 5)]
    history = grid(*workers)
    job = submit(history, tuple(range(len(workers))))
    for worker in workers:
        pull(history, worker)
    first = history.ask("w000", m.Neighbours(job))
    rest = history.ask("w000", m.Neighbours(job, first.neighbours[-1].peer))
    assert (len(first.neighbours), first.more, rest.more) == (m.PAGE, True, False)
    assert [n.peer for n in (*first.neighbours, *rest.neighbours)] == workers


def test_who_runs_a_job_that_is_accepted_and_who_accepts_it_know_each_other():
    history = grid("ann", "bob", "eve")
    client = submit(history, (0,))
    assert pull(history, "ann").job == client
    spec = JobSpec(DISK, lan=True, accept=("22", f"80:{client}", "81:job"))
    server = history.ask("sub", m.Submit(spec, "another")).id
    assert runs(history, "ann", server) == {}
    assert pull(history, "bob").job == server
    assert runs(history, "ann", server) == {"bob": (0,)}
    assert runs(history, "bob", client) == {"ann": (0,)}
    assert runs(history, "eve", server) == runs(history, "eve", client) == "NotFound"
