"""The journal in a SQLite file, or in memory for servers that are to leave nothing behind."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from stateful_sglang.session.history import Commit, History
from stateful_sglang.session.journal import changes, codec, files, reading
from stateful_sglang.session.journal.base import (
    JournalError,
    JournalStats,
    SessionPage,
    SessionQuery,
    TenantTotals,
)
from stateful_sglang.session.journal.files import Sync
from stateful_sglang.session.journal.holder import HeldError, Holder
from stateful_sglang.session.journal.restoring import Restorer
from stateful_sglang.session.journal.writer import Job, Writer
from stateful_sglang.session.records import KeyedResult, PrefixRecord, SessionRecord, State

T = TypeVar("T")

DEFAULT_MAX_BYTES = 16 << 30


class SqliteJournal:
    """`Journal` over SQLite: a thread writes, another reads, and the event loop waits for neither.

    In memory the writer's thread reads as well, since there is one connection.
    """

    def __init__(
        self,
        db: sqlite3.Connection,
        path: Path | None,
        holder: Holder | None,
        *,
        sync: Sync,
        max_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        """Use `connect`, which checks the file first."""
        self._path = path
        self._holder = holder
        self._clock = clock
        self._restorer = Restorer()
        self._reader = None if path is None else _Reader(path)
        self._writer = Writer(
            db, path, partial(files.connect, path, sync), max_bytes=max_bytes, clock=clock
        )

    @classmethod
    def connect(
        cls,
        path: Path | None,
        *,
        sync: Sync = "full",
        max_bytes: int = DEFAULT_MAX_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> SqliteJournal:
        """Open a journal, made if there is none, and hold it until `close` or the process's end.

        Args:
            path: Of the file; None: in memory, gone with the process.
            sync: ``full``: a change is on the disk before it is answered; ``normal``: it survives
                the process, and may be lost with the machine's power.
            max_bytes: Of the files, beyond which sessions are refused that would make them grow.
            clock: The time, in seconds since the epoch.

        Raises:
            JournalError: It is held by another process, damaged, of a later release, no journal, or
                cannot be made where it should be.
        """
        holder = None
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                holder = Holder(path)
                files.make_private(path)
            db = files.connect(path, sync)
            try:
                files.prepare(db, path)
                return cls(db, path, holder, sync=sync, max_bytes=max_bytes, clock=clock)
            except BaseException:
                db.close()
                raise
        except BaseException as error:
            if holder is not None:
                holder.release()
            told = _opening_failed(error, path)
            if told is None:
                raise
            raise told from error

    @property
    def path(self) -> Path | None:
        """Of the file; None where it is in memory."""
        return self._path

    async def open(
        self, record: SessionRecord, history: History, keyed: KeyedResult | None = None
    ) -> None:
        """See `Journal.open`."""
        await self._change(lambda db: changes.open_session(db, record, history, keyed), grows=True)
        for commit in (history.origin, *history.published):
            self._restorer.remember(commit)

    async def append(
        self, record: SessionRecord, commit: Commit, keyed: KeyedResult | None = None
    ) -> None:
        """See `Journal.append`."""
        await self._change(lambda db: changes.append(db, record, commit, keyed), grows=True)
        self._restorer.remember(commit)

    async def update(self, record: SessionRecord, keyed: KeyedResult | None = None) -> None:
        """See `Journal.update`."""
        await self._change(lambda db: changes.update(db, record, keyed))

    async def end(self, session_id: str, state: State, *, erase: bool = False) -> None:
        """See `Journal.end`. One that ended already can be erased still."""
        now = self._clock()
        await self._change(lambda db: changes.end(db, session_id, state, now, erase), erases=erase)

    async def keep(self, keyed: KeyedResult) -> None:
        """See `Journal.keep`."""
        await self._change(lambda db: changes.keep(db, keyed), grows=True)

    async def result(self, tenant: str, scope: str, key: str) -> KeyedResult | None:
        """See `Journal.result`."""
        now = self._clock()
        return await self._read(lambda db: reading.result(db, tenant, scope, key, now))

    async def said(self, digests: Sequence[bytes]) -> Mapping[bytes, tuple[str, int]]:
        """See `Journal.said`."""
        return await self._read(lambda db: reading.said(db, digests))

    async def record(self, session_id: str) -> SessionRecord | None:
        """See `Journal.record`."""
        return await self._read(lambda db: reading.record(db, session_id))

    async def load(self, session_id: str) -> History | None:
        """See `Journal.load`. Commits that another session in memory holds are the same objects."""
        stored = await self._read(lambda db: reading.stored_history(db, session_id))
        if stored is None:
            return None
        try:
            steps = self._restorer.steps(stored)
            while True:
                try:
                    next(steps)
                except StopIteration as end:
                    history: History = end.value
                    return history
                await asyncio.sleep(0)
        except codec.DamagedError as error:
            raise JournalError(files.damaged(self._path, error)) from error

    async def list(self, query: SessionQuery) -> SessionPage:
        """See `Journal.list`."""
        return await self._read(lambda db: reading.sessions(db, query))

    async def totals(self, tenant: str) -> TenantTotals:
        """See `Journal.totals`."""
        return await self._read(lambda db: reading.totals(db, tenant))

    async def idle(
        self, before: float, *, default_ttl_s: float | None, limit: int = 1000
    ) -> Sequence[str]:
        """See `Journal.idle`."""
        return await self._read(lambda db: reading.idle(db, before, default_ttl_s, limit))

    async def oldest(self, tenant: str, limit: int) -> Sequence[str]:
        """See `Journal.oldest`."""
        return await self._read(lambda db: reading.oldest(db, tenant, limit))

    async def publish(self, prefix: PrefixRecord) -> None:
        """See `Journal.publish`."""
        await self._change(lambda db: changes.publish(db, prefix), grows=True)

    async def unpublish(self, prefix_id: str) -> None:
        """See `Journal.unpublish`."""
        await self._change(lambda db: changes.unpublish(db, prefix_id))

    async def prefixes(self) -> Sequence[PrefixRecord]:
        """See `Journal.prefixes`."""
        return await self._read(reading.prefixes)

    def stats(self) -> JournalStats:
        """See `Journal.stats`."""
        done = self._writer.counters
        return JournalStats(
            sessions=done.sessions,
            bytes=done.bytes if self._path is None else files.bytes_of(self._path),
            waiting=self._writer.waiting,
            commits=done.commits,
            changes=done.changes,
            broken=self._writer.broken,
        )

    async def close(self) -> None:
        """See `Journal.close`. A second time does nothing."""
        await asyncio.get_running_loop().run_in_executor(None, self._close)

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._writer.stop()
        if self._holder is not None:
            self._holder.release()
            self._holder = None

    async def _change(
        self,
        run: Callable[[sqlite3.Connection], None],
        *,
        grows: bool = False,
        erases: bool = False,
    ) -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._writer.submit(Job(run, loop, future, grows=grows, erases=erases))
        await future

    async def _read(self, run: Callable[[sqlite3.Connection], T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            if self._reader is not None:
                return await loop.run_in_executor(*self._reader.call(run))
            future: asyncio.Future[T] = loop.create_future()
            self._writer.submit(Job(run, loop, future, reads=True))
            return await future
        except sqlite3.Error as error:
            raise files.explained(error, self._path) from error
        except codec.DamagedError as error:
            raise JournalError(files.damaged(self._path, error)) from error


class _Reader:
    """The reading thread, with a connection of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="journal-reader")
        self._closed = False

    def call(
        self, run: Callable[[sqlite3.Connection], T]
    ) -> tuple[ThreadPoolExecutor, Callable[[], T]]:
        """A read as an event loop's executors take it.

        Raises:
            JournalError: The journal was closed.
        """
        if self._closed:
            raise JournalError("the journal is closed; nothing more is read")
        return self._pool, partial(self._read, run)

    def _read(self, run: Callable[[sqlite3.Connection], Any]) -> Any:
        """Run one read, all of which sees the same state."""
        try:
            if self._db is None:
                self._db = files.connect(self._path)
                self._db.execute("PRAGMA query_only = ON")
            self._db.execute("BEGIN")
            try:
                return run(self._db)
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
        except sqlite3.OperationalError:
            self._forget()  # a disk that came back is read with a new connection
            raise

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._pool.shutdown(wait=True)
        self._forget()

    def _forget(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


def _opening_failed(error: BaseException, path: Path | None) -> JournalError | None:
    if isinstance(error, HeldError):
        return JournalError(
            f"{error}; stop that server, or give this one a file of its own with --journal PATH"
        )
    if isinstance(error, sqlite3.Error):
        return files.explained(error, path)
    if isinstance(error, OSError):
        return JournalError(
            f"the journal {path} cannot be opened: {error.strerror or error}; give the server a "
            "file that it can write with --journal PATH, or --journal off",
        )
    return None
