"""The one thread that writes: it takes all changes that wait, and records them in one transaction.

While the disk takes one batch the next ones queue up, so that many writers share its pace. A change
that raises is rolled back alone. Where the commit of a batch raises, its frames may lie complete in
the write-ahead log all the same, and whoever opened the file next, after a crash say, would find
them there. So before the callers are told, something else is written in their place.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from asyncio import AbstractEventLoop, Future
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from stateful_sglang.session.journal import changes, files, reading
from stateful_sglang.session.journal.base import JournalError

logger = logging.getLogger(__name__)

_LARGEST_BATCH = 256
_RETRY_S = 0.2
_ERASE_TRIES = 8
_QUIET_S = 1.0
"""Seconds without a change after which there is time for upkeep."""
_UPKEEP_EVERY_S = 600.0
_VACUUM_PAGES = 2000
"""Most free pages given back at a time, so that no change waits long for it."""
_LOG_BYTES = 4 << 20
"""Of the write-ahead log, after which it is copied into the database."""


@dataclass(frozen=True, slots=True)
class Job:
    """Something to run with the writer's connection."""

    run: Callable[[sqlite3.Connection], Any]
    loop: AbstractEventLoop
    future: Future[Any]
    grows: bool = False
    """It is refused where the journal is as large as it may be."""
    erases: bool = False
    """What it deletes is overwritten, and gone from all files before it is answered."""
    reads: bool = False
    """It changes nothing, and runs outside any transaction."""

    def resolve(self, outcome: Any) -> None:
        """Give the caller what came of it: an exception is raised there."""

        def give() -> None:
            if self.future.done():  # the caller is gone
                return
            if isinstance(outcome, BaseException):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)

        with suppress(RuntimeError):  # its loop is closed
            self.loop.call_soon_threadsafe(give)


class Counters(NamedTuple):
    """What the writer has done, as one value that any thread may read."""

    commits: int = 0
    changes: int = 0
    sessions: int = 0
    bytes: int = 0
    """Of the database's pages; what a journal in memory takes."""


@dataclass
class _Batch:
    number: int
    jobs: list[Job]
    outcomes: list[Any] = field(default_factory=list)


class Writer:
    """The thread, its connection and its queue."""

    def __init__(
        self,
        db: sqlite3.Connection,
        path: Path | None,
        reopen: Callable[[], sqlite3.Connection],
        *,
        max_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        """Start the thread.

        Args:
            db: The connection, from now on the thread's alone.
            path: Of the file; None where it is in memory.
            reopen: Makes another connection where this one is beyond use.
            max_bytes: Of the files; see `SqliteJournal.connect`.
            clock: The time, in seconds since the epoch.
        """
        self._db = db
        self._path = path
        self._reopen = reopen
        self._clock = clock
        self._log_bytes = min(_LOG_BYTES, max_bytes // 8)
        self._room = max_bytes - 2 * self._log_bytes
        self._queue: deque[Job] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._taken = 0
        self._upkeep_at = 0.0
        self._must_vacuum = True
        self._broken: str | None = None
        self._no_room: str | None = None
        self._number = int(db.execute("SELECT last FROM batches").fetchone()[0])
        self.counters = Counters(sessions=reading.open_count(db), bytes=changes.used_bytes(db))
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Changes handed in and not recorded yet."""
        return len(self._queue) + self._taken

    @property
    def broken(self) -> str | None:
        """Why nothing can be recorded now."""
        return self._broken or self._no_room

    def submit(self, job: Job) -> None:
        """Hand in a job; its future is resolved when it is done.

        Raises:
            JournalError: The journal was closed.
        """
        with self._wake:
            if self._closing:
                raise JournalError("the journal is closed; nothing more is recorded")
            self._queue.append(job)
            self._wake.notify()

    def stop(self) -> None:
        """Do what was handed in and end the thread, which lets go of the connection."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._wake:
                if not self._queue and not self._closing:
                    self._wake.wait(_QUIET_S)
                jobs = [self._queue.popleft() for _ in range(min(_LARGEST_BATCH, len(self._queue)))]
                self._taken = sum(not job.reads for job in jobs)
                if not jobs and self._closing:
                    break
            try:
                self._run(jobs) if jobs else self._keep_up()
            except BaseException as error:  # a fault of ours: no caller waits forever for it
                logger.exception("the journal's writer failed")
                if self._db.in_transaction:
                    self._roll_back()
                told = JournalError(f"the journal's writer failed: {type(error).__name__}: {error}")
                for job in jobs:
                    job.resolve(told)
            self._taken = 0
        self._copy_log("TRUNCATE")
        with suppress(sqlite3.Error):
            self._db.close()

    def _run(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.reads:
                job.resolve(self._outcome_of(partial(job.run, self._db)))
        changing = [job for job in jobs if not job.reads]
        if not changing:
            return
        batch = _Batch(self._number + 1, changing)
        error = self._record(batch)
        failure = None if error is None else self._settle(batch.number, error)
        if failure is None:
            self._broken = None
            self._number = batch.number
            self._count(batch)
        else:
            self._broken = str(failure)
            batch.outcomes = [
                JournalError(str(failure), full=failure.full) for _ in changing
            ]  # one each: who raises an exception changes it
        if any(job.erases for job in changing):
            self._finish_erasing(batch)
        self._taken = 0
        for job, result in zip(changing, batch.outcomes, strict=True):
            job.resolve(result)
        self._must_vacuum = True
        if self._path is not None:
            with suppress(OSError):
                if files.files_of(self._path)[1].stat().st_size > self._log_bytes:
                    self._copy_log("PASSIVE")

    def _record(self, batch: _Batch) -> sqlite3.Error | None:
        """Run a batch and commit it; what kept it from being committed, or None."""
        db = self._db
        try:
            erases = any(job.erases for job in batch.jobs)
            db.execute(f"PRAGMA secure_delete = {'ON' if erases else 'FAST'}").fetchone()
            db.execute("BEGIN IMMEDIATE")
            for job in batch.jobs:
                batch.outcomes.append(self._apart(job))
                if not db.in_transaction:
                    # What is worse than a statement's failure ends the transaction with it.
                    failed = batch.outcomes[-1].__cause__
                    return failed if isinstance(failed, sqlite3.Error) else sqlite3.Error("lost")
            db.execute("UPDATE batches SET last = ?", (batch.number,))
            sessions, size = reading.open_count(db), changes.used_bytes(db)
            db.execute("COMMIT")
        except sqlite3.Error as error:
            return error
        self.counters = self.counters._replace(sessions=sessions, bytes=size)
        return None

    def _apart(self, job: Job) -> Any:
        """Run a change that is rolled back alone where it raises; what came of it."""
        db = self._db
        db.execute("SAVEPOINT change")
        outcome = self._outcome_of(partial(self._within_bounds, job))
        if isinstance(outcome, BaseException) and db.in_transaction:
            db.execute("ROLLBACK TO change")
        if db.in_transaction:
            db.execute("RELEASE change")
        return outcome

    def _within_bounds(self, job: Job) -> Any:
        outcome = job.run(self._db)
        if job.grows:
            self._no_room = None
            if changes.used_bytes(self._db) > self._room and not self._made_room():
                self._no_room = (
                    f"the journal {self._path or 'in memory'} is as large as it may be; close "
                    "sessions, or give it more with --journal-max-gb"
                )
                raise JournalError(self._no_room, full=True)
        return outcome

    def _made_room(self) -> bool:
        """Forget what can be forgotten; whether there is room then."""
        now = self._clock()
        for all_tombstones in (False, True):
            changes.purge(self._db, now, all_tombstones=all_tombstones)
            if changes.used_bytes(self._db) <= self._room:
                return True
        return False

    def _outcome_of(self, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except JournalError as error:
            return error
        except sqlite3.Error as error:
            told = files.explained(error, self._path)
            told.__cause__ = error
            return told
        except Exception as error:
            told = JournalError(f"the journal failed: {type(error).__name__}: {error}")
            told.__cause__ = error
            return told

    def _count(self, batch: _Batch) -> None:
        done = sum(not isinstance(each, BaseException) for each in batch.outcomes)
        self.counters = self.counters._replace(
            commits=self.counters.commits + 1, changes=self.counters.changes + done
        )

    def _settle(self, number: int, error: sqlite3.Error) -> JournalError | None:
        """Make sure that a batch whose commit raised is not in the file, now or after a crash.

        Returns:
            What its changes raise; None where it is recorded after all.
        """
        failure = files.explained(error, self._path)
        logger.error("a batch of changes could not be recorded: %s", failure)
        # Only a batch whose frames were all written, and not known to be on the disk, can be found
        # again; where a write failed its last frame, which makes it one, is missing.
        written = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_IOERR_FSYNC
        while True:
            self._roll_back()
            try:
                (last,) = self._db.execute("SELECT last FROM batches").fetchone()
                if last == number:
                    return None
                self._db.execute("UPDATE batches SET dropped = dropped + 1")
                return failure
            except sqlite3.Error as again:
                # The mark's frame lies in the place of the batch's first one as soon as it is
                # written: what follows in the log no longer adds up, on the disk or not.
                if getattr(again, "sqlite_errorcode", None) == sqlite3.SQLITE_IOERR_FSYNC:
                    return failure
                self._renew()
                if not written or self._closing:
                    return failure
                time.sleep(_RETRY_S)

    def _roll_back(self) -> None:
        with suppress(sqlite3.Error):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def _renew(self) -> None:
        """Take another connection in the place of one that no longer reads or writes."""
        if self._path is None:
            return
        try:
            db = self._reopen()
        except (sqlite3.Error, OSError):
            return  # the next change tries again
        with suppress(sqlite3.Error):
            self._db.close()
        self._db = db

    def _finish_erasing(self, batch: _Batch) -> None:
        """Give back free pages, empty the log, and tell those who erase if that can't be done."""
        if not any(
            job.erases and not isinstance(outcome, BaseException)
            for job, outcome in zip(batch.jobs, batch.outcomes, strict=True)
        ):
            return
        problem: object = "its log is being read"
        for _ in range(_ERASE_TRIES if self._path is not None else 0):
            try:
                self._db.execute("PRAGMA incremental_vacuum").fetchall()
                (busy, _, _) = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                if not busy:
                    return
            except sqlite3.Error as error:
                problem = error
            time.sleep(_RETRY_S)
        if self._path is None:
            return
        told = JournalError(
            f"the session is closed, but its content could not be overwritten in {self._path}: "
            f"{problem}; close it with erase again"
        )
        batch.outcomes = [
            told if job.erases and not isinstance(outcome, BaseException) else outcome
            for job, outcome in zip(batch.jobs, batch.outcomes, strict=True)
        ]

    def _keep_up(self) -> None:
        """Forget what is over and give free pages back, a little at a time, while nothing waits."""
        try:
            if self._clock() >= self._upkeep_at:
                self._upkeep_at = self._clock() + _UPKEEP_EVERY_S
                self._db.execute("BEGIN IMMEDIATE")
                changes.purge(self._db, self._clock())
                self._db.execute("COMMIT")
                self._must_vacuum = True
            if self._must_vacuum and self._path is not None:
                (free,) = self._db.execute("PRAGMA freelist_count").fetchone()
                if free:
                    self._db.execute(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})").fetchall()
                else:
                    self._must_vacuum = False
                self._copy_log("PASSIVE")
        except sqlite3.Error as error:
            self._roll_back()
            self._must_vacuum = False
            logger.warning("the journal's upkeep was put off: %s", error)

    def _copy_log(self, how: str) -> None:
        """Copy the log into the database; it stays where that fails, and is copied later."""
        if self._path is None:
            return
        with suppress(sqlite3.Error):
            self._db.execute(f"PRAGMA wal_checkpoint({how})").fetchone()
