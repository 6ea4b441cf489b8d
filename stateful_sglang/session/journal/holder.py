"""Who holds a journal: one process at a time, by a lock that goes with it, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path


class HeldError(Exception):
    """Another holds the journal; the message names it."""


class Holder:
    """This process's hold of a path. The lock is on a file beside it, which stays."""

    def __init__(self, path: Path) -> None:
        """Take hold.

        Raises:
            HeldError: Another process, or this one already, has it.
            OSError: The lock file cannot be made.
        """
        self._fd = os.open(lock_file(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            told = _told(self._fd)
            os.close(self._fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise HeldError(f"{path} is in use by {told}") from error
        # No room for the name is no reason to refuse: the lock itself holds.
        with suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps({"pid": os.getpid(), "since": time.time()}).encode(), 0)

    def release(self) -> None:
        """Let go."""
        with suppress(OSError):
            os.ftruncate(self._fd, 0)
        os.close(self._fd)


def lock_file(path: Path) -> Path:
    """The file that is locked in place of `path`, which SQLite locks in ways of its own."""
    return path.with_name(path.name + ".lock")


def _told(fd: int) -> str:
    try:
        told = json.loads(os.pread(fd, 200, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(told["since"]))
        return f"process {int(told['pid'])}, since {since}"
    except (OSError, ValueError, TypeError, LookupError):
        return "another process"
