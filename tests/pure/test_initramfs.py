"""What the kernel is given: an archive it can read, drivers in an order that loads."""

import lzma
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.vm.initramfs import Entry, cpio, folder, link, load_order, program

NAMES = st.text("abcdefgh/", min_size=1, max_size=9)


def unpack(data: bytes) -> list[tuple[str, int, bytes, tuple[int, int]]]:
    """A newc archive, read by its specification."""
    assert len(data) % 4 == 0
    found, at = [], 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = data[at + 110 : at + 110 + fields[11] - 1].decode()
        start = -(-(at + 110 + fields[11]) // 4) * 4
        if name == "TRAILER!!!":
            return found
        found.append((name, fields[1], data[start : start + fields[6]], (fields[9], fields[10])))
        at = -(-(start + fields[6]) // 4) * 4


@given(st.lists(st.tuples(NAMES, st.binary(max_size=9))))
def test_cpio_gives_back_what_went_in(files):
    assert [(n, d) for n, _, d, _ in unpack(cpio(program(n, d) for n, d in files))] == files


def test_cpio_keeps_kinds_and_devices():
    packed = cpio([folder("d"), link("l", "d"), Entry("c", 0o020600, device=(5, 1))])
    assert unpack(packed) == [
        ("d", 0o040755, b"", (0, 0)),
        ("l", 0o120777, b"d", (0, 0)),
        ("c", 0o020600, b"", (5, 1)),
    ]


def module(depends: str = "", pre: str = "") -> bytes:
    text = f"\0license=GPL\0depends={depends}\0"
    return (text + (f"softdep=pre: {pre}\0" if pre else "") + "name=x\0").encode()


def test_what_a_module_needs_comes_first(tmp_path: Path):
    (tmp_path / "fs").mkdir()
    (tmp_path / "fs" / "ext4.ko").write_bytes(module("jbd2,mb-cache", pre="crc32c"))
    (tmp_path / "jbd2.ko.xz").write_bytes(lzma.compress(module("mb_cache")))
    (tmp_path / "mb-cache.ko.zst").write_bytes(zstandard.compress(module()))
    (tmp_path / "crc32c.ko").write_bytes(module())
    (tmp_path / "other.ko").write_bytes(module())
    order = load_order(tmp_path, ["ext4", "built_in", "ext4"])
    assert list(order) == ["mb_cache", "jbd2", "crc32c", "ext4"]
    assert order["mb_cache"] == module()


@pytest.mark.parametrize("start", ["a", "b"])
def test_a_circle_ends(tmp_path: Path, start: str):
    (tmp_path / "a.ko").write_bytes(module("b"))
    (tmp_path / "b.ko").write_bytes(module("a"))
    assert set(load_order(tmp_path, [start])) == {"a", "b"}
