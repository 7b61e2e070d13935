"""Read a user's disk image, whatever container it is in, and write fresh ones.

The signature decides the format, not the name: VDI, qcow2, VMDK, and raw for whatever is
none of them.  A name that promises a container which is not there is refused, and so are
containers that we know and do not read: taken for raw they would be a disk of rubbish.

Nothing here opens a second file, whatever the image says.  `docs/reference/images.md` lists
what is read, what is refused and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Protocol

from p2pgrid.dht import qcow2, raw, vdi, vmdk
from p2pgrid.dht.container import CONVERT, SECTOR, Mapped, Source
from p2pgrid.dht.manifest import FORMATS, SIZE_MAX, Segment
from p2pgrid.errors import ImageRefused, Misused

__all__ = ["Image", "ImageRefused", "open_image", "write_image"]


class Image(Protocol):
    """A disk image, open for reading; thread-safe but for `close`."""

    format: str
    """One of `FORMATS`."""
    size: int
    """Bytes of guest space."""
    exact: bool
    """Whether the file can be put together again from `segments`; not where it is compressed."""
    file_size: int
    """Bytes of the container file."""
    freed: int
    """Bytes of the guest's that read as zeros here though they are something else (`skip_free.py`)."""

    def extents(self) -> Iterator[tuple[int, int]]:
        """(offset, length) that may hold data, ascending and disjoint; ends in `check_unchanged`."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Guest bytes; zero where nothing is allocated.  Raises `ImageRefused` where they do not decode."""
        ...

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with guest bytes, as `read` gives them."""
        ...

    def segments(self) -> Iterator[Segment]:
        """The container file in file order, only where `exact`; ends in `check_unchanged`."""
        ...

    def check_unchanged(self) -> None:
        """Raises `ImageRefused` if the file was written to since it was opened."""
        ...

    def refusal(self, why: str) -> ImageRefused:
        """The error that names this file."""
        ...

    def close(self) -> None: ...


_OPEN: dict[str, Callable[[Source], Mapped]] = {
    "raw": raw.open_raw,
    "vdi": vdi.open_vdi,
    "qcow2": qcow2.open_qcow2,
    "vmdk": vmdk.open_vmdk,
}
_SUFFIXES = {".vdi": "vdi", ".qcow2": "qcow2", ".qcow": "qcow2", ".vmdk": "vmdk"}
_FOREIGN = (
    (b"vhdxfile", f"it is a VHDX image, which is not read here; {CONVERT}"),
    (b"conectix", f"it is a VHD image, which is not read here; {CONVERT}"),
    (b"QED\0", f"it is a QED image, which is not read here; {CONVERT}"),
    (b"COWD", f"it is an ESX sparse extent, which is not read here; {CONVERT}"),
    (b"LUKS\xba\xbe", f"it is encrypted (LUKS); decrypt it first, or {CONVERT}"),
    (b"\x1f\x8b\x08", "it is a gzip file; unpack it first (gunzip)"),
    (b"\xfd7zXZ\0", "it is an xz file; unpack it first (unxz)"),
    (b"\x28\xb5\x2f\xfd", "it is a zstd file; unpack it first (unzstd)"),
    (b"PK\x03\x04", "it is a zip file; unpack it first (unzip)"),
)


def open_image(path: Path) -> Image:
    """Read all headers and maps of the image at `path`; the caller closes it.

    Symbolic links are followed.  Raises `NotFound`, `Misused` (not a regular file, unreadable, empty)
    and `ImageRefused`.
    """
    with ExitStack() as stack:
        source = Source(path)
        stack.callback(source.close)
        image = _OPEN[_format(source)](source)
        stack.pop_all()
        return image


def _format(source: Source) -> str:
    head = source.pread(0, min(source.file_size, SECTOR))
    form = "raw"
    if head.startswith(qcow2.SIGNATURE):
        form = "qcow2"
    elif head.startswith(vmdk.SIGNATURE) or head.lower().startswith(b"# disk descriptorfile"):
        form = "vmdk"
    elif head[vdi.SIGNATURE_AT : vdi.SIGNATURE_AT + 4] == vdi.SIGNATURE.to_bytes(4, "little"):
        form = "vdi"
    promised = _SUFFIXES.get(source.path.suffix.lower(), form)
    source.need(
        form == promised,
        f"its name says {promised}, but its first bytes say {form}; rename it if it is {form}",
    )
    if form == "raw":
        for signature, why in _FOREIGN:
            source.need(not head.startswith(signature), why)
    return form


def write_image(
    form: str,
    size: int,
    extents: Iterable[tuple[int, int]],
    read: Callable[[int, int], bytes],
    out: BinaryIO,
) -> None:
    """Write a fresh container of `size` guest bytes to `out`, an empty file that can seek.

    `extents` as of `Image`; `read` is asked for whole MiB (the last one may be short), ascending, and
    what is all zero is not allocated.  All but raw count in sectors: there `size` is rounded up.
    Raises `Misused`, and what `read` and `out` raise (a half-written `out` is the caller's).
    """
    if form not in FORMATS:
        raise Misused(why=f"{form!r} is no image format; there are {', '.join(FORMATS)}")
    assert 0 < size <= SIZE_MAX
    if form == "raw":
        raw.write_raw(size, extents, read, out)
        return
    padded = -(-size // SECTOR) * SECTOR

    def read_padded(offset: int, length: int) -> bytes:
        return read(offset, min(length, size - offset)).ljust(length, b"\0")

    write = {"vdi": vdi.write_vdi, "qcow2": qcow2.write_qcow2, "vmdk": vmdk.write_vmdk}[form]
    write(padded, extents, read_padded, out)
