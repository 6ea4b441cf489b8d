"""Sessions as a service: commands in, results out, whatever wire form they travel in."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from stateful_sglang.rendering.delta import DeltaRenderer
from stateful_sglang.service import exchange
from stateful_sglang.service.appends import Appends
from stateful_sglang.service.changes import Changes
from stateful_sglang.service.commands import (
    Append,
    Caller,
    Edit,
    Fork,
    Ingest,
    Key,
    ListSessions,
    OpenSession,
    Rollback,
    Touch,
)
from stateful_sglang.service.commits import Committer
from stateful_sglang.service.conversations import Conversation, ImplicitTurn
from stateful_sglang.service.core import Core, Limits, journal_errors, view_from
from stateful_sglang.service.engine import EngineError, TurnEngine
from stateful_sglang.service.events import MAX_LISTENERS
from stateful_sglang.service.failures import not_done
from stateful_sglang.service.implicit import Implicit
from stateful_sglang.service.observe import NullObserver, Observer
from stateful_sglang.service.plan import Planner
from stateful_sglang.service.prefixes import Prefixes
from stateful_sglang.service.results import (
    Closed,
    Ingested,
    SessionEvent,
    SessionList,
    SessionMessages,
    SessionView,
)
from stateful_sglang.service.turns import TurnReader
from stateful_sglang.session.errors import SessionError, TooManyRequestsError
from stateful_sglang.session.journal.base import Journal, SessionQuery
from stateful_sglang.session.messages import Head, Message
from stateful_sglang.session.said import Recital, recital

logger = logging.getLogger(__name__)

_MAINTENANCE_S = 5.0


class SessionService:
    """The one owner of sessions in the API process."""

    def __init__(
        self,
        engine: TurnEngine,
        journal: Journal,
        limits: Limits | None = None,
        observer: Observer | None = None,
    ) -> None:
        """
        Args:
            engine: The model server.
            journal: Where every change is recorded before it is answered.
            limits: None for the defaults.
            observer: Told the figures of what happens; None: nobody is.
        """
        limits = limits or Limits()
        renderer = DeltaRenderer(engine.tokenizer, engine.eos_ids, limits.content_tokens)
        renderer.prepare()
        self._engine = engine
        self._planner = Planner(engine, renderer)
        self._core = Core(engine, self._planner, journal, limits, observer or NullObserver())
        self._changes = Changes(self._core)
        self._appends = Appends(self._core, Committer(engine, journal, renderer))
        self.prefixes = Prefixes(self._core)
        self._implicit = Implicit(self._core, self._changes, self._appends)
        self._maintenance: asyncio.Task[None] | None = None
        self.max_body_bytes = limits.max_body_bytes or max(1 << 20, 32 * engine.context_length)

    # ---- Changes without generation ----

    async def open(self, caller: Caller, command: OpenSession) -> SessionView:
        """Open a session; nothing is computed."""
        self._maintain()
        return await self._changes.open(caller, command)

    async def fork(self, caller: Caller, session_id: str, command: Fork) -> SessionView:
        """Open a session that shares another's past; nothing is copied and nothing computed."""
        self._maintain()
        return await self._changes.fork(caller, session_id, command)

    async def ingest(self, caller: Caller, session_id: str, command: Ingest) -> Ingested:
        """Add messages without generating; their KV is computed before the answer."""
        self._maintain()
        return await self._changes.ingest(caller, session_id, command)

    async def rollback(self, caller: Caller, session_id: str, command: Rollback) -> SessionView:
        """Take a session back to one of its versions."""
        return await self._changes.rollback(caller, session_id, command)

    async def edit(self, caller: Caller, session_id: str, command: Edit) -> SessionView:
        """Replace or drop what some turns said."""
        return await self._changes.edit(caller, session_id, command)

    async def touch(self, caller: Caller, session_id: str, command: Touch) -> SessionView:
        """Count the session as used now, and change how it is kept."""
        return await self._changes.touch(caller, session_id, command)

    async def close(self, caller: Caller, session_id: str, *, erase: bool = False) -> Closed:
        """End a session, aborting what runs of it first."""
        return await self._changes.close(caller, session_id, erase=erase)

    async def import_(
        self,
        caller: Caller,
        exported: Mapping[str, Any],
        *,
        key: Key | None = None,
        accept_other_model: bool = False,
    ) -> SessionView:
        """Take in a session that `export` wrote, here or on another server.

        Raises:
            InvalidInputError: It is no such session.
            OtherModelError: Its tokens are another model's. With `accept_other_model` its messages
                alone are taken, and computed anew.
        """
        self._maintain()
        self._core.check_accepting()
        session = await asyncio.to_thread(
            exchange.imported,
            exported,
            caller.tenant,
            model=self._engine.model_digest,
            vocab_size=self._engine.vocab_size,
            accept_other_model=accept_other_model,
        )
        run = partial(self._changes.add, caller, session)
        return await self._core.once(caller, "", key, run, view_from)

    # ---- Reading ----

    async def get(self, caller: Caller, session_id: str) -> SessionView:
        """A session as last committed."""
        async with self._core.directory.use(caller, session_id) as resident:
            return self._core.view(resident.session)

    async def list(self, caller: Caller, command: ListSessions) -> SessionList:
        """The caller's own sessions, the last used first."""
        query = SessionQuery(
            caller.tenant, command.limit, command.after, dict(command.metadata), command.state
        )
        with journal_errors("sessions can't be listed"):
            page = await self._core.journal.list(query)
        views = []
        for record in page.records:
            resident = self._core.directory.resident(record.id)
            busy = resident is not None and resident.writer.held
            views.append(self._core.view_of(record, busy=busy))
        more = page.records[-1].id if len(views) == command.limit else None
        return SessionList(tuple(views), page.total, more)

    async def messages(
        self, caller: Caller, session_id: str, version: int | None = None
    ) -> SessionMessages:
        """The messages of a version, so that a lost reply can be read; None: of the last one."""
        async with self._core.directory.use(caller, session_id) as resident:
            session = resident.session
            commit = session.tip if version is None else session.at(version)
            conversation = commit.conversation
            return SessionMessages(
                session_id=session.id,
                version=commit.version,
                system=conversation.head.system,
                messages=tuple(conversation.messages),
                pending=commit.pending,
                raw=conversation.raw,
            )

    async def export(self, caller: Caller, session_id: str) -> dict[str, Any]:
        """A session with all of its versions, as JSON that `import_` takes."""
        async with self._core.directory.use(caller, session_id) as resident:
            taken = exchange.snapshot(resident.session, self._engine.model_digest)
            return await asyncio.to_thread(exchange.exported, taken)

    async def events(self, caller: Caller, session_id: str) -> AsyncIterator[SessionEvent]:
        """What happens to a session from now on, until it ends."""
        events = self._core.events
        async with self._core.directory.use(caller, session_id) as resident:
            if events.listeners(session_id) >= MAX_LISTENERS:
                raise TooManyRequestsError("that many listen to this session", MAX_LISTENERS)
            listener = events.listen(session_id)
            version = resident.session.version
        try:
            yield SessionEvent("listening", {"version": version})
            async for event in listener:
                yield event
        finally:
            events.leave(session_id, listener)

    async def tree(self, caller: Caller, session_id: str | None, limit: int) -> Mapping[str, Any]:
        """The prefix tree, or one session's path in it, as the engine describes it to people."""
        if session_id is not None:
            async with self._core.directory.use(caller, session_id):
                pass
        try:
            return await self._engine.tree_summary(session_id, limit)
        except EngineError as error:
            raise not_done(error) from error

    # ---- Turns ----

    async def append(self, caller: Caller, session_id: str, command: Append) -> TurnReader:
        """Start a turn, or join the one that was started under the same key.

        It may wait for the session's other turns; a caller that is cancelled meanwhile leaves.

        Raises:
            SessionError: What is wrong with the request, before the engine has seen any of it.
        """
        self._maintain()
        return await self._appends.append(caller, session_id, command)

    def recital(
        self, caller: Caller, scope: str, head: Head, messages: Sequence[Message]
    ) -> Recital:
        """What a client says again, as it is compared; from any thread.

        Args:
            caller: Whose it is.
            scope: What else two requests must have in common to share anything.
            head: Tools and what the template is told.
            messages: All that was said.
        """
        return recital(f"{caller.tenant} {scope} {head.key}", messages)

    def knows(self, asked: Recital) -> bool:
        """Whether a conversation seems to go on from one that is known; from any thread."""
        return self._implicit.knows(asked)

    async def converse(self, caller: Caller, conversation: Conversation) -> ImplicitTurn:
        """Start the turn of a conversation that a client sent whole, in the session it belongs to.

        Raises:
            SessionError: What is wrong with the request, before the engine has seen any of it.
        """
        self._maintain()
        return await self._implicit.turn(caller, conversation)

    # ---- The server's life ----

    def begin(self) -> None:
        """Publish again what was published, in the background, and look after sessions from now on.

        To be called in the loop that serves, once the engine answers; without it the first request
        does.
        """
        self._maintain()

    def begin_drain(self) -> None:
        """Start nothing more; what runs goes on."""
        self._core.draining = True

    async def shutdown(self, bound_s: float = 30.0) -> None:
        """Let running turns commit, abort those that take longer, and close the journal.

        Args:
            bound_s: Seconds that turns have.
        """
        self.begin_drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(bound_s):
                await self._appends.ended()
        self._appends.cancel()
        await self._appends.ended()
        if self._maintenance is not None:
            self._maintenance.cancel()
        await self._core.journal.close()

    def _maintain(self) -> None:
        """Begin to look after expiry and memory, in the loop of the first request."""
        if self._maintenance is None or self._maintenance.done():
            self._maintenance = asyncio.create_task(self._look_after(), name="maintenance")

    async def _look_after(self) -> None:
        await self._restore_prefixes()
        while True:
            await asyncio.sleep(_MAINTENANCE_S)
            try:
                for session_id in await self._core.directory.overdue(time.time()):
                    await self._core.expire(session_id)
                await self._core.directory.trim()
                self._observe()
            except Exception:
                logger.exception("looking after idle sessions failed; it will be tried again")
            await self._restore_prefixes()

    async def _restore_prefixes(self) -> None:
        try:
            await self.prefixes.restore()
        except SessionError as error:
            logger.error("%s; it will be tried again", error)

    def _observe(self) -> None:
        stats, here = self._core.journal.stats(), len(self._core.directory)
        self._core.observer.journal(stats)
        self._core.observer.sessions("memory", here)
        self._core.observer.sessions("journal", max(0, stats.sessions - here))
