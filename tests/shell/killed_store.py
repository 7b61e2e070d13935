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

from p2pgrid.dht.publish import publish_disk
from p2pgrid.dht.store import Store
from tests.small_disks import KEY, SmallDisk, small_disk

KILLS = 30
THREADS = 3


def main() -> None:
    what, root = sys.argv[1], Path(sys.argv[2])
    {"put": kill_while_putting, "publish": kill_at_every_step}[what](root)


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


def kill_while_putting(root: Path) -> None:
    disk = small_disk([-1 - i for i in range(150)])
    with Store(root, min_free=0) as store:
        disk.put_objects(store)
        store.begin(disk.datum)
    chance = random.Random(1)
    acknowledged: set[int] = set()
    for _ in range(KILLS):
        acknowledged |= one_kill(root, disk, chance)
        with Store(root, min_free=0) as store:
            shelf = store.shelf(disk.pack)
            assert shelf is not None
            here = {i for i in range(len(disk.frames)) if shelf.holds(i)}
            # What a put had returned for is never fetched again, so at most `THREADS` are.
            assert acknowledged <= here, f"lost: {acknowledged - here}"
            assert shelf.verify() == [], "a bit claimed a frame that is not there"
            assert not list((root / "tmp").iterdir())
    os.waitpid(forked(lambda: put_missing(root, disk, os.open(os.devnull, os.O_WRONLY))), 0)
    with Store(root, min_free=0) as store:
        shelf = store.shelf(disk.pack)
        assert shelf is not None
        assert shelf.complete
        assert shelf.read(0, len(disk.plain)) == disk.plain
    print(f"{KILLS} kills, {len(acknowledged)} frames acknowledged before one, none lost")


def one_kill(root: Path, disk: SmallDisk, chance: random.Random) -> set[int]:
    """Let a child put frames and kill it: after some acknowledgements, or after some time."""
    read, write = os.pipe()
    child = forked(lambda: put_missing(root, disk, write))
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
    return set(seen)


def put_missing(root: Path, disk: SmallDisk, acknowledge: int) -> None:
    store = Store(root, min_free=0)
    shelf = store.begin(disk.datum)
    missing = [i for i in range(len(disk.frames)) if not shelf.holds(i)]
    random.shuffle(missing)

    def put() -> None:
        while missing:
            try:
                index = missing.pop()
            except IndexError:
                return
            shelf.put_frame(index, disk.frames[index])
            os.write(acknowledge, bytes((index,)))
            if index % 10 == 0:
                shelf.flush()

    threads = [threading.Thread(target=put) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()


# --- a disk that is put -----------------------------------------------------------------


def kill_at_every_step(root: Path) -> None:
    """End the process just before its n-th write, sync, rename or unlink, for every n."""
    disk = small_disk([1, 2, 0, 3, 2, 4], tail=1024)
    image = root.parent / "image.raw"
    image.write_bytes(disk.plain)
    steps = 0
    while True:
        child = forked(partial(put_until, root, image, steps))
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        with Store(root, min_free=0) as store:
            held = store.held()
            assert not list((root / "tmp").iterdir())
            if held:
                shelf = store.shelf(held[0].pack)
                assert shelf is not None
                assert shelf.complete
                assert shelf.read(0, len(disk.plain)) == disk.plain
                store.drop(held[0].datum)
            left = [p for p in root.rglob("*") if p.is_file() and p.name != "lock"]
            assert left == [], f"step {steps} left {left}"
        if code == 0:
            break
        assert code == 9, f"the child failed at step {steps}"
        steps += 1
    assert steps > 30, "the steps were not counted"
    print(f"ended at each of {steps} steps: all or nothing")


def put_until(root: Path, image: Path, steps: int) -> None:
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
    with Store(root, min_free=0) as store:
        publish_disk(store, image, KEY)


if __name__ == "__main__":
    main()
