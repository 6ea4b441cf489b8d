"""What a person does with a journal's file: look whether it is sound, shrink it, read it out."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from stateful_sglang.session.journal import changes, codec, files, reading, rows, schema
from stateful_sglang.session.journal.base import JournalError
from stateful_sglang.session.journal.holder import HeldError, Holder
from stateful_sglang.session.journal.restoring import Restorer

_MOST_PROBLEMS = 20


class Report(NamedTuple):
    """What a check found."""

    facts: dict[str, int]
    """Counts and bytes, by what they are of."""
    held_by: str | None
    """Who uses the file meanwhile."""
    problems: list[str]
    """What is damaged; empty for a sound file."""


class Shrunk(NamedTuple):
    """What vacuuming came to, in bytes of the files."""

    before: int
    after: int


def check(path: Path) -> Report:
    """Read everything in a journal, a server's that runs included; nothing is changed.

    Raises:
        JournalError: There is no such file, or it is no journal that this release reads.
    """
    holder, held_by = None, None
    _require(path)
    try:
        holder = Holder(path)
    except HeldError as error:
        held_by = str(error)
    except OSError as error:
        raise JournalError(f"{path} cannot be read: {error.strerror}") from error
    try:
        with closing(_looking(path)) as db:
            facts: dict[str, int] = {}
            try:
                facts = _facts(db, path)
                problems = list(_problems(db))
            except sqlite3.DatabaseError as error:
                problems = [str(error)]
            return Report(facts, held_by, problems)
    finally:
        if holder is not None:
            holder.release()


def vacuum(path: Path) -> Shrunk:
    """Forget what is over, and rewrite the file without what is free in it.

    It takes as much room again while it runs.

    Raises:
        JournalError: A server uses it, it is no sound journal, or there is no room.
    """
    with closing(_held(path)) as held:
        before = files.bytes_of(path)
        try:
            changes.purge(held.db, time.time())
            held.db.execute("VACUUM")
            held.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as error:
            raise files.explained(error, path) from error
        return Shrunk(before, files.bytes_of(path))


def export(path: Path) -> Iterator[dict[str, Any]]:
    """Every session that can be read, as JSON has it: its record, and if it is open its messages.

    One that is damaged has ``error`` in their place.

    Raises:
        JournalError: A server uses the file, or it is no journal at all.
    """
    with closing(_held(path)) as held:
        try:
            ids = [row[0] for row in held.db.execute("SELECT id FROM sessions").fetchall()]
        except sqlite3.Error as error:
            raise files.explained(error, path) from error
        for id_ in ids:
            yield _exported(held.db, codec.from_name(id_))


class _Held(NamedTuple):
    db: sqlite3.Connection
    holder: Holder

    def close(self) -> None:
        self.db.close()
        self.holder.release()


def _held(path: Path) -> _Held:
    _require(path)
    try:
        holder = Holder(path)
    except HeldError as error:
        raise JournalError(f"{error}; stop that server first") from error
    except OSError as error:
        raise JournalError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        return _Held(_connected(path), holder)
    except BaseException:
        holder.release()
        raise


def _looking(path: Path) -> sqlite3.Connection:
    db = _connected(path)
    db.execute("PRAGMA query_only = ON")
    return db


def _connected(path: Path) -> sqlite3.Connection:
    try:
        db = files.connect(path)
    except sqlite3.Error as error:
        raise JournalError(f"{path} is no journal, or damaged from its start: {error}") from error
    try:
        version = schema.version_of(db)
        if db.execute("PRAGMA application_id").fetchone() != (schema.APPLICATION_ID,):
            raise JournalError(f"{path} is no journal of sessions")
        if version != len(schema.MIGRATIONS):
            raise JournalError(
                f"{path} has schema version {version}, this release reads "
                f"{len(schema.MIGRATIONS)}: a later release wrote it, or none has migrated it yet"
            )
    except sqlite3.Error as error:
        db.close()
        raise JournalError(f"{path} is damaged from its start: {error}") from error
    except BaseException:
        db.close()
        raise
    return db


def _require(path: Path) -> None:
    if not path.is_file():
        raise JournalError(f"there is no journal {path}; name it with --journal PATH")


def _facts(db: sqlite3.Connection, path: Path) -> dict[str, int]:
    def one(query: str) -> int:
        return int(db.execute(query).fetchone()[0])

    return {
        "schema version": schema.version_of(db),
        "bytes": files.bytes_of(path),
        "bytes free": one("PRAGMA freelist_count") * one("PRAGMA page_size"),
        "sessions open": one("SELECT count(*) FROM sessions WHERE state = 'open'"),
        "sessions ended": one("SELECT count(*) FROM sessions WHERE state <> 'open'"),
        "commits": one("SELECT count(*) FROM commits"),
        "published prefixes": one("SELECT count(*) FROM prefixes"),
        "keyed results": one("SELECT count(*) FROM results"),
        "changes in batches": one("SELECT last FROM batches"),
    }


def _problems(db: sqlite3.Connection) -> Iterator[str]:
    for (line,) in db.execute(f"PRAGMA integrity_check({_MOST_PROBLEMS})"):
        if line != "ok":
            yield str(line)
    for table, row, parent, _ in db.execute("PRAGMA foreign_key_check"):
        yield f"row {row} of {table} names a row of {parent} that is missing"
    for (id_,) in db.execute("SELECT id FROM sessions WHERE state = 'open'").fetchall():
        exported = _exported(db, codec.from_name(id_))
        if "error" in exported:
            yield f"session {exported['id']}: {exported['error']}"
    for row in db.execute(f"SELECT {rows.PREFIX_COLUMNS} FROM prefixes").fetchall():
        try:
            rows.prefix(row)
        except codec.DamagedError as error:
            yield f"published prefix {row[0]}: {error}"


def _exported(db: sqlite3.Connection, session_id: str) -> dict[str, Any]:
    try:
        row = db.execute(
            f"SELECT {rows.COLUMNS} FROM sessions WHERE id = ?", (codec.name(session_id),)
        ).fetchone()
        record = rows.record(row)
        line: dict[str, Any] = {
            "id": record.id,
            "tenant": record.tenant,
            "model": record.model,
            "state": record.state,
            "version": record.version,
            "tokens": record.tokens,
            "created_at": record.created_at,
            "used_at": record.used_at,
            "metadata": dict(record.options.metadata),
            "finish_reason": record.finish_reason,
            "origin": None if record.origin is None else list(record.origin),
        }
        stored = reading.stored_history(db, session_id)
        if stored is None:
            return line
        history = Restorer().history(stored)
        head = history.tip.conversation.head
        return {
            **line,
            "system": head.system,
            "tools": list(head.tools),
            "messages": [codec.message_form(each) for each in history.messages(record.version)],
        }
    except (sqlite3.Error, codec.DamagedError) as error:
        return {"id": session_id, "error": str(error)}
