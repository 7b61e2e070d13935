"""Do drafts only ever go on, and is what came by them a pack's, whole or not at all?"""

from __future__ import annotations

import os
import random
import secrets
from array import array
from pathlib import Path
from unittest import mock

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from p2pgrid.dht import shelf as shelf_module
from p2pgrid.dht.draft import LISTS_MAX, MOST_MAX, Draft, going_on, read_list
from p2pgrid.dht.drafting import PERIOD, STEP, Drafting
from p2pgrid.dht.manifest import encode_frames, signed
from p2pgrid.dht.store import Store
from p2pgrid.errors import BadObject, ChunkCorrupt, NoSpace, NotFound, VerificationFailed
from p2pgrid.ids import Cid, digest, object_cid
from tests.power_cut import Power
from tests.small_disks import KEY, SmallDisk, small_disk

OTHER = SigningKey(bytes(32))
DISK = small_disk([*range(1, 30), 5, 0, *range(-40, -30)], tail=1000)
COUNT = len(DISK.frames)


@attrs.frozen
class Told:
    """A draft, and what it adds."""

    draft: Draft
    data: bytes
    lists: dict[Cid, bytes]

    @property
    def name(self) -> Cid:
        return object_cid(self.data)


def first(most: int = COUNT, key: SigningKey = KEY, nonce: bytes = bytes(32)) -> Told:
    draft = signed(Draft(None, nonce, most, 0, (), b""), key)
    return Told(draft, draft.encode(), {})


def more(series: Cid, before: Draft, frames: list[bytes], key: SigningKey = KEY) -> Told:
    """The draft after `before`, which tells `frames`, too."""
    listed = encode_frames([len(f) for f in frames], [digest(f) for f in frames])
    lists = (*before.lists, object_cid(listed))
    draft = signed(Draft(series, b"", before.most, before.count + len(frames), lists, b""), key)
    return Told(draft, draft.encode(), {object_cid(listed): listed})


def chain(sizes: list[int], frames: tuple[bytes, ...] = DISK.frames) -> list[Told]:
    """A first draft, and one for each of `sizes`."""
    told = [first()]
    at = 0
    for size in sizes:
        told.append(more(told[0].name, told[-1].draft, list(frames[at : at + size])))
        at += size
    return told


some_sizes = st.lists(st.integers(1, 12), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) <= COUNT)


# --- what goes on ------------------------------------------------------------------------


@given(some_sizes, st.data())
def test_any_later_draft_goes_on_from_any_earlier_one_and_none_the_other_way(sizes, data):
    told = chain(sizes)
    series = told[0].name
    one = data.draw(st.integers(0, len(told) - 1))
    two = data.draw(st.integers(1, len(told) - 1))
    found = going_on(series, told[one].draft, told[two].data)
    assert found == (told[two].draft if two > one else None)


@given(some_sizes, some_sizes, st.integers(0, 5), st.data())
def test_a_signer_s_two_stories_are_told_apart_from_either_side(sizes, others, shared, data):
    shared = min(shared, len(sizes) - 1)
    told, series = chain(sizes), first().name
    fork = told[: shared + 1]
    for size in others:
        frames = [secrets.token_bytes(10) for _ in range(min(size, COUNT - fork[-1].draft.count))]
        if frames:
            fork.append(more(series, fork[-1].draft, frames))
    if len(fork) == shared + 1:
        return
    mine = data.draw(st.sampled_from(told[shared + 1 :]))
    theirs = data.draw(st.sampled_from(fork[shared + 1 :]))
    for held, came in ((mine, theirs), (theirs, mine)):
        with pytest.raises(VerificationFailed):
            going_on(series, held.draft, came.data)


def test_drafts_of_others_are_not_ours():
    told = chain([3, 4])
    series, held = told[0].name, told[1].draft
    stranger = signed(attrs.evolve(told[2].draft, signature=b""), OTHER)
    wider = signed(attrs.evolve(told[2].draft, most=COUNT + 1, signature=b""), KEY)
    elsewhere = signed(attrs.evolve(told[2].draft, first=object_cid(b"x"), signature=b""), KEY)
    for draft in (stranger, wider, elsewhere, told[0].draft):
        with pytest.raises(BadObject):
            going_on(series, held, draft.encode())
    miscounted = signed(attrs.evolve(told[1].draft, count=4, signature=b""), KEY)
    with pytest.raises(VerificationFailed):
        going_on(series, held, miscounted.encode())


@pytest.mark.parametrize(
    "wrong",
    [
        {"nonce": b""},
        {"nonce": bytes(31)},
        {"most": MOST_MAX + 1},
        {"most": -1},
        {"count": 1},
        {"lists": (object_cid(b"list"),)},
        {"first": object_cid(b"first")},
        {"first": object_cid(b"first"), "nonce": b"", "count": COUNT + 1, "lists": (object_cid(b"list"),)},
        {"first": object_cid(b"first"), "nonce": b"", "count": 1, "lists": (object_cid(b"list"),) * 2},
        {"first": object_cid(b"first"), "nonce": b"", "most": MOST_MAX, "count": MOST_MAX,
         "lists": (object_cid(b"list"),) * (LISTS_MAX + 1)},
    ],
)  # fmt: skip
def test_what_no_draft_says_is_refused(wrong):
    Draft.decode(first().data)
    with pytest.raises(BadObject):
        Draft.decode(signed(attrs.evolve(first().draft, **wrong, signature=b""), KEY).encode())


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_flipped_byte_is_no_draft(at, flip):
    data = bytearray(chain([3])[1].data)
    data[at % len(data)] ^= flip
    with pytest.raises(BadObject):
        Draft.decode(bytes(data))


@given(st.binary(max_size=200))
def test_noise_is_no_list(noise):
    with pytest.raises(BadObject):
        read_list(noise)


def test_a_list_has_a_length_and_a_digest_for_each_frame():
    lengths, digests = read_list(encode_frames([1, 2], [bytes(32), b"\1" * 32]))
    assert (lengths, digests) == (array("I", [1, 2]), bytes(32) + b"\1" * 32)
    with pytest.raises(BadObject):
        read_list(encode_frames([0, 2], [b"", bytes(32)]))


# --- the putter's side -------------------------------------------------------------------


def test_a_putter_tells_seldom_and_whoever_reads_its_drafts_knows_all_frames(tmp_path):
    frames = [random.Random(i).randbytes(STEP // 10) for i in range(100)]
    now, told = 0.0, []
    with Store(tmp_path / "store", min_free=0) as store, store.staging() as folder:
        drafting = Drafting(store, KEY, 1000, told.append, lambda: now)
        (folder / "frames").write_bytes(b"".join(frames))
        counts = []
        for count in range(1, 101):
            now += PERIOD / 4
            drafting.wrote(
                folder,
                array("I", [len(f) for f in frames[:count]]),
                bytearray(b"".join(digest(f) for f in frames[:count])),
                count * len(frames[0]),
                {3, 50},
            )
            counts.append(len(told))
        assert 8 <= len(told) <= 10, "a step of ten frames each"
        series = {grown.series for grown in told}
        assert len(series) == 1
        assert sorted(i for grown in told for i in grown.indices) == [
            i for i in range(told[-1].indices[-1] + 1) if i not in (3, 50)
        ]
        shelf = store.shelf(told[0].series)
        assert shelf is not None
        assert shelf.whole
        assert not shelf.complete
        assert [shelf.get_frame(i) for i in (0, 49)] == [frames[0], frames[49]]
        with pytest.raises(NotFound):
            shelf.get_frame(50)
        newest = Draft.decode(store.get_object(told[-1].newest))
        assert sum(len(read_list(store.get_object(one))[0]) for one in newest.lists) == newest.count
        drafting.close()
        assert store.shelf(told[0].series) is None
        with pytest.raises(NotFound):
            store.get_object(told[-1].newest)
        with pytest.raises(NotFound):
            shelf.get_frame(0)


# --- the worker's ------------------------------------------------------------------------


def begun(store: Store, told: list[Told]) -> None:
    series = store.drafts.begin(told[0].data).pack
    for one in told[1:]:
        store.drafts.extend(series, one.data, {c: d for t in told for c, d in t.lists.items()})


def promoted(store: Store, disk: SmallDisk = DISK) -> None:
    disk.put_objects(store)
    store.begin(disk.datum)


def leftovers(root: Path) -> list[str]:
    return [p.name for p in (root / "tmp").iterdir()] + [p.name for p in root.glob("packs/*")]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=some_sizes, data=st.data())
def test_whatever_came_by_drafts_is_the_pack_s_and_no_more(sizes, data, tmp_path):
    """Any drafts, skipped or in another order; any frames; then the disk."""
    root = tmp_path / secrets.token_hex(8)
    told = chain(sizes)
    every = {cid: one for t in told for cid, one in t.lists.items()}
    known, here = 0, set()
    with Store(root, min_free=0) as store:
        series = store.drafts.begin(told[0].data).pack
        for which in data.draw(st.lists(st.integers(1, len(told) - 1), min_size=1, max_size=8)):
            fresh = store.drafts.extend(series, told[which].data, every)
            assert fresh == range(known, max(known, told[which].draft.count)) or not fresh
            known = max(known, told[which].draft.count)
            shelf = store.shelf(series)
            assert len(shelf.frames.lengths) == known
            for index in data.draw(st.sets(st.integers(0, COUNT - 1), max_size=6)):
                if index < known:
                    shelf.put_frame(index, DISK.frames[index])
                    here.add(index)
                else:
                    with pytest.raises(ChunkCorrupt):
                        shelf.put_frame(index, DISK.frames[index])
        assert store.used() == sum(len(f) for f in DISK.frames[:known])
        assert store.held() == []
        assert store.shelves() == []
        promoted(store)
        pack = store.shelf(DISK.pack)
        assert {i for i in range(COUNT) if pack.holds(i)} == here
        assert pack.verify() == []
        assert store.shelf(series) is None
        assert shelf.over
        for index in set(range(COUNT)) - here:
            pack.put_frame(index, DISK.frames[index])
        assert pack.read(0, len(DISK.plain)) == DISK.plain
        used = store.used()
    with Store(root, min_free=0) as store:
        assert store.complete(DISK.datum)
        assert store.used() == used
        store.drop(DISK.datum)
        assert leftovers(root) == []


def test_another_frame_is_refused_and_a_rotten_one_is_noticed(tmp_path):
    with Store(tmp_path / "store", min_free=0) as store:
        told = chain([5])
        begun(store, told)
        shelf = store.shelf(told[0].name)
        with pytest.raises(ChunkCorrupt):
            shelf.put_frame(0, DISK.frames[1])
        with pytest.raises(ChunkCorrupt):
            shelf.put_frame(0, bytes(len(DISK.frames[0])))
        shelf.put_frame(0, DISK.frames[0])
        with (shelf.folder / "frames").open("r+b") as file:
            file.write(b"rot")
        with pytest.raises(ChunkCorrupt):
            shelf.get_frame(0)
        assert not shelf.holds(0)
        with pytest.raises(NotFound):
            shelf.read(0, 0)


def test_nobody_begins_a_draft(tmp_path):
    with Store(tmp_path / "store", min_free=0) as store:
        told = chain([COUNT])
        begun(store, told)
        for one in told:
            store.put_object(one.data)
            with pytest.raises(BadObject):
                store.begin(one.name)


def test_a_later_draft_alone_begins_nothing(tmp_path):
    with Store(tmp_path / "store", min_free=0) as store:
        with pytest.raises(BadObject):
            store.drafts.begin(chain([3])[1].data)
        assert leftovers(tmp_path / "store") == []


def test_a_liar_s_lists_are_not_taken(tmp_path):
    with Store(tmp_path / "store", min_free=0) as store:
        told = chain([3, 4])
        series = store.drafts.begin(told[0].data).pack
        miscounted = attrs.evolve(told[1].draft, count=4, signature=b"")
        with pytest.raises(VerificationFailed):
            store.drafts.extend(series, signed(miscounted, KEY).encode(), told[1].lists)
        store.drafts.extend(series, told[1].data, told[1].lists)
        other = more(series, told[0].draft, [b"other"])
        with pytest.raises(VerificationFailed):
            store.drafts.extend(series, other.data, other.lists)
        assert len(store.shelf(series).frames.lengths) == 3


@pytest.mark.parametrize("disk", [
    small_disk([9, *range(2, 30)], tail=1000),  # begins with another chunk
    small_disk([1, 2, 3]),  # shorter than what was told
    small_disk([*range(1, 30), 5, 0, *range(-40, -30)], tail=1000, key=OTHER),  # the same, of somebody else
])  # fmt: skip
def test_a_pack_that_does_not_go_on_from_a_draft_leaves_it_alone(disk, tmp_path):
    with Store(tmp_path / "store", min_free=0) as store:
        told = chain([5])
        begun(store, told)
        store.shelf(told[0].name).put_frame(0, DISK.frames[0])
        promoted(store, disk)
        assert store.drafts.followed() == [told[0].name]
        assert not store.shelf(disk.pack).holds(0)
        assert store.shelf(told[0].name).get_frame(0) == DISK.frames[0]


def test_a_draft_that_does_not_fit_is_refused_as_it_grows(tmp_path):
    lengths = [len(f) for f in DISK.frames]
    with Store(tmp_path / "store", quota=sum(lengths[:5]) + 100, min_free=0) as store:
        told = chain([5, 1])
        begun(store, told[:2])
        with pytest.raises(NoSpace):
            store.drafts.extend(told[0].name, told[2].data, told[2].lists)
        assert store.used() == sum(lengths[:5])
        store.drop(told[0].name)
        assert store.used() == 0
        assert leftovers(tmp_path / "store") == []


def test_a_pack_that_does_not_fit_does_not_take_the_draft_with_it_half(tmp_path):
    lengths, objects = [len(f) for f in DISK.frames], sum(map(len, set(DISK.objects)))
    with Store(tmp_path / "store", quota=sum(lengths) - 1 + objects, min_free=0) as store:
        begun(store, chain([5]))
        DISK.put_objects(store)
        with pytest.raises(NoSpace):
            store.begin(DISK.datum)
        assert store.used() == objects
        assert leftovers(tmp_path / "store") == []


def test_a_store_that_is_opened_again_knows_no_draft(tmp_path):
    root = tmp_path / "store"
    told = chain([5])
    with Store(root, min_free=0) as store:
        begun(store, told)
        store.shelf(told[0].name).put_frame(0, DISK.frames[0])
    assert leftovers(root) == []
    store = Store(root, min_free=0)
    begun(store, told)
    assert leftovers(root) != []
    os.close(store._lock_fd)  # it was killed
    with Store(root, min_free=0) as store:
        assert store.used() == 0
        assert leftovers(root) == []
        with pytest.raises(NotFound):
            store.drop(told[0].name)


@pytest.mark.parametrize("seed", range(12))
def test_a_power_cut_after_the_promotion_costs_what_was_not_synced_and_nothing_lies(seed, tmp_path):
    root, chance, power = tmp_path / "store", random.Random(seed), Power()
    synced: set[int] = set()
    with power.on(), mock.patch.object(shelf_module, "SYNC_BYTES", 1 << 60):
        store = Store(root, min_free=0)
        told = chain([10, 10, 10])
        begun(store, told)
        growing = store.shelf(told[0].name)
        here = set(chance.sample(range(30), 20))
        for count, index in enumerate(sorted(here)):
            growing.put_frame(index, DISK.frames[index])
            if count == 11:
                growing.flush()
                synced = {i for i in here if growing.holds(i)}
        promoted(store)
        assert {i for i in range(COUNT) if store.shelf(DISK.pack).holds(i)} == here
        power.cut(root, chance)
        os.close(store._lock_fd)
        with Store(root, min_free=0) as store:
            pack = store.begin(DISK.datum)
            left = {i for i in range(COUNT) if pack.holds(i)}
            assert synced <= left <= here
            assert pack.verify() == []
            for index in set(range(COUNT)) - left:
                pack.put_frame(index, DISK.frames[index])
            assert pack.read(0, len(DISK.plain)) == DISK.plain
