"""Is what an export writes all that a fetch needs, whole or absent, and cheap to write again?"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from p2pgrid.dht.export import export_datum
from p2pgrid.dht.publish import publish_tree
from p2pgrid.dht.store import Store
from p2pgrid.errors import ChunkCorrupt, Conflict, GridError, NotFound
from tests.origin_server import files_of
from tests.small_disks import KEY, SmallDisk, changed, chunk, small_delta, small_disk

DISK = small_disk([1, 0, 2, 3, 1, *range(4, 40)], tail=1000)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", min_free=0) as store:
        hold(store, DISK)
        yield store


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "www"


def hold(store: Store, disk: SmallDisk) -> None:
    disk.put_objects(store)
    shelf = store.begin(disk.datum)
    for index, frame in enumerate(disk.frames):
        if not shelf.holds(index):
            shelf.put_frame(index, frame)


def there(folder: Path) -> dict[str, bytes]:
    return {f"/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pack_of(folder: Path) -> Path:
    return folder / "packs" / str(DISK.pack)


def test_it_is_what_an_origin_has(store, folder):
    seen = []
    done = export_datum(store, DISK.datum, folder, lambda done, total: seen.append((done, total)))
    assert there(folder) == files_of(DISK)
    size = sum(map(len, DISK.frames))
    assert seen == sorted(seen)
    assert seen[-1] == (size, size)
    assert (done.objects, done.packs) == (len(DISK.objects), 1)
    assert done.bytes == done.written == sum(map(len, there(folder).values()))
    assert pack_of(folder).stat().st_mode & 0o444 == 0o444


def test_again_costs_no_write(store, folder):
    first = export_datum(store, DISK.datum, folder)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    again = export_datum(store, DISK.datum, folder)
    assert (again.written, again.bytes) == (0, first.bytes)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("harm", [b"\0" * 20, None])
def test_what_has_rotted_there_is_written_again(store, folder, harm):
    export_datum(store, DISK.datum, folder)
    if harm is None:
        os.truncate(pack_of(folder), 100)
    else:
        with pack_of(folder).open("r+b") as file:
            file.seek(500)
            file.write(harm)
    (folder / "objects" / str(DISK.datum)).write_bytes(b"no")
    assert export_datum(store, DISK.datum, folder).written > 0
    assert there(folder) == files_of(DISK)


def test_several_disks_share_a_folder_and_what_they_have_in_common(store, folder):
    other = small_disk([1, 0, 2, 3, 1, *range(4, 40)], tail=1000, exact=False)
    hold(store, other)
    export_datum(store, DISK.datum, folder)
    done = export_datum(store, other.datum, folder)
    assert there(folder) == files_of(DISK, other)
    assert done.written < done.bytes / 2


def test_a_delta_brings_its_parent_along(store, folder):
    plain = [chunk(1), changed(chunk(2), 7), chunk(3), chunk(50)]
    delta = small_delta(DISK, plain)
    hold(store, delta)
    done = export_datum(store, delta.datum, folder)
    parents = dict(list(files_of(DISK).items()))
    for path, data in files_of(delta).items():
        assert there(folder)[path] == data
    assert there(folder)[f"/packs/{DISK.pack}"] == parents[f"/packs/{DISK.pack}"]
    assert done.packs == 2
    with Store(folder.parent / "fresh", min_free=0) as fresh:
        while missing := fresh.missing_objects(delta.datum):
            for cid in missing:
                fresh.put_object((folder / "objects" / str(cid)).read_bytes())
        for part in fresh.begin(delta.datum).parts:
            data, at = (folder / "packs" / str(part.pack)).read_bytes(), 0
            for index, length in enumerate(part.frames.lengths):
                if length:
                    part.put_frame(index, data[at : at + length])
                at += length
        assert fresh.complete(delta.datum)
        assert fresh.begin(delta.datum).read(0, len(delta.plain)) == delta.plain


def test_cancelled_it_leaves_whole_files_only(store, folder):
    calls = 0

    def stop(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise Conflict(what="enough")

    with pytest.raises(Conflict, match="enough"):
        export_datum(store, DISK.datum, folder, stop)
    assert there(folder) == {}


def test_killed_it_goes_on_where_it_was(store, folder):
    export_datum(store, DISK.datum, folder)
    data = pack_of(folder).read_bytes()
    pack_of(folder).unlink()
    half = sum(map(len, DISK.frames[:20]))
    part = pack_of(folder).with_name(pack_of(folder).name + ".part")
    part.write_bytes(data[:half] + b"\xff" * 10_000_000)
    (folder / "objects" / "0123.tmp").write_bytes(b"half")
    done = export_datum(store, DISK.datum, folder)
    assert there(folder) == files_of(DISK)
    assert done.written == len(data) - half


def test_what_is_not_all_here_is_not_exported(store, folder):
    with pytest.raises(NotFound):
        export_datum(store, small_disk([77]).datum, folder)
    lacking = small_disk([77, 78])
    lacking.put_objects(store)
    store.begin(lacking.datum)
    with pytest.raises(NotFound):
        export_datum(store, lacking.datum, folder)
    assert not folder.exists()


def test_what_has_rotted_here_ends_it(store, folder):
    frames = store.root / "packs" / str(DISK.pack) / "frames"
    with frames.open("r+b") as file:
        file.seek(500)
        file.write(b"\0" * 20)
    with pytest.raises((ChunkCorrupt, NotFound)):
        export_datum(store, DISK.datum, folder)
    assert there(folder) == {}


def test_two_do_not_write_to_one_folder(store, folder):
    folder.mkdir()
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(Conflict, match="an export"):
            export_datum(store, DISK.datum, folder)
    finally:
        os.close(fd)


def test_a_folder_that_cannot_be_is_said(store, folder):
    folder.write_bytes(b"a file")
    with pytest.raises(GridError, match="www"):
        export_datum(store, DISK.datum, folder)


def test_results_are_exported_too(store, folder, tmp_path):
    for name, files in (("some", {"a": b"x" * 5000}), ("none", {"empty": b""})):
        (tmp_path / name).mkdir()
        for file, data in files.items():
            (tmp_path / name / file).write_bytes(data)
        made = publish_tree(store, tmp_path / name, KEY)
        done = export_datum(store, made.datum, folder / name)
        assert done.packs == (1 if name == "some" else 0)
        assert (folder / name / "objects" / str(made.datum)).exists()
