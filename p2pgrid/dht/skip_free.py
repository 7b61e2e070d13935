"""Read a disk as if the blocks that its ext4 file systems have freed were zero.

Pure.  What a guest deleted still lies on its disk; nobody reads it, and it need not travel.
The file system stays what it was: only blocks that its bitmaps call free change (`ext4_free.py`).
Partitions with anything else in them are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from p2pgrid.dht.ext4_free import Ext4, looks_like_ext
from p2pgrid.dht.image import Image
from p2pgrid.dht.manifest import Segment
from p2pgrid.dht.partitions import partitions
from p2pgrid.errors import ImageRefused


class SkipFree:
    """An image without what is free in it.  Thread-safe like `image`, which stays its caller's."""

    exact = False

    def __init__(self, image: Image, progress: Callable[[int, int], None] | None = None) -> None:
        """Look at all bitmaps; `progress` is told that nothing is done yet, and may raise.

        Raises `ImageRefused` where no file system is found, or one whose bitmaps are in doubt.
        """
        self.format = image.format
        self.size = image.size
        self.file_size = image.file_size
        self._image = image
        self._tell = progress or (lambda done, total: None)
        parts = partitions(self._look, image.size, self._need)
        whole = looks_like_ext(self._look, 0, image.size)
        self._need(not (parts and whole), "it has partitions, and a file system in their place")
        spans = [span for span in parts or [(0, image.size)] if looks_like_ext(self._look, *span)]
        self._need(bool(spans), "it has no ext4 file system that could tell what is free")
        self._systems = [Ext4(self._look, *span, self._need) for span in spans]
        self.freed = sum(system.free_bytes for system in self._systems)
        self._tell = lambda done, total: None  # from now on threads look, each at what it reads

    def _look(self, offset: int, length: int) -> bytes:
        self._tell(0, self.size)
        self._need(offset + length <= self.size, "what its file system says lies behind its end")
        return self._image.read(offset, length)

    def _need(self, ok: bool, why: str) -> None:
        if not ok:
            raise self.refusal(f"nothing can be left out of it: {why}")

    def extents(self) -> Iterator[tuple[int, int]]:
        return self._image.extents()

    def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, view: memoryview) -> None:
        free = [span for system in self._systems for span in system.free(offset, len(view))]
        if free != [(offset, len(view))]:
            self._image.read_into(offset, view)
        for start, length in free:
            view[start - offset : start - offset + length] = bytes(length)

    def segments(self) -> Iterator[Segment]:
        raise AssertionError("the file itself is not kept")

    def check_unchanged(self) -> None:
        self._image.check_unchanged()

    def refusal(self, why: str) -> ImageRefused:
        return self._image.refusal(why)

    def close(self) -> None:
        self._image.close()
