"""Is a disk that was put before recognised for the price of its names, and no other taken for it?"""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pgrid.dht import again, press
from p2pgrid.dht.manifest import CHUNK_SIZE
from p2pgrid.dht.publish import publish_disk
from p2pgrid.dht.restore import restore_disk
from p2pgrid.dht.store import Store
from tests.small_disks import KEY, chunk

COUNT = 150
OLD = b"".join(chunk(1 + seed) for seed in range(COUNT))
LAST = (COUNT - 1) * CHUNK_SIZE
NEW = OLD[:LAST] + chunk(999)
"""Differs in a chunk that no sample has."""


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", min_free=0) as store:
        yield store


def image(folder: Path, plain: bytes) -> Path:
    (folder / "disk.raw").write_bytes(plain)
    return folder / "disk.raw"


@pytest.fixture
def named_only(monkeypatch):
    """Neither frames nor a likeness are made."""

    def enough():
        monkeypatch.setattr(press, "compress", None)
        monkeypatch.setattr("p2pgrid.dht.likeness.Likeness.of", None)
        monkeypatch.setattr("p2pgrid.dht.likeness.Likeness.load", None)

    return enough


def test_a_full_pack_is_recognised(store, tmp_path, named_only):
    path = image(tmp_path, OLD)
    first = publish_disk(store, path, KEY)
    named_only()
    second = publish_disk(store, path, KEY)
    assert (second.datum, second.wire_bytes, second.parent) == (first.datum, first.wire_bytes, None)


def test_a_delta_is_recognised(store, tmp_path, named_only):
    old = publish_disk(store, image(tmp_path, OLD), KEY)
    path = image(tmp_path, NEW)
    first = publish_disk(store, path, KEY)
    assert first.parent == old.content
    named_only()
    second = publish_disk(store, path, KEY)
    assert second.datum == first.datum
    assert (second.parent, second.delta_bytes, second.wire_bytes) == (
        first.parent,
        first.delta_bytes,
        first.wire_bytes,
    )


def test_one_chunk_that_no_sample_has_makes_another_disk(store, tmp_path):
    old = publish_disk(store, image(tmp_path, OLD), KEY, parent=None)
    new = publish_disk(store, image(tmp_path, NEW), KEY, parent=None)
    assert new.content != old.content
    assert new.parent is None
    restore_disk(store, new.datum, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == NEW


def test_the_same_chunks_in_another_order_are_another_disk(store, tmp_path):
    old = publish_disk(store, image(tmp_path, OLD), KEY, parent=None)
    turned = OLD[CHUNK_SIZE:] + OLD[:CHUNK_SIZE]
    new = publish_disk(store, image(tmp_path, turned), KEY, parent=None)
    assert (new.content != old.content, new.chunks) == (True, old.chunks)
    restore_disk(store, new.datum, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == turned


def test_who_asks_for_a_full_pack_is_not_given_the_delta(store, tmp_path):
    publish_disk(store, image(tmp_path, OLD), KEY)
    delta = publish_disk(store, image(tmp_path, NEW), KEY)
    full = publish_disk(store, image(tmp_path, NEW), KEY, parent=None)
    assert (delta.parent is None, full.parent is None) == (False, True)
    assert publish_disk(store, image(tmp_path, NEW), KEY, parent=delta.parent).datum == delta.datum
    assert publish_disk(store, image(tmp_path, NEW), KEY).datum == full.datum


def test_an_incomplete_pack_is_pressed_again(store, tmp_path):
    path = image(tmp_path, OLD)
    first = publish_disk(store, path, KEY)
    (shelf,) = store.shelves()
    with (shelf.folder / "frames").open("r+b") as frames:
        frames.write(b"rot")
    assert shelf.verify() == [0]
    assert publish_disk(store, path, KEY).datum == first.datum
    assert shelf.complete
    assert shelf.verify() == []


def test_the_sample_does_not_grow_with_the_disk(store, tmp_path, monkeypatch):
    publish_disk(store, image(tmp_path, OLD), KEY)
    looked: list[int] = []
    known_in = again.known_in

    def counted(store, key, size, positions, read, fits):
        return known_in(
            store, key, size, positions, lambda at, view: looked.append(at) or read(at, view), fits
        )

    monkeypatch.setattr("p2pgrid.dht.publish.known_in", counted)
    publish_disk(store, image(tmp_path, NEW), KEY, parent=None)
    assert len(looked) == 64
    assert LAST not in looked
