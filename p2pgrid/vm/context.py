"""Write the context disk: ISO 9660 with Rock Ridge and Joliet, from names and bytes.

Linux reads the Rock Ridge names, everything else the Joliet ones; the plain ISO names are numbers,
since 8.3 names of many files collide.  A name that Joliet cannot spell is left out there.
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pycdlib import PyCdlib
from pycdlib.pycdlibexception import PyCdlibException

from p2pgrid.dht.manifest import safe_path
from p2pgrid.errors import Misused

LABEL = "CONTEXT"
SCRIPT = "context.sh"
ENV = "p2pgrid.env"
JOLIET_MAX = 64
"""UTF-16 units of one Joliet name."""
_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")


def env_file(env: Mapping[str, str]) -> bytes:
    """`env` as lines that a POSIX shell may source."""
    assert all(_NAME.fullmatch(name) for name in env), "names are ours"
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in env.items()).encode()


def write_context(path: Path, files: Mapping[str, bytes | Path], env: Mapping[str, str]) -> None:
    """Write the disk to `path`, which must not exist.

    Args:
        files: content by relative POSIX path; a `Path` is a regular file to copy.

    Raises `Misused` for a path that is not safe, is given twice as file and folder, or is `p2pgrid.env`.
    """
    for name in files:
        if not safe_path(name) or name == ENV or name.startswith(ENV + "/"):
            raise Misused(why=f"an input file cannot be named {name[:200]!r}")
    _refuse_file_as_folder(files)
    iso = PyCdlib()
    iso.new(interchange_level=3, rock_ridge="1.09", joliet=3, vol_ident=LABEL)
    try:
        _fill(iso, {**files, ENV: env_file(env)})
        with path.open("xb") as out:
            iso.write_fp(out)
    except PyCdlibException as refused:
        raise Misused(why=f"the input files do not fit on a context disk: {refused}") from None
    finally:
        iso.close()


def _refuse_file_as_folder(files: Mapping[str, object]) -> None:
    for name in files:
        for folder in PurePosixPath(name).parents:
            if str(folder) in files:
                raise Misused(why=f"{str(folder)[:200]!r} is a file and a folder among the input files")


def _fill(iso: PyCdlib, files: Mapping[str, bytes | Path]) -> None:
    plain = {PurePosixPath("."): ""}  # folder -> its path in numbers
    joliet: dict[PurePosixPath, str | None] = {
        PurePosixPath("."): ""
    }  # folder -> its Joliet path, if it has one
    count = 0
    for name, content in sorted(files.items()):
        file = PurePosixPath(name)
        for folder in (*reversed(file.parents), file):
            if folder in plain:
                continue
            count += 1
            above = joliet[folder.parent]
            spelled = f"{above}/{folder.name}" if above is not None and _joliet_can(folder.name) else None
            names: dict[str, Any] = {"rr_name": folder.name, "joliet_path": spelled}
            if folder != file:
                plain[folder], joliet[folder] = f"{plain[folder.parent]}/D{count:07}", spelled
                iso.add_directory(plain[folder], file_mode=0o040755, **names)
                continue
            number = f"{plain[file.parent]}/F{count:07}.;1"
            if isinstance(content, bytes):
                iso.add_fp(io.BytesIO(content), len(content), number, file_mode=0o100755, **names)
            else:  # opened only while it is copied, so that there may be many
                iso.add_file(str(content), number, file_mode=0o100755, **names)


def _joliet_can(name: str) -> bool:
    return len(name.encode("utf-16-be")) <= 2 * JOLIET_MAX and not any(
        c in "*/:;?\\" or ord(c) > 0xFFFF for c in name
    )
