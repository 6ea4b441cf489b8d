"""The moments of a change, by name, and a process that is killed at one of them.

The product knows nothing of this: in a process made to die its functions are wrapped, SQLite tells
each statement that it begins, and a preloaded library stands between it and the disk.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import os
import signal
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine_double import EngineDouble

from stateful_sglang.service.commits import Committer
from stateful_sglang.service.idempotency import KeyedWork
from stateful_sglang.service.turns import RunningTurn
from stateful_sglang.session.journal import files, writer
from stateful_sglang.session.journal.sqlite import SqliteJournal
from stateful_sglang.session.session import Session


class Death:
    """Kills the process when it has been armed and called so many times."""

    def __init__(self, spared: int) -> None:
        self._left = spared
        self._armed = False
        self._when_armed: list[Callable[[int], None]] = []

    def arm(self) -> None:
        """From now on calls count."""
        self._armed = True
        for act in self._when_armed:
            act(self._left)

    def when_armed(self, act: Callable[[int], None]) -> None:
        """Have something else kill the process, told how often it is to spare it."""
        self._when_armed.append(act)

    def __call__(self) -> None:
        if not self._armed:
            return
        if self._left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1


Install = Callable[[Death, Path], None]


def _around(owner: Any, name: str, *, before: bool) -> Install:
    """Strike whenever a function is entered, or has returned."""

    def install(death: Death, _: Path) -> None:
        wrapped = getattr(owner, name)

        @functools.wraps(wrapped)
        def sync(*args: Any, **kwargs: Any) -> Any:
            if before:
                death()
            result = wrapped(*args, **kwargs)
            if not before:
                death()
            return result

        @functools.wraps(wrapped)
        async def waiting(*args: Any, **kwargs: Any) -> Any:
            if before:
                death()
            result = await wrapped(*args, **kwargs)
            if not before:
                death()
            return result

        setattr(owner, name, waiting if inspect.iscoroutinefunction(wrapped) else sync)

    return install


def _before(owner: Any, name: str) -> Install:
    return _around(owner, name, before=True)


def _after(owner: Any, name: str) -> Install:
    return _around(owner, name, before=False)


def _statement(beginning: str) -> Install:
    """Strike when SQLite begins a statement."""

    def install(death: Death, _: Path) -> None:
        connect = files.connect

        def traced(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            db = connect(*args, **kwargs)
            db.set_trace_callback(lambda text: death() if text.startswith(beginning) else None)
            return db

        files.connect = traced

    return install


def _disk(mode: int) -> Install:
    """Strike at the disk: see `journal_faults.c`."""

    def install(death: Death, library: Path) -> None:
        shim = ctypes.CDLL(str(library))

        def arm(spared: int) -> None:
            ctypes.c_int.in_dll(shim, "fault_spared").value = spared
            ctypes.c_int.in_dll(shim, "fault_mode").value = mode

        death.when_armed(arm)
        writer._LOG_BYTES = 1 << 16  # so that the log is copied within a few changes

    return install


def _driver(_: Death, __: Path) -> None:
    """The one who asks strikes itself."""


POINTS: Mapping[str, Install] = {
    "its key was looked up": _after(KeyedWork, "join"),
    "sent to the engine": _before(EngineDouble, "run"),
    "some of the answer was read": _after(RunningTurn, "_publish"),
    "the answer is complete": _before(Committer, "commit"),
    "the change is prepared": _before(SqliteJournal, "_change"),
    "handed to the writer": _after(writer.Writer, "submit"),
    "taken by the writer": _before(writer.Writer, "_record"),
    "before BEGIN": _statement("BEGIN IMMEDIATE"),
    "the transaction has begun": _statement("SAVEPOINT"),
    "before the commit's row": _statement("INSERT INTO commits"),
    "before the session's row": _statement("UPDATE sessions"),
    "before the result's row": _statement("INSERT OR REPLACE INTO results"),
    "all rows are written": _statement("UPDATE batches"),
    "before COMMIT": _statement("COMMIT"),
    "half of a write to the log": _disk(8),
    "before the sync": _disk(6),
    "after the sync": _disk(7),
    "half of a write to the database": _disk(9),
    "after COMMIT": _before(writer.Writer, "_count"),
    "before the caller is told": _before(writer.Job, "resolve"),
    "told by the writer": _after(writer.Job, "resolve"),
    "recorded": _after(SqliteJournal, "_change"),
    "before it is published": _before(Session, "publish"),
    "published": _after(Session, "publish"),
    "before the answer": _driver,
    "answered": _driver,
}
"""In the order in which a turn passes them. What they do to this process cannot be undone."""
AT_THE_DISK = frozenset(name for name in POINTS if "half of" in name or "the sync" in name)
"""Those that need the preloaded library."""
