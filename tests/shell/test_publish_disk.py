"""Is a disk that was put what comes back, in any container, and a put that fails absent?"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from p2pgrid.dht import objects as objects_module
from p2pgrid.dht import press, publish
from p2pgrid.dht.image import open_image, write_image
from p2pgrid.dht.manifest import (
    CHUNK_SIZE,
    FORMATS,
    LITERAL_MAX,
    Disk,
    Guest,
    Literal,
    Pack,
    Recipe,
    Zeros,
    encode_segments,
    signed,
)
from p2pgrid.dht.publish import publish_disk
from p2pgrid.dht.restore import restore_disk
from p2pgrid.dht.store import Store
from p2pgrid.errors import BadObject, ChunkCorrupt, ImageRefused, Misused, NoSpace, NotFound
from p2pgrid.ids import Cid
from tests.small_disks import KEY, chunk, small_disk

PLAIN = b"".join(chunk(seed, CHUNK_SIZE) for seed in (1, 0, 2, 3, 2, 0, 0, 4)) + chunk(5, 7 * 512)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", min_free=0) as store:
        yield store


def image(folder: Path, form: str, plain: bytes = PLAIN) -> Path:
    path = folder / f"disk.{form}"
    with path.open("w+b") as file:
        write_image(form, len(plain), [(0, len(plain))], lambda at, n: plain[at : at + n], file)
    return path


def objects(store: Store) -> int:
    return sum(path.stat().st_size for path in (store.root / "objects").glob("*/*"))


def everything(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("form", FORMATS)
def test_what_was_put_comes_back(form, store, tmp_path):
    path = image(tmp_path, form)
    steps = []
    put = publish_disk(store, path, KEY, lambda done, total: steps.append((done, total)))
    assert (put.size, put.chunks, put.holes) == (len(PLAIN), 5, 3)
    assert put.unique_bytes == 4 * CHUNK_SIZE + 7 * 512
    assert put.wire_bytes == store.used() - objects(store)
    assert steps == sorted(steps)
    assert steps[-1] == (len(PLAIN), len(PLAIN))
    assert store.held()[0].chunks == 5
    back = restore_disk(store, put.datum, tmp_path / "back")
    assert (back.exact, back.format, back.size) == (True, form, path.stat().st_size)
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
    for other in FORMATS:
        out = tmp_path / f"other.{other}"
        assert restore_disk(store, put.datum, out, other).exact == (other == form)
        opened = open_image(out)
        assert opened.read(0, len(PLAIN)) == PLAIN
        opened.close()
    assert not list(tmp_path.glob(".p2pgrid-*"))


def test_all_containers_have_one_content_and_one_pack(store, tmp_path):
    put = [publish_disk(store, image(tmp_path, form), KEY) for form in FORMATS]
    assert len({p.datum for p in put}) == len(FORMATS)
    assert len({p.content for p in put}) == 1
    assert len({Disk.decode(store.get_object(p.datum)).pack for p in put}) == 1
    assert store.used() - objects(store) == put[0].wire_bytes


def test_the_same_disk_twice_writes_nothing(store, tmp_path):
    path = image(tmp_path, "vdi")
    first = publish_disk(store, path, KEY)
    before = everything(store.root)
    again = publish_disk(store, path, KEY)
    assert again.datum == first.datum
    assert everything(store.root) == before
    with Store(tmp_path / "other", min_free=0) as other:
        assert publish_disk(other, path, KEY).datum == first.datum


def test_chunks_of_an_older_version_are_not_compressed_again(store, tmp_path, monkeypatch):
    publish_disk(store, image(tmp_path, "raw"), KEY)
    changed = bytearray(PLAIN)
    changed[CHUNK_SIZE : CHUNK_SIZE + 4] = b"new!"
    compressed = []
    compress = press.compress
    monkeypatch.setattr(press, "compress", lambda plain: compressed.append(bytes(plain)) or compress(plain))
    path = image(tmp_path, "raw", bytes(changed))
    put = publish_disk(store, path, KEY)
    assert compressed == [bytes(changed[CHUNK_SIZE : 2 * CHUNK_SIZE])]
    shelf = store.shelf(Disk.decode(store.get_object(put.datum)).pack)
    assert shelf.verify() == []
    assert shelf.read(0, len(changed)) == changed
    with Store(tmp_path / "other", min_free=0) as other:
        assert publish_disk(other, path, KEY).datum == put.datum


def test_nothing_of_another_signer_is_signed(store, tmp_path):
    """A pack of somebody else may lie about its frames; ours may not."""
    seeds = [1, 2, 3]
    liar = small_disk(seeds, frames=[b"rubbish", b"more rubbish", b"still"], key=SigningKey(bytes(32)))
    liar.put_objects(store)
    shelf = store.begin(liar.datum)
    for index, frame in enumerate(liar.frames):
        shelf.put_frame(index, frame)
    put = publish_disk(store, image(tmp_path, "raw", liar.plain), KEY)
    honest = store.shelf(Disk.decode(store.get_object(put.datum)).pack)
    assert honest.read(0, len(liar.plain)) == liar.plain


def test_a_put_completes_a_pack_that_was_being_fetched(store, tmp_path):
    path = image(tmp_path, "raw")
    with Store(tmp_path / "other", min_free=0) as other:
        put = publish_disk(other, path, KEY)
        about = Disk.decode(other.get_object(put.datum))
        wanted = [put.datum]
        while wanted := store.missing_objects(put.datum):
            for cid in wanted:
                store.put_object(other.get_object(cid))
        shelf = store.begin(put.datum)
        shelf.put_frame(1, other.shelf(about.pack).get_frame(1))
    assert publish_disk(store, path, KEY).datum == put.datum
    assert shelf.complete
    assert shelf.read(0, len(PLAIN)) == PLAIN


def test_cancelled_is_absent(store, tmp_path):
    class Enough(Exception):
        pass

    def cancel(done: int, total: int) -> None:
        raise Enough

    path = image(tmp_path, "vdi")
    with pytest.raises(Enough):
        publish_disk(store, path, KEY, cancel)
    assert set(everything(store.root)) == {str(store.root / "lock")}
    put = publish_disk(store, path, KEY)
    with pytest.raises(Enough):
        restore_disk(store, put.datum, tmp_path / "back", progress=cancel)
    with pytest.raises(Enough):
        restore_disk(store, put.datum, tmp_path / "back", "qcow2", progress=cancel)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk.vdi", "store"]


def test_a_disk_that_changes_while_it_is_read_is_refused(store, tmp_path):
    path = image(tmp_path, "raw")

    def meddle(done: int, total: int) -> None:
        with path.open("r+b") as file:
            file.write(b"x")
        os.utime(path, ns=(1, done))

    with pytest.raises(ImageRefused):
        publish_disk(store, path, KEY, meddle)
    store.close()
    with Store(store.root, min_free=0) as again:
        assert again.held() == []
        assert set(everything(store.root)) == {str(store.root / "lock")}


def test_a_container_full_of_what_the_guest_does_not_see_is_refused(store, tmp_path, monkeypatch):
    """Said before anything is pressed, with what to do; and nothing of it stays."""
    path = image(tmp_path, "raw")
    stale = [Guest(0, len(PLAIN)), *[Literal(bytes([n]) * LITERAL_MAX) for n in range(9)]]
    monkeypatch.setattr(type(open_image(path)), "segments", lambda image: iter(stale))
    monkeypatch.setattr(objects_module, "RECIPE_PAGES", 2)
    monkeypatch.setattr(publish, "press", None)
    with pytest.raises(ImageRefused, match="qemu-img convert -O raw"):
        publish_disk(store, path, KEY)
    assert set(everything(store.root)) == {str(store.root / "lock")}


def test_a_disk_tells_of_every_chunk_it_writes(store, tmp_path):
    """A raw disk is one segment, and a person waits for it."""
    put = publish_disk(store, image(tmp_path, "raw"), KEY)
    steps = []
    restore_disk(store, put.datum, tmp_path / "back", progress=lambda *step: steps.append(step))
    size = len(PLAIN)
    assert steps == sorted(steps)
    assert {total for _, total in steps} == {size}
    assert {n * CHUNK_SIZE for n in range(1, 9)} - {6 * CHUNK_SIZE} <= {done for done, _ in steps}
    assert steps[-1] == (size, size)


def test_a_disk_over_the_quota_is_refused(tmp_path):
    path = image(tmp_path, "raw")
    with Store(tmp_path / "store", quota=10_000, min_free=0) as store:
        with pytest.raises(NoSpace):
            publish_disk(store, path, KEY)
        assert store.used() == objects(store) < 1000
        assert not list((store.root / "packs").iterdir())


def test_a_full_disk_is_absent(store, tmp_path):
    """The kernel refuses what is longer than the limit, in the middle of a put and of a get."""
    path = image(tmp_path, "raw")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(NoSpace):
            publish_disk(store, path, KEY)
        assert set(everything(store.root)) == {str(store.root / "lock")}
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        put = publish_disk(store, path, KEY)
        resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK_SIZE, before[1]))
        for form in ("raw", "vdi"):
            with pytest.raises(NoSpace):
                restore_disk(store, put.datum, tmp_path / "back", form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk.raw", "store"]


def test_restoring_says_what_is_missing(store, tmp_path):
    put = publish_disk(store, image(tmp_path, "raw"), KEY)
    shelf = store.shelf(Disk.decode(store.get_object(put.datum)).pack)
    (store.root / "packs" / str(shelf.pack) / "frames").write_bytes(b"")
    with pytest.raises(ChunkCorrupt):
        restore_disk(store, put.datum, tmp_path / "back")
    with pytest.raises(NotFound):
        restore_disk(store, put.datum, tmp_path / "back")
    with pytest.raises(NotFound):
        restore_disk(store, Cid(0x71, bytes(32)), tmp_path / "back")
    with pytest.raises(Misused):
        restore_disk(store, put.datum, tmp_path / "back", "iso")
    with pytest.raises(NotFound):
        restore_disk(store, put.datum, tmp_path / "no folder" / "back", "raw")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("segments", [
    [Guest(0, len(PLAIN)), Zeros(1)], [Guest(0, len(PLAIN) - 1)], [Guest(1, len(PLAIN))],
    [Guest(1 << 44, 5), Zeros(len(PLAIN) - 5)], [Zeros(1 << 45)], [],
])  # fmt: skip
def test_a_recipe_that_does_not_fit_is_refused(segments, store, tmp_path):
    put = publish_disk(store, image(tmp_path, "raw"), KEY)
    about = Disk.decode(store.get_object(put.datum))
    page = store.put_object(encode_segments(segments))
    recipe = store.put_object(Recipe("raw", True, len(PLAIN), (page,)).encode())
    datum = store.put_object(signed(Disk(about.content, about.pack, recipe, b""), KEY).encode())
    store.begin(datum)
    with pytest.raises(BadObject):
        restore_disk(store, datum, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_the_file_is_as_sparse_as_it_can_be(store, tmp_path):
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.seek(64 << 20)
        file.write(chunk(1))
        file.truncate(128 << 20)
    put = publish_disk(store, path, KEY)
    restore_disk(store, put.datum, tmp_path / "back")
    assert (tmp_path / "back").stat().st_size == 128 << 20
    assert (tmp_path / "back").stat().st_blocks * 512 <= 2 * CHUNK_SIZE
    assert path.read_bytes() == (tmp_path / "back").read_bytes()


@given(st.lists(st.sampled_from([0, 0, 1, 2, 3, -1]), min_size=1, max_size=40), st.integers(1, CHUNK_SIZE))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_disk_comes_back_as_the_objects_say(tmp_path_factory, seeds, tail):
    """And its content is what a putter without threads, batches and files makes of it."""
    folder = tmp_path_factory.mktemp("disk")
    disk = small_disk(seeds, tail)
    path = folder / "disk.raw"
    path.write_bytes(disk.plain)
    with Store(folder / "store", min_free=0) as store:
        put = publish_disk(store, path, KEY)
        about = Disk.decode(store.get_object(put.datum))
        assert about.pack == disk.pack
        assert Pack.decode(store.get_object(disk.pack)).count == len(disk.frames)
        shelf = store.shelf(disk.pack)
        assert [shelf.get_frame(i) for i in range(len(disk.frames))] == list(disk.frames)
        cut = random.Random(tail).randrange(len(disk.plain))
        assert shelf.read(cut, len(disk.plain) - cut) == disk.plain[cut:]
        restore_disk(store, put.datum, folder / "back")
        assert (folder / "back").read_bytes() == disk.plain


def test_a_huge_sparse_disk_takes_little_memory(tmp_path):
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        for i in range(40):
            file.seek(i * (100 << 30) // 40)
            file.write(chunk(1 + i % 5) * 4)
        file.truncate(100 << 30)
    program = (
        "import sys; from pathlib import Path; from nacl.signing import SigningKey;"
        "from p2pgrid.dht.publish import publish_disk; from p2pgrid.dht.restore import restore_disk;"
        "from p2pgrid.dht.store import Store;"
        "store = Store(Path(sys.argv[1]) / 'store', min_free=0);"
        "put = publish_disk(store, Path(sys.argv[1]) / 'disk.raw', SigningKey(bytes(32)));"
        "restore_disk(store, put.datum, Path(sys.argv[1]) / 'back.raw');"
        "peak = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0];"
        "print(put.chunks, put.holes, peak)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chunks, holes, peak = map(int, done.stdout.split())
    assert chunks == 5  # chunk(seed) * 4 are four equal chunks
    assert holes > 400_000
    assert peak < 300 << 10, "KiB"  # not ru_maxrss: that begins with what our own process had
    assert (tmp_path / "back.raw").stat().st_size == 100 << 30
