"""Kill processes that write to a store, again and again, and look at what they left.

Run as a program of its own (`test_store_kill.py` does): it has one thread, so it may fork.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from p2pgrid.dht.draft import Draft
from p2pgrid.dht.manifest import encode_frames, signed
from p2pgrid.dht.publish import publish_disk
from p2pgrid.dht.store import Store
from p2pgrid.ids import Cid, digest, object_cid
from tests.small_disks import KEY, SmallDisk, changed, chunk, small_delta, small_disk

KILLS = 30
THREADS = 3


def main() -> None:
    what, root = sys.argv[1], Path(sys.argv[2])
    {
        "put": lambda: kill_while_putting(root, small_disk([-1 - i for i in range(150)])),
        "put a delta": lambda: kill_while_putting(root, a_delta(), a_parent()),
        "publish": lambda: kill_at_every_step(root, None),
        "promote": lambda: kill_while_promoting(root),
        "publish a delta": lambda: kill_at_every_step(root, small_disk([1, 2, 0, 7, 2, 4], tail=1024)),
    }[what]()


def a_parent() -> SmallDisk:
    return small_disk([-1 - i for i in range(90)])


def a_delta() -> SmallDisk:
    """Of 60 chunks most are the parent's, changed; the others it takes as they are."""
    plain = [chunk(-1 - i) for i in range(60)]
    return small_delta(a_parent(), [changed(p, i) if i % 4 else p for i, p in enumerate(plain)])


def forked(work: Callable[[], None]) -> int:
    """The pid of a child that does `work` and ends."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


# --- frames that come in ----------------------------------------------------------------


Frame = tuple[int, int]
"""Which of the packs that a disk needs, and the index there."""


def frames_of(disk: SmallDisk, parent: SmallDisk | None) -> dict[Frame, bytes]:
    packs = (disk,) if parent is None else (parent, disk)
    return {(p, i): f for p, pack in enumerate(packs) for i, f in enumerate(pack.frames) if f}


def kill_while_putting(root: Path, disk: SmallDisk, parent: SmallDisk | None = None) -> None:
    frames = frames_of(disk, parent)
    with Store(root, min_free=0) as store:
        disk.put_objects(store)
        for data in parent.pack_objects if parent is not None else ():
            store.put_object(data)
        store.begin(disk.datum)
    chance = random.Random(1)
    acknowledged: set[Frame] = set()
    for _ in range(KILLS):
        acknowledged |= one_kill(root, disk, frames, chance)
        with Store(root, min_free=0) as store:
            shelf = store.shelf(disk.pack)
            assert shelf is not None
            here = {(part, index) for part, index in frames if shelf.parts[part].holds(index)}
            # What a put had returned for is never fetched again, so at most `THREADS` are.
            assert acknowledged <= here, f"lost: {acknowledged - here}"
            assert [part.verify() for part in shelf.parts] == [[]] * len(shelf.parts), (
                "a bit claimed a frame that is not there"
            )
            assert not list((root / "tmp").iterdir())
    os.waitpid(forked(lambda: put_missing(root, disk, frames, os.open(os.devnull, os.O_WRONLY))), 0)
    with Store(root, min_free=0) as store:
        shelf = store.shelf(disk.pack)
        assert shelf is not None
        assert shelf.complete
        assert shelf.read(0, len(disk.plain)) == disk.plain
    print(f"{KILLS} kills, {len(acknowledged)} frames acknowledged before one, none lost")


def one_kill(root: Path, disk: SmallDisk, frames: dict[Frame, bytes], chance: random.Random) -> set[Frame]:
    """Let a child put frames and kill it: after some acknowledgements, or after some time."""
    read, write = os.pipe()
    child = forked(lambda: put_missing(root, disk, frames, write))
    os.close(write)
    seen = b""
    if chance.random() < 0.7:
        seen = os.read(read, 1)
        while len(seen) < chance.randint(1, 5) and (more := os.read(read, 1)):
            seen += more
    else:
        time.sleep(chance.uniform(0, 0.02))  # any moment, opening and syncing included
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(read, 1000):
        seen += more
    os.close(read)
    two = any(part for part, _ in frames)
    return {divmod(number, 128) if two else (0, number) for number in seen}


def put_missing(root: Path, disk: SmallDisk, frames: dict[Frame, bytes], acknowledge: int) -> None:
    store = Store(root, min_free=0)
    shelf = store.begin(disk.datum)
    missing = [(part, index) for part, index in frames if not shelf.parts[part].holds(index)]
    random.shuffle(missing)

    def put() -> None:
        while missing:
            try:
                part, index = missing.pop()
            except IndexError:
                return
            shelf.parts[part].put_frame(index, frames[part, index])
            os.write(acknowledge, bytes((128 * part + index,)))
            if index % 10 == 0:
                shelf.parts[part].flush()

    threads = [threading.Thread(target=put) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()


# --- a disk that is put -----------------------------------------------------------------


def kill_at_every_step(root: Path, parent: SmallDisk | None) -> None:
    """End the process just before its n-th write, sync, rename or unlink, for every n."""
    disk = small_disk([1, 2, 0, 3, 2, 4], tail=1024)
    image = root.parent / "image.raw"
    image.write_bytes(disk.plain)
    before, upon = set[Path](), None
    if parent is not None:
        (root.parent / "parent.raw").write_bytes(parent.plain)
        with Store(root, min_free=0) as store:
            upon = publish_disk(store, root.parent / "parent.raw", KEY).content
        before = files(root)
    steps = 0
    while True:
        child = forked(partial(put_until, root, image, upon, steps))
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        with Store(root, min_free=0) as store:
            held = [h for h in store.held() if h.content != upon]
            assert not list((root / "tmp").iterdir())
            if held:
                shelf = store.shelf(held[0].pack)
                assert shelf is not None
                assert shelf.complete
                assert (shelf.parent is None) == (upon is None)
                assert shelf.read(0, len(disk.plain)) == disk.plain
                store.drop(held[0].datum)
            assert files(root) == before, f"step {steps} left {files(root) ^ before}"
        for path in root.glob("packs/*/likeness"):
            path.unlink()
        if code == 0:
            assert held
            break
        assert code == 9, f"the child failed at step {steps}"
        steps += 1
    assert steps > 30, "the steps were not counted"
    print(f"ended at each of {steps} steps: all or nothing")


# --- a pack that takes a draft over -------------------------------------------------------


def kill_while_promoting(root: Path) -> None:
    """End the process just before its n-th step from the first draft to the pack, for every n."""
    disk = small_disk([1, 2, 0, 3, 2, 4], tail=1024)
    steps = 0
    with Store(root, min_free=0):
        before = files(root)
    while True:
        child = forked(partial(promote_until, root, disk, steps))
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        with Store(root, min_free=0) as store:
            assert not list((root / "tmp").iterdir())
            assert store.drafts.followed() == []
            held = store.held()
            if held:
                shelf = store.shelf(disk.pack)
                assert shelf is not None
                assert [shelf.holds(i) for i in range(len(disk.frames))] == [True, True, False, False]
                assert shelf.verify() == []
                store.drop(disk.datum)
            # A few objects that were put and not begun may stay; an opened store counts and clears them.
            assert not list(root.glob("packs/*"))
        with Store(root, min_free=0):
            assert files(root) == before, f"step {steps} left {files(root) ^ before}"
        if code == 0:
            assert held
            break
        assert code == 9, f"the child failed at step {steps}"
        steps += 1
    assert steps > 30, "the steps were not counted"
    print(f"ended at each of {steps} steps: all or nothing")


def promote_until(root: Path, disk: SmallDisk, steps: int) -> None:
    first = signed(Draft(None, bytes(32), 6, 0, (), b""), KEY).encode()
    listed = encode_frames([len(f) for f in disk.frames[:3]], [digest(f) for f in disk.frames[:3]])
    count_steps(steps)
    with Store(root, min_free=0) as store:
        growing = store.drafts.begin(first)
        later = signed(Draft(growing.pack, b"", 6, 3, (object_cid(listed),), b""), KEY)
        store.drafts.extend(growing.pack, later.encode(), {object_cid(listed): listed})
        for index in (0, 1):
            growing.put_frame(index, disk.frames[index])
        disk.put_objects(store)
        store.begin(disk.datum)


def files(root: Path) -> set[Path]:
    """What is kept, but for what may be made again at any time."""
    return {p for p in root.rglob("*") if p.is_file() and p.name not in ("lock", "likeness")}


def put_until(root: Path, image: Path, upon: Cid | None, steps: int) -> None:
    count_steps(steps)
    with Store(root, min_free=0) as store:
        publish_disk(store, image, KEY, parent=upon)


def count_steps(steps: int) -> None:
    """End the process before it takes one step more to the disk than these."""
    left = steps
    lock = threading.Lock()

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def step(*args: object, **named: object) -> object:
            nonlocal left
            with lock:
                if left == 0:
                    os._exit(9)
                left -= 1
            return call(*args, **named)

        return step

    for name in ("pwrite", "fsync", "fdatasync", "rename", "ftruncate", "unlink", "mkdir", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))


if __name__ == "__main__":
    main()
