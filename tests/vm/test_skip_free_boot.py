"""Does a disk boot when what its guest had deleted was left behind?"""

import os
import shutil
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from p2pgrid.dht.image import open_image
from p2pgrid.dht.partitions import partitions
from p2pgrid.dht.publish import publish_disk
from p2pgrid.dht.restore import restore_disk
from p2pgrid.dht.store import Store
from p2pgrid.vm.blockdev import FileSource
from p2pgrid.vm.guest import GuestSpec, run_guest
from p2pgrid.vm.qemu import Qemu
from tests.ext4_disks import MISSING, alter, free_blocks, tool
from tests.tiny_disk import tiny_disk

pytestmark = [
    pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed"),
    pytest.mark.skipif(bool(MISSING), reason=f"e2fsprogs lacks {', '.join(MISSING)}"),
]
DEBRIS = b"a file that is long gone "


def used_disk(folder: Path) -> tuple[Path, int, int]:
    """The tiny disk, raw, with rubbish in every free block; where its file system lies."""
    image = open_image(tiny_disk())
    try:
        plain = image.read(0, image.size)
        ((start, length),) = partitions(image.read, image.size, lambda ok, why: None)
    finally:
        image.close()
    (folder / "fs").write_bytes(plain[start : start + length])
    block, runs = free_blocks(folder / "fs")
    path = folder / "disk.raw"
    path.write_bytes(plain)
    for first, count in runs:
        alter(path, start + first * block, (DEBRIS * (count * block // len(DEBRIS) + 1))[: count * block])
    assert sum(count for _, count in runs) * block > 100_000
    return path, start, length


async def test_it_boots_and_its_file_system_is_clean(tmp_path):
    path, start, length = used_disk(tmp_path)
    with Store(tmp_path / "store", min_free=0) as store:
        put = publish_disk(store, path, SigningKey.generate(), skip_free=True)
        assert put.freed > 100_000
        restore_disk(store, put.datum, tmp_path / "back.raw", "raw")
    back = (tmp_path / "back.raw").read_bytes()
    assert DEBRIS not in back
    (tmp_path / "fs").write_bytes(back[start : start + length])
    tool("e2fsck", "-fn", tmp_path / "fs")

    context = {"context.sh": b"#!/bin/sh\necho alive > result.txt\nexit 7\n"}
    spec = GuestSpec(memory=128 << 20, time=120, env={})
    os.mkdir(tmp_path / "cache")
    with FileSource(tmp_path / "back.raw") as base:
        end = await run_guest(Qemu(tmp_path / "cache"), base, spec, context, tmp_path / "guest")
    assert (end.exit, end.why) == (7, "off"), end.console.read_text(errors="replace")
    assert (end.results / "result.txt").read_text() == "alive\n"
