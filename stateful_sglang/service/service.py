"""Sessions as a service: commands in, results out, whatever wire form they travel in."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stateful_sglang.rendering.content import ContentTokens
from stateful_sglang.rendering.delta import DeltaRenderer
from stateful_sglang.service.commands import Append, OpenSession
from stateful_sglang.service.commits import AcceptedAppend, Committer
from stateful_sglang.service.engine import EngineError, TurnEngine, TurnProgress, TurnRequest
from stateful_sglang.service.failures import not_done, turn_failed
from stateful_sglang.service.plan import Planner, constrained_by
from stateful_sglang.service.results import Closed, SessionList, SessionView, TurnResult
from stateful_sglang.service.turns import RunningTurn
from stateful_sglang.session.errors import SessionClosedError
from stateful_sglang.session.journal.base import CommitLog, NoLog
from stateful_sglang.session.store import Session, SessionStore


@dataclass(frozen=True)
class Limits:
    """What one server takes on."""

    max_sessions: int = 10_000
    max_body_bytes: int | None = None
    """Largest request body; None: 32 bytes for each token of the context, at least 1 MiB."""
    content_tokens: ContentTokens = "text"
    """What special tokens spelled in messages become: text, or tokens."""


class SessionService:
    """The one owner of sessions in the API process."""

    def __init__(
        self, engine: TurnEngine, limits: Limits | None = None, log: CommitLog | None = None
    ) -> None:
        """
        Args:
            engine: The model server.
            limits: None for the defaults.
            log: Records commits before they are published; None keeps them in memory alone.
        """
        limits = limits or Limits()
        self._engine = engine
        self._store = SessionStore(limits.max_sessions)
        renderer = DeltaRenderer(engine.tokenizer, engine.eos_ids, limits.content_tokens)
        renderer.prepare()
        self._planner = Planner(engine, renderer)
        self._committer = Committer(engine, self._store, renderer, log or NoLog())
        self._turns: dict[str, RunningTurn] = {}
        self.max_body_bytes = limits.max_body_bytes or max(1 << 20, 32 * engine.context_length)

    async def open(self, command: OpenSession) -> SessionView:
        """Open a session; nothing is computed."""
        await self._planner.check_head(command.head)
        return self._view(self._store.open(command.head, command.messages, command.metadata))

    def get(self, session_id: str) -> SessionView:
        """A session as last committed."""
        return self._view(self._store.get(session_id))

    def list(self, limit: int) -> SessionList:
        """The sessions opened last, at most `limit`."""
        newest = list(self._store)[: -limit - 1 : -1]
        return SessionList(tuple(self._view(each) for each in newest), len(self._store))

    async def close(self, session_id: str) -> Closed:
        """Forget a session, aborting its turn first."""
        session = self._store.remove(session_id)
        # Not to be cut short by the connection that asked for it.
        await asyncio.shield(asyncio.create_task(self._close(session)))
        return Closed(session.id, session.version)

    async def tree(self, session_id: str | None, limit: int) -> Mapping[str, Any]:
        """The prefix tree, or one session's path in it, as the engine describes it to people."""
        if session_id is not None:
            self._store.get(session_id)
        try:
            return await self._engine.tree_summary(session_id, limit)
        except EngineError as error:
            raise not_done(error) from error

    async def append(self, session_id: str, command: Append) -> RunningTurn:
        """Start a turn.

        Raises:
            SessionError: What is wrong with the request, before the engine has seen any of it.
        """
        arrived = time.perf_counter()
        running = self._turns.get(self._store.get(session_id).id)
        if running is not None and running.aborting:
            await running.wait()
        session = self._writable(session_id, command)
        constraint = await self._planner.constraint(command, session.tip.conversation.head)
        if constraint is not None:
            session = self._writable(session_id, command)
        plan = self._planner.plan(session, command.content)
        sampling = self._planner.sampling(command.sampling, plan)
        base_len, delta = self._store.begin(session, plan)
        accepted = AcceptedAppend(session, command, plan, sampling.max_tokens or 0, arrived)

        async def commit(last: TurnProgress, first_token_at: float) -> TurnResult:
            return await self._committer.commit(accepted, last, first_token_at)

        def release() -> None:
            self._store.release(session)
            self._turns.pop(session.id, None)

        rid = secrets.token_hex(16)
        turn = RunningTurn(
            self._engine,
            TurnRequest(session.id, rid, base_len, delta, sampling, constraint, command.stream),
            commit=commit,
            release=release,
            constraint=constrained_by(command),
        )
        self._turns[session.id] = turn
        return turn

    def _writable(self, session_id: str, command: Append) -> Session:
        session = self._store.get(session_id)
        self._store.check_writable(session, command.expected_version)
        return session

    async def _close(self, session: Session) -> None:
        turn = self._turns.get(session.id)
        if turn is not None:
            await turn.abort(SessionClosedError())
        try:
            await self._engine.close_session(session.id)
        except Exception as error:
            broken = EngineError("broken", f"closing the session failed: {error}")
            raise turn_failed(broken, None) from error

    def _view(self, session: Session) -> SessionView:
        tip = session.tip
        tokens = len(tip.transcript)
        return SessionView(
            id=session.id,
            version=tip.version,
            busy=session.busy,
            tokens=tokens,
            tokens_left=self._planner.tokens_left(tokens),
            messages=len(tip.conversation.messages),
            tools=tuple(tip.conversation.head.tool_names()),
            finish_reason=tip.finish_reason,
            metadata=dict(session.metadata),
            created_at=session.created_at,
            updated_at=session.updated_at,
        )
