"""What every operation of the service needs: the parts, and how a caller gets at a session."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

from stateful_sglang.rendering.content import ContentTokens
from stateful_sglang.service.commands import Caller, Key, Writing
from stateful_sglang.service.directory import Directory, Resident
from stateful_sglang.service.engine import TurnEngine
from stateful_sglang.service.events import EventHub
from stateful_sglang.service.idempotency import Keeping, KeyedWork, Scope
from stateful_sglang.service.observe import Observer
from stateful_sglang.service.plan import Planner
from stateful_sglang.service.results import SessionView
from stateful_sglang.session.errors import (
    DrainingError,
    JournalFailedError,
    SessionBusyError,
    VersionMismatchError,
)
from stateful_sglang.session.journal.base import Journal, JournalError
from stateful_sglang.session.records import CommitRef, KeyedResult, SessionRecord
from stateful_sglang.session.session import Session

T = TypeVar("T")

logger = logging.getLogger(__name__)

_GRACE_S = 0.05
"""How long a caller that will not wait still waits: the turn that is in its way may be one whose
client is gone, which takes a moment to be noticed."""
_GRACE_STEPS = 16


@dataclass(frozen=True)
class Limits:
    """What one server takes on."""

    max_sessions: int = 10_000
    """Of a tenant; beyond, the one unused longest expires for a new one."""
    max_body_bytes: int | None = None
    """Largest request body; None: 32 bytes for each token of the context, at least 1 MiB."""
    content_tokens: ContentTokens = "text"
    """What special tokens spelled in messages become: text, or tokens."""
    default_ttl_s: float | None = 24 * 3600.0
    """Seconds without a use after which a session expires that names no time of its own."""
    resident_tokens: int = 16_000_000
    """Tokens of the sessions in memory: beyond, those unused longest leave it for the journal."""


class Core:
    """The parts of the service, and what its operations have in common."""

    def __init__(
        self,
        engine: TurnEngine,
        planner: Planner,
        journal: Journal,
        limits: Limits,
        observer: Observer,
    ) -> None:
        self.engine = engine
        self.planner = planner
        self.journal = journal
        self.limits = limits
        self.observer = observer
        self.directory = Directory(
            engine,
            journal,
            max_tokens=limits.resident_tokens,
            default_ttl_s=limits.default_ttl_s,
        )
        self.events = EventHub()
        self.draining = False
        self._running: KeyedWork[Any] = KeyedWork(journal)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._left: set[asyncio.Task[Any] | None] = set()
        """Of those, the ones whose callers are gone."""

    def check_accepting(self) -> None:
        """Raise `DrainingError` once the server is about to stop."""
        if self.draining:
            raise DrainingError

    async def take(self, resident: Resident, writing: Writing) -> None:
        """Become the session's writer; the caller gives the place back.

        Raises:
            SessionBusyError: Somebody else is for longer than the caller waits.
            VersionMismatchError: The session is at another version than expected.
            SessionClosedError: It was closed meanwhile.
        """
        place = resident.writer
        began = time.perf_counter() if place.held else None
        wait_s = writing.wait_s if writing.on_busy == "wait" else _GRACE_S
        taken = await place.take(wait_s, partial(self._was_left, resident))
        if began is not None:
            self.observer.waited(time.perf_counter() - began)
        if not taken:
            waited = writing.wait_s if writing.on_busy == "wait" else 0
            raise SessionBusyError(resident.session.version, waited)
        try:
            self.check_version(resident.session, writing.expected_version)
        except VersionMismatchError:
            place.give_back()
            raise

    async def _was_left(self, resident: Resident) -> bool:
        """Whether nobody waits any more for what its writer does: it ends by itself, and whoever
        comes next isn't refused for it, however long that takes."""
        # A moment counted in steps of the loop: one that was stalled has the timers of those who
        # wait fire before it reads that a connection has ended.
        for _ in range(_GRACE_STEPS):
            turn, task = resident.turn, resident.writing
            if (turn is not None and turn.aborting) or task in self._left:
                return True
            await asyncio.sleep(0)
        return False

    def check_version(self, session: Session, expected: int | None) -> None:
        """Raise `VersionMismatchError` where the caller expected another version."""
        if expected is not None and expected != session.version:
            raise VersionMismatchError(expected, session.version)

    @asynccontextmanager
    async def writing(
        self, caller: Caller, session_id: str, writing: Writing
    ) -> AsyncIterator[Resident]:
        """The session, with the caller as its writer."""
        async with self.directory.use(caller, session_id) as resident:
            await self.take(resident, writing)
            resident.writing = asyncio.current_task()
            try:
                yield resident
            finally:
                resident.writing = None
                resident.writer.give_back()

    @asynccontextmanager
    async def recording(self, resident: Resident) -> AsyncIterator[None]:
        """A change of a session's record, from its making to its publication.

        Raises:
            JournalFailedError: What the journal raised.
        """
        async with resident.recording:
            with journal_errors("the change could not be recorded"):
                yield

    async def once(
        self,
        caller: Caller,
        session_id: str,
        key: Key | None,
        run: Callable[[Keeping], Coroutine[Any, Any, T]],
        restore: Callable[[Mapping[str, Any]], T],
    ) -> T:
        """Run an operation to its end even if its client leaves, and once for each key.

        Args:
            caller: Who asks.
            session_id: Of what; empty for what makes a session.
            key: The idempotency key, if there is one.
            run: The operation; it has to record its result by the `Keeping` it is given.
            restore: Makes the result of what was recorded.
        """
        keeping = Keeping(Scope(caller.tenant, session_id), key)
        if key is None:
            return await self.finish(run(keeping))
        with journal_errors("the results under idempotency keys can't be read"):
            known = await self._running.join(keeping)
        if isinstance(known, KeyedResult):
            return restore(known.result)
        if known is not None:
            joined: T = known
            return joined

        async def start() -> T:
            try:
                result: T = await self._running.start(keeping, lambda: run(keeping))
            finally:
                self._running.over(keeping)
            return result

        return await self.finish(start())

    async def finish(self, operation: Coroutine[Any, Any, T]) -> T:
        """What an operation gives, which is run to its end even if its caller is cancelled."""
        task = asyncio.create_task(operation)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done():
                self._left.add(task)
                task.add_done_callback(self._left.discard)
            raise

    def spawn(self, operation: Coroutine[Any, Any, None]) -> None:
        """Run an operation that nobody waits for; what goes wrong with it is logged."""
        task = asyncio.create_task(operation)
        self._tasks.add(task)

        def ended(_: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("an operation that nobody waits for failed", exc_info=error)

        task.add_done_callback(ended)

    async def expire(self, session_id: str) -> None:
        """End a session that nobody uses any more.

        Raises:
            JournalError: That could not be recorded.
        """
        await self.directory.end(session_id, "expired")
        self.events.tell(session_id, "expired")
        self.observer.session_ended("expired")

    def view(self, session: Session) -> SessionView:
        """A session as it is now."""
        resident = self.directory.resident(session.id)
        busy = resident is not None and resident.writer.held
        return self.view_of(session.record(self.engine.model_digest), busy=busy)

    def view_of(self, record: SessionRecord, *, busy: bool = False) -> SessionView:
        """A session as it is recorded."""
        options = record.options
        return SessionView(
            id=record.id,
            version=record.version,
            state=record.state,
            busy=busy,
            tokens=record.tokens,
            tokens_left=self.planner.tokens_left(record.tokens),
            messages=record.messages,
            pending=record.pending,
            tools=record.tools,
            finish_reason=record.finish_reason,
            metadata=dict(options.metadata),
            ttl_s=self.directory.ttl_s(record),
            retention=options.retention,
            priority=options.priority,
            private=options.private,
            forked_from=record.origin,
            created_at=record.created_at,
            used_at=record.used_at,
        )


@contextmanager
def journal_errors(what: str) -> Iterator[None]:
    """Errors of the journal become what a caller is told: `what` went wrong, and why."""
    try:
        yield
    except JournalError as error:
        raise JournalFailedError(f"{what}: {error}") from error


def view_json(view: SessionView) -> dict[str, Any]:
    """A view as JSON keeps it; `view_from` reads it again."""
    return asdict(view)


def view_from(kept: Mapping[str, Any]) -> SessionView:
    """A view that `view_json` wrote."""
    origin = kept["forked_from"]
    forked_from = None if origin is None else CommitRef(*origin)
    return SessionView(**{**kept, "tools": tuple(kept["tools"]), "forked_from": forked_from})
