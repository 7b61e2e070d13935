"""Is a disk that is being put ordered like one that was, and forgotten when no disk comes of it?"""

from __future__ import annotations

import pytest

from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.drafts import DRAFTS_MAX, TTL
from tests.schedule_history import OWNER, History, Pass, cid

ROOM = m.Capacity(slots=1, memory=1 << 33, cpus=4, disk=1 << 36, store=1 << 36)
DRAFT, DISK = cid("draft"), cid("disk")


def grid(*workers: str) -> History:
    history = History()
    for worker in workers:
        history.ask(worker, m.Join("t", worker, (), (f"/{worker}",)), Pass("worker", worker))
        beat(history, worker)
    history.ask("sub", m.Join("t", "sub", (), ("/sub",)), Pass("submitter", "s"))
    return history


def beat(history: History, worker: str, *holds: str, patience: float = 0.0) -> m.Orders | None:
    return history.ask(
        worker, m.Beat(holds, total=ROOM, free=ROOM, addresses=(f"/{worker}",), patience=patience)
    )


def ordered(orders: m.Orders | None) -> list[tuple[str, str]]:
    assert orders is not None
    return [(wanted.datum, wanted.kind) for wanted in orders.hold]


def record(replica: int) -> m.DatumRecord:
    return m.DatumRecord(DISK, "disk", cid("content"), "debian", "raw", 10, 10, 10, replica)


def test_workers_are_told_at_once_and_then_to_hold_the_disk_itself():
    history = grid("ann", "bob")
    waiting = history.call("ann", m.Beat((), total=ROOM, free=ROOM, patience=20.0))
    assert waiting not in history.answers
    assert history.ask("sub", m.Draft(DRAFT, 10, -1)) == m.Done()
    (wanted,) = history.answers[waiting].hold
    assert (wanted.datum, wanted.kind, wanted.content, wanted.reason) == (DRAFT, "draft", None, "replica")
    assert wanted.peers[0].peer == "sub"
    assert ordered(beat(history, "bob")) == [(DRAFT, "draft")]
    again = history.call("ann", m.Beat((), total=ROOM, free=ROOM, patience=20.0))
    assert again not in history.answers, "that is no news"
    history.ask("sub", m.Draft(DRAFT, 10, -1))
    assert again not in history.answers, "nor that it goes on"
    history.ask("sub", m.Put(record(-1), DRAFT))
    assert ordered(history.answers[again]) == [(DISK, "disk")]
    assert history.answers[again].drop == ()
    assert history.ledger.past().data[0].record.datum == DISK


def test_who_was_to_hold_the_draft_holds_the_disk_and_nobody_else():
    """The putter is one of the holders that are wished for."""
    history = grid("ann", "bob", "cyd")
    history.ask("sub", m.Draft(DRAFT, 10, 2))
    assert ordered(beat(history, "bob")) == [(DRAFT, "draft")]
    assert ordered(beat(history, "ann")) == []
    history.ask("sub", m.Put(record(2), DRAFT))
    assert ordered(beat(history, "cyd")) == []
    assert ordered(beat(history, "ann")) == []
    assert ordered(beat(history, "bob")) == [(DISK, "disk")]
    history.schedule.check()


def test_one_copy_is_the_putter_s():
    history = grid("ann")
    history.ask("sub", m.Draft(DRAFT, 10, 1))
    assert ordered(beat(history, "ann")) == []


def test_what_does_not_fit_is_not_followed():
    history = grid("ann")
    history.ask("sub", m.Draft(DRAFT, (1 << 36) + 1, -1))
    assert ordered(beat(history, "ann")) == []


def test_workers_are_told_of_one_another():
    history = grid("ann", "bob")
    history.ask("sub", m.Draft(DRAFT, 10, -1))
    beat(history, "ann")
    (wanted,) = beat(history, "bob").hold
    assert [(p.peer, p.addresses) for p in wanted.peers] == [("sub", ("/sub",)), ("ann", ("/ann",))]


def test_a_put_that_failed_is_dropped_by_all():
    history = grid("ann")
    history.ask("sub", m.Draft(DRAFT, 10, -1))
    beat(history, "ann")
    waiting = history.call("ann", m.Beat((), total=ROOM, free=ROOM, patience=20.0))
    history.ask("sub", m.Draft(DRAFT, over=True))
    assert (history.answers[waiting].hold, history.answers[waiting].drop) == ((), (DRAFT,))
    history.ask("sub", m.Draft(DRAFT, 10, -1))  # a word that was overtaken
    assert ordered(beat(history, "ann")) == []
    history.until(history.now + 3 * TTL)
    assert beat(history, "ann").drop == ()
    assert not history.schedule.drafts.withdrawn


def test_a_word_that_the_put_overtook_brings_nothing_back():
    history = grid("ann")
    history.ask("sub", m.Draft(DRAFT, 10, -1))
    beat(history, "ann")
    history.ask("sub", m.Put(record(-1), DRAFT))
    history.ask("sub", m.Draft(DRAFT, 10, -1))
    assert ordered(beat(history, "ann")) == [(DISK, "disk")]


@pytest.mark.parametrize("alive", [True, False])
def test_a_putter_that_fell_silent_is_not_waited_for(alive):
    history = grid("ann")
    history.ask("sub", m.Draft(DRAFT, 10, -1))
    for _ in range(15):
        history.until(history.now + TTL / 10)
        if alive:
            history.ask("sub", m.Draft(DRAFT, 10, -1))
        orders = beat(history, "ann")
    assert ordered(orders) == ([(DRAFT, "draft")] if alive else [])
    assert orders.drop == (() if alive else (DRAFT,))


def test_a_coordinator_that_was_restarted_hears_of_it_anew():
    history = grid("ann")
    history.ask("sub", m.Draft(DRAFT, 10, -1))
    history.restart()
    orders = beat(history, "ann")
    assert (ordered(orders), orders.drop) == ([], ())
    history.ask("sub", m.Draft(DRAFT, 10, -1))
    assert ordered(beat(history, "ann")) == [(DRAFT, "draft")]


def test_drafts_of_others_and_too_many_are_refused():
    history = grid("ann")
    history.ask("sub2", m.Join("t", "sub2", (), ("/sub2",)), Pass("submitter", "s2"))
    history.ask("sub", m.Draft(DRAFT, 10, -1))
    assert history.ask("sub2", m.Draft(DRAFT, over=True)).code == "Conflict"
    assert history.ask("ann", m.Draft(DRAFT, 10, -1)).code == "NotAuthorised"
    for number in range(DRAFTS_MAX - 1):
        assert history.ask("sub2", m.Draft(cid(f"draft {number}"), 10, -1)) == m.Done()
    assert history.ask("sub2", m.Draft(cid("one more"), 10, -1)).code == "Refused"
    history.ask("sub2", m.Put(record(-1), DRAFT))  # of a draft that is not theirs
    assert sorted(kind for _, kind in ordered(beat(history, "ann"))) == ["disk"] + ["draft"] * DRAFTS_MAX


def test_the_owner_s_own_machine_is_not_told_to_fetch_from_itself():
    history = grid("ann")
    history.ask(OWNER, m.Draft(DRAFT, 10, -1))
    assert ordered(beat(history, OWNER)) == []
    assert ordered(beat(history, "ann")) == [(DRAFT, "draft")]
