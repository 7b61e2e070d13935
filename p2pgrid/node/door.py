"""Enter a command line: what is done before anything is loaded that takes time.

Loading takes a tenth of a second, in which a person may have thought better of it: until there
is something to tidy up, Ctrl-C ends the process without a word.
"""

from __future__ import annotations

import importlib
import signal
import sys

from p2pgrid import __version__


def enter(name: str, commands: str) -> int:
    """Run the command that `sys.argv` names; `commands` is the module with its `app`."""
    if sys.argv[1:] == ["--version"]:
        print(f"{name} {__version__}")
        return 0
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not ignored, as by nohup
    if is_ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    app = importlib.import_module(commands).app
    from p2pgrid.node.console import run_app

    if is_ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run_app(app, name)
