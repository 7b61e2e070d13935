"""Build disks that keep the guest's contract, unattended, from the distribution's own packages.

*tiny*: kernel and busybox; some 20 MB, boots in seconds even without KVM (`tiny.py`).
*debian*: systemd, python3 and what else is asked for; realistic (`debian.py`).

    packages ──> files ──> file system in a plain file ──> MBR + GRUB ──> VDI

No loop mount anywhere.  tiny needs no privilege; debian is made by mmdebstrap, as root.
Guest side: `kit/`, `docs/reference/guest-kit.md`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

from blake3 import blake3

from p2pgrid.dht.image import write_image
from p2pgrid.errors import Misused
from p2pgrid.vm import boot_disk, debian, initramfs, kit, tiny
from p2pgrid.vm.boot_disk import Extents

Kind = Literal["tiny", "debian"]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, and which step of how many it is (from 0)."""

STEPS = 5


def build_template(
    kind: Kind, out: Path, *, packages: Sequence[str] = (), progress: Progress | None = None
) -> Path:
    """Make the disk `kind` as a VDI at `out`, complete or not at all.

    `packages` names more of them for a debian disk.  Blocks for seconds (tiny) or minutes
    (debian).  Raises `Misconfigured` when programs or packages are missing.
    """
    if kind == "tiny" and packages:
        raise Misused(why="the tiny template takes no more packages; use debian")
    step = 0

    def tell(what: str) -> None:
        nonlocal step
        if progress:
            progress(what, step, STEPS)
        step += 1

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".template-", dir=out.parent) as scratch:
        work = Path(scratch)
        size, extents = tiny.build(work, tell) if kind == "tiny" else debian.build(work, packages, tell)
        tell("write the VDI")
        _write_vdi(work / "disk.raw", size, extents, work / "disk.vdi")
        os.replace(work / "disk.vdi", out)
    if progress:
        progress("done", STEPS, STEPS)
    return out


def cached_template(
    kind: Kind,
    folder: Path | None = None,
    *,
    packages: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """The disk `kind`, built once and kept in `folder` (by default the user's cache folder).

    It is built anew when the kit or the recipe changes, not when the distribution has newer packages.
    """
    stamp = blake3("\0".join((kind, *sorted(packages))).encode())
    for name in kit.NAMES:
        stamp.update(kit.read(name))
    for module in (tiny, debian, boot_disk, initramfs):
        stamp.update(
            resources.files("p2pgrid.vm").joinpath(f"{module.__name__.split('.')[-1]}.py").read_bytes()
        )
    out = (folder or cache_folder()) / f"{kind}-{stamp.hexdigest()[:12]}.vdi"
    return out if out.exists() else build_template(kind, out, packages=packages, progress=progress)


def cache_folder() -> Path:
    """Where templates are kept: below XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "p2pgrid" / "templates"


def _write_vdi(raw: Path, size: int, extents: Extents, out: Path) -> None:
    """Our own file, and our own writer: nothing is probed."""
    with raw.open("rb") as disk, out.open("wb") as vdi:
        write_image("vdi", size, extents, lambda at, length: os.pread(disk.fileno(), length, at), vdi)
        vdi.flush()
        os.fsync(vdi.fileno())
