"""Ask the real qemu-img: do we read what it writes, and does it read what we write?

qemu-img opens only files made here.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from p2pgrid.dht.image import Image, open_image, write_image
from p2pgrid.dht.manifest import FORMATS, Guest
from p2pgrid.errors import ImageRefused
from tests.image_builders import KIB64, MIB, Disk, guest_bytes, pattern, qcow2, rebuilt, stream_vmdk, vdi

QEMU_IMG = shutil.which("qemu-img")
pytestmark = pytest.mark.skipif(QEMU_IMG is None, reason="qemu-img is not installed (Debian: qemu-utils)")

SIZES = {
    "odd": 70 * MIB + 1536,
    "round": 64 * MIB,
    "two L2 tables": 513 * MIB,
    "tiny": 512,
}
KINDS = {
    "vdi": ("vdi",),
    "fixed.vdi": ("vdi", "-o", "static=on"),
    "v2.qcow2": ("qcow2", "-o", "compat=0.10"),
    "v3.qcow2": ("qcow2", "-o", "compat=1.1"),
    "lazy.qcow2": ("qcow2", "-o", "lazy_refcounts=on"),
    "small-clusters.qcow2": ("qcow2", "-o", "cluster_size=512"),
    "large-clusters.qcow2": ("qcow2", "-o", "cluster_size=2M"),
    "preallocated.qcow2": ("qcow2", "-o", "preallocation=metadata"),
    "falloc.qcow2": ("qcow2", "-o", "preallocation=falloc"),
    "refcounts.qcow2": ("qcow2", "-o", "refcount_bits=1"),
    "packed.qcow2": ("qcow2", "-c"),
    "packed-v2.qcow2": ("qcow2", "-c", "-o", "compat=0.10"),
    "packed-small.qcow2": ("qcow2", "-c", "-o", "cluster_size=4k"),
    "zstd.qcow2": ("qcow2", "-c", "-o", "compression_type=zstd"),
    "zstd-large.qcow2": ("qcow2", "-c", "-o", "compression_type=zstd,cluster_size=2M"),
    "vmdk": ("vmdk",),
    "scsi.vmdk": ("vmdk", "-o", "adapter_type=lsilogic,compat6=on"),
    "zeroed.vmdk": ("vmdk", "-o", "zeroed_grain=on"),
    "stream.vmdk": ("vmdk", "-o", "subformat=streamOptimized"),
}
COMPRESSED = ("packed", "zstd", "stream")
SECRET = ("--object", "secret,id=k,data=0123456789abcdef", "-o")
REFUSED = {
    "extended.qcow2": (("qcow2", "-o", "extended_l2=on"), "subclusters"),
    "aes.qcow2": (("qcow2", *SECRET, "encrypt.format=aes,encrypt.key-secret=k"), "encrypted"),
    "data.qcow2": (("qcow2", "-o", "data_file=outside.raw"), "in another file"),
    "flat.vmdk": (("vmdk", "-o", "subformat=monolithicFlat"), "text descriptor"),
    "split.vmdk": (("vmdk", "-o", "subformat=twoGbMaxExtentSparse"), "text descriptor"),
    "split-s001.vmdk": (("vmdk", "-o", "subformat=twoGbMaxExtentSparse"), "neither monolithicSparse"),
    "disk.vhdx": (("vhdx",), "VHDX"),
    "disk.vhd": (("vpc",), "VHD image"),
    "disk.qed": (("qed",), "QED"),
}  # fmt: skip


def qemu_img(*words: str | Path, cwd: Path | None = None) -> str:
    assert QEMU_IMG is not None
    run = subprocess.run(
        [QEMU_IMG, *words], cwd=cwd, capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, f"{words}: {run.stdout} {run.stderr}"
    return run.stdout


@pytest.fixture(scope="module")
def raws(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Raw disks with data at their ends, across block borders and here and there."""
    folder = tmp_path_factory.mktemp("raw")
    made: dict[str, Path] = {}
    for name, size in SIZES.items():
        rng = random.Random(name)
        made[name] = folder / f"{name}.raw"
        with made[name].open("wb") as out:
            for i in range(24):
                length = min(rng.choice((512, 4096, KIB64, 300_000, MIB)), size)
                at = {0: 0, 1: size - length}.get(i, rng.randrange(size - length + 1) // 512 * 512)
                out.seek(at)
                out.write(pattern(i, length))
            out.truncate(size)
    return made


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rebuilt_hash(image: Image) -> str:
    return hashlib.sha256(rebuilt(image)).hexdigest()


@pytest.mark.parametrize(
    ("kind", "size"), [(k, s) for k in KINDS for s in SIZES if s != "two L2 tables" or k == "v3.qcow2"]
)
def test_what_qemu_writes(tmp_path: Path, raws: dict[str, Path], kind: str, size: str) -> None:
    path = tmp_path / (kind if "." in kind else f"disk.{kind}")
    qemu_img("convert", "-f", "raw", "-O", *KINDS[kind], raws[size], path)
    with closing(open_image(path)) as image:
        assert image.format == KINDS[kind][0]
        assert image.size == SIZES[size]
        assert image.exact == (not kind.startswith(COMPRESSED))
        assert guest_bytes(image) == raws[size].read_bytes()
        if image.exact:
            assert rebuilt_hash(image) == file_hash(path)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_what_qemu_reads(tmp_path: Path, raws: dict[str, Path], form: str, size: str) -> None:
    path = tmp_path / f"disk.{form}"
    with closing(open_image(raws[size])) as image, path.open("wb") as out:
        write_image(form, image.size, image.extents(), image.read, out)
    if form != "raw":
        qemu_img("check", "-f", form, path)
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", form, raws[size], path)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_becomes_every_other(tmp_path: Path, raws: dict[str, Path], form: str) -> None:
    """From what qemu-img compressed to what we write, and back to raw by qemu-img."""
    first, second, third = tmp_path / "first.qcow2", tmp_path / f"second.{form}", tmp_path / "third.raw"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raws["odd"], first)
    with closing(open_image(first)) as image, second.open("wb") as out:
        write_image(form, image.size, image.extents(), image.read, out)
    qemu_img("convert", "-f", form, "-O", "raw", second, third)
    assert file_hash(third) == file_hash(raws["odd"])


def test_an_odd_raw_disk_is_rounded_up_as_qemu_does(tmp_path: Path) -> None:
    raw = tmp_path / "odd.raw"
    raw.write_bytes(pattern(1, 70001))
    for form in FORMATS:
        path = tmp_path / f"disk.{form}"
        with closing(open_image(raw)) as image, path.open("wb") as out:
            write_image(form, image.size, image.extents(), image.read, out)
        assert "identical" in qemu_img("compare", "-f", "raw", "-F", form, raw, path)


@pytest.mark.parametrize("form", ["vdi", "qcow2", "vmdk"])
def test_a_disk_that_a_guest_wrote_to(tmp_path: Path, form: str) -> None:
    """Blocks in the order of writing, overwritten, zeroed and discarded, after a resize."""
    path, plain = tmp_path / f"disk.{form}", bytearray(40 * MIB)
    qemu_img("create", "-f", form, path, "40M")
    rng = random.Random(form)
    words: list[str] = []
    for i in range(40):
        at, length = rng.randrange(39 * MIB) // 512 * 512, rng.choice((512, 4096, KIB64, 700 * 1024))
        if i % 5 == 4:
            words.append(f"write -z {'-u ' if form == 'qcow2' and i % 2 else ''}{at} {length}")
            value = 0
        else:
            value = i + 1
            words.append(f"write -P {value} {at} {length}")
        plain[at : at + length] = bytes([value]) * length
    qemu_io = shutil.which("qemu-io")
    assert qemu_io is not None, "it comes with qemu-img"
    commands = [part for word in words for part in ("-c", word)]
    subprocess.run(
        [qemu_io, "-f", form, "-d", "unmap", *commands, path], check=True, capture_output=True, timeout=120
    )
    with closing(open_image(path)) as image:
        assert guest_bytes(image) == plain
        assert rebuilt_hash(image) == file_hash(path)


def test_a_compressed_disk_that_a_guest_wrote_to(tmp_path: Path, raws: dict[str, Path]) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raws["round"], path)
    plain = bytearray(raws["round"].read_bytes())
    qemu_io = shutil.which("qemu-io")
    assert qemu_io is not None, "it comes with qemu-img"
    commands: list[str] = []
    for i, at in enumerate((0, 4096, 3 * MIB + 512, 60 * MIB)):
        commands += ["-c", f"write -P {i + 1} {at} 5120"]
        plain[at : at + 5120] = bytes([i + 1]) * 5120
    subprocess.run([qemu_io, "-f", "qcow2", *commands, path], check=True, capture_output=True, timeout=120)
    with closing(open_image(path)) as image:
        assert not image.exact
        assert guest_bytes(image) == plain


def test_a_snapshot_is_refused_until_it_is_deleted(tmp_path: Path, raws: dict[str, Path]) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raws["round"], path)
    qemu_img("snapshot", "-c", "before", path)
    with pytest.raises(ImageRefused, match="internal snapshots"):
        open_image(path)
    qemu_img("snapshot", "-d", "before", path)
    with closing(open_image(path)) as image:
        assert guest_bytes(image) == raws["round"].read_bytes()
        assert rebuilt_hash(image) == file_hash(path)


def test_an_overlay_is_refused_until_it_is_flattened(tmp_path: Path, raws: dict[str, Path]) -> None:
    for form in ("qcow2", "vmdk"):
        base, overlay, flat = (tmp_path / f"{name}.{form}" for name in ("base", "overlay", "flat"))
        qemu_img("convert", "-f", "raw", "-O", form, raws["round"], base)
        qemu_img("create", "-f", form, "-b", base, "-F", form, overlay)
        with pytest.raises(ImageRefused, match="flatten it first"):
            open_image(overlay)
        qemu_img("convert", "-f", form, "-O", form, overlay, flat)
        with closing(open_image(flat)) as image:
            assert guest_bytes(image) == raws["round"].read_bytes()


def test_a_resized_disk(tmp_path: Path, raws: dict[str, Path]) -> None:
    path = tmp_path / "disk.qcow2"
    plain = raws["round"].read_bytes().ljust(100 * MIB, b"\0")
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raws["round"], path)
    for size in (3 << 30, 40 * MIB):
        qemu_img("resize", "--shrink", "-f", "qcow2", path, str(size))
        with closing(open_image(path)) as image:
            assert image.size == size
            assert guest_bytes(image, min(size, 100 * MIB)) == plain[:size]
            assert rebuilt_hash(image) == file_hash(path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_qemu_writes_and_we_do_not_read(tmp_path: Path, raws: dict[str, Path], name: str) -> None:
    options, why = REFUSED[name]
    whole = name.replace("-s001", "")
    qemu_img("convert", "-f", "raw", "-O", *options, raws["round"], whole, cwd=tmp_path)
    with pytest.raises(ImageRefused, match=why):
        open_image(tmp_path / name)


def test_what_the_other_tests_build_by_hand_is_no_invention(tmp_path: Path) -> None:
    """qemu-img reads the builders' images as we do."""
    clusters = {n: pattern(n, KIB64) for n in (0, 1, 5, 31)}
    size = 2 * MIB
    disk = Disk(size, {n * KIB64: data for n, data in clusters.items()})
    made = {
        "disk.vdi": vdi(size, [1, 0], [disk.read(MIB, MIB), disk.read(0, MIB)]),
        "disk.qcow2": qcow2(size, clusters, zeros=[7], kept=[9]),
        "v2.qcow2": qcow2(size, clusters, version=2),
        "deflate.qcow2": qcow2(size, clusters, pack="deflate"),
        "zstd.qcow2": qcow2(size, clusters, pack="zstd"),
        "stream.vmdk": stream_vmdk(size, clusters),
    }
    (tmp_path / "disk.raw").write_bytes(disk.plain)
    for name, data in made.items():
        path = tmp_path / name
        path.write_bytes(data)
        answer = qemu_img("compare", "-f", "raw", "-F", path.suffix[1:], tmp_path / "disk.raw", path)
        assert "identical" in answer, name
        with closing(open_image(path)) as image:
            assert guest_bytes(image) == disk.plain


def test_a_sparse_disk_of_100_gib(tmp_path: Path) -> None:
    """Preallocated and fixed containers of holes: the holes are not read."""
    for name, options in {
        "fixed.vdi": ("vdi", "-o", "static=on,size=100G"),
        "preallocated.qcow2": ("qcow2", "-o", "preallocation=metadata,size=100G"),
    }.items():
        path = tmp_path / name
        form, *rest = options
        qemu_img("create", "-f", form, *rest, path)
        with closing(open_image(path)) as image:
            assert image.size == 100 << 30
            assert sum(length for _, length in image.extents()) <= 16 * MIB
            assert sum(s.length for s in image.segments() if isinstance(s, Guest)) == 100 << 30
        os.unlink(path)
