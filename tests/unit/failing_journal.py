"""A real journal in memory that records nothing any more once it is told to."""

from __future__ import annotations

from typing import Any

from stateful_sglang.session.journal.base import JournalError
from stateful_sglang.session.journal.sqlite import SqliteJournal

_CHANGES = frozenset({"open", "append", "update", "end", "keep", "publish", "unpublish"})


class FailingJournal:
    """Every change fails with the text of `broken`, if it has one."""

    def __init__(self) -> None:
        self.inner = SqliteJournal.connect(None)
        self.broken: str | None = None
        self.erased: list[str] = []
        """Sessions whose content was to be removed from the files."""

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.inner, name)
        if name not in _CHANGES:
            return call

        async def change(*args: Any, **options: Any) -> None:
            if self.broken is not None:
                raise JournalError(self.broken, full=True)
            await call(*args, **options)
            if options.get("erase"):
                self.erased.append(args[0])

        return change
