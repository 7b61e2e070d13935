"""The command line is quick, loads no network, and leaves quietly when it is interrupted early."""

import os
import resource
import signal
import subprocess
import sys

import pytest

HEAVY = ("libp2p", "trio", "multiaddr", "p2pgrid.node.daemon", "p2pgrid.dht.store", "apsw", "rich.progress")


def python(*words, **more):
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=60, check=False, **more
    )


@pytest.mark.parametrize(
    "module",
    ["p2pgrid.cli", "p2pgrid.cli.commands", "p2pgrid.node.cli", "p2pgrid.node.commands", "p2pgrid.node.show"],
)
def test_no_module_of_the_command_line_loads_what_is_heavy(module):
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    said = python("-c", code)
    assert said.stdout.strip() == "[]", said.stderr


@pytest.mark.parametrize("module", ["p2pgrid.cli", "p2pgrid.node.cli"])
def test_version_takes_a_quarter_of_a_second_of_cpu(module):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = python("-m", module, "--version")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert said.returncode == 0
    assert said.stdout.split()[0] in ("p2pgrid", "p2pnode")
    assert said.stderr == ""
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent <= 0.25


def test_even_a_call_of_the_daemon_loads_no_network(tmp_path):
    code = f"""
import sys
from p2pgrid.cli import main
sys.argv = ["p2pgrid", "disk", "ls", "--data-dir", {str(tmp_path)!r}]
code = main()
print(code, [m for m in {HEAVY!r} if m in sys.modules])
"""
    assert python("-c", code).stdout.strip() == "6 []"


@pytest.mark.parametrize("words", [("--help",), ("run", "--help"), ("job", "--help"), ()])
def test_help_is_help(words):
    said = python("-m", "p2pgrid.cli", *words)
    assert said.returncode == 0
    assert "Usage: p2pgrid" in said.stdout


def test_an_interrupt_while_python_loads_leaves_without_a_word():
    code = """
import importlib, os, signal
def load(name):
    os.kill(os.getpid(), signal.SIGINT)
importlib.import_module = load
from p2pgrid.node.door import enter
enter("p2pgrid", "p2pgrid.cli.commands")
"""
    said = python("-c", code)
    assert said.returncode == -signal.SIGINT
    assert said.stdout + said.stderr == ""


def test_an_ignored_interrupt_stays_ignored():
    code = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
import p2pgrid.node.door as door, sys
sys.argv = ["p2pgrid", "--help"]
door.enter("p2pgrid", "p2pgrid.cli.commands")
print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)
"""
    assert python("-c", code).stdout.splitlines()[-1] == "True"


def test_whoever_stops_listening_reads_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        said = subprocess.run(
            [sys.executable, "-m", "p2pgrid.cli", "--help"],
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert said.stderr == b""
    assert said.returncode in (0, 1)  # rich, which writes the help, says 1


@pytest.mark.parametrize(
    "words",
    [
        ("p2pgrid.cli", "get", "x", "-o", "y", "--origin", "file:///etc"),
        ("p2pgrid.cli", "run", "x", "--script", "y", "--origin", "http://a:b@h/"),
        ("p2pgrid.cli", "coordinator", "--origin", "disks.example"),
        ("p2pnode", "join", "--origin", "http://h/ x"),
    ],
)
def test_what_is_no_origin_is_refused_before_anything_is_done(tmp_path, words):
    module, *rest = ("p2pgrid.node.cli", *words[1:]) if words[0] == "p2pnode" else words
    said = python("-m", module, *rest, "--data-dir", str(tmp_path / "home"))
    assert said.returncode == 2
    assert said.stderr.startswith("error: ")
    assert "--origin" in said.stderr
    assert not (tmp_path / "home").exists()
