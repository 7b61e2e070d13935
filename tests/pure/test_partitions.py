"""Are partitions found where a table says, and is a table that contradicts itself refused?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.dht.partitions import partitions
from p2pgrid.errors import ImageRefused
from tests.disk_tables import SECTOR, gpt, mbr, sector

SIZE = 4096 * SECTOR


def found(disk: dict[int, bytes], size: int = SIZE) -> list[tuple[int, int]]:
    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= size, "outside of the disk"
        plain = bytearray(length)
        for at, data in disk.items():
            low, high = max(at, offset), min(at + len(data), offset + length)
            if low < high:
                plain[low - offset : high - offset] = data[low - at : high - at]
        return bytes(plain)

    def need(ok: bool, why: str) -> None:
        if not ok:
            raise ImageRefused(path="disk", why=why)

    return partitions(read, size, need)


@st.composite
def layouts(draw):
    """Spans that lie apart, with a sector between them for a link of the chain."""
    edges = draw(st.lists(st.integers(40, 4000), min_size=2, max_size=8, unique=True).map(sorted))
    pairs = zip(edges[::2], edges[1::2], strict=False)
    return [((a + 1) * SECTOR, (b - a - 1) * SECTOR) for a, b in pairs if b - a > 1]


@given(layouts())
def test_all_tables_tell_the_same(spans):
    entries = [(0x83, *span) for span in spans]
    assert found(mbr(entries)) == spans
    assert found(gpt(SIZE, spans)) == spans
    if len(spans) > 1:
        extended = spans[1][0] - SECTOR
        assert found(mbr(entries[:1], entries[1:], extended)) == spans


def test_a_disk_without_a_table_has_none():
    assert found({}) == []
    assert found({0: bytes(510) + b"\x55\xaa"}) == []
    assert found({0: b"\x55\xaa"}, 512) == []
    code = bytearray(sector([(0x83, SECTOR, SECTOR)]))
    code[446] = 0x33  # neither active nor inactive
    assert found({0: bytes(code)}) == []


def broken_gpt(at: int) -> dict[int, bytes]:
    disk = gpt(SIZE, [(40 * SECTOR, 8 * SECTOR)])
    place = max(offset for offset in disk if offset <= at)
    data = bytearray(disk[place])
    data[at - place] ^= 1
    return {**disk, place: bytes(data)}


@pytest.mark.parametrize(("disk", "why"), [
    (mbr([(0x83, SECTOR, SIZE)]), "inside the disk"),
    (mbr([(0x83, SECTOR, 9 * SECTOR), (0x83, 9 * SECTOR, SECTOR)]), "overlap"),
    (mbr([(0x83, 0, 9 * SECTOR)]), "inside the disk"),
    (mbr([(0x05, 2 * SIZE, SECTOR)]), "inside the disk"),
    ({0: sector([(0x05, 9 * SECTOR, SECTOR)]), 9 * SECTOR: sector([(0x05, 0, SECTOR)])}, "circle"),
    ({0: sector([(0x05, 9 * SECTOR, SECTOR)]),
      **{i * SECTOR: sector([(0x05, (i - 8) * SECTOR, SECTOR)]) for i in range(9, 4000)}}, "128 logical"),
    ({0: sector([(0xEE, SECTOR, SECTOR)])}, "is not there"),
    (broken_gpt(SECTOR), "is not there"),
    (broken_gpt(SECTOR + 60), "its GPT does not hold"),
    (broken_gpt(2 * SECTOR + 33), "entries does not hold"),
], ids=lambda value: value if isinstance(value, str) else "disk")  # fmt: skip
def test_contradictions_are_refused(disk, why):
    with pytest.raises(ImageRefused, match=why):
        found(disk)


@given(st.integers(0, 4 * SECTOR), st.binary(min_size=1, max_size=16), st.booleans())
def test_noise_is_refused_or_read(at, noise, new):
    spans = [(40 * SECTOR, 80 * SECTOR), (200 * SECTOR, 80 * SECTOR)]
    entries = [(0x83, *span) for span in spans]
    disk = gpt(SIZE, spans) if new else mbr(entries[:1], entries[1:], 199 * SECTOR)
    try:
        result = found({**disk, at: noise})
    except ImageRefused:
        return
    assert all(min(start, length) > 0 and start + length <= SIZE for start, length in result)
