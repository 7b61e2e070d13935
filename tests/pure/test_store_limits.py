"""Does the store keep to its limits, to its owner, and to what a pack may claim?"""

from __future__ import annotations

import os
import random
import resource
import threading
from unittest import mock

import attrs
import pytest
from nacl.signing import SigningKey

from p2pgrid.dht import marks
from p2pgrid.dht.dagcbor import encode
from p2pgrid.dht.frame import compress
from p2pgrid.dht.manifest import CHUNK_SIZE, PAGE_SPAN, Content, Disk, Pack, Recipe, Tree, signed
from p2pgrid.dht.objects import PATIENCE, RECIPE_PAGES
from p2pgrid.dht.store import Store
from p2pgrid.errors import BadObject, ChunkCorrupt, Misconfigured, NoSpace, NotFound, VerificationFailed
from p2pgrid.ids import object_cid
from tests.small_disks import KEY, chunk, small_disk

SMALL = small_disk([1, 2, 0, 3, 1, 4], tail=1000)
WIDE = small_disk([-1 - i for i in range(16)])  # 4 MiB of frames


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", min_free=0) as store:
        yield store


def fill(store, disk):
    disk.put_objects(store)
    shelf = store.begin(disk.datum)
    for index, frame in enumerate(disk.frames):
        shelf.put_frame(index, frame)
    return shelf


def test_one_process_at_a_time(tmp_path):
    with Store(tmp_path / "s"), pytest.raises(Misconfigured):
        Store(tmp_path / "s")
    Store(tmp_path / "s").close()


def test_a_pack_counts_in_full_from_the_beginning(tmp_path):
    small, wide = sum(map(len, SMALL.frames)), sum(map(len, WIDE.frames))
    objects = sum(map(len, {*SMALL.objects, *WIDE.objects}))
    with Store(tmp_path / "s", quota=wide + small + objects - 1, min_free=0) as store:
        for disk in (WIDE, SMALL):
            disk.put_objects(store)
        store.begin(WIDE.datum)
        assert store.used() == wide + objects
        with pytest.raises(NoSpace) as refusal:
            store.begin(SMALL.datum)
        assert (refusal.value.wanted, refusal.value.free) == (small, small - 1)
        assert [held.datum for held in store.held()] == [WIDE.datum]
        store.drop(WIDE.datum)
        assert store.used() == sum(map(len, SMALL.objects))  # young
        fill(store, SMALL)


def test_the_file_system_keeps_some_room_and_what_was_promised(tmp_path):
    small, wide = sum(map(len, SMALL.frames)), sum(map(len, WIDE.frames))
    with Store(tmp_path / "s", min_free=1 << 20) as store:
        for disk in (WIDE, SMALL):
            disk.put_objects(store)
        with mock.patch("p2pgrid.dht.room.free", return_value=(1 << 20) + wide):
            store.begin(WIDE.datum)
            with pytest.raises(NoSpace) as refusal:
                store.begin(SMALL.datum)
        assert (refusal.value.wanted, refusal.value.free) == (small, 0)


def test_objects_take_room_like_frames(tmp_path):
    """A recipe may list what it likes: what is fetched of it counts, before anything is begun."""
    with Store(tmp_path / "s", quota=5000, min_free=0) as store:
        for n in range(5):
            store.put_object(encode({"n": n, "data": bytes(900)}))
            store.put_object(encode({"n": n, "data": bytes(900)}))  # counted once
        used = store.used()
        assert used == sum(p.stat().st_size for p in (store.root / "objects").glob("*/*"))
        with pytest.raises(NoSpace) as refusal:
            store.put_object(encode({"n": 5, "data": bytes(900)}))
        assert refusal.value.free == 5000 - used
        assert store.used() == used
        with pytest.raises(NoSpace):
            store.check_room(5000 - used + 1)
    with Store(tmp_path / "s", quota=5000, min_free=0) as store:
        assert store.used() == 0  # nobody needs them
    with (
        mock.patch("p2pgrid.dht.room.free", return_value=1 << 20),
        Store(tmp_path / "s", min_free=1 << 20) as store,
        pytest.raises(NoSpace),
    ):
        store.put_object(SMALL.objects[0])


def test_objects_of_a_fetch_that_was_given_up_make_way(tmp_path):
    small, objects = sum(map(len, SMALL.frames)), sum(map(len, SMALL.objects))
    with Store(tmp_path / "s", quota=small + objects + 100, min_free=0) as store:
        left = store.put_object(WIDE.objects[-1])
        assert store.missing_objects(left) != []
        with pytest.raises(NoSpace):
            fill(store, SMALL)
        store._objects._young[left] -= PATIENCE  # nobody has asked for it since
        assert fill(store, SMALL).complete
        assert not store.has_object(left)
        assert store.used() == small + objects
        store.drop(SMALL.datum)
        left = store.put_object(WIDE.objects[-1])
        store.abandon(left)
        fill(store, SMALL)
        assert not store.has_object(left)
        assert store.missing_objects(SMALL.datum) == []


def test_a_datum_lists_no_more_than_its_size_justifies(store):
    def datum(size, pages, frames=1):
        content = store.put_object(Content(size, CHUNK_SIZE, (None,) * (-(-size >> 31) or 1)).encode())
        lists = (content,) * -(-frames // PAGE_SPAN)
        pack = store.put_object(signed(Pack(content, frames, lists, b""), KEY).encode())
        recipe = store.put_object(Recipe("qcow2", True, 1 << 40, (content,) * pages).encode())
        return store.put_object(signed(Disk(content, pack, recipe, b""), KEY).encode())

    assert store.missing_objects(datum(CHUNK_SIZE, RECIPE_PAGES)) == []
    with pytest.raises(BadObject, match="4096 are allowed"):
        store.missing_objects(datum(CHUNK_SIZE, RECIPE_PAGES + 1))
    assert store.missing_objects(datum(1 << 31, RECIPE_PAGES + 64)) == []
    with pytest.raises(BadObject, match="4160 are allowed"):
        store.missing_objects(datum(1 << 31, RECIPE_PAGES + 65))
    with pytest.raises(BadObject, match="more frames"):
        store.missing_objects(datum(CHUNK_SIZE, 0, frames=2))


def test_a_drop_looks_at_nothing_but_its_own(store, monkeypatch):
    disks = [SMALL, WIDE, *[small_disk([n]) for n in range(20, 26)]]
    for disk in disks:
        fill(store, disk)
    read = []
    get = store._objects.get
    monkeypatch.setattr(store._objects, "get", lambda cid: read.append(cid) or get(cid))
    assert store.complete(SMALL.datum)
    store.drop(SMALL.datum)
    assert not store.complete(SMALL.datum)
    assert read == []
    assert {h.datum for h in store.held()} == {disk.datum for disk in disks[1:]}


def test_a_full_disk_is_no_corruption(store):
    """The kernel cuts a write in the middle; what was not written is not claimed."""
    WIDE.put_objects(store)
    shelf = store.begin(WIDE.datum)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = 5 * len(WIDE.frames[0]) + 1000
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        for index, frame in enumerate(WIDE.frames):
            if index < 5:
                shelf.put_frame(index, frame)
            else:
                with pytest.raises(NoSpace) as refusal:
                    shelf.put_frame(index, frame)
                assert refusal.value.where == str(store.root / "packs" / str(WIDE.pack))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert shelf.count == 5
    assert shelf.verify() == []
    fill(store, WIDE)
    assert shelf.read(0, len(WIDE.plain)) == WIDE.plain


def test_frames_come_from_many_threads_at_once(store):
    WIDE.put_objects(store)
    shelf = store.begin(WIDE.datum)
    failures: list[BaseException] = []

    def put(seed):
        order = list(range(16)) * 3
        random.Random(seed).shuffle(order)
        try:
            for index in order:
                shelf.put_frame(index, WIDE.frames[index])
                assert shelf.get_frame(index) == WIDE.frames[index]
                assert shelf.read(index * CHUNK_SIZE, 9) == WIDE.plain[index * CHUNK_SIZE :][:9]
                if index == seed:
                    shelf.flush()
        except BaseException as failure:
            failures.append(failure)
            raise

    threads = [threading.Thread(target=put, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert shelf.complete
    assert shelf.count == 16
    assert shelf.have() == b"\xff\xff"


@pytest.mark.parametrize("lie", ["another chunk", "no frame", "a bomb", "too short"])
def test_a_pack_that_lies_is_convicted(lie, store, tmp_path):
    """The frame is what the pack says: peers are innocent, the signer is not."""
    frames = list(SMALL.frames)
    frames[1] = {
        "another chunk": compress(chunk(9)),
        "no frame": b"rubbish",
        "a bomb": compress(bytes(CHUNK_SIZE * 40)),
        "too short": compress(chunk(2)[:-1]),
    }[lie]
    liar = small_disk([1, 2, 0, 3, 1, 4], tail=1000, frames=frames)
    shelf = fill(store, liar)
    assert shelf.complete
    assert shelf.read(0, CHUNK_SIZE) == chunk(1)
    with pytest.raises(VerificationFailed):
        shelf.read(CHUNK_SIZE + 5, 1)
    store.close()
    with Store(store.root, min_free=0) as again:
        shelf = again.shelf(liar.pack)
        assert shelf.convicted
        assert not shelf.complete
        assert shelf.have() == b"\0"
        assert [held.chunks for held in again.held()] == [0]
        for refused in (
            lambda: shelf.put_frame(0, frames[0]),
            lambda: shelf.get_frame(0),
            lambda: shelf.read(0, 1),
            shelf.verify,
        ):
            with pytest.raises(VerificationFailed):
                refused()
        again.drop(liar.datum)
        assert again.used() == 0


def test_the_last_chunk_may_not_stand_for_a_whole_one(store):
    """A short chunk's name at a whole position decodes and hashes well, and is a lie."""
    honest = small_disk([1, 2], tail=1000)
    shelf = fill(store, honest)
    shelf.layout.names._indices[0] = 1
    with pytest.raises(VerificationFailed):
        shelf.read(0, 10)


def test_an_index_outside_of_the_pack_is_refused(store):
    shelf = fill(store, SMALL)
    for index in (-1, 4, 1 << 40):
        with pytest.raises(ChunkCorrupt):
            shelf.put_frame(index, SMALL.frames[0])
        with pytest.raises(NotFound):
            shelf.get_frame(index)


def test_a_rotten_object_is_fetched_again(store):
    shelf = fill(store, SMALL)
    path = next((store.root / "objects").glob(f"*/{SMALL.datum}"))
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(NotFound):
        store.get_object(SMALL.datum)
    assert store.missing_objects(SMALL.datum) == [SMALL.datum]
    assert store.held() == []
    store.close()
    with Store(store.root, min_free=0) as again:
        SMALL.put_objects(again)
        assert again.begin(SMALL.datum).complete
    assert shelf.layout.cid == again.held()[0].content


def test_missing_objects_are_named_level_by_level(store):
    rest = {object_cid(data): data for data in SMALL.objects}
    asked = []
    while missing := store.missing_objects(SMALL.datum):
        with pytest.raises(NotFound):
            store.begin(SMALL.datum)
        asked.append(len(missing))
        for cid in missing:
            store.put_object(rest.pop(cid))
    assert asked == [1, 3, 3]
    assert rest == {}


def test_objects_on_their_way_survive_a_drop(store):
    """Another datum that shares them is being fetched while this one is dropped."""
    sibling = small_disk([1, 2, 0, 3, 1, 4], tail=1000, exact=False)
    fill(store, SMALL)
    store.put_object(sibling.objects[-1])
    missing = store.missing_objects(sibling.datum)
    store.drop(SMALL.datum)
    for data in sibling.objects:
        if object_cid(data) in missing:
            store.put_object(data)
    store.begin(sibling.datum)


def test_what_was_begun_and_dropped_is_not_found(store):
    shelf = fill(store, SMALL)
    store.drop(SMALL.datum)
    with pytest.raises(NotFound):
        shelf.get_frame(0)
    with pytest.raises(NotFound):
        shelf.read(0, 1)
    store.flush()


def test_frames_that_are_here_are_never_fetched(store):
    first = fill(store, small_disk([1, 2, 3, 5]))
    assert first.local_bytes == 0
    other = small_disk([5, 3, 7, 2], key=SigningKey(bytes(32)))
    other.put_objects(store)
    shelf = store.begin(other.datum)
    assert [shelf.holds(i) for i in range(4)] == [True, True, False, True]
    assert shelf.local_bytes == sum(len(other.frames[i]) for i in (0, 1, 3))


def test_objects_that_do_not_fit_together_are_refused(store):
    other = small_disk([7])
    for disk in (SMALL, other):
        disk.put_objects(store)
    about = Disk.decode(SMALL.objects[-1])
    strange = Disk.decode(other.objects[-1])
    for wrong in (
        attrs.evolve(about, pack=strange.pack),
        attrs.evolve(about, content=strange.content),
        attrs.evolve(about, pack=about.recipe),
        attrs.evolve(about, recipe=about.pack),
        attrs.evolve(about, pack=SMALL.datum),
    ):
        datum = store.put_object(signed(wrong, KEY).encode())
        with pytest.raises(BadObject):
            store.begin(datum)
    assert store.held() == []


def test_a_tree_of_nothing_is_complete_at_once(store):
    datum = store.put_object(signed(Tree((), None, None, b""), KEY).encode())
    assert store.missing_objects(datum) == []
    shelf = store.begin(datum)
    assert shelf.complete
    assert shelf.have() == b""
    held = store.held()[0]
    assert (held.datum, held.content, held.pack, held.chunks_total) == (datum, held.content, datum, 0)
    store.close()
    with Store(store.root, min_free=0) as again:
        assert again.shelf(datum).complete
        again.drop(datum)
        assert not list((again.root / "packs").iterdir())


def test_a_restart_hashes_nothing_and_another_kernel_only_what_is_in_doubt(store):
    WIDE.put_objects(store)
    shelf = store.begin(WIDE.datum)
    for index in range(10):
        shelf.put_frame(index, WIDE.frames[index])
        if index == 6:
            shelf.flush()
    os.close(store._lock_fd)
    checked = []
    sound = type(shelf)._sound

    def counted(self, index):
        checked.append(index)
        return sound(self, index)

    with mock.patch.object(type(shelf), "_sound", counted):
        with Store(store.root, min_free=0) as again:
            assert again.shelf(WIDE.pack).count == 10
            assert checked == []
            os.close(again._lock_fd)  # close() would sync
            again._lock_fd = -1
        with (
            mock.patch.object(marks, "boot_id", return_value="another"),
            Store(store.root, min_free=0) as again,
        ):
            assert again.shelf(WIDE.pack).count == 10
            assert checked == [7, 8, 9]
    store._lock_fd = -1
