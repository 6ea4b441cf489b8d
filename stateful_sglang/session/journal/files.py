"""The files of a journal: made for their owner alone, opened, checked at little cost, measured."""

from __future__ import annotations

import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Literal

from stateful_sglang.session.journal import schema
from stateful_sglang.session.journal.base import JournalError

Sync = Literal["full", "normal"]
"""``full``: every change is on the disk before it is answered; ``normal``: it survives the end of
the process however it comes, and may be lost with the machine's power."""

CHECK = "run `stateful-sglang journal check`"
_BUSY_MS = 500
_NO_ROOM = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE})
_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


def files_of(path: Path) -> tuple[Path, ...]:
    """The database, its write-ahead log and the log's index."""
    return (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm"))


def bytes_of(path: Path) -> int:
    """Bytes of the files that are there."""
    total = 0
    for file in files_of(path):
        with suppress(OSError):
            total += file.stat().st_size
    return total


def make_private(path: Path) -> None:
    """Make the file if there is none, for its owner alone; SQLite gives the others its mode.

    Raises:
        OSError: It cannot be made, or belongs to another user.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    for file in files_of(path):
        with suppress(FileNotFoundError):
            if file.stat().st_mode & 0o077:
                file.chmod(0o600)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError:
        pass  # not every file system has it for folders
    finally:
        os.close(folder)


def connect(path: Path | None, sync: Sync = "full") -> sqlite3.Connection:
    """A connection that any one thread at a time may use; transactions are ours to begin and end.

    Nothing is written: see `prepare`.

    Raises:
        sqlite3.Error: The file is damaged, or no database.
    """
    db = sqlite3.connect(
        ":memory:" if path is None else path, isolation_level=None, check_same_thread=False
    )
    try:
        db.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
        db.execute(f"PRAGMA synchronous = {sync.upper()}")
        db.execute("PRAGMA foreign_keys = ON")
        # Zeroes what is deleted within a page that is written anyway; erasing asks for all of it.
        db.execute("PRAGMA secure_delete = FAST").fetchone()
        db.execute("PRAGMA wal_autocheckpoint = 0").fetchone()  # the writer does, after answering
        db.execute("PRAGMA journal_size_limit = 0").fetchone()
    except BaseException:
        db.close()
        raise
    return db


def prepare(db: sqlite3.Connection, path: Path | None) -> None:
    """Look whether a database is a sound journal, as far as that is cheap, and bring it up to date.

    Raises:
        JournalError: It is something else, of a later release, or cut off.
        sqlite3.Error: It is damaged, or no step of the schema could be recorded.
    """
    (found,) = db.execute("PRAGMA application_id").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and found != schema.APPLICATION_ID:
        raise JournalError(
            f"{path} is a database of another program; take another file with --journal PATH"
        )
    try:
        schema.refuse_newer(db)
        if not tables:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA journal_mode = WAL").fetchone()
        schema.migrate(db)
    except schema.NewerSchemaError as error:
        raise JournalError(f"the journal {path} cannot be opened: {error}") from error
    db.execute("SELECT last, dropped FROM batches").fetchone()
    db.execute("SELECT count(*) FROM sessions").fetchone()
    if path is None:
        return
    with suppress(sqlite3.OperationalError):  # a full disk: it stays in the log
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
        if files_of(path)[1].stat().st_size == 0 and path.stat().st_size < pages * size:
            raise JournalError(damaged(path, "its end is missing"))


def damaged(path: Path | None, why: object) -> str:
    """The message of an error about damage."""
    return f"the journal {path or 'in memory'} is damaged: {why}; {CHECK}"


def explained(error: sqlite3.Error, path: Path | None) -> JournalError:
    """An error of SQLite's as one of ours, with what to do."""
    code = getattr(error, "sqlite_errorcode", None)
    where = str(path or "in memory")
    if code in _NO_ROOM:
        return JournalError(
            f"no room left for the journal {where}: {error}; free some on its disk", full=True
        )
    if code is not None and code & 0xFF in _DAMAGE:
        return JournalError(damaged(path, error))
    reason = getattr(error, "sqlite_errorname", None)
    told = f"{error} ({reason})" if reason else str(error)
    return JournalError(f"the journal {where} could not be used: {told}; look at its disk")
