"""The reference says what the commands are, what their codes mean, and what their documents hold."""

import re
import subprocess
import sys
from pathlib import Path

from p2pgrid import errors
from p2pgrid.cli.commands import app
from p2pgrid.node import api, commands, jobs

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_commands_is_as_they_are(tmp_path):
    made = tmp_path / "cli.md"
    subprocess.run([sys.executable, DOCS / "make_cli.py", made], check=True)
    assert (DOCS / "reference/cli.md").read_text() == made.read_text(), "run: python docs/make_cli.py"


def every_error(family=errors.GridError):
    yield family
    for kind in family.__subclasses__():
        yield from every_error(kind)


def test_every_exit_code_is_explained():
    explained = set(
        map(int, re.findall(r"^\| (\d+) \|", (DOCS / "reference/exit-codes.md").read_text(), re.M))
    )
    assert {jobs.NoScript.exit_code, api.NoDaemon.exit_code} == {127, 6}
    assert {kind.exit_code for kind in every_error()} <= explained
    assert {0, 5, 125, 130} <= explained


def names(node, path=()):
    """Every command that takes --json."""
    for name in node:
        command = node[name]
        if name.startswith("-"):
            continue
        if command.default_command is None:
            yield from names(command, (*path, name))
        elif "as_json" in command.default_command.__annotations__:
            yield " ".join((*path, name))


def test_every_document_is_described():
    page = (DOCS / "reference/json.md").read_text()
    described = set(re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^\| (`.*?) \|", page, re.M))))
    mine = set(names(app))
    assert {"put", "job wait", "disk verify"} <= mine
    assert mine <= described
    assert {f"p2pnode {name}" for name in names(commands.app)} <= described | {"p2pnode join"}
