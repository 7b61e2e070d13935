"""Does a delta stay whole on its parent, cost what it says, and convict nobody but its own signer?"""

from __future__ import annotations

import random
import threading

import attrs
import pytest
from nacl.signing import SigningKey

from p2pgrid.dht.delta import encode_delta
from p2pgrid.dht.frame import compress
from p2pgrid.dht.manifest import CHUNK_SIZE, Delta, Disk, File, Tree, signed
from p2pgrid.dht.store import Store
from p2pgrid.errors import BadObject, ChunkCorrupt, NoSpace, NotFound, Temporary, VerificationFailed
from p2pgrid.ids import object_cid
from tests.small_disks import KEY, changed, chunk, small_delta, small_disk

OTHER = SigningKey(bytes(32))
OLD = small_disk([1, 2, 0, 3, 1, 4], tail=1000)
CHUNKS = [changed(chunk(1), 1), chunk(3), chunk(0), changed(chunk(3), 2), chunk(1)]
NEW = small_delta(OLD, CHUNKS)
ABOUT = Delta.decode(NEW.pack_objects[-1])


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", min_free=0) as store:
        yield store


def put_missing(store, datum, *disks):
    """Put what `datum` needs of the objects of `disks`; how many that was."""
    objects = {object_cid(data): data for disk in disks for data in disk.objects}
    count = 0
    while missing := store.missing_objects(datum):
        for cid in missing:
            store.put_object(objects[cid])
        count += len(missing)
    return count


def fill(store, disk, *others):
    put_missing(store, disk.datum, disk, *others)
    shelf = store.begin(disk.datum)
    frames = {d.pack: d.frames for d in (disk, *others)}
    for part in shelf.parts:
        for index, frame in enumerate(frames.get(part.pack, ())):
            if frame and not part.holds(index):
                part.put_frame(index, frame)
    return shelf


def size(disk):
    return sum(map(len, disk.frames))


def test_who_has_the_parent_takes_what_is_new(store):
    fill(store, OLD)
    used = store.used()
    assert put_missing(store, NEW.datum, NEW) == len(NEW.objects)  # none of the parent's
    shelf = store.begin(NEW.datum)
    assert [len(f) > 0 for f in NEW.frames] == [True, False, True, False]
    assert shelf.have() == b"\x0a"
    assert [shelf.holds(i) for i in range(4)] == [False, True, False, True]
    assert not store.complete(NEW.datum)
    fill(store, NEW)
    assert store.complete(NEW.datum)
    assert store.used() == used + size(NEW) + sum(map(len, NEW.objects))
    assert size(NEW) < size(OLD)
    assert shelf.read(0, len(NEW.plain)) == NEW.plain
    assert shelf.read(CHUNK_SIZE - 5, 10) == NEW.plain[CHUNK_SIZE - 5 : CHUNK_SIZE + 5]


def test_who_has_nothing_takes_the_parents_pack_and_then_what_is_new(store):
    assert put_missing(store, NEW.datum, NEW, OLD) == len(NEW.objects) + len(OLD.pack_objects)
    shelf = store.begin(NEW.datum)
    assert [part.pack for part in shelf.parts] == [OLD.pack, NEW.pack]
    for index in (0, 2):
        shelf.put_frame(index, NEW.frames[index])
    assert shelf.count == 4
    assert not shelf.complete
    with pytest.raises(NotFound):
        shelf.read(0, 1)
    assert [(h.chunks, h.chunks_total, h.bytes) for h in store.held()] == [(2, 6, size(NEW))]
    fill(store, NEW, OLD)
    assert shelf.complete
    assert shelf.read(0, len(NEW.plain)) == NEW.plain
    assert [(h.chunks, h.chunks_total, h.bytes) for h in store.held()] == [(6, 6, size(NEW) + size(OLD))]


def test_what_a_delta_takes_is_neither_given_nor_taken(store):
    shelf = fill(store, NEW, OLD)
    for index in (1, 3):
        with pytest.raises(NotFound):
            shelf.get_frame(index)
        for frame in (b"", compress(chunk(3))):
            with pytest.raises(ChunkCorrupt):
                shelf.put_frame(index, frame)
    assert shelf.verify() == []
    assert shelf.complete


def test_the_parent_is_found_by_content_whoever_signed_it(store):
    same = small_disk([1, 2, 0, 3, 1, 4], tail=1000, key=OTHER)
    assert same.pack != OLD.pack
    fill(store, same)
    shelf = fill(store, NEW)
    assert shelf.parent.pack == same.pack
    assert shelf.read(0, len(NEW.plain)) == NEW.plain
    fill(store, OLD)  # it stays with what it began with
    store.close()
    with Store(store.root, min_free=0) as again:
        assert again.shelf(NEW.pack).parent.pack == same.pack
        again.drop(same.datum)
        assert again.missing_objects(NEW.datum) == []
        assert again.begin(NEW.datum).read(0, len(NEW.plain)) == NEW.plain
        again.drop(NEW.datum)
        assert again.shelf(same.pack) is None


def test_two_data_of_one_delta_share_its_parent(store):
    fill(store, OLD)
    twin = signed(attrs.evolve(Disk.decode(NEW.objects[-1]), recipe=Disk.decode(OLD.objects[-1]).recipe), KEY)
    fill(store, NEW)
    store.put_object(twin.encode())
    datum = object_cid(twin.encode())
    store.begin(datum)
    store.drop(OLD.datum)
    store.drop(NEW.datum)
    assert store.complete(datum)
    store.drop(datum)
    assert store.shelves() == []


@pytest.mark.parametrize("first", ["parent", "delta"])
def test_a_parent_stays_as_long_as_a_delta_needs_it(first, store):
    fill(store, OLD)
    shelf = fill(store, NEW)
    gone, left = (OLD, NEW) if first == "parent" else (NEW, OLD)
    store.drop(gone.datum)
    assert store.complete(left.datum)
    needed = {*left.objects, *OLD.pack_objects}
    assert store.used() == size(OLD) + sum(map(len, needed)) + (size(NEW) if left is NEW else 0)
    if left is NEW:
        assert shelf.read(0, len(NEW.plain)) == NEW.plain
    store.close()
    with Store(store.root, min_free=0) as again:
        assert again.complete(left.datum)
        assert again.begin(left.datum).read(0, len(left.plain)) == left.plain
        again.drop(left.datum)
        assert again.used() == 0
        assert not list((again.root / "packs").iterdir())
        assert not list((again.root / "objects").glob("*/*"))


def test_both_packs_count_and_nothing_is_left_where_they_do_not_fit(tmp_path):
    objects = sum(map(len, {*NEW.objects, *OLD.pack_objects}))
    whole = objects + size(OLD) + size(NEW)
    with Store(tmp_path / "s", quota=whole - 1, min_free=0) as store:
        put_missing(store, NEW.datum, NEW, OLD)
        with pytest.raises(NoSpace) as refusal:
            store.begin(NEW.datum)
        assert (refusal.value.wanted, refusal.value.free) == (size(NEW), size(NEW) - 1)
        assert store.used() == objects
        assert store.shelves() == []
        assert not list((store.root / "packs").iterdir())
    with Store(tmp_path / "s", quota=whole, min_free=0) as store:
        assert fill(store, NEW, OLD).complete
        assert store.used() == whole


@pytest.mark.parametrize("lie", ["another chunk", "no frame", "a bomb", "behind the end", "too short"])
def test_a_delta_that_lies_is_convicted_and_its_parent_is_not(lie, store):
    frames = list(NEW.frames)
    frames[2] = {
        "another chunk": encode_delta(chunk(9), [], b""),
        "no frame": b"rubbish",
        "a bomb": encode_delta(bytes(CHUNK_SIZE * 40), [], b""),
        "behind the end": b"\x01\0\x01\0\0\xff\0\0\x01" + compress(CHUNKS[3]),
        "too short": encode_delta(CHUNKS[3][:-1], [], b""),
    }[lie]
    liar = small_delta(OLD, CHUNKS, frames=frames)
    old = fill(store, OLD)
    shelf = fill(store, liar)
    assert shelf.complete
    assert shelf.read(0, CHUNK_SIZE) == CHUNKS[0]
    with pytest.raises(VerificationFailed, match=str(liar.pack)):
        shelf.read(3 * CHUNK_SIZE + 5, 1)
    store.close()
    with Store(store.root, min_free=0) as again:
        shelf = again.shelf(liar.pack)
        assert shelf.convicted
        assert not shelf.complete
        assert (shelf.count, shelf.have()) == (0, b"\0")
        assert not shelf.holds(1)
        for refused in (lambda: shelf.get_frame(0), lambda: shelf.read(CHUNK_SIZE, 1), shelf.verify):
            with pytest.raises(VerificationFailed):
                refused()
        assert again.complete(OLD.datum)
        assert not again.complete(liar.datum)
        assert again.begin(OLD.datum).read(0, len(OLD.plain)) == OLD.plain
        assert fill(again, NEW).read(0, len(NEW.plain)) == NEW.plain
        again.drop(liar.datum)
        assert old.layout.cid == again.shelf(OLD.pack).layout.cid


@pytest.mark.parametrize("position", [1, 3])
def test_a_chunk_of_the_parent_that_rots_convicts_nobody(position, store):
    """One is taken as it is, of the other a delta frame is made."""
    shelf = fill(store, NEW, OLD)
    index = 2
    path = store.root / "packs" / str(OLD.pack) / "frames"
    with path.open("r+b") as file:
        file.seek(shelf.parent.frames.offsets()[index] + 50)
        file.write(b"rot")
    with pytest.raises(ChunkCorrupt):
        shelf.read(position * CHUNK_SIZE, 1)
    assert not shelf.parent.holds(index)
    assert not shelf.complete
    assert not any(part.convicted for part in shelf.parts)
    with pytest.raises(NotFound):
        shelf.read(position * CHUNK_SIZE, 1)
    shelf.parent.put_frame(index, OLD.frames[index])
    assert shelf.complete
    assert shelf.read(0, len(NEW.plain)) == NEW.plain


def test_a_parent_whose_signer_lied_is_exchanged(store):
    frames = [*OLD.frames[:2], compress(chunk(8)), OLD.frames[3]]
    liar = small_disk([1, 2, 0, 3, 1, 4], tail=1000, key=OTHER, frames=frames)
    fill(store, liar)
    shelf = fill(store, NEW)
    assert shelf.parent.pack == liar.pack
    with pytest.raises(VerificationFailed, match=str(liar.pack)):
        shelf.read(CHUNK_SIZE, 1)
    assert not shelf.convicted
    assert not shelf.complete
    assert set(store.missing_objects(NEW.datum)) <= set(map(object_cid, OLD.pack_objects))
    assert fill(store, NEW, OLD) is shelf
    assert shelf.parent.pack == OLD.pack
    assert shelf.read(0, len(NEW.plain)) == NEW.plain
    store.drop(liar.datum)
    store.close()
    with Store(store.root, min_free=0) as again:
        assert again.complete(NEW.datum)
        assert [part.pack for part in again.begin(NEW.datum).parts] == [OLD.pack, NEW.pack]
        again.drop(NEW.datum)
        assert again.used() == 0


@pytest.mark.parametrize("lost", ["the file", "what it says", "the parent's folder"])
def test_a_parent_that_is_lost_is_begun_again(lost, store):
    fill(store, NEW, OLD)
    store.close()
    file = store.root / "packs" / str(NEW.pack) / "parent"
    if lost == "the file":
        file.unlink()
    elif lost == "what it says":
        file.write_bytes(b"\xff rot")
    else:
        (store.root / "packs" / str(OLD.pack)).rename(store.root / "elsewhere")
    with Store(store.root, min_free=0) as again:
        assert again.shelf(NEW.pack) is None
        assert again.held() == []
        assert not again.complete(NEW.datum)
        shelf = fill(again, NEW, OLD)
        assert shelf.read(0, len(NEW.plain)) == NEW.plain


def refused(**about):
    return small_delta(OLD, CHUNKS, about=attrs.evolve(ABOUT, **about))


def test_objects_that_are_no_delta_of_their_parent_are_refused(store):
    strange = small_disk([7, 8])
    nested = small_delta(NEW, [chunk(3), changed(chunk(2), 5)])
    lacking = small_delta(OLD, CHUNKS, frames=[b"", *NEW.frames[1:]])
    everything = (OLD, NEW, strange, nested)
    for wrong in (
        nested,
        lacking,
        refused(base=strange.pack),
        refused(base=NEW.pack),
        refused(base=OLD.datum),
        refused(parent=Disk.decode(strange.objects[-1]).content),
        refused(parent=OLD.pack),
    ):
        with pytest.raises(BadObject):
            fill(store, wrong, *everything)
        assert store.held() == []
        assert store.shelves() == []


def test_a_tree_in_a_delta_is_refused(store):
    put_missing(store, NEW.datum, NEW, OLD)
    about = Disk.decode(NEW.objects[-1])
    tree = Tree((File("a", len(NEW.plain), False),), about.content, about.pack, b"")
    datum = store.put_object(signed(tree, KEY).encode())
    with pytest.raises(BadObject, match="tree"):
        store.missing_objects(datum)


def test_a_delta_of_more_frames_than_its_content_has_chunks_is_refused(store):
    delta = signed(attrs.evolve(ABOUT, count=6), KEY)
    about = attrs.evolve(Disk.decode(NEW.objects[-1]), pack=store.put_object(delta.encode()))
    datum = store.put_object(signed(about, KEY).encode())
    store.put_object(NEW.objects[0])
    store.put_object(NEW.objects[1])
    with pytest.raises(BadObject, match="more frames"):
        store.missing_objects(datum)


def test_what_is_adopted_stands_on_a_parent_that_is_whole(store):
    put_missing(store, NEW.datum, NEW, OLD)
    with store.staging() as staged:
        (staged / "frames").write_bytes(b"".join(NEW.frames))
        with pytest.raises(Temporary):
            store.adopt(NEW.datum, staged)
        fill(store, OLD)
        shelf = store.adopt(NEW.datum, staged)
        assert shelf.complete
        assert shelf.verify() == []
        assert shelf.read(0, len(NEW.plain)) == NEW.plain
    with store.staging() as staged:  # and once more, where a part of it was fetched before
        shelf._forget(0)
        (staged / "frames").write_bytes(b"".join(NEW.frames))
        assert store.adopt(NEW.datum, staged) is shelf
        assert shelf.complete


def test_many_read_both_at_once(store, monkeypatch):
    """Nobody waits for another, whichever way round the two are read."""
    monkeypatch.setattr("p2pgrid.dht.shelf.CACHE_CHUNKS", 1)
    shelf, failures = fill(store, NEW, OLD), []

    def read(seed):
        chance = random.Random(seed)
        try:
            for _ in range(40):
                part, disk = chance.choice([(shelf, NEW), (shelf.parent, OLD)])
                at = chance.randrange(len(disk.plain) - 9)
                assert part.read(at, 9) == disk.plain[at : at + 9]
        except BaseException as failure:
            failures.append(failure)
            raise

    threads = [threading.Thread(target=read, args=(seed,), daemon=True) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures
