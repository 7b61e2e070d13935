"""Images that lie: each lie is refused by name, and noise never does anything else.

One lie, one sentence: the tables below change one field of a good image.  Then Hypothesis changes
anything: what comes is either `ImageRefused`, or an image that can be read and put together again.
"""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import closing
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from p2pgrid.dht.image import open_image
from p2pgrid.errors import ImageRefused
from tests.image_builders import (
    KIB64,
    MIB,
    Disk,
    deflated,
    descriptor,
    guest_bytes,
    opened,
    pattern,
    qcow2,
    rebuilt,
    stream_vmdk,
    vdi,
    written,
)

U16, U32, U64 = "<H", "<I", "<Q"
B32, B64 = ">I", ">Q"

VDI = vdi(4 * MIB, [1, 0xFFFFFFFF, 0, 0xFFFFFFFE], [pattern(1, MIB), pattern(2, MIB)])
CLUSTERS = {0: pattern(0, KIB64), 3: pattern(3, KIB64), 9: pattern(9, KIB64)}
QCOW2 = qcow2(10 * KIB64, CLUSTERS, zeros=[5], kept=[6])
QCOW2_V2 = qcow2(10 * KIB64, CLUSTERS, version=2)
DEFLATE = qcow2(10 * KIB64, CLUSTERS, pack="deflate")
ZSTD = qcow2(10 * KIB64, CLUSTERS, pack="zstd")
VMDK = written("vmdk", Disk(MIB, {0: pattern(0, KIB64), 5 * KIB64: pattern(5, 3 * KIB64)}))
STREAM = stream_vmdk(MIB, {0: pattern(0, KIB64), 1: pattern(1, KIB64), 15: pattern(15, KIB64)})

L1, L2 = KIB64, 4 * KIB64
GRAIN_TABLE = struct.unpack_from(U32, VMDK, 512 * struct.unpack_from(U64, VMDK, 56)[0])[0] * 512


def refused(path: Path, data: bytes) -> str:
    """Why `data` is refused: by `open_image`, or at the latest where its bytes are read."""
    path.write_bytes(data)
    with pytest.raises(ImageRefused) as caught, closing(open_image(path)) as image:
        guest_bytes(image)
    assert caught.value.exit_code == 7
    assert caught.value.path == str(path)
    return caught.value.why


def changed(data: bytes, *fields: tuple[int, str, int]) -> bytes:
    lie = bytearray(data)
    for offset, code, value in fields:
        struct.pack_into(code, lie, offset, value)
    return bytes(lie)


LIES: dict[str, tuple[str, bytes, str]] = {
    # VDI
    "vdi-signature": ("vdi", changed(VDI, (64, U32, 0)), "its first bytes say raw"),
    "vdi-version": ("vdi", changed(VDI, (68, U32, 0x10000)), "version 1.0 is not 1.1"),
    "vdi-type": ("vdi", changed(VDI, (76, U32, 3)), "neither dynamic nor fixed"),
    "vdi-differencing": ("vdi", changed(VDI, (76, U32, 4)), "flatten it first"),
    "vdi-parent": ("vdi", changed(VDI, (424, U32, 7)), "flatten it first"),
    "vdi-parent-change": ("vdi", changed(VDI, (455, "B", 1)), "flatten it first"),
    "vdi-sector": ("vdi", changed(VDI, (360, U32, 4096)), "sectors have 4096"),
    "vdi-block": ("vdi", changed(VDI, (376, U32, 1 << 21)), "blocks have 2097152"),
    "vdi-extra": ("vdi", changed(VDI, (380, U32, 512)), "1048576 \\+ 512"),
    "vdi-size-zero": ("vdi", changed(VDI, (368, U64, 0)), "a disk of no bytes"),
    "vdi-size-overflow": ("vdi", changed(VDI, (368, U64, (1 << 64) - 512)), "is the most"),
    "vdi-size-odd": ("vdi", changed(VDI, (368, U64, 4 * MIB - 1)), "not a multiple of 512"),
    "vdi-size-larger": ("vdi", changed(VDI, (368, U64, 4 * MIB + 512)), "counts 4 blocks"),
    "vdi-count-larger": ("vdi", changed(VDI, (384, U32, 5)), "counts 5 blocks"),
    "vdi-count-huge": (
        "vdi",
        changed(VDI, (384, U32, 1 << 25), (368, U64, 1 << 45), (344, U32, 0x80000000)),
        "the file ends inside its block map",
    ),
    "vdi-allocated-larger": ("vdi", changed(VDI, (388, U32, 5)), "5 allocated blocks of 4"),
    "vdi-allocated-smaller": ("vdi", changed(VDI, (388, U32, 1)), "only 1 are allocated"),
    "vdi-out-of-range": ("vdi", changed(VDI, (MIB, U32, 2)), "has block 2"),
    "vdi-almost-zero": ("vdi", changed(VDI, (MIB, U32, 0xFFFFFFFD)), "has block 4294967293"),
    "vdi-twice": ("vdi", changed(VDI, (MIB, U32, 0)), "claimed twice"),
    "vdi-past-the-end": ("vdi", changed(VDI, (388, U32, 3), (MIB, U32, 2)), "past the end of the file"),
    "vdi-map-in-header": ("vdi", changed(VDI, (340, U32, 0)), "lies in its header"),
    "vdi-map-askew": ("vdi", changed(VDI, (340, U32, MIB + 4)), "begin at a sector"),
    "vdi-data-askew": ("vdi", changed(VDI, (344, U32, 2 * MIB + 4)), "begin at a sector"),
    "vdi-data-in-map": ("vdi", changed(VDI, (344, U32, MIB)), "overlap"),
    "vdi-map-past-the-end": (
        "vdi",
        changed(VDI, (340, U32, 1 << 30), (344, U32, 1 << 31)),
        "inside its block map",
    ),
    "vdi-header-truncated": ("vdi", VDI[:400], "inside its header"),
    "vdi-map-truncated": ("vdi", VDI[: MIB + 12], "inside its block map"),
    "vdi-truncated": ("vdi", VDI[:-1], "past the end of the file"),
    # qcow2
    "qcow2-signature": ("qcow2", changed(QCOW2, (0, "B", 0)), "its first bytes say raw"),
    "qcow2-version-1": ("qcow2", changed(QCOW2, (4, B32, 1)), "version 1"),
    "qcow2-version-4": ("qcow2", changed(QCOW2, (4, B32, 4)), "version 4"),
    "qcow2-backing": ("qcow2", changed(QCOW2, (8, B64, 4096), (16, B32, 11)), "backing file"),
    "qcow2-backing-offset": ("qcow2", changed(QCOW2, (8, B64, 4096)), "backing file"),
    "qcow2-v2-backing": ("qcow2", changed(QCOW2_V2, (8, B64, 4096), (16, B32, 11)), "backing file"),
    "qcow2-clusters-small": ("qcow2", changed(QCOW2, (20, B32, 8)), "2\\^8"),
    "qcow2-clusters-large": ("qcow2", changed(QCOW2, (20, B32, 4000000000)), "2\\^4000000000"),
    "qcow2-size-zero": ("qcow2", changed(QCOW2, (24, B64, 0)), "no bytes"),
    "qcow2-size-overflow": ("qcow2", changed(QCOW2, (24, B64, (1 << 64) - 512)), "is the most"),
    "qcow2-size-odd": ("qcow2", changed(QCOW2, (24, B64, 10 * KIB64 - 1)), "not a multiple"),
    "qcow2-size-smaller": ("qcow2", changed(QCOW2, (24, B64, 9 * KIB64)), "behind the end of the disk"),
    "qcow2-aes": ("qcow2", changed(QCOW2, (32, B32, 1)), "encrypted"),
    "qcow2-luks": ("qcow2", changed(QCOW2, (32, B32, 2)), "encrypted"),
    "qcow2-luks-extension": ("qcow2", changed(QCOW2, (112, B32, 0x0537BE77)), "encrypted"),
    "qcow2-l1-small": ("qcow2", changed(QCOW2, (36, B32, 0)), "too small"),
    "qcow2-l1-small-for-size": ("qcow2", changed(QCOW2, (24, B64, 1 << 40)), "too small"),
    "qcow2-l1-huge": ("qcow2", changed(QCOW2, (36, B32, 0xFFFFFFFF)), "more than any disk needs"),
    "qcow2-l1-long": ("qcow2", changed(QCOW2, (36, B32, 1 << 21)), "inside its L1 table"),
    "qcow2-l1-over-refcounts": ("qcow2", changed(QCOW2, (36, B32, 8193)), "L1 entry|claimed twice"),
    "qcow2-l1-past-the-end": ("qcow2", changed(QCOW2, (40, B64, (1 << 64) - KIB64)), "inside its L1 table"),
    "qcow2-l1-askew": ("qcow2", changed(QCOW2, (40, B64, L1 + 8)), "begin at a cluster"),
    "qcow2-l1-in-header": ("qcow2", changed(QCOW2, (40, B64, 0)), "L1 entry|claimed twice"),
    "qcow2-refcounts-none": ("qcow2", changed(QCOW2, (56, B32, 0)), "refcount table has 0"),
    "qcow2-refcounts-huge": ("qcow2", changed(QCOW2, (56, B32, 0xFFFFFFFF)), "refcount table has 4294967295"),
    "qcow2-refcounts-past-the-end": ("qcow2", changed(QCOW2, (48, B64, 1 << 40)), "past the end"),
    "qcow2-snapshots": ("qcow2", changed(QCOW2, (60, B32, 1)), "internal snapshots"),
    "qcow2-snapshots-huge": ("qcow2", changed(QCOW2, (60, B32, 0xFFFFFFFF)), "internal snapshots"),
    "qcow2-dirty": ("qcow2", changed(QCOW2, (79, "B", 1)), "dirty"),
    "qcow2-corrupt": ("qcow2", changed(QCOW2, (79, "B", 2)), "marked corrupt"),
    "qcow2-data-file": ("qcow2", changed(QCOW2, (79, "B", 4)), "in another file"),
    "qcow2-data-file-name": ("qcow2", changed(QCOW2, (112, B32, 0x44415441)), "in another file"),
    "qcow2-subclusters": ("qcow2", changed(QCOW2, (79, "B", 16)), "subclusters"),
    "qcow2-unknown-feature": ("qcow2", changed(QCOW2, (72, "B", 1)), "features that we do not know"),
    "qcow2-refcount-order": ("qcow2", changed(QCOW2, (96, B32, 7)), "2\\^7 bits"),
    "qcow2-header-short": ("qcow2", changed(QCOW2, (100, B32, 96)), "claims 96"),
    "qcow2-header-long": ("qcow2", changed(QCOW2, (100, B32, 1 << 30)), "claims 1073741824"),
    "qcow2-extension-long": ("qcow2", changed(QCOW2, (116, B32, 0xFFFFFFF0)), "do not end"),
    "qcow2-compression": ("qcow2", changed(QCOW2, (104, "B", 2)), "compression type 2"),
    "qcow2-compression-unsaid": ("qcow2", changed(QCOW2, (104, "B", 1)), "contradicts itself"),
    "qcow2-compression-without": ("qcow2", changed(QCOW2, (79, "B", 8)), "contradicts itself"),
    "qcow2-l1-reserved": ("qcow2", changed(QCOW2, (L1, B64, 1 << 63 | L2 | 1)), "L1 entry 0 is malformed"),
    "qcow2-l1-entry-askew": ("qcow2", changed(QCOW2, (L1, B64, L2 + 512)), "L1 entry 0 is malformed"),
    "qcow2-l2-in-header": ("qcow2", changed(QCOW2, (L1, B64, 1 << 63 | L1)), "claimed twice"),
    "qcow2-l2-past-the-end": ("qcow2", changed(QCOW2, (L1, B64, 1 << 55)), "past the end"),
    "qcow2-l2-twice": ("qcow2", changed(QCOW2, (36, B32, 2), (L1 + 8, B64, L2)), "claimed twice"),
    "qcow2-l2-reserved": ("qcow2", changed(QCOW2, (L2, B64, 1 << 61 | 5 * KIB64)), "malformed"),
    "qcow2-l2-askew": ("qcow2", changed(QCOW2, (L2, B64, 5 * KIB64 + 512)), "malformed"),
    "qcow2-v2-zero-flag": ("qcow2", changed(QCOW2_V2, (L2, B64, 1)), "malformed"),
    "qcow2-data-in-header": ("qcow2", changed(QCOW2, (L2, B64, 1 << 63)), "points at the header"),
    "qcow2-data-in-l2": ("qcow2", changed(QCOW2, (L2, B64, L2)), "claimed twice"),
    "qcow2-data-in-kept": ("qcow2", changed(QCOW2, (L2, B64, 8 * KIB64)), "claimed twice"),
    "qcow2-data-twice": ("qcow2", changed(QCOW2, (L2, B64, 6 * KIB64)), "claimed twice"),
    "qcow2-data-past-the-end": ("qcow2", changed(QCOW2, (L2, B64, 1 << 50)), "past the end"),
    "qcow2-behind-the-disk": (
        "qcow2",
        changed(QCOW2, (L2 + 80, B64, 8 * KIB64)),
        "behind the end of the disk",
    ),
    "qcow2-header-truncated": ("qcow2", QCOW2[:71], "inside its header"),
    "qcow2-header3-truncated": ("qcow2", QCOW2[:103], "inside its header"),
    "qcow2-l1-truncated": ("qcow2", QCOW2[: L1 + 7], "inside its L1 table"),
    "qcow2-l2-truncated": ("qcow2", QCOW2[: L2 + 7], "past the end"),
    "qcow2-truncated": ("qcow2", QCOW2[:-1], "past the end"),
    "qcow2-packed-past-the-end": ("qcow2", changed(DEFLATE, (L2, B64, 1 << 62 | 1 << 53)), "past the end"),
    "qcow2-packed-in-l2": ("qcow2", changed(DEFLATE, (L2, B64, 1 << 62 | L2 + 99)), "claimed twice"),
    "qcow2-packed-twice": (
        "qcow2",
        changed(DEFLATE, (L2 + 8, B64, struct.unpack_from(B64, DEFLATE, L2)[0])),
        "claimed twice",
    ),
    "qcow2-packed-copied": ("qcow2", changed(DEFLATE, (L2, B64, 3 << 62 | 5 * KIB64)), "malformed"),
    "qcow2-packed-rubbish": ("qcow2", changed(DEFLATE, (5 * KIB64, B64, (1 << 64) - 1)), "is corrupt"),
    "qcow2-packed-cut": ("qcow2", changed(DEFLATE, (L2, B64, 1 << 62 | 5 * KIB64)), "is too short"),
    "qcow2-packed-behind": (
        "qcow2",
        changed(DEFLATE, (24, B64, 9 * KIB64)),
        "behind the end of the disk",
    ),
    "qcow2-zstd-rubbish": ("qcow2", changed(ZSTD, (5 * KIB64, B64, (1 << 64) - 1)), "is corrupt"),
    "qcow2-zstd-cut": ("qcow2", changed(ZSTD, (L2, B64, 1 << 62 | 5 * KIB64)), "is too short"),
    "qcow2-zstd-as-deflate": ("qcow2", changed(ZSTD, (79, "B", 0), (104, "B", 0)), "is corrupt|too short"),
    # VMDK
    "vmdk-signature": ("vmdk", changed(VMDK, (0, "B", 0)), "its first bytes say raw"),
    "vmdk-text": ("vmdk", descriptor(2048, "monolithicFlat").encode(), "text descriptor"),
    "vmdk-version": ("vmdk", changed(VMDK, (4, U32, 4)), "version 4"),
    "vmdk-newlines": ("vmdk", changed(VMDK, (75, "B", 10)), "text transfer"),
    "vmdk-unclean": ("vmdk", changed(VMDK, (72, "B", 1)), "not closed properly"),
    "vmdk-size-zero": ("vmdk", changed(VMDK, (12, U64, 0)), "no bytes"),
    "vmdk-size-overflow": ("vmdk", changed(VMDK, (12, U64, (1 << 64) - 1)), "is the most"),
    "vmdk-size": ("vmdk", changed(VMDK, (12, U64, 2049)), "contradicts its header on the size"),
    "vmdk-grain-zero": ("vmdk", changed(VMDK, (20, U64, 0)), "grains have 0"),
    "vmdk-grain-odd": ("vmdk", changed(VMDK, (20, U64, 100)), "grains have 100"),
    "vmdk-grain-huge": ("vmdk", changed(VMDK, (20, U64, 1 << 63)), "grains have"),
    "vmdk-tables": ("vmdk", changed(VMDK, (44, U32, 1 << 31)), "tables have 2147483648 grains"),
    "vmdk-compression": ("vmdk", changed(VMDK, (77, U16, 2)), "compression 2"),
    "vmdk-half-a-stream": ("vmdk", changed(VMDK, (8, U32, 0x10003)), "half a stream"),
    "vmdk-packed-unsaid": ("vmdk", changed(VMDK, (77, U16, 1)), "contradicts itself"),
    "vmdk-no-descriptor": ("vmdk", changed(VMDK, (28, U64, 0)), "one extent of a larger disk"),
    "vmdk-descriptor-empty": ("vmdk", changed(VMDK, (36, U64, 0)), "descriptor claims 0"),
    "vmdk-descriptor-huge": ("vmdk", changed(VMDK, (36, U64, (1 << 64) - 1)), "descriptor claims"),
    "vmdk-descriptor-far": ("vmdk", changed(VMDK, (28, U64, (1 << 64) - 1)), "past the end"),
    "vmdk-descriptor-behind": ("vmdk", changed(VMDK, (28, U64, 1 << 30)), "inside its descriptor"),
    "vmdk-directory-far": ("vmdk", changed(VMDK, (56, U64, (1 << 64) - 2)), "past the end"),
    "vmdk-directory-behind": ("vmdk", changed(VMDK, (56, U64, 1 << 30)), "inside its grain directory"),
    "vmdk-directory-at-end": ("vmdk", changed(VMDK, (56, U64, (1 << 64) - 1)), "does not end in a footer"),
    "vmdk-table-in-header": ("vmdk", changed(VMDK, (GRAIN_TABLE - 512, U32, 0xFFFFFFFF)), "past the end"),
    "vmdk-table-in-descriptor": ("vmdk", changed(VMDK, (GRAIN_TABLE - 512, U32, 2)), "claimed twice"),
    "vmdk-grain-in-maps": ("vmdk", changed(VMDK, (GRAIN_TABLE, U32, 24)), "in the header or the maps"),
    "vmdk-grain-one": ("vmdk", changed(VMDK, (GRAIN_TABLE, U32, 1)), "in the header or the maps"),
    "vmdk-grain-twice": ("vmdk", changed(VMDK, (GRAIN_TABLE, U32, 256)), "claimed twice"),
    "vmdk-grain-half-over": ("vmdk", changed(VMDK, (GRAIN_TABLE, U32, 200)), "claimed twice"),
    "vmdk-grain-past-the-end": ("vmdk", changed(VMDK, (GRAIN_TABLE, U32, 0xFFFFFFFF)), "past the end"),
    "vmdk-behind-the-disk": (
        "vmdk",
        changed(VMDK, (GRAIN_TABLE + 64, U32, 640)),
        "behind the end of the disk",
    ),
    "vmdk-header-truncated": ("vmdk", VMDK[:511], "inside its header"),
    "vmdk-descriptor-truncated": ("vmdk", VMDK[:1024], "inside its descriptor"),
    "vmdk-directory-truncated": ("vmdk", VMDK[:13314], "inside its grain directory"),
    "vmdk-truncated": ("vmdk", VMDK[:-1], "past the end"),
    "vmdk-stream-truncated": ("vmdk", STREAM[:-1], "truncated"),
    "vmdk-stream-without-footer": ("vmdk", STREAM[:-1536], "truncated"),
    "vmdk-footer-no-directory": (
        "vmdk",
        changed(STREAM, (len(STREAM) - 1024 + 56, U64, (1 << 64) - 1)),
        "footer has no directory",
    ),
    "vmdk-footer-size": ("vmdk", changed(STREAM, (len(STREAM) - 1024 + 12, U64, 4096)), "footer contradicts"),
    "vmdk-marker": ("vmdk", changed(STREAM, (128 * 512, U64, 128)), "marked as another"),
    "vmdk-marker-long": ("vmdk", changed(STREAM, (128 * 512 + 8, U32, 0xFFFFFFFF)), "claims 4294967295"),
    "vmdk-marker-empty": ("vmdk", changed(STREAM, (128 * 512 + 8, U32, 0)), "claims 0"),
    "vmdk-marker-cut": ("vmdk", changed(STREAM, (128 * 512 + 8, U32, 100)), "shorter than it must be"),
    "vmdk-stream-rubbish": ("vmdk", changed(STREAM, (128 * 512 + 12, U64, 0)), "is corrupt"),
}


@pytest.mark.parametrize("lie", LIES)
def test_each_lie_has_its_sentence(tmp_path: Path, lie: str) -> None:
    form, data, why = LIES[lie]
    with pytest.raises(ImageRefused, match=why):
        raise ImageRefused(path="", why=refused(tmp_path / f"disk.{form}", data))


DESCRIPTORS = {
    "absolute": ('RW 2048 FLAT "/etc/passwd" 0', "an extent that is not this file"),
    "sparse": ('RW 2048 SPARSE "/etc/passwd"', "an extent that is not this file"),
    "upwards": ('RW 2048 SPARSE "..\\secret"', "an extent that is not this file"),
    "device": ('RW 2048 VMFSRDM "disk.vmdk"', "an extent that is not this file"),
    "two": ('RW 2048 SPARSE "disk.vmdk"\nRW 9 FLAT "/etc/passwd" 0', "2 extents"),
    "two-lower-case": ('RW 2048 SPARSE "disk.vmdk"\nrw 9 FLAT "/etc/passwd" 0', "2 extents"),
    "none": ("# nothing", "0 extents"),
    "size": ('RW 4096 SPARSE "disk.vmdk"', "contradicts its header on the size"),
}


@pytest.mark.parametrize("name", DESCRIPTORS)
def test_foreign_extents(tmp_path: Path, name: str) -> None:
    line, why = DESCRIPTORS[name]
    text = descriptor(2048).replace('RW 2048 SPARSE "any name.vmdk"', line)
    with pytest.raises(ImageRefused, match=why):
        opened(tmp_path / "disk.vmdk", stream_vmdk(MIB, {0: b"x"}, text))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (descriptor(2048, parent="12345678"), "a child of another disk"),
        (descriptor(2048, more='parentFileNameHint="/etc/passwd"'), "a child of another disk"),
        (descriptor(2048, more="parentCID=ffffffff"), "'parentcid' twice"),
        (descriptor(2048, more='encryptionKeys = "vmware:key/list"'), "encrypted"),
        (descriptor(2048, "twoGbMaxExtentSparse"), "'twogbmaxextentsparse' is neither"),
        (descriptor(2048, "monolithicFlat"), "'monolithicflat' is neither"),
        ("", "'' is neither"),
        ("\udcff", "'' is neither"),
    ],
)
def test_descriptors_that_need_more(tmp_path: Path, text: str, why: str) -> None:
    text = text.encode("latin-1", "replace").decode("latin-1")
    with pytest.raises(ImageRefused, match=why):
        opened(tmp_path / "disk.vmdk", stream_vmdk(MIB, {0: b"x"}, text))


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("disk.vdi", VMDK, "its name says vdi, but its first bytes say vmdk"),
        ("disk.QCOW2", b"raw", "its name says qcow2"),
        ("disk.vmdk", bytes(MIB), "its name says vmdk"),
        ("disk.qcow", QCOW2[:3], "its name says qcow2"),
        ("disk", b"vhdxfile" + bytes(99), "VHDX"),
        ("disk.vhd", b"conectix" + bytes(99), "VHD image"),
        ("disk.img", b"LUKS\xba\xbe\0\2", "encrypted"),
        ("disk.img.gz", b"\x1f\x8b\x08\0", "gunzip"),
        ("disk.img", b"# Disk DescriptorFile\nversion=1\n", "text descriptor"),
    ],
)
def test_names_and_signatures(tmp_path: Path, name: str, data: bytes, why: str) -> None:
    with pytest.raises(ImageRefused, match=why):
        opened(tmp_path / name, data)


def test_a_descriptor_may_say_more(tmp_path: Path) -> None:
    """The file was renamed since, as exported ones always are; nobody opens the name."""
    text = descriptor(2048, more='ddb.comment = "one"\nddb.comment = "two"').replace("RW ", "RDONLY ")
    image = opened(tmp_path / "disk.vmdk", stream_vmdk(MIB, {0: b"x"}, text.replace("\n", "\r\n")))
    assert image.read(0, 1) == b"x"
    image.close()


def test_a_container_without_its_suffix_is_known_by_its_signature(tmp_path: Path) -> None:
    for form, data in {"vdi": VDI, "qcow2": QCOW2, "vmdk": VMDK}.items():
        image = opened(tmp_path / "disk.img", data)
        assert image.format == form
        image.close()


@pytest.mark.parametrize("pack", ["deflate", "zstd", "vmdk"])
def test_a_bomb_yields_no_more_than_its_block(tmp_path: Path, pack: str) -> None:
    """64 MiB of zeros in one compressed block: what is read of it is the block, and no more is kept."""
    bomb = bytes(64 * MIB)
    if pack == "vmdk":
        packed = stream_vmdk(MIB, {0: bomb})
    else:
        file = bytearray(qcow2(10 * KIB64, {0: b"x"}, pack=pack))
        raw = deflated(bomb) if pack == "deflate" else zstandard.compress(bomb, 3)
        file[5 * KIB64 :] = raw.ljust(-(-len(raw) // 512) * 512, b"\0")
        sectors = min(-(-len(raw) // 512) - 1, 255)
        struct.pack_into(B64, file, L2, 1 << 62 | sectors << 54 | 5 * KIB64)
        packed = bytes(file)
    image = opened(tmp_path / "bomb", packed)
    tracemalloc.start()
    try:
        assert image.read(0, KIB64) == bytes(KIB64)
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()
        image.close()


def test_maps_that_name_each_other_cost_nothing(tmp_path: Path) -> None:
    """4 million L1 entries for one L2 table would be 34 thousand million clusters."""
    entries = (32 * MIB) // 8
    file = bytearray(qcow2(10 * KIB64, {0: b"x"}))
    table_at = -(-len(file) // KIB64) * KIB64
    struct.pack_into(">IQ", file, 36, entries, table_at)
    data = bytes(file).ljust(table_at, b"\0") + struct.pack(B64, L2) * entries
    with pytest.raises(ImageRefused, match="more tables than it has room for"):
        opened(tmp_path / "disk.qcow2", data)


# --- noise -------------------------------------------------------------------------------

Change = tuple[int, bytes]
INTERESTING = [0, 1, 2, 511, 512, 513, 4096, KIB64, MIB, (1 << 31) - 1, 1 << 31, (1 << 32) - 2, (1 << 32) - 1]


def changes(hot: list[tuple[int, int]]) -> st.SearchStrategy[list[Change]]:
    """Some fields overwritten, most of them in `hot` (start, end): the headers and maps."""
    places = st.one_of([st.integers(a, b - 1) for a, b in hot])
    numbers = st.one_of(st.sampled_from(INTERESTING), st.integers(0, (1 << 64) - 1))
    values = st.one_of(
        st.binary(min_size=1, max_size=16),
        st.builds(lambda n, code: struct.pack(code, n % (1 << 8 * struct.calcsize(code))), numbers,
                  st.sampled_from([U16, U32, U64, B32, B64])),
    )  # fmt: skip
    return st.lists(st.tuples(places, values), min_size=0, max_size=4)


def survives(path: Path, good: bytes, edits: list[Change], length: int | None) -> bool:
    """Whether the mutant is read at all; then it must be read whole, and rebuilt exactly."""
    file = bytearray(good)
    for at, value in edits:
        file[at : at + len(value)] = value
    data = bytes(file[:length])
    if not data:
        return False
    path.write_bytes(data)
    try:
        image = open_image(path)
    except ImageRefused:
        return False
    try:
        plain = sum(length for _, length in image.extents())
        assert plain <= len(data) * 64
        for offset, span in image.extents():
            for at in range(offset, offset + span, MIB):
                want = min(MIB, offset + span - at)
                assert len(image.read(at, want)) == want
        tail = min(image.size, 4096)
        assert len(image.read(image.size - tail, tail)) == tail
        if image.exact:
            assert rebuilt(image) == data
    except ImageRefused:
        assert not image.exact, "what can be known from headers and maps is refused at once"
        return False
    finally:
        image.close()
    return True


MUTANTS: dict[str, tuple[bytes, list[tuple[int, int]]]] = {
    "vdi": (VDI, [(64, 84), (340, 456), (MIB, MIB + 16)]),
    "qcow2": (QCOW2, [(0, 72), (72, 176), (L1, L1 + 8), (L2, L2 + 88)]),
    "qcow2-v2": (QCOW2_V2, [(4, 72), (L1, L1 + 8), (L2, L2 + 88)]),
    "deflate": (DEFLATE, [(4, 112), (L2, L2 + 88), (5 * KIB64, len(DEFLATE))]),
    "zstd": (ZSTD, [(4, 112), (L2, L2 + 88), (5 * KIB64, len(ZSTD)), (5 * KIB64, 5 * KIB64 + 20)]),
    "vmdk": (VMDK, [(0, 80), (512, 900), (GRAIN_TABLE - 512, GRAIN_TABLE + 80)]),
    "stream": (STREAM, [(0, 80), (512, 800), (128 * 512, 128 * 512 + 40), (len(STREAM) - 6000, len(STREAM))]),
}


@pytest.mark.parametrize("kind", MUTANTS)
def test_noise_is_refused_or_read_and_nothing_else(tmp_path: Path, kind: str) -> None:
    good, hot = MUTANTS[kind]
    path = tmp_path / "disk"
    tally = {True: 0, False: 0}

    @settings(max_examples=350, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(edits=changes(hot), length=st.one_of(st.none(), st.none(), st.integers(1, len(good))))
    @example(edits=[], length=None)
    def run(edits: list[Change], length: int | None) -> None:
        tally[survives(path, good, edits, length)] += 1

    run()
    assert tally[True] >= 1, "the good image itself"
    assert tally[False] >= 100, "the noise reaches what matters"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(min_size=1, max_size=2000),
    magic=st.sampled_from([b"QFI\xfb", b"KDMV", b"# Disk DescriptorFile", b""]),
)
def test_rubbish_behind_a_signature(tmp_path: Path, data: bytes, magic: bytes) -> None:
    survives(tmp_path / "disk", magic + data, [], None)
