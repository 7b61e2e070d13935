"""Whatever a guest leaves on its scratch disk, only regular files come out, in one folder, in time."""

import os
import random
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import trio

from p2pgrid.dht.files import free
from p2pgrid.errors import NoSpace
from p2pgrid.vm.context import write_context
from p2pgrid.vm.findings import Begin, Bytes, Done, Failed
from p2pgrid.vm.results import Caps, ResultsRefused, Sink, extract
from p2pgrid.vm.scratch import find_program, make_scratch

MIB = 1 << 20
CAPS = Caps(bytes=64 * MIB, files=1000)


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def run(program: str, *words: str | Path) -> None:
    subprocess.run([find_program(program, "e2fsprogs"), *words], check=True, capture_output=True)


def ext4_image(
    path: Path, source: Path, features: str = "^has_journal,metadata_csum", size: str = "16M"
) -> Path:
    run("mke2fs", "-F", "-t", "ext4", "-b", "1024", "-O", features, "-d", source, path, size)
    return path


def some_files(folder: Path) -> Path:
    (folder / "a" / "b").mkdir(parents=True)
    for i in range(20):
        (folder / "a" / f"f{i}").write_bytes(random.Random(i).randbytes(i * 999))
    (folder / "a" / "b" / "big").write_bytes(random.Random(0).randbytes(400_000))
    (folder / "run.sh").write_bytes(b"#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "ünï cødé").write_bytes(b"u")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_plain(folder: Path) -> None:
    """Nothing but folders and regular files of ours."""
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        assert stat.S_ISREG(mode) or stat.S_ISDIR(mode), path
        assert path.lstat().st_uid == os.geteuid()


async def test_files_come_out_as_they_were(tmp_path, out):
    source = some_files(tmp_path / "in")
    await extract(ext4_image(tmp_path / "image", source), out, CAPS)
    assert contents(out) == contents(source)
    assert_plain(out)
    assert os.access(out / "run.sh", os.X_OK)
    assert (out / "a" / "f1").stat().st_mode & 0o777 == 0o644


async def test_a_guest_may_have_made_its_own_file_system(tmp_path, out):
    source = some_files(tmp_path / "in")
    await extract(ext4_image(tmp_path / "image", source, "has_journal,^flex_bg,^64bit"), out, CAPS)
    assert contents(out) == contents(source)


@pytest.mark.parametrize("features", ["^has_journal,^extent,^64bit", "^has_journal,inline_data", "encrypt"])
async def test_a_kind_of_ext4_that_would_be_read_in_part_is_refused(tmp_path, out, features):
    image = ext4_image(tmp_path / "image", some_files(tmp_path / "in"), features)
    with pytest.raises(ResultsRefused, match="not read here"):
        await extract(image, out, CAPS)
    assert contents(out) == {}


async def test_a_fresh_scratch_disk_is_empty_and_small(tmp_path, out):
    image = tmp_path / "scratch"
    await make_scratch(image, 8 << 30)
    assert image.stat().st_size == 8 << 30
    assert image.stat().st_blocks * 512 < MIB
    await extract(image, out, CAPS)
    assert contents(out) == {}


async def test_holes_stay_holes(tmp_path, out):
    source = tmp_path / "in"
    source.mkdir()
    with (source / "sparse").open("wb") as file:
        file.seek(3 << 30)
        file.write(b"end")
    await extract(ext4_image(tmp_path / "image", source, size="16M"), out, Caps(bytes=4 << 30))
    found = (out / "sparse").stat()
    assert found.st_size == (3 << 30) + 3
    assert found.st_blocks * 512 < MIB
    with (out / "sparse").open("rb") as file:
        file.seek(-3, os.SEEK_END)
        assert file.read() == b"end"


async def test_links_devices_and_lost_and_found_are_left_out(tmp_path, out):
    source = tmp_path / "in"
    (source / "folder").mkdir(parents=True)
    (source / "good").write_bytes(b"good")
    (source / "absolute").symlink_to("/etc/passwd")
    (source / "folder" / "up").symlink_to("../../../../etc")
    os.mkfifo(source / "fifo")
    if os.geteuid() == 0:
        os.mknod(source / "disk", stat.S_IFBLK | 0o666, os.makedev(8, 0))
    await extract(ext4_image(tmp_path / "image", source), out, CAPS)
    assert contents(out) == {"good": b"good"}
    assert_plain(out)


async def test_names_that_lead_elsewhere_are_left_out(tmp_path, out):
    source = tmp_path / "in"
    (source / "dddddddd").mkdir(parents=True)
    (source / "aaaaaaaa").write_bytes(b"evil")
    (source / "bbbbbbbb").write_bytes(b"evil")
    (source / "cc").write_bytes(b"evil")
    (source / "dddddddd" / "inner").write_bytes(b"evil")
    (source / "eeee").write_bytes(b"evil")
    (source / "good").write_bytes(b"good")
    image = ext4_image(tmp_path / "image", source, "^has_journal,^metadata_csum")
    data = image.read_bytes()
    for plain, evil in {
        b"aaaaaaaa": b"../pwned",
        b"bbbbbbbb": b"/tmp/pwn",
        b"\x02\x01cc": b"\x02\x01..",
        b"dddddddd": b"../../dd",
        b"\x04\x01eeee": b"\x04\x01\xff\xfe\0x",
    }.items():
        assert data.count(plain) >= 1
        data = data.replace(plain, evil)
    image.write_bytes(data)
    await extract(image, out, CAPS)
    assert contents(out) == {"good": b"good"}
    assert not list(tmp_path.glob("pwned*"))


async def test_a_folder_inside_itself_ends(tmp_path, out):
    source = tmp_path / "in"
    (source / "x").mkdir(parents=True)
    (source / "x" / "file").write_bytes(b"once")
    image = ext4_image(tmp_path / "image", source, "^has_journal,^metadata_csum")
    run("debugfs", "-w", "-R", "link x x/again", image)
    await extract(image, out, CAPS)
    assert contents(out) == {"x/file": b"once"}


@pytest.mark.parametrize("caps", [Caps(bytes=8 << 30), Caps(bytes=CAPS.bytes)])
async def test_a_huge_sparse_file_is_refused(tmp_path, out, caps):
    source = tmp_path / "in"
    source.mkdir()
    os.truncate(os.open(source / "huge", os.O_CREAT | os.O_WRONLY), 1 << 40)
    image = ext4_image(tmp_path / "image", source)
    with pytest.raises(ResultsRefused, match=f"more than {caps.bytes} bytes"):
        await extract(image, out, caps)


async def test_too_many_files_are_refused(tmp_path, out):
    image = ext4_image(tmp_path / "image", some_files(tmp_path / "in"))
    with pytest.raises(ResultsRefused, match="more than 10 files"):
        await extract(image, out, Caps(files=10))


async def test_reading_ends_at_its_time_limit(tmp_path, out):
    image = ext4_image(tmp_path / "image", some_files(tmp_path / "in"))
    with pytest.raises(ResultsRefused, match="took more than"):
        await extract(image, out, CAPS, patience=0)


@pytest.mark.parametrize("data", [b"", bytes(MIB), b"\xff" * MIB, bytes(1080) + b"\x53\xef" + bytes(MIB)])
async def test_what_is_no_file_system_is_refused(tmp_path, out, data):
    (tmp_path / "image").write_bytes(data)
    with pytest.raises(ResultsRefused):
        await extract(tmp_path / "image", out, CAPS)
    assert contents(out) == {}


@pytest.mark.parametrize("features", ["^has_journal,metadata_csum", "^has_journal,^metadata_csum"])
async def test_thirty_spoilt_disks_are_read_or_refused(tmp_path, features):
    """Never outside the folder, never past the time limit, never another error."""
    sound = ext4_image(tmp_path / "image", some_files(tmp_path / "in"), features, "4M").read_bytes()
    caps = Caps(bytes=4 * MIB, files=100)
    refused = 0
    for seed in range(30):
        image, out = tmp_path / f"image{seed}", tmp_path / f"out{seed}"
        image.write_bytes(spoilt(sound, seed))
        out.mkdir()
        try:
            with trio.fail_after(20):
                await extract(image, out, caps, patience=5)
        except ResultsRefused:
            refused += 1
        assert_plain(out)
        assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) <= caps.bytes
        image.unlink()
        shutil.rmtree(out)
    assert 0 < refused < 30
    assert {path.name for path in tmp_path.iterdir()} == {"in", "image"}


def spoilt(data: bytes, seed: int) -> bytes:
    dice = random.Random(seed)
    image = bytearray(data)
    for _ in range(dice.choice([1, 4, 40, 400])):
        places = (dice.randrange(1024, 2048), dice.randrange(300 * 1024), dice.randrange(len(image)))
        image[dice.choice(places)] = dice.choice([0, 255, dice.randrange(256)])
    return bytes(image)


# --- ISO 9660, by way of a context disk ----------------------------------------------------


def sourced(path: Path, name: str) -> bytes:
    """The value of a variable after a shell has sourced `path`."""
    shell = ["sh", "-c", f'. {path}; printf %s "${name}"']
    return subprocess.run(shell, capture_output=True, check=True).stdout


async def test_a_context_disk_is_read_back(tmp_path, out):
    deep = "/".join(f"d{i}" for i in range(20)) + "/leaf"
    files = {
        name: name.encode() for name in ("context.sh", deep, "x" * 250, "ünï/ço dé", "😀", "A", "a", "b c/D")
    }
    files |= {f"many/f{i}": b"%d" % i for i in range(300)} | {"empty": b""}
    write_context(tmp_path / "iso", files, {"P2PGRID_JOB": "it's"})
    await extract(tmp_path / "iso", out, CAPS)
    env = (out / "p2pgrid.env").read_text()
    assert contents(out) == {**files, "p2pgrid.env": env.encode()}
    assert sourced(out / "p2pgrid.env", "P2PGRID_JOB") == b"it's"
    assert_plain(out)


async def test_twenty_spoilt_isos_are_read_or_refused(tmp_path):
    write_context(tmp_path / "iso", {f"f{i}": bytes(i) for i in range(30)}, {})
    sound = (tmp_path / "iso").read_bytes()
    for seed in range(20):
        dice = random.Random(seed)
        image = bytearray(sound)
        for _ in range(dice.choice([1, 10, 100])):
            image[dice.randrange(32768, 32768 + 40 * 2048)] = dice.randrange(256)
        (tmp_path / "spoilt").write_bytes(image)
        out = tmp_path / f"out{seed}"
        out.mkdir()
        try:
            with trio.fail_after(20):
                await extract(tmp_path / "spoilt", out, CAPS, patience=5)
        except ResultsRefused:
            pass
        assert_plain(out)


# --- the sink believes nobody --------------------------------------------------------------


def pour(folder: Path, *told: Begin | Bytes | Done | Failed) -> None:
    sink = Sink(folder, Caps(bytes=1000, files=3))
    try:
        sink.take(told)
    finally:
        sink.close()


@pytest.mark.parametrize(
    "told",
    [
        [Begin("../x", 1, False)],
        [Begin("/etc/x", 1, False)],
        [Begin("a/../../x", 1, False)],
        [Begin("", 1, False)],
        [Begin("a\0b", 1, False)],
        [Begin("a", -1, False)],
        [Begin("a", 1001, False)],
        [Begin("a", 501, False), Begin("b", 500, False)],
        [Begin(name, 0, False) for name in "abcd"],
        [Begin("a", 1, False), Begin("a", 1, False)],
        [Begin("a", 1, False), Begin("a/b", 1, False)],
        [Begin("a/b", 1, False), Begin("a", 1, False)],
        [Bytes(0, b"x")],
        [Begin("a", 3, False), Bytes(1, b"xyz")],
        [Begin("a", 3, False), Bytes(-1, b"x")],
        [Begin("a", 3, False), Bytes(0, b"xy"), Bytes(0, b"xy")],
        [Done(), Begin("a", 1, False)],
        [Failed("no")],
    ],
)
def test_a_reader_that_was_taken_over_is_refused(tmp_path, out, told):
    with pytest.raises(ResultsRefused):
        pour(out, *told)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert_plain(out)


def test_links_that_are_there_already_are_not_followed(tmp_path, out):
    (tmp_path / "elsewhere").mkdir()
    (out / "a").symlink_to(tmp_path / "elsewhere")
    (out / "b").symlink_to(tmp_path / "elsewhere" / "b")
    for path in ("a/x", "b"):
        with pytest.raises(ResultsRefused):
            pour(out, Begin(path, 1, False), Bytes(0, b"x"))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_result_that_would_fill_the_disk_is_not_written(out):
    sink = Sink(out, CAPS, min_free=free(out) + 100 * MIB)
    try:
        with pytest.raises(NoSpace):
            sink.take([Begin("big", 20, False), Bytes(0, b"x" * 20)])
    finally:
        sink.close()
    assert (out / "big").read_bytes() == bytes(20)
    sink = Sink(out, CAPS)
    sink.take([Begin("other", 20, False), Bytes(0, b"x" * 20), Done()])
    sink.close()
    assert (out / "other").read_bytes() == b"x" * 20
