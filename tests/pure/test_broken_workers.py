"""Does the schedule bear what goes wrong on single nodes: broken workers, full stores, stuck results?"""

from __future__ import annotations

import attrs
import msgspec
import pytest

from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.job import JobSpec, Outcome
from tests.schedule_history import OWNER, History, Pass, cid, tree

GIB = 1 << 30
ROOM = m.Capacity(slots=1, memory=4 * GIB, cpus=4, disk=100 * GIB)
BROKEN = Outcome(why="no KVM", retry=True)


def grid(*workers: str, **rules: float) -> History:
    """Workers that are online, and the owner's disk `d`."""
    history = History()
    history.rules = attrs.evolve(history.rules, **rules)
    history.restart()
    for name in workers:
        history.ask(name, m.Join(name=name), Pass("worker"))
        beat(history, name)
    history.ask(OWNER, m.Put(m.DatumRecord(cid("d"), "disk", wire_bytes=1000)))
    return history


def beat(history: History, name: str, *holds: str, store: int = 1 << 50, **fields: object) -> m.Orders:
    room = m.Capacity(1, 4 * GIB, 4, 100 * GIB, store)
    return history.ask(name, m.Beat(tuple(map(cid, holds)), total=room, free=room, **fields))


def pull(history: History, name: str, *working: str, room: m.Capacity = ROOM) -> m.Grant | None:
    reply = history.ask(name, m.Pull(room, working, 0))
    return reply if isinstance(reply, m.Grant) else None


def tasks(history: History, job: str) -> list[tuple[str, int]]:
    return [(t.state, t.attempts) for t in history.schedule.work.jobs[job].tasks]


def seconds(history: History, count: int, *busy: m.Grant) -> None:
    """Let time pass in which everybody who is busy renews, and all beat."""
    for _ in range(count):
        history.until(history.now + 1)
        for grant in busy:
            history.ask("ann", m.Renew(grant.task, grant.epoch))


# --- whose fault it is --------------------------------------------------------------------


def test_a_broken_worker_cannot_use_up_a_job_while_the_others_are_busy():
    history = grid("ann", "eve")
    history.ask(OWNER, m.Submit(JobSpec(cid("d")), "long"))
    busy = pull(history, "ann")
    job = history.ask(OWNER, m.Submit(JobSpec(cid("d"), array=(0, 1, 2), retries=3), "k")).id
    granted = []
    for _ in range(600):
        beat(history, "ann")
        grant = pull(history, "eve")
        if grant is not None:
            granted.append(history.now)
            assert isinstance(history.ask("eve", m.Report(grant.task, grant.epoch, BROKEN)), m.Done)
        seconds(history, 1, busy)
    start = granted[0]
    assert [round(t - start) for t in granted] == [0, 15, 45, 105, 225, 465]
    assert sum(n for _, n in tasks(history, job)) == 1, "a worker spends one retry of a job"
    assert {s for s, _ in tasks(history, job)} == {"pending"}
    why = history.ask(OWNER, m.Watch(job)).why
    assert "2 workers online 2 can run it; 1 of these failed lately and get no task for up to" in why
    # The busy one is free again and does everything.
    history.ask("ann", m.Report(busy.task, busy.epoch, Outcome(0)))
    for _ in range(3):
        grant = pull(history, "ann")
        history.ask("ann", m.Report(grant.task, grant.epoch, Outcome(0)))
    assert {s for s, _ in tasks(history, job)} == {"completed"}


def test_one_success_ends_the_pauses_of_a_worker():
    history = grid("ann", "bob")
    history.ask(OWNER, m.Submit(JobSpec(cid("d"), array=tuple(range(9)), retries=100), "k"))
    for pause in (15, 30):
        grant = pull(history, "ann")
        history.ask("ann", m.Report(grant.task, grant.epoch, BROKEN))
        history.until(history.now + pause - 1)
        assert pull(history, "ann") is None
        history.until(history.now + 1)
    grant = pull(history, "ann")
    history.ask("ann", m.Report(grant.task, grant.epoch, Outcome(0)))
    grant = pull(history, "ann")
    history.ask("ann", m.Report(grant.task, grant.epoch, BROKEN))
    history.until(history.now + 15)
    assert pull(history, "ann") is not None


def test_a_job_that_nobody_can_run_ends_and_keeps_nobody_from_other_work():
    history = grid("ann", "bob")
    bad = history.ask(
        OWNER, m.Submit(JobSpec(cid("d"), name="bad", array=(0, 1), memory=1, retries=2), "b")
    ).id
    history.until(history.now + 1)
    good = history.ask(OWNER, m.Submit(JobSpec(cid("d"), array=tuple(range(20))), "g")).id
    start = history.now
    ended = {}
    for _ in range(4000):
        for name in ("ann", "bob"):
            beat(history, name)
            grant = pull(history, name)
            if grant is not None:
                outcome = BROKEN if grant.job == bad else Outcome(0)
                history.ask(name, m.Report(grant.task, grant.epoch, outcome))
        for job in (bad, good):
            if history.schedule.work.jobs[job].final:
                ended.setdefault(job, history.now - start)
        if len(ended) == 2:
            break
        history.until(history.now + 1)
    assert tasks(history, bad) == [("error", 3)] * 2
    assert tasks(history, good) == [("completed", 0)] * 20
    assert ended[good] < 30
    assert ended[bad] < 600


# --- stores that are full -----------------------------------------------------------------


def test_a_disk_that_does_not_fit_the_store_is_neither_held_nor_granted_there():
    history = grid("ann", "bob")
    everywhere = m.DatumRecord(cid("all"), "tree", wire_bytes=600, replica=-1)
    history.ask(OWNER, m.Put(everywhere))
    inputs = m.DatumRecord(cid("in"), "tree", wire_bytes=10)
    history.ask(OWNER, m.Put(inputs))
    assert [w.datum for w in beat(history, "bob", store=599).hold] == []
    assert [w.datum for w in beat(history, "ann", store=600).hold] == [cid("all")]
    # It was told to hold it; then its quota shrank.
    assert [w.datum for w in beat(history, "ann", store=599).hold] == []
    # What it has of it already needs no room.
    partial = (m.Holding(cid("all"), 99),)
    assert [w.datum for w in beat(history, "bob", store=100, partial=partial).hold] == [cid("all")]
    history.ask(OWNER, m.Forget(cid("all")))

    job = history.ask(OWNER, m.Submit(JobSpec(cid("d"), cid("in")), "k")).id
    small = m.Capacity(1, 4 * GIB, 4, 100 * GIB, store=1009)
    for name in ("ann", "bob"):
        history.until(history.now + 10)
        assert beat(history, name, store=1009).hold == ()
        assert pull(history, name, room=small) is None
    assert "2 workers online none has room in its store" in history.ask(OWNER, m.Watch(job)).why
    assert pull(history, "bob", room=msgspec.structs.replace(small, store=1010)) is not None


def test_a_worker_that_waits_gets_the_task_once_the_disk_is_here():
    history = grid("ann")
    history.ask(OWNER, m.Submit(JobSpec(cid("d")), "k"))
    small = m.Capacity(1, 4 * GIB, 4, 100 * GIB, store=10)
    call = history.call("ann", m.Pull(small, (), 20))
    assert call not in history.answers
    beat(history, "ann", "d", store=10)
    assert isinstance(history.answers[call], m.Grant)


# --- beats that are cut -------------------------------------------------------------------


def returned(history: History, name: str, result: str, job: str | None = None) -> m.Grant:
    """A task of which `name` reported the tree `result`."""
    history.ask(OWNER, m.Submit(JobSpec(cid("d")), job or result))
    grant = pull(history, name)
    assert grant is not None
    history.ask(name, m.Report(grant.task, grant.epoch, Outcome(0, "off", tree(result))))
    return grant


@pytest.mark.parametrize("restart", [False, True])
def test_what_a_cut_beat_does_not_list_is_not_taken_as_gone(restart):
    history = grid("ann")
    task = returned(history, "ann", "r").task
    if restart:
        history.restart()
    for _ in range(20):
        beat(history, "ann", "other", cut=True)
        history.until(history.now + 5)
    assert history.schedule.work.tasks[task].state == "returning"
    # A whole list tells the truth.
    beat(history, "ann", "other")
    assert history.schedule.work.tasks[task].state == "pending"


def test_what_a_cut_node_was_told_to_drop_is_gone_and_what_is_partial_is_not_whole():
    history = grid("ann")
    history.ask(OWNER, m.Put(m.DatumRecord(cid("t"), "tree")))
    history.ask(OWNER, m.Put(m.DatumRecord(cid("u"), "tree")))
    beat(history, "ann", "t", "u")
    history.ask(OWNER, m.Forget(cid("t")))
    assert beat(history, "ann", "other", cut=True).drop == (cid("t"),)
    orders = beat(history, "ann", "other", cut=True, partial=(m.Holding(cid("u"), 5),))
    assert orders.drop == ()
    assert history.schedule.roster.node("ann").holds == {cid("other")}


# --- inputs -------------------------------------------------------------------------------


def test_inputs_go_with_the_last_job_that_uses_them():
    history = grid("ann", "bob")
    for name in ("in", "used"):
        history.ask(OWNER, m.Put(m.DatumRecord(cid(name), "tree")))
    history.ask(OWNER, m.Put(m.DatumRecord(cid("named"), "tree", name="mine")))
    jobs = [history.ask(OWNER, m.Submit(JobSpec(cid("d"), cid(i)), f"{n}")).id
            for n, i in enumerate(("in", "in", "named", "used"))]  # fmt: skip
    partial = (m.Holding(cid("in"), 5),)

    def dropped() -> list[tuple[str, ...]]:
        history.until(history.now + 10)
        return [
            beat(history, "ann", "d", "in", "named", "used").drop,
            beat(history, "bob", partial=partial).drop,
            history.ask(OWNER, m.Beat((cid("d"), cid("in"), cid("named"), cid("used")))).drop,
        ]

    history.ask(OWNER, m.Cancel(jobs[0]))
    history.ask(OWNER, m.Cancel(jobs[2]))
    for _ in range(50):
        assert dropped() == [(), (), ()], "another job needs them, or they have a name"
    history.ask(OWNER, m.Cancel(jobs[1]))
    assert dropped() == [(cid("in"),)] * 3
    assert [v.record.datum for v in history.ask(OWNER, m.Data()).data] == [
        cid("named"),
        cid("used"),
        cid("d"),
    ]
    history.restart()
    history.ask("ann", m.Beat())
    assert dropped() == [(cid("in"),)] * 3, "also those who come back later"
    # Published again, they are wanted again.
    history.ask(OWNER, m.Put(m.DatumRecord(cid("in"), "tree")))
    assert dropped() == [(), (), ()]
    job = history.ask(OWNER, m.Submit(JobSpec(cid("d"), cid("in")), "again"))
    assert isinstance(job, m.Done)


def test_inputs_just_put_wait_for_their_job():
    history = grid("ann")
    history.ask(OWNER, m.Put(m.DatumRecord(cid("in"), "tree")))
    first = history.ask(OWNER, m.Submit(JobSpec(cid("d"), cid("in")), "1")).id
    history.until(history.now + 400)
    history.ask(OWNER, m.Put(m.DatumRecord(cid("in"), "tree")))
    history.ask(OWNER, m.Cancel(first))
    history.until(history.now + 200)
    second = history.ask(OWNER, m.Submit(JobSpec(cid("d"), cid("in")), "2")).id
    history.until(history.now + 1000)
    assert history.ask(OWNER, m.Beat((cid("in"),))).drop == ()
    history.ask(OWNER, m.Cancel(second))
    history.until(history.now + 10)
    assert history.ask(OWNER, m.Beat((cid("in"),))).drop == (cid("in"),)


def test_a_result_that_was_used_as_inputs_stays_with_its_submitter():
    history = grid("ann")
    grant = returned(history, "ann", "r")
    history.ask(OWNER, m.Collect(grant.task, 1))
    history.ask(OWNER, m.Put(m.DatumRecord(cid("r"), "tree")))
    job = history.ask(OWNER, m.Submit(JobSpec(cid("d"), cid("r")), "k2")).id
    history.ask(OWNER, m.Cancel(job))
    history.until(history.now + 1000)
    assert history.ask(OWNER, m.Beat((cid("r"),))).drop == ()


# --- results ------------------------------------------------------------------------------


def wait_for_results(history: History, count: int, missing=lambda t: {}) -> None:
    """Time passes in which the owner and the workers beat."""
    for t in range(count):
        history.until(history.now + 5)
        for name in ("ann", "bob"):
            beat(history, name, *(f"r {name}{n}" for n in range(9)))
        partial = tuple(m.Holding(cid(d), n) for d, n in missing(t).items())
        history.ask(OWNER, m.Beat(partial=partial))


def test_a_result_that_cannot_travel_is_made_again_elsewhere_and_in_the_end_given_up():
    history = grid("ann", "bob", return_patience=600, fault_pause_max=600)
    grant = returned(history, "ann", "r ann0", "k")
    task = history.schedule.work.tasks[grant.task]
    view = history.ask(OWNER, m.Watch(grant.job)).tasks[0]
    assert view.note == "its result waits at ann since 1970-01-01 00:16:40 UTC"
    # Nobody is to blame while the submitter's node is away.
    for _ in range(200):
        history.until(history.now + 5)
        beat(history, "ann", "r ann0")
    wait_for_results(history, 100)
    assert task.state == "returning"
    wait_for_results(history, 25)
    assert (task.state, task.lost, task.attempts) == ("pending", 1, 0)
    assert task.reason == "its result could not be fetched from ann in 600 s"
    assert cid("r ann0") in beat(history, "ann", "r ann0").drop
    assert isinstance(history.ask(OWNER, m.Collect(grant.task, 1)), m.Failure)
    assert pull(history, "ann") is None, "the worker is avoided"
    grant = pull(history, "bob")
    assert (grant.task, grant.epoch) == (task.id, 2)
    history.ask("bob", m.Report(task.id, 2, Outcome(0, "off", tree("r bob1"))))
    wait_for_results(history, 125)
    assert task.state == "pending"
    grant = pull(history, "ann")
    history.ask("ann", m.Report(task.id, 3, Outcome(0, "off", tree("r ann2"))))
    wait_for_results(history, 125)
    assert task.state == "error"
    assert task.reason.startswith("3 results of it could not be brought to its submitter")
    assert history.ask(OWNER, m.Watch(grant.job)).state == "error"


def test_a_result_that_comes_nearer_or_waits_for_its_elders_is_given_time():
    history = grid("ann", "bob", return_patience=600)
    elder, younger = returned(history, "ann", "r ann0"), returned(history, "bob", "r bob0")
    task = history.schedule.work.tasks
    # The elder comes slowly: a byte in 500 s.
    wait_for_results(history, 1000, lambda t: {"r ann0": 10 - t // 100})
    assert task[elder.task].state == task[younger.task].state == "returning"
    history.ask(OWNER, m.Collect(elder.task, 1))
    wait_for_results(history, 115)
    assert task[younger.task].state == "returning"
    wait_for_results(history, 10)
    assert task[younger.task].state == "pending"


def test_partly_fetched_results_and_data_are_dropped_too():
    history = grid("ann")
    history.ask(OWNER, m.Put(m.DatumRecord(cid("t"), "tree")))
    grant = returned(history, "ann", "r")
    partial = (m.Holding(cid("t"), 5), m.Holding(cid("r"), 5))
    assert beat(history, "ann", partial=partial).drop == ()
    history.ask(OWNER, m.Forget(cid("t")))
    history.ask(OWNER, m.Collect(grant.task, 1))
    assert set(beat(history, "ann", partial=partial).drop) == {cid("t"), cid("r")}
    assert history.ask(OWNER, m.Beat(partial=partial)).drop == (cid("t"),)


def test_two_submitters_with_the_same_result_both_keep_it():
    history = grid("ann")
    history.ask("sam", m.Join(name="sam"), Pass("submitter"))
    history.ask("sam", m.Put(m.DatumRecord(cid("s"), "disk")))
    for who, disk in ((OWNER, "d"), ("sam", "s")):
        history.ask(who, m.Submit(JobSpec(cid(disk)), "k"))
        grant = pull(history, "ann")
        history.ask("ann", m.Report(grant.task, 1, Outcome(0, "off", tree("same"))))
        assert isinstance(history.ask(who, m.Collect(grant.task, 1)), m.Done)
    for who in (OWNER, "sam"):
        assert history.ask(who, m.Beat((cid("same"),))).drop == ()
    assert beat(history, "ann", "same").drop == (cid("same"),)


def test_the_result_of_a_failure_that_is_tried_again_is_dropped():
    history = grid("ann")
    history.ask(OWNER, m.Submit(JobSpec(cid("d")), "k"))
    grant = pull(history, "ann")
    history.ask("ann", m.Report(grant.task, 1, Outcome(None, "boot", tree("console"), retry=True)))
    assert beat(history, "ann", "console").drop == (cid("console"),)
