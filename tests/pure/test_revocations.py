"""Is everybody told whose memberships are void: at once, as long as it matters, and no longer?"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.hole_punch.membership import ALLOWANCE_MAX
from p2pgrid.ids import PeerId
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.events import Rules
from p2pgrid.scheduler.facts import Member, Past
from p2pgrid.scheduler.members import Members
from tests.schedule_history import OWNER, History, Pass

LIFE = 1000.0
RULES = Rules(membership=LIFE)
PATIENT = m.Beat(patience=20.0)


def told(history: History, peer: str = OWNER) -> dict[str, float]:
    """Whom `peer` is told of; the revision of its orders is that of the list."""
    orders: m.Orders = history.ask(peer, m.Beat())
    listed: m.RevocationList = history.ask(peer, m.Revocations())
    assert orders.revocations == listed.revision
    assert (listed.revision == "") == (not listed.revocations)
    assert orders.now == history.now
    return {row.peer: row.at for row in listed.revocations}


def grid(members: Sequence[str] = ("ann", "bob"), **tokens: str) -> History:
    history = History(rules=RULES)
    for peer in members:
        history.ask(peer, m.Join(ticket="t"), Pass("worker", tokens.get(peer, peer)))
    history.until(history.now + 10)
    return history


def test_nobody_is_revoked_at_first():
    assert told(grid()) == {}


def test_a_revoked_ticket_is_told_at_once_to_those_who_wait():
    history = grid()
    history.ask("bob", PATIENT)
    waits = history.call("bob", PATIENT)
    assert waits not in history.answers
    history.ask(OWNER, m.Revoke("ann"))
    assert history.answers[waits].revocations
    assert told(history, "bob") == {"ann": history.now}
    # Who knows waits again, and is not told the same twice.
    history.ask("bob", m.Beat())
    assert history.call("bob", PATIENT) not in history.answers


def test_who_left_is_told_with_the_next_beat():
    history = grid()
    history.ask("bob", PATIENT)
    waits = history.call("bob", PATIENT)
    history.ask("ann", m.Leave())
    assert waits not in history.answers
    assert told(history, "bob") == {"ann": history.now}


def test_who_is_let_in_again_is_told_of_by_time_only():
    history = grid()
    history.ask(OWNER, m.Revoke("ann"))
    at = history.now
    history.until(at + 1)
    welcome = history.ask("ann", m.Join(ticket="t"), Pass("worker", "another"))
    assert told(history) == {"ann": at}
    assert welcome.now > at
    history.ask("ann", m.Join(name="a new name"))
    assert told(history) == {"ann": at}


def test_who_is_let_in_again_is_in_though_the_coordinator_s_clock_was_set_back():
    history = grid()
    history.ask(OWNER, m.Revoke("ann"))
    for back in (0.0, 0.0005, 400.0):
        history.now -= back
        history.restart()
        assert "ann" in told(history)
        ticket = Pass("worker", f"again-{back}")
        assert history.ask("ann", m.Join(ticket="t"), ticket).roles == ("worker",)
        assert told(history) == {}
        history.ask("ann", m.Leave())


def test_who_lost_one_of_two_roles_has_to_show_a_newer_membership():
    history = grid()
    history.ask("ann", m.Join(ticket="t"), Pass("submitter", "two"))
    history.ask(OWNER, m.Revoke("two"))
    assert told(history) == {"ann": history.now}
    assert history.ask("ann", m.Join()).roles == ("worker",)


def test_all_who_came_with_a_ticket_are_revoked_with_it_once():
    history = grid(("ann", "bob", "cid"), ann="one", bob="one")
    history.ask(OWNER, m.Revoke("one"))
    first = history.now
    assert told(history) == {"ann": first, "bob": first}
    history.until(first + 5)
    history.ask(OWNER, m.Revoke("one"))
    assert told(history) == {"ann": first, "bob": first}


def test_a_restart_forgets_nothing_that_counts_and_only_that():
    history = grid(("ann", "bob", "cid"))
    history.ask(OWNER, m.Revoke("ann"))
    first = history.now
    history.until(first + LIFE / 2)
    history.ask("bob", m.Leave())
    second, revision = history.now, history.ask("cid", m.Revocations()).revision
    history.restart()
    assert told(history) == {"ann": first, "bob": second}
    assert history.ask("cid", m.Revocations()).revision == revision
    history.until(first + LIFE + ALLOWANCE_MAX + 1)
    history.restart()
    assert told(history) == {"bob": second}
    history.ask("cid", m.Leave())
    assert told(history) == {"bob": second, "cid": history.now}


def test_strangers_are_told_nothing():
    assert isinstance(grid().ask("eve", m.Revocations()), m.Failure)


@given(st.lists(st.floats(1.0, 2000.0), max_size=12), st.floats(0.0, 3000.0))
def test_just_those_are_told_that_could_still_be_taken(times: list[float], after: float):
    rows = [Member(PeerId(f"p{i}"), "", {}, (), 0.0, at) for i, at in enumerate(times)]
    now = 2000.0 + after
    members = Members(OWNER, Past(members=rows), [], now, LIFE)
    told = {row.peer: row.at for row in members.revocations.revocations}
    assert told == {f"p{i}": at for i, at in enumerate(times) if at > now - LIFE}


def test_of_too_many_the_newest_are_told():
    rows = [Member(PeerId(f"p{i}"), "", {}, (), 0.0, 1.0 + i) for i in range(m.REVOCATIONS_MAX + 3)]
    told = Members(OWNER, Past(members=rows), [], 2.0, LIFE).revocations.revocations
    assert len(told) == m.REVOCATIONS_MAX
    assert told[-1].peer == f"p{m.REVOCATIONS_MAX + 2}"
