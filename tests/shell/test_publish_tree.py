"""Does a folder come back as it was, and does nobody's tree write outside of its folder?"""

from __future__ import annotations

import itertools
import os
import random
import stat
from pathlib import Path

import attrs
import pytest
from nacl.signing import SigningKey

from p2pgrid.dht.manifest import CHUNK_SIZE, File, Tree, signed
from p2pgrid.dht.publish import publish_tree
from p2pgrid.dht.restore import restore_tree
from p2pgrid.dht.store import Store
from p2pgrid.errors import BadObject, Conflict, Misused, NotFound, Refused, Temporary
from tests.small_disks import KEY, chunk

FILES = {
    "result.txt": b"42\n",
    "empty": b"",
    "a/deep/er/file": chunk(1, 3 * 1000),
    "a/big": chunk(2) + chunk(3) + chunk(4, 99),
    "a.b": chunk(3),
    "zeros": bytes(3 * CHUNK_SIZE + 5),
    "naïve 名前": b"x",
    "run.sh": b"#!/bin/sh\n",
}


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", min_free=0) as store:
        yield store


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    for path, data in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    (folder / "run.sh").chmod(0o755)
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_comes_back(store, folder, tmp_path):
    put = publish_tree(store, folder, KEY)
    assert put.size == sum(map(len, FILES.values()))
    assert publish_tree(store, folder, KEY).datum == put.datum
    assert store.held()[0].bytes == put.wire_bytes
    tree = restore_tree(store, put.datum, tmp_path / "out")
    assert [f.path for f in tree.files] == sorted(FILES)
    steps = []
    restore_tree(store, put.datum, tmp_path / "told", progress=lambda *step: steps.append(step))
    assert steps == sorted(steps)
    assert steps[-1] == (put.size, put.size)
    assert len(steps) >= put.chunks
    assert everything(tmp_path / "out") == FILES
    for path in FILES:
        mode = stat.S_IMODE((tmp_path / "out" / path).stat().st_mode)
        assert mode == (0o755 if path == "run.sh" else 0o644)


def test_folders_of_little_come_back(store, tmp_path):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file").touch()
    for name, files in (("nothing", {}), ("empty", {"file": b""})):
        put = publish_tree(store, tmp_path / name, KEY)
        assert (put.content, put.size, put.chunks) == (None, 0, 0)
        restore_tree(store, put.datum, tmp_path / f"{name} again")
        assert everything(tmp_path / f"{name} again") == files
    assert len(store.held()) == 2
    for held in store.held():
        store.drop(held.datum)
    assert not list((store.root / "packs").iterdir())


def test_a_folder_of_zeros_has_a_content_and_no_chunk(store, tmp_path):
    (tmp_path / "zeros").mkdir()
    (tmp_path / "zeros" / "file").write_bytes(bytes(CHUNK_SIZE + 1))
    put = publish_tree(store, tmp_path / "zeros", KEY)
    assert (put.size, put.chunks, put.holes, put.wire_bytes) == (CHUNK_SIZE + 1, 0, 2, 0)
    restore_tree(store, put.datum, tmp_path / "out")
    assert everything(tmp_path / "out") == {"file": bytes(CHUNK_SIZE + 1)}
    assert publish_tree(store, tmp_path / "zeros", KEY).datum == put.datum


def test_links_and_special_files_are_left_out(store, folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (folder / "link").symlink_to(secret)
    (folder / "folder link").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    put = publish_tree(store, folder, KEY)
    restore_tree(store, put.datum, tmp_path / "out")
    assert everything(tmp_path / "out") == FILES


def test_names_that_cannot_travel_are_refused(store, folder):
    (folder / "back\\slash").touch()
    with pytest.raises(Misused):
        publish_tree(store, folder, KEY)
    with pytest.raises(Misused):
        publish_tree(store, folder / "result.txt", KEY)
    assert store.held() == []


def test_a_file_that_changes_while_it_is_read_is_refused(store, folder):
    for change in (lambda f: f.write_bytes(b"longer than it was"), lambda f: f.write_bytes(b"")):
        big = folder / "zz last"
        big.write_bytes(chunk(5))
        early = [big]

        def meddle(done, total, early=early, change=change):
            for file in early:
                change(file)

        # The first batch is read before the last file when there are more chunks than one batch.
        (folder / "y").write_bytes(b"".join(chunk(-i, CHUNK_SIZE) for i in range(1, 20)))
        with pytest.raises(Temporary):
            publish_tree(store, folder, KEY, meddle)
    assert store.held() == []


def test_a_fresh_folder_or_none(store, folder, tmp_path):
    put = publish_tree(store, folder, KEY)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "file").touch()
    for name in ("full", "link", "file"):
        with pytest.raises(Conflict):
            restore_tree(store, put.datum, tmp_path / name)
    assert everything(tmp_path / "full") == {"mine": b"mine"}
    restore_tree(store, put.datum, tmp_path / "empty")
    assert everything(tmp_path / "empty") == FILES
    with pytest.raises(Refused):
        restore_tree(store, put.datum, tmp_path / "other", most=put.size - 1)
    shelf = store.shelf(store.held()[0].pack)
    (store.root / "packs" / str(shelf.pack) / "frames").write_bytes(bytes(shelf.size))
    shelf.verify()
    with pytest.raises(NotFound):
        restore_tree(store, put.datum, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert not list(tmp_path.glob(".p2pgrid-*"))


# --- escapes ---------------------------------------------------------------------------

STEPS = [
    "..",
    ".",
    "",
    "/",
    "a",
    "~",
    "...",
    "\\",
    "..\\..",
    "\0",
    "C:",
    "\n",
    "%2e%2e",
    "\udc80",
    "\u202e",
    "x" * 256,
]


def corpus() -> list[list[str]]:
    """Paths that a hostile putter might try, alone and in pairs that build on each other."""
    chance = random.Random(1)
    joined = ["/".join(steps) for n in (1, 2, 3) for steps in itertools.product(STEPS, repeat=n)]
    alone = [[path] for path in chance.sample(joined, 220)]
    pairs = [[*chance.sample(joined, 2), "a/b/c"] for _ in range(60)]
    by_hand = [
        ["/etc/passwd"], ["//etc/passwd"], ["../escaped"], ["a/../../escaped"], ["a/b/../../../escaped"],
        ["./../escaped"], [".."], ["."], [""], ["a/"], ["/"], ["a//b"], ["a/./b"], ["a", "a"], ["a", "a/b"],
        ["a/b", "a"], ["a/b/c", "a/b"], ["A", "a"], ["x/" * 40 + "y"], ["x" * 1025], ["é" * 200],
        ["nul\0byte"], ["\x1b]0;title\x07"], ["\x9b31m"], ["\ud800"], ["con"], ["~/.ssh/authorized_keys"],
        ["-rf"], ["$(id)"],
    ]  # fmt: skip
    return [*alone, *pairs, *by_hand]


def test_the_corpus_is_large_enough():
    assert len(corpus()) >= 300


def _forged(paths: list[str], good: Tree) -> bytes | None:
    """A validly signed tree with these paths; None where they cannot even be spelled in CBOR."""
    sizes = [good.files[0].size, *[0] * (len(paths) - 1)]
    files = tuple(File(path, size, True) for path, size in zip(paths, sizes, strict=True))
    try:
        return signed(attrs.evolve(good, files=files), SigningKey(bytes(32))).encode()
    except UnicodeEncodeError:
        return None


def test_no_tree_writes_outside_of_its_folder(store, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"harm")
    put = publish_tree(store, source, KEY)
    good = Tree.decode(store.get_object(put.datum))
    yard = tmp_path / "yard"
    written = refused = 0
    for number, paths in enumerate(corpus()):
        data = _forged(paths, good)
        if data is None:
            refused += 1
            continue
        out = yard / str(number) / "out"
        out.parent.mkdir(parents=True)
        datum = store.put_object(data)
        try:
            restore_tree(store, datum, out)
            written += 1
            assert {p.relative_to(out).as_posix() for p in out.rglob("*") if not p.is_dir()} == set(paths)
        except BadObject:
            refused += 1
            assert not out.exists()
        assert {p.name for p in out.parent.iterdir()} <= {"out"}
    assert {p.name for p in yard.iterdir()} <= {str(n) for n in range(len(corpus()))}
    assert {p.name for p in tmp_path.iterdir()} == {"source", "store", "yard"}
    assert refused > 200
    assert written > 5


@pytest.mark.parametrize("paths", [["a", "a"], ["a", "a/b"], ["a/b", "a"]])
def test_the_writer_does_not_lean_on_the_decoder(paths, store, tmp_path, monkeypatch):
    """Were such a tree ever decoded, its files would still not be written over each other."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"harm")
    put = publish_tree(store, source, KEY)
    good = Tree.decode(store.get_object(put.datum))
    files = (File(paths[0], 4, False), File(paths[1], 0, False))
    monkeypatch.setattr(Tree, "decode", lambda data: attrs.evolve(good, files=files))
    with pytest.raises(BadObject):
        restore_tree(store, put.datum, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_planted_on_the_way_is_not_followed(store, tmp_path, monkeypatch):
    """Somebody with the same user swaps a folder for a link while the tree is written."""
    source = tmp_path / "source" / "a"
    source.mkdir(parents=True)
    (source / "file").write_bytes(b"harm")
    put = publish_tree(store, tmp_path / "source", KEY)
    outside = tmp_path / "outside"
    outside.mkdir()
    mkdir = os.mkdir

    def planted(path, mode=0o777, *, dir_fd=None):
        if path == "a":
            os.symlink(outside, path, dir_fd=dir_fd)
        else:
            mkdir(path, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", planted)
    with pytest.raises(BadObject):
        restore_tree(store, put.datum, tmp_path / "out")
    assert not list(outside.iterdir())
