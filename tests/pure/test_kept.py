"""Do kept files stay few, right, and gone once they are let go of?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from p2pgrid.dht.files import KEPT_MAX, Kept
from p2pgrid.errors import NotFound


def here(path: Path) -> int:
    """How many descriptors of this process are under `path`."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{fd}").startswith(f"{path}/")
        except FileNotFoundError:  # the one that listed them
            continue
    return found


@pytest.fixture
def many(tmp_path: Path) -> list[Kept]:
    kept = []
    for place in range(KEPT_MAX + 10):
        (tmp_path / str(place)).write_bytes(b"%d" % place)
        kept.append(Kept(tmp_path / str(place), os.O_RDONLY))
    return kept


def test_few_stay_open_and_all_are_right(many: list[Kept], tmp_path: Path) -> None:
    for _ in range(2):
        for place, kept in enumerate(many):
            assert os.pread(kept.descriptor().fd, 10, 0) == b"%d" % place
        assert here(tmp_path) == KEPT_MAX
    for kept in many:
        kept.let_go()
    assert here(tmp_path) == 0


def test_who_uses_a_file_that_makes_way_goes_on(many: list[Kept], tmp_path: Path) -> None:
    in_use = many[0].descriptor()
    for kept in many[1:]:
        kept.descriptor()
    assert many[0].descriptor() is not in_use
    assert os.pread(in_use.fd, 10, 0) == b"0"
    assert here(tmp_path) == KEPT_MAX + 1
    del in_use
    assert here(tmp_path) == KEPT_MAX
    for kept in many:
        kept.let_go()


def test_what_was_let_go_of_after_its_folder_went_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "pack"
    folder.mkdir()
    (folder / "frames").write_bytes(b"bytes")
    kept = Kept(folder / "frames", os.O_RDONLY)
    kept.descriptor()
    folder.rename(tmp_path / "doomed")
    kept.let_go()
    with pytest.raises(NotFound):
        kept.descriptor()
