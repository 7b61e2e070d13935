"""Does the store hold what it says after any history of puts, rot, drops, kills and power cuts?"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from random import Random
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from nacl.signing import SigningKey

from p2pgrid.dht import shelf as shelf_module
from p2pgrid.dht.manifest import CHUNK_SIZE
from p2pgrid.dht.store import Store
from p2pgrid.errors import ChunkCorrupt, NotFound
from p2pgrid.ids import digest, object_cid
from tests.power_cut import Power
from tests.small_disks import changed, chunk, small_delta, small_disk

FIRST = small_disk([1, 2, 0, 3, 1, 4], tail=1000)
NEXT = [changed(chunk(1), 1), chunk(3), chunk(0), changed(chunk(4), 2), chunk(2), chunk(1)]
DISKS = [
    FIRST,
    small_disk([2, 3, 5, 5, 6]),
    small_disk([1, 2, 0, 3, 1, 4], tail=1000, key=SigningKey(bytes(32))),  # same frames, another pack
    small_disk([1, 2, 0, 3, 1, 4], tail=1000, exact=False),  # same pack, another datum
    small_disk([0, 0]),  # nothing but holes
    small_delta(FIRST, NEXT),
    small_delta(FIRST, [chunk(3), chunk(2)], key=SigningKey(bytes(32))),  # nothing of its own
]
OBJECTS = {object_cid(data): data for disk in DISKS for data in disk.objects}
some_disk = st.integers(0, len(DISKS) - 1)
some_index = st.integers(0, 4)


class StoreHistory(RuleBasedStateMachine):
    """`have` is what the store must say it has; `rotten` what lies there wrong and unnoticed."""

    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="p2pgrid-test-"))
        self.power = Power()
        self.power_on = self.power.on()
        self.power_on.__enter__()
        self.small_syncs = mock.patch.object(shelf_module, "SYNC_BYTES", 50_000)
        self.small_syncs.start()
        self.begun: set[int] = set()
        self.have: dict = {}
        self.durable: dict = {}
        self.parents: dict = {}

    @initialize(held=st.sampled_from([(), (), (5,), (0, 5), (2, 5, 6)]))
    def open(self, held):
        self.store = Store(self.root, min_free=0)
        for which in held:
            self.do_begin(which)
            self.do_put_all(len(self.begun) - 1, but=99)

    def teardown(self):
        self.store.close()
        self.power_on.__exit__(None, None, None)
        self.small_syncs.stop()
        shutil.rmtree(self.root)

    # --- what lies on the disk, looked at from outside ---

    def lies(self, pack, index):
        shelf = self.store.shelf(pack)
        start = shelf.frames.offsets()[index]
        with (self.root / "packs" / str(pack) / "frames").open("rb") as file:
            file.seek(start)
            return file.read(shelf.frames.lengths[index])

    def rotten(self, pack):
        names = self.store.shelf(pack).frames.digests
        return {i for i in self.have[pack] if names[i] and digest(self.lies(pack, i)) != names[i]}

    def says(self, pack):
        shelf = self.store.shelf(pack)
        bits = int.from_bytes(shelf.have(), "little")
        return {i for i in range(len(shelf.frames.lengths)) if bits >> i & 1}

    def pick(self, which, index):
        """A disk that was begun, its shelf, and an index of it."""
        chosen = sorted(self.begun)[which % len(self.begun)]
        disk = DISKS[chosen]
        return disk, self.store.shelf(disk.pack), index % len(disk.frames) if disk.frames else None

    # --- rules ---

    def parts(self, disk):
        """The packs that a disk needs, its parent's first."""
        return [p for p in (self.parents.get(disk.pack), disk.pack) if p is not None]

    def whole(self, pack):
        return pack in self.have and len(self.have[pack]) == len(self.frames_of(pack))

    @rule(which=some_disk)
    def begin(self, which):
        self.do_begin(which)

    def do_begin(self, which):
        disk = DISKS[which]
        while missing := self.store.missing_objects(disk.datum):
            for cid in missing:
                self.store.put_object(OBJECTS[cid])
        known, before = self.parents.get(disk.pack), {p: set(have) for p, have in self.have.items()}
        sound = {p: have - self.rotten(p) for p, have in before.items()}
        full = {p for p in (DISKS[0].pack, DISKS[2].pack) if self.whole(p)}
        shelf = self.store.begin(disk.datum)
        assert shelf is self.store.shelf(disk.pack)
        if shelf.parent is not None:
            parent = self.parents[disk.pack] = shelf.parent.pack
            assert parent in ({known} if known else full or {DISKS[0].pack})
        for pack in self.parts(disk):
            self.look_for_frames(pack, before, sound)
        for pack, held in before.items():  # rot may have been noticed on the way
            assert sound[pack] <= self.says(pack)
            if pack not in self.parts(disk):
                assert self.says(pack) <= held
                self.have[pack] = self.says(pack)
        self.begun.add(which)

    def look_for_frames(self, pack, before, sound):
        """The pack was begun: has it what the others had, and nothing else?"""
        shelf, now = self.store.shelf(pack), self.says(pack)
        taken = {i for i, name in enumerate(shelf.frames.digests) if not name}
        assert taken <= now

        def named(packs):
            return {
                self.store.shelf(p).frames.digests[i] for p, some in packs.items() if p != pack for i in some
            }

        had = before.get(pack, set())
        wanted = {i: d for i, d in enumerate(shelf.frames.digests) if i not in had | taken}
        assert {i for i, d in wanted.items() if d in named(sound)} <= now - had
        assert now - had <= {i for i, d in wanted.items() if d in named(before)} | taken
        if pack not in before:
            assert shelf.local_bytes == sum(shelf.frames.lengths[i] for i in now)
        self.have[pack] = now
        self.durable.setdefault(pack, set())

    @precondition(lambda self: self.begun)
    @rule(which=some_disk, index=some_index)
    def put_frame(self, which, index):
        disk, shelf, index = self.pick(which, index)
        if index is not None and disk.frames[index]:
            shelf.put_frame(index, memoryview(disk.frames[index]))
            self.have[disk.pack].add(index)

    @precondition(lambda self: self.begun)
    @rule(which=some_disk, but=st.integers(0, 9))
    def put_all(self, which, but):
        """Every frame of a disk and of what it builds on, but for one perhaps."""
        self.do_put_all(which, but)

    def do_put_all(self, which, but):
        disk, _, _ = self.pick(which, 0)
        frames = [(p, i, f) for p in self.parts(disk) for i, f in enumerate(self.frames_of(p)) if f]
        for at, (pack, index, frame) in enumerate(frames):
            if at != but:
                self.store.shelf(pack).put_frame(index, frame)
                self.have[pack].add(index)

    @precondition(lambda self: self.begun)
    @rule(which=some_disk, index=some_index, at=st.integers(0, 100), kind=st.sampled_from("bls"))
    def put_wrong_frame(self, which, index, at, kind):
        disk, shelf, index = self.pick(which, index)
        if index is not None:
            wrong = bytearray(disk.frames[index] or bytes(100))
            wrong[at % len(wrong)] ^= 1
            frame = {"b": bytes(wrong), "l": disk.frames[index] + b"\0", "s": b""}[kind]
            with pytest.raises(ChunkCorrupt):
                shelf.put_frame(index, frame)

    @precondition(lambda self: self.begun)
    @rule(which=some_disk, index=some_index)
    def get_frame(self, which, index):
        disk, shelf, index = self.pick(which, index)
        if index is None or index not in self.have[disk.pack] or not disk.frames[index]:
            with pytest.raises(NotFound):
                shelf.get_frame(index or 0)
        elif index in self.rotten(disk.pack):
            with pytest.raises(ChunkCorrupt):
                shelf.get_frame(index)
            self.have[disk.pack].discard(index)
        else:
            assert shelf.get_frame(index) == disk.frames[index]

    @precondition(lambda self: self.begun)
    @rule(which=some_disk, a=st.floats(0, 1), b=st.floats(0, 1), everything=st.booleans())
    def read(self, which, a, b, everything):
        disk, shelf, _ = self.pick(which, 0)
        size = len(disk.plain)
        start, end = (0, size) if everything else sorted((int(a * size), int(b * size)))
        try:
            assert shelf.read(start, end - start) == disk.plain[start:end]
        except NotFound:
            assert not all(map(self.whole, self.parts(disk)))
        except ChunkCorrupt:
            lost = {(p, i) for p in self.parts(disk) for i in self.have[p] - self.says(p)}
            assert len(lost) == 1
            assert lost <= {(p, i) for p in self.parts(disk) for i in self.rotten(p)}
            for pack, index in lost:
                self.have[pack].discard(index)

    @precondition(lambda self: any(self.have.values()))
    @rule(which=some_disk, index=some_index, at=st.floats(0, 1), bit=st.integers(0, 7))
    def rot(self, which, index, at, bit):
        disk, shelf, index = self.pick(which, index)
        if index in self.have[disk.pack] and disk.frames[index]:
            place = shelf.frames.offsets()[index] + int(at * (shelf.frames.lengths[index] - 1))
            with (self.root / "packs" / str(disk.pack) / "frames").open("r+b") as file:
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes((byte ^ 1 << bit,)))

    @precondition(lambda self: self.begun)
    @rule(which=some_disk)
    def verify(self, which):
        disk, shelf, _ = self.pick(which, 0)
        rotten = self.rotten(disk.pack)
        steps = []
        assert shelf.verify(lambda done, total: steps.append((done, total))) == sorted(rotten)
        assert steps == sorted(steps)
        assert not steps or steps[-1] == (shelf.size, shelf.size)
        self.have[disk.pack] -= rotten

    @precondition(lambda self: self.begun)
    @rule(which=some_disk)
    def drop(self, which):
        chosen = sorted(self.begun)[which % len(self.begun)]
        self.store.drop(DISKS[chosen].datum)
        self.begun.remove(chosen)
        needed = {DISKS[i].pack for i in self.begun}
        self.parents = {pack: parent for pack, parent in self.parents.items() if pack in needed}
        for pack in self.have.keys() - needed - set(self.parents.values()):
            self.have.pop(pack)
            self.durable.pop(pack)
            assert self.store.shelf(pack) is None
        with pytest.raises(NotFound):
            self.store.drop(DISKS[chosen].datum)

    @rule()
    def flush(self):
        self.store.flush()
        self.durable = {pack: set(have) for pack, have in self.have.items()}

    @rule()
    def reopen(self):
        self.store.close()
        self.durable = {pack: set(have) for pack, have in self.have.items()}
        self.store = Store(self.root, min_free=0)

    @rule()
    def kill(self):
        """As kill -9 does: nothing is flushed, the kernel lets go of the lock."""
        os.close(self.store._lock_fd)
        self.store = Store(self.root, min_free=0)

    @rule(seed=st.integers(0, 1 << 32))
    def cut_power(self, seed):
        rotten = {pack: self.rotten(pack) for pack in self.have}
        os.close(self.store._lock_fd)
        self.power.cut(self.root, Random(seed))
        self.store = Store(self.root, min_free=0)
        for pack, before in self.have.items():
            now = self.says(pack)
            # More than before is possible: rot that had not reached the disk is gone with the cache.
            assert (self.durable[pack] & before) - rotten[pack] <= now
            self.have[pack] = now
            assert self.rotten(pack) <= rotten[pack], "a bit claims a frame whose data is missing"
            self.durable[pack] = set(now)

    # --- always ---

    @invariant()
    def it_says_what_it_has(self):
        for pack, have in self.have.items():
            assert self.says(pack) == have
            shelf = self.store.shelf(pack)
            assert shelf.count == len(have)
            assert shelf.complete == all(self.whole(part.pack) for part in shelf.parts)
        held = {(h.datum, h.content, h.pack, h.chunks, h.chunks_total, h.bytes) for h in self.store.held()}
        assert held == {self.expected(DISKS[i]) for i in self.begun}
        objects = self.needed()
        frames = [frame for pack in self.have for frame in self.frames_of(pack)]
        assert self.store.used() == sum(map(len, frames)) + sum(map(len, objects))
        for index, disk in enumerate(DISKS):
            whole = index in self.begun and all(map(self.whole, self.parts(disk)))
            assert self.store.complete(disk.datum) == whole

    def needed(self):
        """The objects of what was begun, and of the parents' packs."""
        parents = set(self.parents.values())
        return {data for i in self.begun for data in DISKS[i].objects} | {
            data for disk in DISKS if disk.pack in parents for data in disk.pack_objects
        }

    def expected(self, disk):
        frames = [(p, i, f) for p in self.parts(disk) for i, f in enumerate(self.frames_of(p)) if f]
        here = [len(frame) for pack, index, frame in frames if index in self.have[pack]]
        content = self.store.shelf(disk.pack).layout.cid
        return disk.datum, content, disk.pack, len(here), len(frames), sum(here)

    def frames_of(self, pack):
        return next(d.frames for d in DISKS if d.pack == pack)

    @invariant()
    def it_keeps_the_objects_that_are_needed_and_no_others(self):
        needed = {str(object_cid(data)) for data in self.needed()}
        assert {p.name for p in (self.root / "objects").glob("*/*")} == needed
        assert not list((self.root / "tmp").iterdir())
        assert not list((self.root / "packs").glob("*/*.tmp"))


StoreHistory.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestStore = StoreHistory.TestCase
assert CHUNK_SIZE * 5 < len(DISKS[0].plain) < CHUNK_SIZE * 6
