"""Which sessions there are: those in memory, and those that the journal brings back when asked."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from stateful_sglang.service.commands import Caller
from stateful_sglang.service.engine import TurnEngine
from stateful_sglang.service.turns import RunningTurn
from stateful_sglang.service.writers import WriterPlace
from stateful_sglang.session.errors import (
    JournalFailedError,
    OtherModelError,
    SessionClosedError,
    SessionGoneError,
    SessionNotFoundError,
)
from stateful_sglang.session.journal.base import Journal, JournalError
from stateful_sglang.session.records import SessionRecord, State
from stateful_sglang.session.session import Session

logger = logging.getLogger(__name__)

_EMPTY_TOKENS = 1024
"""What a session takes in memory beside its tokens and messages, some 4 KiB, in tokens."""


@dataclass(eq=False)
class Resident:
    """A session in memory, with what the service needs to run it."""

    session: Session
    writer: WriterPlace = field(default_factory=WriterPlace)
    turn: RunningTurn | None = None
    """The writer's, while one runs."""
    writing: asyncio.Task[Any] | None = None
    """What the writer runs in, where it changes the session without a turn."""
    beside: set[RunningTurn] = field(default_factory=set)
    """Ephemeral turns under way."""
    recovering: bool = False
    """It was read from the journal, and no turn of it has given a token since."""
    recording: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held from a change of the record to its publication: each record is the whole of it."""
    uses: int = 0
    """Who would be left with a session of another time if it went from memory now."""

    @property
    def tokens(self) -> int:
        """What it holds in memory, as a number of tokens; an empty session is some too."""
        return _EMPTY_TOKENS + self.session.history.weight

    @property
    def idle(self) -> bool:
        """Whether it can leave memory."""
        return not self.uses and not self.writer.held and self.turn is None and not self.beside


class Directory:
    """All sessions of the server. Its methods are called on one event loop."""

    def __init__(
        self, engine: TurnEngine, journal: Journal, *, max_tokens: int, default_ttl_s: float | None
    ) -> None:
        """
        Args:
            engine: Told of sessions that leave memory.
            journal: Where sessions are while they are not in memory.
            max_tokens: Of all sessions in memory, empty ones counting as some; beyond, those unused
                longest leave it.
            default_ttl_s: Of sessions that name none; None: they don't expire.
        """
        self._engine = engine
        self._journal = journal
        self._max_tokens = max_tokens
        self._default_ttl_s = default_ttl_s
        self._residents: OrderedDict[str, Resident] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Resident]] = {}

    def __len__(self) -> int:
        """Sessions in memory."""
        return len(self._residents)

    @property
    def tokens(self) -> int:
        """What the sessions in memory hold, as a number of tokens."""
        return sum(each.tokens for each in self._residents.values())

    def resident(self, session_id: str) -> Resident | None:
        """A session that is in memory."""
        return self._residents.get(session_id)

    def drop(self, session_id: str) -> None:
        """Forget what memory has of a session, to be read anew."""
        self._residents.pop(session_id, None)

    def ttl_s(self, session: Session | SessionRecord) -> float | None:
        """Seconds without a use after which a session expires."""
        own = session.options.ttl_s
        return self._default_ttl_s if own is None else own

    def add(self, session: Session) -> Resident:
        """Keep a new session, which the journal has already."""
        resident = self._residents[session.id] = Resident(session)
        return resident

    @asynccontextmanager
    async def use(self, caller: Caller, session_id: str) -> AsyncIterator[Resident]:
        """The caller's session of that id, in memory as long as it is used.

        Raises:
            SessionNotFoundError: There is none, or it is somebody else's.
            SessionGoneError: It has expired.
            OtherModelError: Another model's tokens are in it.
            JournalFailedError: Its record can't be read.
        """
        resident = await self._find(caller, session_id)
        resident.uses += 1
        try:
            yield resident
        finally:
            resident.uses -= 1

    async def _find(self, caller: Caller, session_id: str) -> Resident:
        """The same, brought back from the journal where it isn't in memory."""
        resident = self._residents.get(session_id)
        if resident is None:
            await self.record(caller, session_id)
            resident = await self._load(session_id)
        if resident.session.tenant != caller.tenant:
            raise SessionNotFoundError(session_id)
        if self._overdue(resident.session) and resident.idle:
            await self.end(session_id, "expired")
            raise SessionGoneError("expired")
        if session_id in self._residents:
            self._residents.move_to_end(session_id)
        return resident

    async def record(self, caller: Caller, session_id: str) -> SessionRecord:
        """The record of an open session of the caller, of any model.

        Raises:
            SessionNotFoundError: There is none, or it is somebody else's.
            SessionGoneError: It has expired.
            JournalFailedError: It can't be read.
        """
        record = await self._read_record(session_id)
        if record is None or record.tenant != caller.tenant or record.state == "closed":
            raise SessionNotFoundError(session_id)
        if record.state == "open" and session_id not in self._residents and self._overdue(record):
            await self.end(session_id, "expired")
            raise SessionGoneError("expired")
        if record.state != "open":
            raise SessionGoneError(record.state)
        return record

    async def end(self, session_id: str, state: State, *, erase: bool = False) -> None:
        """A session is no more: in the journal, in memory, and on the ranks.

        Raises:
            JournalError: That could not be recorded.
        """
        await self._journal.end(session_id, state, erase=erase)
        resident = self._residents.pop(session_id, None)
        if resident is not None:
            resident.writer.close(SessionClosedError())
        await self._engine.close_session(session_id)

    async def trim(self) -> None:
        """Let the sessions that nobody used for longest leave memory, while it holds too much."""
        excess = self.tokens - self._max_tokens
        if excess <= 0:
            return
        for session_id, resident in list(self._residents.items()):
            if excess <= 0:
                return
            if resident.idle:
                excess -= resident.tokens
                del self._residents[session_id]
                await self._engine.close_session(session_id)

    async def overdue(self, now: float) -> list[str]:
        """Sessions that nobody used for as long as they were to be kept.

        Args:
            now: Seconds since the epoch.

        Raises:
            JournalError: It can't be asked.
        """
        found = []
        for session_id in await self._journal.idle(now, default_ttl_s=self._default_ttl_s):
            resident = self._residents.get(session_id)
            # In memory it may have been used since it was recorded.
            if resident is None or (resident.idle and self._overdue(resident.session)):
                found.append(session_id)
        return found

    def _overdue(self, session: Session | SessionRecord) -> bool:
        ttl_s = self.ttl_s(session)
        return ttl_s is not None and time.time() - session.used_at > ttl_s

    async def _read_record(self, session_id: str) -> SessionRecord | None:
        try:
            return await self._journal.record(session_id)
        except JournalError as error:
            raise JournalFailedError(str(error)) from error

    async def _load(self, session_id: str) -> Resident:
        task = self._loading.get(session_id)
        if task is None:
            task = self._loading[session_id] = asyncio.create_task(self._restore(session_id))
            task.add_done_callback(lambda _: self._loading.pop(session_id, None))
        return await asyncio.shield(task)

    async def _restore(self, session_id: str) -> Resident:
        try:
            record = await self._journal.record(session_id)
            if record is not None and record.model != self._engine.model_digest:
                raise OtherModelError(record.model, self._engine.model_digest)
            history = await self._journal.load(session_id)
        except JournalError as error:
            raise JournalFailedError(str(error)) from error
        if record is None or history is None:
            raise SessionNotFoundError(session_id)
        resident = self._residents.get(session_id)
        if resident is None:
            resident = self.add(
                Session(
                    record.id,
                    record.tenant,
                    history,
                    record.options,
                    created_at=record.created_at,
                    used_at=record.used_at,
                )
            )
            resident.recovering = True
        return resident
