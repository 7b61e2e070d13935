"""Do members hear who relays, as long as it does?"""

from __future__ import annotations

from p2pgrid.scheduler import messages as m
from tests.schedule_history import History, Pass


def grid(*workers: str) -> History:
    history = History()
    for worker in workers:
        history.ask(worker, m.Join("t", worker), Pass("worker", worker))
    return history


def test_members_hear_who_relays():
    history = grid("ann", "bob")
    assert history.ask("ann", m.Beat()).relays == ()
    assert history.ask("bob", m.Beat(relay=("/b",))).relays == (), "not of oneself"
    assert history.ask("ann", m.Beat()).relays == (m.Relay("bob", ("/b",)),)
    history.ask("bob", m.Beat(relay=("/c",)))
    assert history.ask("ann", m.Beat()).relays == (m.Relay("bob", ("/c",)),)
    history.ask("bob", m.Beat())
    assert history.ask("ann", m.Beat()).relays == ()


def test_who_is_silent_or_left_relays_no_more():
    history = grid("ann", "bob", "cyd")
    history.ask("bob", m.Beat(relay=("/b",)))
    history.ask("cyd", m.Beat(relay=("/c",)))
    history.ask("bob", m.Leave())
    assert [relay.peer for relay in history.ask("ann", m.Beat()).relays] == ["cyd"]
    history.until(history.now + 60)
    assert history.ask("ann", m.Beat()).relays == ()


def test_a_relay_is_no_news_that_a_beat_waits_for():
    """Else all nodes would be answered whenever one of them comes or goes."""
    history = grid("ann", "bob")
    history.ask("ann", m.Beat())
    waiting = history.call("ann", m.Beat(patience=20.0))
    history.ask("bob", m.Beat(relay=("/b",)))
    assert waiting not in history.answers
    history.until(history.now + 21)
    assert [relay.peer for relay in history.answers[waiting].relays] == ["bob"]


def test_of_many_relays_everybody_hears_of_others():
    names = [f"relay-{n}" for n in range(40)]
    history = grid("ann", "bob", *names)
    for name in names:
        history.ask(name, m.Beat(relay=(f"/{name}",)))
    told = [{relay.peer for relay in history.ask(who, m.Beat()).relays} for who in ("ann", "bob")]
    assert [len(peers) for peers in told] == [m.RELAYS_MAX, m.RELAYS_MAX]
    assert told[0] != told[1]
