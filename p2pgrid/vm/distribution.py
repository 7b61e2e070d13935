"""Fetch packages of the distribution at hand and take files out of them.

Nothing is installed and no privilege is needed: `apt-get download` with the machine's
own sources and keys, `dpkg-deb -x` into a folder.  Where a package comes from is the
administrator's decision, so no address appears here.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from p2pgrid.errors import Misconfigured

KERNELS = ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-generic", "linux-image-amd64")
"""Names that always mean the newest kernel: Debian's, Ubuntu's; the smallest first."""


def need(*programs: tuple[str, str]) -> None:
    """Check that each (program, package) is installed.  Raises `Misconfigured` with the line to type."""
    missing = sorted({package for program, package in programs if not find_program(program)})
    if missing:
        raise Misconfigured(why=f"programs are missing; type: sudo apt-get install {' '.join(missing)}")


def find_program(name: str) -> str | None:
    """Where `name` is; the administrator's folders count even for those who do not have them in PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def run(command: Sequence[str | Path], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """What `command` prints.  Raises `Misconfigured` with the end of its complaint when it fails."""
    program = str(command[0])
    words = [find_program(program) or program, *map(str, command[1:])]
    environ = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **(env or {})}
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except OSError as broken:
        raise Misconfigured(why=f"{program} cannot be started: {broken.strerror}") from None
    if done.returncode:
        said = " | ".join((done.stderr or done.stdout).strip().splitlines()[-6:])
        raise Misconfigured(why=f"{program} failed with status {done.returncode}: {said}")
    return done.stdout


def depends(package: str) -> list[str]:
    """What `package` depends on, as far as apt knows; empty where it does not know the package."""
    try:
        told = run(["apt-cache", "depends", "--no-recommends", "--no-suggests", package])
    except Misconfigured:
        return []
    return re.findall(r"^\s*\|?Depends: ([a-z0-9][^\s:<>]*)", told, re.MULTILINE)


def kernel_name() -> str:
    """The package that always means the newest kernel here."""
    for name in KERNELS:
        if any(re.match(r"linux-image-\d", package) for package in depends(name)):
            return name
    raise Misconfigured(why="apt knows no kernel package; type: sudo apt-get update")


def kernel_packages() -> list[str]:
    """The packages that hold the newest kernel's image and its modules."""
    wanted = [p for p in depends(kernel_name()) if re.match(r"linux-(image|modules)-\d", p)]
    for package in wanted:
        wanted += [p for p in depends(package) if re.match(r"linux-modules-\d", p) and p not in wanted]
    return wanted


def grub_packages() -> list[str]:
    """The packages that hold GRUB for a BIOS and the program that links it, with its one rare library."""
    libraries = [p for p in depends("grub-common") if p.startswith("libdevmapper")]
    return ["grub-pc-bin", "grub-common", *libraries]


def sources() -> tuple[str, list[str]]:
    """This machine's distribution: its suite, and its package sources as one-line entries.

    Sources of others (browsers, clouds) are left out, and so are backports and proposals.
    """
    suite = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    form = "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
    rows = run(["apt-get", "indextargets", "--format", form, "Created-By: Packages"]).splitlines()
    found = []
    for origin, address, release, component in (row.split("|") for row in dict.fromkeys(rows)):
        if origin in ("Debian", "Ubuntu") and release in (suite, f"{suite}-updates", f"{suite}-security"):
            found.append(f"deb {address} {release} {component}")
    if not suite or not found:
        raise Misconfigured(why="apt has no lists of this Debian or Ubuntu; type: sudo apt-get update")
    return suite, found


def unpack(packages: Sequence[str], folder: Path) -> None:
    """Download `packages` and unpack them into `folder`.  Raises `Misconfigured`."""
    archives = folder.with_name(folder.name + ".debs")
    archives.mkdir()
    try:
        run(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *packages], cwd=archives)
    except Misconfigured as refused:
        raise Misconfigured(why=f"{refused.why}; try: sudo apt-get update") from None
    folder.mkdir(exist_ok=True)
    for archive in sorted(archives.glob("*.deb")):
        run(["dpkg-deb", "-x", archive, folder])
    shutil.rmtree(archives)
