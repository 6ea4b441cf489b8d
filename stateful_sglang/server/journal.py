"""Where a server records its sessions, as its options say; checked before anything is imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from stateful_sglang import cache_folder
from stateful_sglang.runtime.options import Options
from stateful_sglang.server.errors import LaunchError
from stateful_sglang.session.journal.holder import HeldError, Holder

if TYPE_CHECKING:
    from stateful_sglang.session.journal.sqlite import SqliteJournal

FILE = "journal.sqlite3"
OFF = "off"
_BEGINS = b"SQLite format 3\0"
_ELSEWHERE = "name another file with --journal PATH, or --journal off to record nothing"


def path_of(journal: str | None, cache_dir: Path | None = None) -> Path | None:
    """The file that ``--journal`` and ``--cache-dir`` stand for; None where nothing is recorded."""
    if journal == OFF:
        return None
    if journal is None:
        return cache_folder.root(cache_dir) / FILE
    return Path(journal).expanduser().absolute()


def open_journal(options: Options) -> SqliteJournal:
    """The journal of a server with these options, which holds it until it is closed.

    Raises:
        JournalError: It cannot be opened; the message says why and what to do.
    """
    from stateful_sglang.session.journal.sqlite import SqliteJournal

    return SqliteJournal.connect(
        path_of(options.journal, options.cache_dir),
        sync=options.journal_sync,
        max_bytes=int(options.journal_max_gb * 2**30),
    )


def check(options: Options) -> None:
    """Look whether the journal's file could be written, and whether another server has it.

    Raises:
        LaunchError: It could not, or one has.
    """
    path = path_of(options.journal, options.cache_dir) if options.stateful else None
    if path is None:
        return
    problem = _problem(path)
    if problem is not None:
        raise LaunchError(f"sessions cannot be recorded in {path}: {problem}; {_ELSEWHERE}")


def _problem(path: Path) -> str | None:
    if path.is_dir():
        return "it is a folder"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            return f"{path.parent} is not writable"
        holder = Holder(path)
        try:
            if path.exists():
                with path.open("r+b") as file:
                    begins = file.read(len(_BEGINS))
                if begins not in (b"", _BEGINS):
                    return "it is no database"
        finally:
            holder.release()
    except HeldError as error:
        return f"{error}"
    except OSError as error:
        return error.strerror or str(error)
    return None
