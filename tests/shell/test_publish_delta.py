"""Does a new version of a disk cost what is new, in place or laid out afresh, from put to get?"""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import attrs
import pytest
import trio
from nacl.signing import SigningKey

from p2pgrid.dht.manifest import Delta, Disk, decode_pack
from p2pgrid.dht.publish import Published, publish_disk
from p2pgrid.dht.restore import restore_disk
from p2pgrid.dht.store import Store
from p2pgrid.errors import NotFound
from p2pgrid.ids import DAG_CBOR, Cid
from tests.shell.test_exchange import know, open_nodes
from tests.small_disks import KEY

OTHER = SigningKey(bytes(32))
FILES, FILE = 20, 300_000


@attrs.frozen
class Versions:
    """A file system, the same with two files changed, and what that one holds laid out afresh."""

    old: Path
    new: Path
    afresh: Path


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def laid_out(tree: Path, image: Path) -> Path:
    """`tree` as an ext4 of 48 MiB."""
    image.write_bytes(b"")
    with image.open("r+b") as file:
        file.truncate(48 << 20)
    run("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-m", "0", "-d", tree, image)
    return image


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Versions:
    folder, chance = tmp_path_factory.mktemp("versions"), random.Random(1)
    tree = folder / "tree"
    tree.mkdir()
    for nth in range(FILES):
        (tree / f"file{nth:02}").write_bytes(chance.randbytes(FILE + 4099 * nth))
    old = laid_out(tree, folder / "old.raw")
    new = folder / "new.raw"
    new.write_bytes(old.read_bytes())
    for nth in (5, 15):  # rebuilt: a few bytes differ, all behind them has moved a little
        file = tree / f"file{nth:02}"
        bytes_ = file.read_bytes()
        file.write_bytes(bytes_[:90_000] + chance.randbytes(50) + bytes_[90_000:])
        run("debugfs", "-w", "-R", f"rm {file.name}", new)
        run("debugfs", "-w", "-R", f"write {file} {file.name}", new)
    (tree / "another").write_bytes(chance.randbytes(70_000))
    run("debugfs", "-w", "-R", f"write {tree / 'another'} another", new)
    (tree / "file00").rename(tree / "zzz")
    return Versions(old, new, laid_out(tree, folder / "afresh.raw"))


@pytest.fixture
def store(tmp_path: Path):
    with Store(tmp_path / "store", min_free=0) as store:
        yield store


def is_same(store: Store, put: Published, image: Path, folder: Path) -> bool:
    out = folder / "out.raw"
    assert restore_disk(store, put.datum, out).exact
    return out.read_bytes() == image.read_bytes()


@pytest.mark.parametrize("which", ["new", "afresh"])
def test_a_new_version_is_told_by_the_old_one(which: str, versions: Versions, store: Store, tmp_path: Path):
    image = getattr(versions, which)
    old = publish_disk(store, versions.old, KEY)
    assert old.parent is None
    assert old.delta_bytes == 0
    assert old.wire_bytes > FILES * FILE
    used = store.used()
    put = publish_disk(store, image, KEY)
    assert put.parent == old.content
    assert put.delta_bytes < 200_000  # 70,000 are new
    assert put.wire_bytes == old.wire_bytes + put.delta_bytes
    assert store.used() - used < 600_000  # and its objects, and what finds the likeness
    assert is_same(store, put, image, tmp_path)
    assert publish_disk(store, image, KEY).datum == put.datum
    assert publish_disk(store, versions.old, KEY).datum == old.datum
    store.drop(old.datum)
    assert publish_disk(store, image, KEY).datum == put.datum
    assert is_same(store, put, image, tmp_path)
    store.drop(put.datum)
    assert not list((store.root / "packs").iterdir())
    store.close()
    with Store(store.root, min_free=0) as again:
        assert again.used() == 0


def test_the_same_bytes_give_the_same_delta_in_another_store(
    versions: Versions, store: Store, tmp_path: Path
):
    with Store(tmp_path / "other", min_free=0) as other:
        data = set()
        for here in (store, other):
            publish_disk(here, versions.old, KEY)
            data.add(publish_disk(here, versions.new, KEY).datum)
        assert len(data) == 1


def test_likeness_counts_and_outlives_the_store(versions: Versions, store: Store, monkeypatch):
    publish_disk(store, versions.old, KEY)
    publish_disk(store, versions.new, KEY)
    used = store.used()
    store.close()
    with Store(store.root, min_free=0) as again:
        assert again.used() == used
        monkeypatch.setattr("p2pgrid.dht.likeness.Likeness.of", None)  # it is not made again
        assert publish_disk(again, versions.afresh, KEY).parent is not None
        files = [p for p in again.root.rglob("*") if p.is_file() and p.parent.name != "datums"]
        marks = ("have", "durable", "boot", "parent", "lock")
        assert again.used() == sum(p.stat().st_size for p in files if p.name not in marks)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_parent_that_rots_is_left_out(when: str, versions: Versions, store: Store, tmp_path: Path):
    old = publish_disk(store, versions.old, KEY)
    if when == "meanwhile":  # its likeness is known, so nobody looks at it before it is read
        store.drop(publish_disk(store, versions.new, KEY).datum)
    (pack,) = (store.root / "packs").iterdir()
    with (pack / "frames").open("r+b") as file:
        for at in range(0, old.wire_bytes - 10, 100_000):
            file.seek(at)
            file.write(b"rot!")
    store.shelves()[0]._plain.clear()
    put = publish_disk(store, versions.afresh, KEY)
    assert put.parent is None
    assert is_same(store, put, versions.afresh, tmp_path)


def test_a_parent_of_another_signer_will_do(versions: Versions, store: Store, tmp_path: Path):
    theirs = publish_disk(store, versions.old, OTHER)
    put = publish_disk(store, versions.new, KEY)
    assert put.parent == theirs.content
    assert is_same(store, put, versions.new, tmp_path)
    mine = publish_disk(store, versions.old, KEY)  # nothing is new; but his pack is not signed as ours
    assert mine.parent is None
    assert mine.content == theirs.content
    assert mine.datum != theirs.datum


def test_whoever_asks_for_a_full_pack_gets_one(versions: Versions, store: Store, tmp_path: Path):
    publish_disk(store, versions.old, KEY)
    put = publish_disk(store, versions.new, KEY, parent=None)
    assert put.parent is None
    assert put.wire_bytes > FILES * FILE
    assert is_same(store, put, versions.new, tmp_path)
    assert publish_disk(store, versions.new, KEY).datum == put.datum  # it is here in full


def test_a_parent_that_is_asked_for_is_here_and_helps_or_is_left_out(
    versions: Versions, store: Store, tmp_path: Path
):
    with pytest.raises(NotFound):
        publish_disk(store, versions.new, KEY, parent=Cid(DAG_CBOR, bytes(32)))
    old = publish_disk(store, versions.old, KEY)
    assert old.content is not None
    put = publish_disk(store, versions.new, KEY, parent=old.content)
    pack = decode_pack(store.get_object(Disk.decode(store.get_object(put.datum)).pack))
    assert isinstance(pack, Delta)
    assert (pack.parent, pack.content) == (old.content, put.content)
    noise = tmp_path / "noise.raw"
    noise.write_bytes(random.Random(2).randbytes(12 << 20))
    for parent in ({"parent": old.content}, {}):
        strange = publish_disk(store, noise, KEY, **parent)
        assert strange.parent is None
        assert strange.delta_bytes == 0
        assert is_same(store, strange, noise, tmp_path)


async def test_workers_that_have_the_old_one_fetch_what_is_new(versions: Versions, tmp_path: Path):
    async with open_nodes(tmp_path, "putter", "a", "b") as (putter, *workers):
        old = publish_disk(putter.store, versions.old, KEY)
        for worker in workers:
            await worker.exchange.fetch(old.datum, know(worker, putter))
        served = sum(putter.exchange.served.values())
        for image in (versions.new, versions.afresh):
            put = publish_disk(putter.store, image, KEY)
            fetched = []

            async def fetch(worker, datum=put.datum, fetched=fetched):
                fetched.append(await worker.exchange.fetch(datum, [putter.me]))

            async with trio.open_nursery() as nursery:
                for worker in workers:
                    nursery.start_soon(fetch, worker)
            assert [sum(f.bytes_by_peer.values()) for f in fetched] == [put.delta_bytes] * 2
            for worker in workers:
                assert is_same(worker.store, put, image, tmp_path)
        assert sum(putter.exchange.served.values()) - served < 800_000
