"""Does only what the guest has freed stay behind, and is every doubt refused?"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from p2pgrid.dht.image import open_image
from p2pgrid.dht.manifest import CHUNK_SIZE, Disk, Recipe
from p2pgrid.dht.publish import publish_disk
from p2pgrid.dht.restore import restore_disk
from p2pgrid.dht.skip_free import SkipFree
from p2pgrid.dht.store import Store
from p2pgrid.errors import ImageRefused
from tests.disk_tables import gpt, mbr
from tests.ext4_disks import DELETED, MIB, MISSING, alter, check, file_system, free_blocks, tool
from tests.small_disks import KEY, chunk

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"e2fsprogs lacks {', '.join(MISSING)}")
SUPERBLOCK = 1024


def freed(path: Path) -> bytes:
    image = open_image(path)
    try:
        skipping = SkipFree(image)
        return b"".join(
            skipping.read(at, min(CHUNK_SIZE, skipping.size - at))
            for at in range(0, skipping.size, CHUNK_SIZE)
        )
    finally:
        image.close()


def without(plain: bytes, block: int, runs: list[tuple[int, int]]) -> bytes:
    expected = bytearray(plain)
    for first, count in runs:
        expected[first * block : (first + count) * block] = bytes(count * block)
    return bytes(expected)


@pytest.mark.parametrize("options", [
    ("-t", "ext4"),
    ("-t", "ext4", "-b", "1024"),
    ("-t", "ext4", "-b", "2048", "-O", "^flex_bg,^resize_inode"),
    ("-t", "ext4", "-b", "1024", "-O", "64bit,metadata_csum,meta_bg,^resize_inode"),
    ("-t", "ext4", "-b", "1024", "-O", "^64bit,^metadata_csum,uninit_bg"),
    ("-t", "ext4", "-b", "1024", "-g", "1024", "-O", "sparse_super2,metadata_csum_seed,^has_journal"),
    ("-t", "ext4", "-b", "4096", "-g", "4096", "-O", "^metadata_csum,inline_data,large_dir,quota"),
    ("-t", "ext3", "-b", "1024"),
    ("-t", "ext2", "-b", "1024", "-r", "1", "-O", "^sparse_super,^resize_inode"),
    ("-t", "ext2", "-b", "4096", "-O", "none"),
], ids=" ".join)  # fmt: skip
def test_what_is_free_reads_as_zeros_and_nothing_else_changes(options, tmp_path):
    path = file_system(tmp_path, *options)
    block, runs = free_blocks(path)
    out = freed(path)
    assert out == without(path.read_bytes(), block, runs)
    assert DELETED * 500 not in out
    image = open_image(path)
    assert SkipFree(image).freed == block * sum(count for _, count in runs)
    image.close()
    path.write_bytes(out)
    check(path)


def disk(folder: Path, table: str) -> tuple[Path, int]:
    """A file system behind a table of partitions; where it begins."""
    inner = file_system(folder, "-t", "ext4", "-b", "1024")
    start, length = {"mbr": (MIB, 20 * MIB), "logical": (3 * MIB, 20 * MIB), "gpt": (MIB, 20 * MIB),
                     "odd": (63 * 512, 20 * MIB)}[table]  # fmt: skip
    size = 28 * MIB
    path = folder / "disk.raw"
    other = (start + length, 2 * MIB)
    tables = {
        "mbr": lambda: mbr([(0x83, start, length), (0x82, *other)]),
        "odd": lambda: mbr([(0x83, start, length)]),
        "logical": lambda: mbr([(0x83, MIB, MIB)], [(0x83, start, length), (0x82, *other)], 2 * MIB),
        "gpt": lambda: gpt(size, [(start, length), other]),
    }
    with path.open("wb") as file:
        for at, data in tables[table]().items():
            file.seek(at)
            file.write(data)
        file.seek(start)
        file.write(inner.read_bytes())
        file.seek(other[0])
        file.write(chunk(-7, 2 * MIB))
        file.truncate(size)
    return path, start


@pytest.mark.parametrize("table", ["mbr", "logical", "gpt", "odd"])
def test_file_systems_in_partitions_are_found(table, tmp_path):
    path, start = disk(tmp_path, table)
    block, runs = free_blocks(tmp_path / "fs")
    plain, inner = path.read_bytes(), (tmp_path / "fs").read_bytes()
    out = freed(path)
    assert out[start : start + len(inner)] == without(inner, block, runs)
    assert (out[:start], out[start + len(inner) :]) == (plain[:start], plain[start + len(inner) :])


def test_a_put_says_so_and_the_rest_comes_back(tmp_path):
    path, start = disk(tmp_path, "mbr")
    with Store(tmp_path / "store", min_free=0) as store:
        whole = publish_disk(store, path, KEY)
        delta = publish_disk(store, path, KEY, skip_free=True)
        assert delta.parent == whole.content
        assert delta.delta_bytes < 10_000  # zeros in the place of what the parent has
        put = publish_disk(store, path, KEY, skip_free=True, parent=None)
        assert put.content == delta.content
        assert (whole.freed, put.freed) == (
            0,
            sum(count for _, count in free_blocks(tmp_path / "fs")[1]) * 1024,
        )
        assert put.wire_bytes < whole.wire_bytes
        assert put.datum != whole.datum
        assert publish_disk(store, path, KEY, skip_free=True).datum == put.datum
        recipe = Recipe.decode(store.get_object(Disk.decode(store.get_object(put.datum)).recipe))
        assert (recipe.exact, recipe.freed, recipe.pages) == (False, put.freed, ())
        assert not restore_disk(store, put.datum, tmp_path / "back").exact
    back = (tmp_path / "back").read_bytes()
    assert back == freed(path)
    (tmp_path / "fs").write_bytes(back[start : start + 20 * MIB])
    check(tmp_path / "fs")


# --- what is refused -------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(ImageRefused) as refused:
        freed(path)
    return refused.value.why


def superblock(path: Path, at: int, data: bytes) -> None:
    """Change the superblock and make its checksum hold again."""
    alter(path, SUPERBLOCK + at, data)
    tool("debugfs", "-w", "-n", "-R", "set_super_value checksum calc", path)


@pytest.mark.parametrize(("command", "why"), [
    ("feature needs_recovery", "start the guest and shut it down"),
    ("feature FEATURE_R7", "features"),
    ("feature shared_blocks", "features"),
    ("feature journal_dev", "features"),
    ("set_super_value state 0", "was not unmounted"),
    ("set_super_value state 3", "has errors"),
    ("set_super_value blocks_count 1000000", "larger than where it lies"),
    ("set_super_value log_block_size 9", "blocks have"),
    ("set_super_value rev_level 7", "revision"),
    ("set_bg 0 free_blocks_count 5", "free blocks"),
    ("set_bg 0 block_bitmap 900000", "outside of it"),
    ("set_bg 0 flags 2", "free blocks"),
])  # fmt: skip
def test_doubts_are_refused(command, why, tmp_path):
    path = file_system(tmp_path, "-t", "ext4", "-b", "1024", "-O", "^metadata_csum,^uninit_bg")
    tool("debugfs", "-w", "-R", command, path)
    assert why in refusal(path)


def test_clusters_are_refused(tmp_path):
    path = tmp_path / "fs"
    path.touch()
    os.truncate(path, 32 * MIB)
    tool("mke2fs", "-q", "-F", "-t", "ext4", "-O", "bigalloc", "-C", "65536", path)
    assert "bigalloc" in refusal(path)


@pytest.mark.parametrize(("where", "why"), [
    ("bitmap", "checksum of the bitmap"), ("descriptor", "checksum of group"), ("super", "superblock"),
])  # fmt: skip
def test_checksums_hold_or_it_is_refused(where, why, tmp_path):
    path = file_system(tmp_path, "-t", "ext4", "-b", "1024")
    data = path.read_bytes()
    bitmap = int.from_bytes(data[2048:2052], "little") * 1024
    at = {"bitmap": bitmap + 900, "descriptor": 2048 + 64 + 8, "super": SUPERBLOCK + 0x30}[where]
    alter(path, at, bytes([data[at] ^ 0x10]))
    assert why in refusal(path)


def test_a_bitmap_never_frees_bitmaps_and_inode_tables(tmp_path):
    """Even where bitmap and count agree that they are free."""
    path = file_system(tmp_path, "-t", "ext4", "-b", "1024", "-O", "^metadata_csum,^uninit_bg")
    data = path.read_bytes()
    bitmap, _, table = (int.from_bytes(data[2048 + i : 2052 + i], "little") for i in (0, 4, 8))
    bits = bytearray(data[bitmap * 1024 : bitmap * 1024 + 1024])
    for block in (bitmap, table):
        bits[(block - 1) // 8] &= ~(1 << (block - 1) % 8)
    free = int.from_bytes(data[2060:2062], "little") + 2
    alter(path, bitmap * 1024, bytes(bits))
    alter(path, 2060, free.to_bytes(2, "little"))
    out = freed(path)
    for block in (bitmap, table):
        assert any(out[block * 1024 : block * 1024 + 1024])


def test_a_disk_without_such_a_file_system_is_refused(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(chunk(-1) * 4)
    assert "no ext4 file system" in refusal(path)
    with Store(tmp_path / "store", min_free=0) as store:
        with pytest.raises(ImageRefused):
            publish_disk(store, path, KEY, skip_free=True)
        assert store.used() == 0


def test_partitions_over_a_file_system_are_refused(tmp_path):
    path = file_system(tmp_path, "-t", "ext4")
    for at, data in mbr([(0x83, MIB, MIB)]).items():
        alter(path, at, data)
    assert "in their place" in refusal(path)


def test_noise_in_the_metadata_is_refused_or_read(tmp_path):
    """Nothing but `ImageRefused`, whatever the superblock and the descriptors say."""
    path = file_system(tmp_path, "-t", "ext4", "-b", "1024", "-O", "^metadata_csum,^uninit_bg")
    good = path.read_bytes()
    chance = random.Random(5)
    refused = 0
    for _ in range(150):
        at = chance.choice([SUPERBLOCK + chance.randrange(0x110), 2048 + chance.randrange(192)])
        noise = chance.choice([b"\xff" * 4, bytes(4), chance.randbytes(2)])
        alter(path, at, noise)
        try:
            assert len(freed(path)) == len(good)
        except ImageRefused:
            refused += 1
        alter(path, at, good[at : at + 4])
    assert refused > 40


def test_opening_can_be_cancelled(tmp_path):
    class Enough(Exception):
        pass

    def cancel(done: int, total: int) -> None:
        raise Enough

    path = file_system(tmp_path, "-t", "ext4")
    with Store(tmp_path / "store", min_free=0) as store, pytest.raises(Enough):
        publish_disk(store, path, KEY, cancel, skip_free=True)
    assert not (tmp_path / "store" / "packs").exists() or not list((tmp_path / "store" / "packs").iterdir())
