"""The service of sessions as its only caller sees it: over a journal in memory, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from engine_double import EngineDouble

from stateful_sglang.service.commands import Caller
from stateful_sglang.service.service import Limits, SessionService
from stateful_sglang.session.journal.base import Journal, JournalError
from stateful_sglang.session.journal.sqlite import SqliteJournal

ME = Caller()


class OneTenant:
    """A service whose operations need not be told who calls."""

    def __init__(
        self,
        engine: EngineDouble,
        limits: Limits | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.journal = journal or SqliteJournal.connect(None)
        self.service = SessionService(engine, self.journal, limits)

    async def shutdown(self) -> None:
        await self.service.shutdown()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(getattr(self.service, name), ME)


class SlowJournal:
    """A real journal that records when it is let to, or fails."""

    def __init__(self) -> None:
        self.inner = SqliteJournal.connect(None)
        self.began, self.go = asyncio.Event(), asyncio.Event()
        self.error: JournalError | None = None
        self.recorded: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def append(self, record: Any, commit: Any, keyed: Any = None) -> None:
        self.began.set()
        await self.go.wait()
        if self.error is not None:
            raise self.error
        await self.inner.append(record, commit, keyed)
        self.recorded.append((record.id, commit.version))
