"""Does a guest boot from a disk in a delta, through the chunks of another disk?"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import attrs
import pytest
import trio

from p2pgrid.dht.publish import publish_disk
from p2pgrid.dht.shelf import Shelf
from p2pgrid.dht.store import Store
from tests.small_disks import KEY
from tests.vm.bios.disk import bios_disk
from tests.vm.test_guest_qemu import CONTEXT, SPEC, assert_came_home, hypervisor, run_guest

pytestmark = pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed")
__all__ = ["hypervisor"]


@attrs.frozen
class FromShelf:
    """A disk in the store."""

    shelf: Shelf

    @property
    def size(self) -> int:
        return self.shelf.layout.content.size

    async def read(self, offset: int, length: int) -> bytes:
        return await trio.to_thread.run_sync(self.shelf.read, offset, length)


async def test_a_disk_in_a_delta_boots(hypervisor, tmp_path: Path):
    old, new = bytearray(random.Random(1).randbytes(2 << 20)), bytearray()
    first = bios_disk()
    old[: len(first)] = first
    new[:] = old
    second = bios_disk(exit_status=7)
    assert len(second) == len(first)
    new[: len(second)] = second
    new[1 << 20 : 1 << 20] = random.Random(2).randbytes(4096)  # all behind it has moved
    (tmp_path / "old.raw").write_bytes(old)
    (tmp_path / "new.raw").write_bytes(new)
    with Store(tmp_path / "store", min_free=0) as store:
        parent = publish_disk(store, tmp_path / "old.raw", KEY)
        put = publish_disk(store, tmp_path / "new.raw", KEY, parent=parent.content)
        assert put.delta_bytes < 20_000
        store.drop(parent.datum)
        shelf = store.begin(put.datum)
        assert shelf.parent is not None
        end = await run_guest(hypervisor, FromShelf(shelf), SPEC, CONTEXT, tmp_path / "room")
        assert_came_home(end, exit_status=7)
        assert shelf.read(0, len(new)) == new
