"""Nothing that others wrote steers a terminal."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.node import show
from p2pgrid.node.console import Bars, complain, emit
from p2pgrid.node.plain import cleaned, console, plain

NASTY = "\x1b]0;owned\x07\x1b[2J\r\n\x9b31mfake\u202etxt.exe\x7f\u2028"
HARMLESS = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def is_harmless(text: str) -> bool:
    return not any(unicodedata.category(c) in HARMLESS for c in text)


@given(st.text())
def test_every_character_is_visible_and_what_was_is_kept(text):
    said = plain(text)
    assert is_harmless(said)
    assert said == text or not text.isprintable()
    assert plain(said) == said


def test_what_is_not_is_written_out():
    assert plain("a\nb\x1b[1m\u202ec") == "a\\nb\\x1b[1m\\u202ec"
    assert plain("naïve 名前 ✓") == "naïve 名前 ✓"


@given(st.text())
def test_a_console_is_lines_of_visible_characters(text):
    assert is_harmless(console(text).replace("\n", ""))


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("\x1b[1;32m  OK  \x1b[0m Started\r\n", "  OK   Started\n"),
        ("10 %\r20 %\r", "10 %\n20 %\n"),
        ("\x1b]0;title\x07login:", "login:"),
        ("\x1b]8;;http://x\x1b\\link", "link"),
        ("\x1bPq\x1b\\a\x1b(Bb\x1b7c", "abc"),
        ("a\tb\x07", "a    b\\x07"),
        ("\x1b[" + "1;" * 200 + "m", "1;" * 200 + "m"),
        ("no end \x1b]0;title", "no end 0;title"),
    ],
)
def test_colours_and_cursors_are_left_out(said, read):
    assert console(said).replace("\\x1b[", "") == read


def test_answers_errors_and_progress_are_plain(capsys):
    row = {"name": NASTY, "size": 1, "wire_bytes": 1, "holders": 2, "held": 1, "frames": 2, "disk": NASTY}
    emit({"disks": [row]}, False, show.disks)
    task = {"index": 0, "state": "failed", "node": NASTY, "exit": 1, "attempts": 1, "reason": NASTY}
    emit({"job": "a", "state": NASTY, "disk": NASTY, "why": NASTY, "tasks": [task]}, False, show.job)
    complain(NASTY, NASTY)
    with Bars() as bars:
        bars.event({"phase": NASTY, "done": 1, "total": 2, "note": NASTY, "stall": NASTY, "stalled_for": 9})
    said = capsys.readouterr()
    assert is_harmless((said.out + said.err).replace("\n", ""))
    assert len(said.out.splitlines()) == 2 + 4
    assert len(said.err.splitlines()) == 3
    assert "owned" in said.out


def test_json_is_left_as_it_is_and_steers_nothing(capsys):
    emit({"name": NASTY}, True, str)
    out = capsys.readouterr().out
    assert is_harmless(out.replace("\n", ""))
    assert cleaned({"a": [1, None, {"b": "x\n"}]}) == {"a": [1, None, {"b": "x\\n"}]}
