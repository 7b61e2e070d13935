"""Know the data of a grid: by CID, by name, by who put them.

Pure.  The latest put under a name has the name; a name that another submitter gave to
other bytes is a `Conflict`.  A forgotten datum stays as a row, so that nodes that are away
now are told to drop it when they come back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs

from p2pgrid.errors import Conflict, NotFound
from p2pgrid.ids import PeerId
from p2pgrid.scheduler.facts import DatumRow
from p2pgrid.scheduler.messages import DatumRecord


class Catalogue:
    """Rows of data, in the order in which they were put."""

    def __init__(self, rows: Iterable[DatumRow] = ()) -> None:
        self._rows: dict[str, DatumRow] = {}
        self._names: dict[str, dict[str, None]] = {}
        self.wishing: dict[str, DatumRow] = {}
        """Those that wish for replicas."""
        self.dropped: set[str] = set()
        """Forgotten data: whoever has them shall drop them."""
        for row in rows:
            self._enter(row)

    def __contains__(self, datum: str) -> bool:
        return datum in self._rows and not self._rows[datum].forgotten

    def __iter__(self) -> Iterator[DatumRow]:
        return (row for row in self._rows.values() if not row.forgotten)

    def _enter(self, row: DatumRow) -> None:
        """Take a row as it is, in place of an older one."""
        datum, name = row.record.datum, row.record.name
        old = self._rows.pop(datum, None)
        if old is not None and old.record.name:
            self._names[old.record.name].pop(datum, None)
        self._rows[datum] = row
        self.wishing.pop(datum, None)
        if row.forgotten:
            self.dropped.add(datum)
            return
        self.dropped.discard(datum)
        if name:
            self._names.setdefault(name, {})[datum] = None
        if row.record.replica != 0:
            self.wishing[datum] = row

    def put(self, record: DatumRecord, submitter: PeerId, now: float) -> DatumRow:
        """Take a record in.  Raises `Conflict`."""
        old = self._rows.get(record.datum)
        if old is not None and not old.forgotten and old.submitter != submitter:
            raise Conflict(what=f"{record.datum} was put by another submitter")
        holder = self._named(record.name) if record.name else None
        if holder is not None and holder.submitter != submitter and holder.record.datum != record.datum:
            raise Conflict(what=f"another submitter has a datum named {record.name}")
        row = DatumRow(record, submitter, now)
        self._enter(row)
        return row

    def forget(self, datum: str) -> DatumRow:
        """Mark it forgotten."""
        row = attrs.evolve(self[datum], forgotten=True)
        self._enter(row)
        return row

    def __getitem__(self, datum: str) -> DatumRow:
        """Raises `NotFound`, also for what was forgotten."""
        row = self._rows.get(datum)
        if row is None or row.forgotten:
            raise NotFound(what=f"datum {datum}")
        return row

    def find(self, name: str, submitter: PeerId, everything: bool) -> DatumRow:
        """By CID, by name, or by "" the disk last put by `submitter`.  Raises `NotFound`.

        Without `everything` only what `submitter` put is found.
        """
        if not name:
            disks = (r for r in reversed(self._rows.values()) if not r.forgotten and r.record.kind == "disk")
            row = next((r for r in disks if r.submitter == submitter), None)
            what = "a disk that you put"
        else:
            row = self[name] if name in self else self._named(name)
            what = f"disk or tree {name}"
        if row is None or not (everything or row.submitter == submitter):
            raise NotFound(what=what)
        return row

    def _named(self, name: str) -> DatumRow | None:
        data = self._names.get(name)
        return self._rows[next(reversed(data))] if data else None

    def check(self) -> None:
        for name, data in self._names.items():
            assert all(self._rows[d].record.name == name and d in self for d in data)
        assert self.dropped == {d for d, row in self._rows.items() if row.forgotten}
        assert all(row.record.replica != 0 and d in self for d, row in self.wishing.items())
