"""Keep the grid's books in SQLite: what was acknowledged survives any kill.

WAL and `synchronous=FULL`: a transaction is on disk when it returns.  One transaction holds
the rows of all calls that came in together (group commit), so that the price of an fsync
is shared; `docs/decisions/0006-ledger.md` has the measurements.  SQLite waits on the disk,
so it is only ever called in a thread, one call at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apsw
import attrs
import msgspec
import trio

from p2pgrid.errors import Misconfigured
from p2pgrid.ids import PeerId
from p2pgrid.scheduler.facts import DatumRow, LedgerStuck, Member, Past, Row, TokenRevoked, TokenUse
from p2pgrid.scheduler.job import Job, JobSpec, Outcome, Task
from p2pgrid.scheduler.messages import DatumRecord

SCHEMA = 2
_TABLES = """
CREATE TABLE member (peer TEXT PRIMARY KEY, name TEXT NOT NULL, roles BLOB NOT NULL,
    shares BLOB NOT NULL, joined REAL NOT NULL, revoked REAL NOT NULL DEFAULT 0) STRICT;
CREATE TABLE token_use (token TEXT NOT NULL, peer TEXT NOT NULL, PRIMARY KEY (token, peer)) STRICT;
CREATE TABLE token_revoked (token TEXT PRIMARY KEY) STRICT;
CREATE TABLE datum (place INTEGER PRIMARY KEY AUTOINCREMENT, cid TEXT NOT NULL UNIQUE, record BLOB NOT NULL,
    submitter TEXT NOT NULL, created REAL NOT NULL, forgotten INTEGER NOT NULL) STRICT;
CREATE TABLE job (place INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, spec BLOB NOT NULL,
    submitter TEXT NOT NULL, key TEXT NOT NULL, created REAL NOT NULL, cancelled INTEGER NOT NULL,
    UNIQUE (submitter, key)) STRICT;
CREATE TABLE task (id TEXT PRIMARY KEY, job TEXT NOT NULL REFERENCES job (id), idx INTEGER NOT NULL,
    state TEXT NOT NULL, epoch INTEGER NOT NULL, node TEXT, attempts INTEGER NOT NULL, lost INTEGER NOT NULL,
    outcome BLOB, started REAL NOT NULL, reported REAL NOT NULL, ended REAL NOT NULL, reason TEXT NOT NULL,
    UNIQUE (job, idx)) STRICT;
"""
_SINCE_1 = "ALTER TABLE member ADD COLUMN revoked REAL NOT NULL DEFAULT 0"
_MEMBER = "INSERT OR REPLACE INTO member VALUES (?, ?, ?, ?, ?, ?)"
_USE = "INSERT OR IGNORE INTO token_use VALUES (?, ?)"
_REVOKED = "INSERT OR IGNORE INTO token_revoked VALUES (?)"
_DATUM = "INSERT OR REPLACE INTO datum (cid, record, submitter, created, forgotten) VALUES (?, ?, ?, ?, ?)"
_JOB = """INSERT INTO job (id, spec, submitter, key, created, cancelled) VALUES (?, ?, ?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET cancelled = excluded.cancelled"""
_TASK = """INSERT INTO task VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET state = excluded.state, epoch = excluded.epoch, node = excluded.node,
    attempts = excluded.attempts, lost = excluded.lost, outcome = excluded.outcome,
    started = excluded.started, reported = excluded.reported, ended = excluded.ended,
    reason = excluded.reason WHERE excluded.epoch >= task.epoch"""
_PRAGMAS = ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON")

_pack = msgspec.msgpack.encode
_unpack = msgspec.msgpack.decode


class SqliteLedger:
    """A `Ledger` in the file `path`, made where there is none.  Closed by `close`.

    Raises `Misconfigured` for a file of a newer version, for one that is no ledger, and
    while another coordinator has it open.
    """

    def __init__(self, path: Path) -> None:
        self._turn = trio.CapacityLimiter(1)
        try:
            self._db = apsw.Connection(str(path))
            self._db.set_busy_timeout(0)
            for pragma in _PRAGMAS:
                self._db.execute(f"PRAGMA {pragma}").fetchall()
            with self._db:
                version = self._db.pragma("user_version")
                if version < SCHEMA:
                    self._db.execute(_TABLES if version == 0 else _SINCE_1)
                    self._db.execute(f"PRAGMA user_version={SCHEMA}")
        except apsw.BusyError:
            raise Misconfigured(why=f"another coordinator has {path} open") from None
        except (apsw.NotADBError, apsw.CorruptError, apsw.CantOpenError, apsw.SQLError) as broken:
            raise Misconfigured(why=f"{path} cannot be used as a ledger: {broken}") from None
        if version > SCHEMA:
            self._db.close()
            raise Misconfigured(why=f"{path} was written by a newer p2pgrid (schema {version}, not {SCHEMA})")

    async def load(self) -> Past:
        return await trio.to_thread.run_sync(self._load, limiter=self._turn)

    async def save(self, rows: Sequence[Row]) -> None:
        await trio.to_thread.run_sync(self._save, rows, limiter=self._turn)

    def close(self) -> None:
        self._db.close()

    def _save(self, rows: Sequence[Row]) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for row in rows:
                self._db.execute(*_statement(row))
            self._db.execute("COMMIT")
        except (apsw.FullError, apsw.IOError, apsw.BusyError) as stuck:
            raise LedgerStuck(why=str(stuck)) from None
        finally:
            if self._db.in_transaction:  # on a full disk SQLite may have rolled back by itself
                self._db.execute("ROLLBACK")

    def _load(self) -> Past:
        def rows(sql: str) -> list[tuple[Any, ...]]:
            return self._db.execute(sql).fetchall()

        data = rows("SELECT record, submitter, created, forgotten FROM datum ORDER BY place")
        jobs = rows("SELECT id, spec, submitter, key, created, cancelled FROM job ORDER BY place")
        return Past(
            members=[_member(*row) for row in rows("SELECT * FROM member ORDER BY joined, peer")],
            data=[DatumRow(_unpack(r, type=DatumRecord), PeerId(s), t, bool(f)) for r, s, t, f in data],
            uses=[TokenUse(token, PeerId(peer)) for token, peer in rows("SELECT * FROM token_use")],
            revoked=[TokenRevoked(token) for (token,) in rows("SELECT token FROM token_revoked")],
            jobs=[Job(i, _unpack(j, type=JobSpec), PeerId(s), k, t, bool(c)) for i, j, s, k, t, c in jobs],
            tasks=[_task(*row) for row in rows("SELECT * FROM task")],
        )


def _member(peer: str, name: str, roles: bytes, shares: bytes, joined: float, revoked: float) -> Member:
    return Member(
        PeerId(peer),
        name,
        _unpack(roles, type=dict[str, str]),
        _unpack(shares, type=tuple[str, ...]),
        joined,
        revoked,
    )


def _task(*row: Any) -> Task:
    values = dict(zip([field.name for field in attrs.fields(Task)], row, strict=True))
    if values["outcome"] is not None:
        values["outcome"] = _unpack(values["outcome"], type=Outcome)
    return Task(**values)


def _statement(row: Row) -> tuple[str, tuple[Any, ...]]:
    match row:
        case Member():
            roles, shares = _pack(row.roles), _pack(row.shares)
            return _MEMBER, (row.peer, row.name, roles, shares, row.joined, row.revoked)
        case TokenUse():
            return _USE, (row.token, row.peer)
        case TokenRevoked():
            return _REVOKED, (row.token,)
        case DatumRow():
            record = _pack(row.record)
            return _DATUM, (row.record.datum, record, row.submitter, row.created, int(row.forgotten))
        case Job():
            return _JOB, (row.id, _pack(row.spec), row.submitter, row.key, row.created, int(row.cancelled))
        case Task():
            values = attrs.astuple(row, recurse=False)
            outcome = _pack(row.outcome) if row.outcome is not None else None
            return _TASK, (*values[:8], outcome, *values[9:])
