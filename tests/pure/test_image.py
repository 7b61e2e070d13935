"""Images that are well formed: the guest's bytes are right, and the file can be put together again."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pgrid.dht.image import open_image, write_image
from p2pgrid.dht.manifest import (
    FORMATS,
    LITERAL_MAX,
    Guest,
    Literal,
    Zeros,
    decode_segments,
    paged_segments,
)
from p2pgrid.errors import ImageRefused, Misused, NotFound
from tests.image_builders import (
    KIB64,
    MIB,
    Disk,
    guest_bytes,
    opened,
    pattern,
    qcow2,
    rebuilt,
    stream_vmdk,
    vdi,
    written,
)

NEVER, ZERO = 0xFFFFFFFF, 0xFFFFFFFE


@st.composite
def disks(draw: st.DrawFn) -> Disk:
    size = draw(st.integers(1, 6 * MIB))
    count = draw(st.integers(0, 5))
    blocks = {}
    for _ in range(count):
        offset = draw(st.integers(0, size - 1))
        blocks[offset] = pattern(draw(st.integers(0, 99)), draw(st.sampled_from((1, 512, 4096, KIB64, MIB))))
    return Disk(size, dict(sorted(blocks.items())))


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(disk=disks(), data=st.data())
def test_what_is_written_is_read_back(tmp_path: Path, form: str, disk: Disk, data: st.DataObject) -> None:
    # Extents of two blocks may overlap in `Disk`; the product's never do.
    disk.extents = [(0, len(disk.plain))] if len(disk.extents) > 1 else disk.extents
    file = written(form, disk)
    image = opened(tmp_path / f"disk.{form}", file)
    padded = len(disk.plain) if form == "raw" else -(-len(disk.plain) // 512) * 512
    plain = bytes(disk.plain).ljust(padded, b"\0")
    assert (image.format, image.exact, image.size, image.file_size) == (form, True, padded, len(file))
    assert guest_bytes(image) == plain
    for _ in range(3):
        offset = data.draw(st.integers(0, padded))
        length = data.draw(st.integers(0, min(MIB, padded - offset)))
        assert image.read(offset, length) == plain[offset : offset + length]
    assert rebuilt(image) == file
    image.close()


@pytest.mark.parametrize(
    ("form", "most"), [("raw", 0), ("vdi", MIB), ("qcow2", 6 * KIB64), ("vmdk", 2 * KIB64)]
)
def test_zeros_are_not_allocated(tmp_path: Path, form: str, most: int) -> None:
    """`extents` may cover zeros: no block is allocated for them."""
    disk = Disk(8 * MIB, {})
    disk.extents = [(0, 8 * MIB)]
    path = tmp_path / f"disk.{form}"
    with path.open("wb") as out:
        write_image(form, len(disk.plain), disk.extents, disk.read, out)
    image = open_image(path)
    assert list(image.extents()) == []
    assert path.stat().st_blocks * 512 <= most
    image.close()


def test_writers_read_ascending_whole_strides() -> None:
    """What stands behind `read` decompresses whole chunks: each is asked for once, in order."""
    asked: list[tuple[int, int]] = []

    def read(offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return bytes(length)

    for form in FORMATS:
        asked.clear()
        write_image(form, 5 * MIB + 512, [(100, 5), (200, MIB), (4 * MIB, MIB + 512)], read, io.BytesIO())
        assert asked == [(0, MIB), (MIB, MIB), (4 * MIB, MIB), (5 * MIB, 512)]


def test_vdi_in_any_order(tmp_path: Path) -> None:
    """VirtualBox appends blocks as the guest writes them; discarded and never written ones are zeros."""
    rng = random.Random(7)
    order = [0, 1, 2, 3, 4, 5]
    rng.shuffle(order)
    blocks = [pattern(i, MIB) for i in range(6)]
    size = 7 * MIB + 512
    slots = [order[0], NEVER, *order[1:3], ZERO, *order[3:]]
    file = vdi(size, slots, blocks) + b"left behind" + bytes(5000)
    image = opened(tmp_path / "vbox.vdi", file)
    plain = b"".join(blocks[s] if s < ZERO else bytes(MIB) for s in slots)[:size]
    assert guest_bytes(image) == plain
    assert rebuilt(image) == file
    # The rest of the last block is not the guest's: it stands in the recipe.
    assert sum(s.length for s in image.segments() if isinstance(s, Guest)) == 5 * MIB + 512
    image.close()


def test_neighbours_are_one_run_even_when_zero(tmp_path: Path) -> None:
    """A fixed VDI is one guest run; allocated blocks stay guest runs although they hold zeros."""
    file = vdi(4 * MIB, range(4), [pattern(1, MIB), bytes(MIB), b"", pattern(2, MIB)], kind=2)
    image = opened(tmp_path / "fixed.vdi", file)
    assert [s for s in image.segments() if isinstance(s, Guest)] == [Guest(0, 4 * MIB)]
    assert rebuilt(image) == file
    image.close()


def test_literals_are_split_and_zeros_are_not_spelled_out(tmp_path: Path) -> None:
    tail = pattern(5, 3 * LITERAL_MAX + 77) + bytes(9 * MIB) + b"x"
    file = vdi(MIB, [0], [b"boot"]) + tail
    image = opened(tmp_path / "tail.vdi", file)
    segments = list(image.segments())
    assert all(len(s.data) <= LITERAL_MAX for s in segments if isinstance(s, Literal))
    assert max(s.length for s in segments if isinstance(s, Zeros)) > 8 * MIB
    assert sum(len(s.data) for s in segments if isinstance(s, Literal)) < 4 * LITERAL_MAX
    assert [s for page in paged_segments(segments) for s in decode_segments(page)] == segments
    assert rebuilt(image) == file
    image.close()


@pytest.mark.parametrize("version", [2, 3])
def test_qcow2_of_both_versions(tmp_path: Path, version: int) -> None:
    clusters = {0: pattern(0, KIB64), 5: pattern(5, KIB64), 4: pattern(4, KIB64), 20: b"end"}
    size = 20 * KIB64 + 1024
    extra = {"zeros": [6, 7], "kept": [9]} if version == 3 else {}
    file = qcow2(size, clusters, version=version, **extra)
    image = opened(tmp_path / "disk.qcow2", file)
    plain = bytearray(21 * KIB64)
    for number, data in clusters.items():
        plain[number * KIB64 : number * KIB64 + len(data)] = data
    assert guest_bytes(image) == plain[:size]
    assert image.exact
    assert rebuilt(image) == file
    image.close()


@pytest.mark.parametrize("pack", ["deflate", "zstd", "vmdk"])
def test_compressed_images(tmp_path: Path, pack: str) -> None:
    """Read in any order and size; not exact, since nobody can repeat the compressor."""
    numbers = [0, 1, 2, 40, 41, 599] if pack == "vmdk" else [0, 1, 2, 40, 41, 99]
    clusters = {n: pattern(n, KIB64) for n in numbers}
    size = numbers[-1] * KIB64 + 8192
    file = stream_vmdk(size, clusters) if pack == "vmdk" else qcow2(size, clusters, pack=pack)
    image = opened(tmp_path / ("disk.vmdk" if pack == "vmdk" else "disk.qcow2"), file)
    plain = bytearray((numbers[-1] + 1) * KIB64)
    for number, data in clusters.items():
        plain[number * KIB64 : (number + 1) * KIB64] = data
    assert not image.exact
    assert guest_bytes(image) == plain[:size]
    assert list(image.extents()) == [(0, 3 * KIB64), (40 * KIB64, 2 * KIB64), (numbers[-1] * KIB64, 8192)]
    rng = random.Random(1)
    for _ in range(50):
        offset = rng.randrange(size)
        length = rng.randrange(min(300000, size - offset) + 1)
        assert image.read(offset, length) == plain[offset : offset + length]
    image.close()


def test_compressed_and_plain_clusters_mix(tmp_path: Path) -> None:
    """What QEMU leaves when it writes to a compressed image: new clusters are plain."""
    file = bytearray(qcow2(8 * KIB64, {0: pattern(0, KIB64), 1: pattern(1, KIB64)}, pack="deflate"))
    file += bytes(-len(file) % KIB64)
    struct.pack_into(">Q", file, 4 * KIB64 + 8, 1 << 63 | len(file))
    image = opened(tmp_path / "disk.qcow2", bytes(file) + pattern(9, KIB64))
    assert image.read(0, 3 * KIB64) == pattern(0, KIB64) + pattern(9, KIB64) + bytes(KIB64)
    assert not image.exact
    image.close()


def test_threads_share_an_image(tmp_path: Path) -> None:
    clusters = {n: pattern(n, KIB64) for n in range(64)}
    image = opened(tmp_path / "disk.qcow2", qcow2(64 * KIB64, clusters, pack="deflate"))
    wrong: list[int] = []

    def check(seed: int) -> None:
        numbers = list(range(64))
        random.Random(seed).shuffle(numbers)
        wrong.extend(n for n in numbers if image.read(n * KIB64, KIB64) != clusters[n])

    threads = [threading.Thread(target=check, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    image.close()


# --- the file itself --------------------------------------------------------------------


def test_a_raw_disk_of_any_size(tmp_path: Path) -> None:
    image = opened(tmp_path / "disk.img", b"x" * 777)
    assert (image.format, image.size, image.read(700, 77)) == ("raw", 777, b"x" * 77)
    assert list(image.segments()) == [Guest(0, 777)]
    image.close()


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(written("vdi", Disk(MIB, {0: b"boot"})))
    (tmp_path / "disk.vdi").symlink_to("real")
    image = open_image(tmp_path / "disk.vdi")
    assert image.read(0, 4) == b"boot"
    image.close()


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name, why in [
        (".", "is a directory"),
        ("fifo", "not a regular file"),
        ("empty", "is empty"),
        ("loop", "symbolic links"),
        ("nul\0", "null"),
    ]:
        with pytest.raises(Misused, match=why):
            open_image(tmp_path / name)
    for name in ("missing", "empty/missing"):
        with pytest.raises(NotFound):
            open_image(tmp_path / name)


def test_an_unreadable_file() -> None:
    """Root may read everything, so that it is somebody else for a moment."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "disk")
        path.write_bytes(b"x")
        path.chmod(0)
        Path(folder).chmod(0o755)
        user = os.geteuid()
        os.seteuid(user or 65534)
        try:
            with pytest.raises(Misused, match="Permission denied"):
                open_image(path)
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("form", FORMATS)
def test_a_refused_image_leaves_no_descriptor(tmp_path: Path, form: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    (tmp_path / "disk.vdi").write_bytes(b"no VDI")
    (tmp_path / "empty.vdi").touch()
    for name in ("disk.vdi", "empty.vdi", "."):
        with pytest.raises((ImageRefused, Misused)):
            open_image(tmp_path / name)
    opened(tmp_path / f"good.{form}", written(form, Disk(MIB, {0: b"x"}))).close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("form", FORMATS)
def test_a_disk_that_changes_is_refused(tmp_path: Path, form: str) -> None:
    """At the end of `extents` and of `segments`, when it grew, and when it became shorter."""
    path = tmp_path / f"disk.{form}"
    image = opened(path, written(form, Disk(2 * MIB, {0: pattern(1, 2 * MIB)})))
    image.check_unchanged()
    os.utime(path, ns=(1, 1))
    for walk in (image.extents, image.segments):
        with pytest.raises(ImageRefused, match="changed while it was read"):
            list(walk())
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(ImageRefused, match="changed"):
        image.check_unchanged()
    os.truncate(path, 100)
    with pytest.raises(ImageRefused, match="became shorter"):
        image.read(0, 2 * MIB)
    image.close()


# --- large disks ------------------------------------------------------------------------

LARGE = """
    import re, struct, sys
    from pathlib import Path
    from p2pgrid.dht.image import open_image, write_image
    from p2pgrid.dht.manifest import FORMATS, Guest

    base, form = Path(sys.argv[1]), sys.argv[2]
    if form == "scattered":
        # Every cluster allocated, in an order that leaves no two neighbours; the data are holes.
        path = base / "disk.qcow2"
        tables, per, cluster = 20, 8192, 65536
        total = tables * per
        size = total * cluster
        data = (4 + tables) * cluster
        with path.open("wb") as out:
            out.write(struct.pack(">4sIQIIQIIQQIIQ", b"QFI\\xfb", 2, 0, 0, 16, size, 0, tables,
                                  cluster, 2 * cluster, 1, 0, 0))
            out.seek(cluster)
            out.write(struct.pack(f">{tables}Q", *((4 + i) * cluster for i in range(tables))))
            out.seek(4 * cluster)
            for i in range(tables):
                places = (n * 7919 % total for n in range(i * per, (i + 1) * per))
                out.write(struct.pack(f">{per}Q", *(data + place * cluster for place in places)))
            out.truncate(data + total * cluster)
        image = open_image(path)
        assert sum(length for _, length in image.extents()) < 1 << 20
        assert image.read(5 << 30, 4096) == bytes(4096)
    else:
        size = 100 << 30
        marks = [0, 1 << 30, (99 << 30) + 12345 * 4096, size - 4096]
        path = base / f"disk.{form}"
        with path.open("wb") as out:
            write_image(form, size, [(m, 4096) for m in marks], lambda at, n: b"m" * n, out)
        image = open_image(path)
        found = list(image.extents())
        assert found[0][0] == 0 and sum(length for _, length in found) <= 4 << 20, found
        assert all(image.read(m, 4096) == b"m" * 4096 for m in marks)
        assert image.read(50 << 30, 1 << 20) == bytes(1 << 20)
    assert image.size == size
    assert sum(s.length for s in image.segments() if isinstance(s, Guest)) >= 1 << 18
    print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.parametrize(("form", "most"), [*((form, 40) for form in FORMATS), ("scattered", 80)])
def test_a_large_disk_needs_little_memory(tmp_path: Path, form: str, most: int) -> None:
    """100 GiB with four blocks, and 10 GiB in as many pieces as there can be: the peak of a process, MiB."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LARGE), str(tmp_path), form],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < most
