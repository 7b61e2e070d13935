"""Keep many digests in one buffer, and find one among them.

Pure.  A disk of 100 GiB has 409,600 chunks, each with a name and a frame's digest.  As `bytes` in tuples and
dicts they took 350 bytes a chunk; one after the other they take 32 each, and 8 to 16 for what finds them.

    Digests     one after the other
    Sparse      so many entries, of which few have a digest: a delta's
    Index       distinct digests in the order they came, and the place of each

An `Index` has a table of places, four bytes each, at least half of them free: a digest's place is where
its hash says, or in the next slot that was free (open addressing: Peterson, 1957).  The hash is Python's
own, keyed anew in each process, so that nobody can choose digests which all want the same slot.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar, overload

from p2pgrid.ids import DIGEST_SIZE

T = TypeVar("T")

_PIECE = 8192 * DIGEST_SIZE
"""Bytes that are copied to be cut up: slices of a `bytearray` are copied twice."""

Find = Callable[[bytes], int | None]
"""Where a digest stands, None where it does not."""


class Flat(Sequence[bytes]):
    """Digests that are made objects only when one asks for them.  A slice is a list."""

    __slots__ = ()

    @overload
    def __getitem__(self, at: int) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> list[bytes]: ...
    def __getitem__(self, at: int | slice) -> bytes | list[bytes]:
        if isinstance(at, slice):
            return [self._at(i) for i in range(len(self))[at]]
        return self._at(range(len(self))[at])

    @abstractmethod
    def _at(self, place: int) -> bytes: ...

    @abstractmethod
    def finder(self) -> Find:
        """Looks up the first place of a digest, in a table that lasts as long as what is returned."""


class Digests(Flat):
    """Digests one after the other in `packed`, which may grow at its end."""

    __slots__ = ("packed",)

    def __init__(self, packed: bytes | bytearray = b"") -> None:
        assert not len(packed) % DIGEST_SIZE
        self.packed = packed

    def __len__(self) -> int:
        return len(self.packed) // DIGEST_SIZE

    def __iter__(self) -> Iterator[bytes]:
        return map(self._at, range(len(self)))

    def _at(self, place: int) -> bytes:
        return bytes(self.packed[place * DIGEST_SIZE : (place + 1) * DIGEST_SIZE])

    def finder(self) -> Find:
        return Index(self).get


class Sparse(Flat):
    """`count` entries; those at `places` (ascending) have the digests of `told`, the others are empty."""

    __slots__ = ("_count", "_places", "_told")

    def __init__(self, count: int, places: Sequence[int], told: Digests) -> None:
        assert len(places) == len(told)
        self._count = count
        self._places = places
        self._told = told

    def __len__(self) -> int:
        return self._count

    def _at(self, place: int) -> bytes:
        nth = bisect_left(self._places, place)
        return self._told[nth] if nth < len(self._places) and self._places[nth] == place else b""

    def finder(self) -> Find:
        places, nth = self._places, self._told.finder()

        def find(name: bytes) -> int | None:
            at = nth(name)
            return None if at is None else places[at]

        return find


def digests_of(lengths: Sequence[int], packed: bytes | bytearray) -> Flat:
    """The digests of frames of these lengths; what has none has no digest in `packed` either."""
    digests = Digests(packed)
    if len(digests) == len(lengths):
        return digests
    return Sparse(len(lengths), array("I", (i for i, length in enumerate(lengths) if length)), digests)


class Index(Mapping[bytes, int]):
    """Digest to place, in the order of the places.

    One thread may add while others look up: they find all that was added before they began.
    """

    def __init__(self, digests: Digests | None = None) -> None:
        """Of these, and then nothing is added; or of none yet.  Of equal ones the first is found."""
        self.digests = Digests(bytearray()) if digests is None else digests
        self._packed = self.digests.packed
        self._table = self._tabled()

    def add(self, name: bytes) -> int:
        """The place of `name`, which is the last one if it is new."""
        return self.add_all(name)[0]

    def add_all(self, packed: bytes) -> array[int]:
        """The places of these, one after the other."""
        ours = self._packed
        assert isinstance(ours, bytearray)
        table, mask = self._table, len(self._table) - 1
        count = len(self)
        places = array("I")
        for at in range(0, len(packed), DIGEST_SIZE):
            name = packed[at : at + DIGEST_SIZE]
            slot = hash(name) & mask
            while place := table[slot]:  # counted from 1
                if ours.startswith(name, (place - 1) * DIGEST_SIZE):
                    break
                slot = (slot + 1) & mask
            else:
                ours += name
                count += 1
                table[slot] = place = count
                if 2 * count > mask:
                    table = self._table = self._tabled()
                    mask = len(table) - 1
            places.append(place - 1)
        return places

    def __len__(self) -> int:
        return len(self._packed) // DIGEST_SIZE

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.digests)

    def __getitem__(self, name: bytes) -> int:
        place = self.get(name)
        if place is None:
            raise KeyError(name)
        return place

    def __contains__(self, name: object) -> bool:
        return isinstance(name, bytes) and self.get(name) is not None

    @overload
    def get(self, name: bytes, /) -> int | None: ...
    @overload
    def get(self, name: bytes, /, default: int | T) -> int | T: ...
    def get(self, name: bytes, /, default: int | T | None = None) -> int | T | None:
        table = self._table
        mask = len(table) - 1
        slot = hash(name) & mask
        while place := table[slot]:
            if len(name) == DIGEST_SIZE and self._packed.startswith(name, (place - 1) * DIGEST_SIZE):
                return place - 1
            slot = (slot + 1) & mask
        return default

    def _tabled(self) -> array[int]:
        """A table of all that is here, and room for as many again at most."""
        size = 1 << max(4, (2 * len(self)).bit_length())
        table, mask = array("I", bytes(4 * size)), size - 1
        place = 0
        for first in range(0, len(self._packed), _PIECE):
            piece = bytes(self._packed[first : first + _PIECE])
            for at in range(0, len(piece), DIGEST_SIZE):
                slot = hash(piece[at : at + DIGEST_SIZE]) & mask
                while table[slot]:
                    slot = (slot + 1) & mask
                place += 1
                table[slot] = place
        return table
