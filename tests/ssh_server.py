"""Give tests OpenSSH's server without installing it: its packages are unpacked, no service is started."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from p2pgrid.errors import Misconfigured
from p2pgrid.vm.distribution import depends, unpack


def bring_sshd(folder: Path) -> None:
    """Put sshd, the libraries it is linked to, and the loader below `folder`, where they belong in a guest.

    Skips the test, with the reason, where they cannot be had.
    """
    unpacked = folder.with_name(folder.name + ".unpacked")
    libraries = [name for name in depends("openssh-server") if name.startswith("lib") and name != "libc6"]
    try:
        unpack(["openssh-server", *libraries], unpacked)
    except Misconfigured as refused:
        pytest.skip(f"openssh-server cannot be had: {refused.why}")
    places = [str(place) for place in sorted(unpacked.glob("**/lib/*-linux-gnu"))]
    told = subprocess.run(
        ["ldd", str(unpacked / "usr/sbin/sshd")],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "LD_LIBRARY_PATH": ":".join(places)},
    ).stdout
    missing = [line.split()[0] for line in told.splitlines() if "not found" in line]
    if missing:
        pytest.skip(f"sshd is linked to what is not here: {', '.join(missing)}")
    for file in [str(unpacked / "usr/sbin/sshd"), *(word for word in told.split() if word.startswith("/"))]:
        inside = file.removeprefix(str(unpacked)).lstrip("/").removeprefix("usr/")  # /usr/lib is a link there
        target = folder / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        target.chmod(0o755)
    shutil.rmtree(unpacked)
