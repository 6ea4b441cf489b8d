"""Sessions as a service: plans appends, runs them as turns, commits those that end well."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stateful_sglang.api.native.schemas import AppendBody, OpenBody
from stateful_sglang.grammar.constraints import Constraints
from stateful_sglang.grammar.errors import ConstraintError
from stateful_sglang.grammar.worker import WorkerUnavailableError
from stateful_sglang.rendering.content import ContentTokens
from stateful_sglang.rendering.delta import DeltaRenderer, RenderedDelta
from stateful_sglang.service import tool_calls
from stateful_sglang.service.engine import EngineError, TurnEngine, TurnProgress, TurnRequest
from stateful_sglang.service.failures import not_done, turn_failed
from stateful_sglang.service.sampling import (
    DEFAULT_MAX_TOKENS,
    Constraint,
    as_text,
    check_token_ids,
    constraint_of,
    sampling_params,
)
from stateful_sglang.service.turns import Reply, RunningTurn
from stateful_sglang.session.conversation import absorb_system
from stateful_sglang.session.errors import (
    CommitFailedError,
    ContextOverflowError,
    InvalidInputError,
    SessionClosedError,
)
from stateful_sglang.session.history import Commit
from stateful_sglang.session.journal.base import CommitLog, NoLog
from stateful_sglang.session.messages import Message
from stateful_sglang.session.store import Session, SessionStore
from stateful_sglang.session.turn import PlannedTurn, Usage

logger = logging.getLogger(__name__)


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
        self._log = log or NoLog()
        self._engine = engine
        self._store = SessionStore(limits.max_sessions)
        self._constraints = Constraints(engine.check_constraint)
        self._renderer = DeltaRenderer(engine.tokenizer, engine.eos_ids, limits.content_tokens)
        self._renderer.prepare()
        self._turns: dict[str, RunningTurn] = {}
        self.max_body_bytes = limits.max_body_bytes or max(1 << 20, 32 * engine.context_length)

    async def open(self, body: OpenBody) -> dict[str, Any]:
        """Open a session; nothing is computed."""
        head = body.to_head()
        if any(tool["function"].get("parameters") for tool in head.tools):
            await self._prepared(Constraint("tools", as_text(head.tools, "tools"), "tools"))
        if head != type(head)():
            self._renderer.check_head(head)
        messages = [message.to_message() for message in body.messages]
        return self._view(self._store.open(head, messages, body.metadata))

    def get(self, session_id: str) -> dict[str, Any]:
        """A session as last committed."""
        return self._view(self._store.get(session_id))

    def list(self, limit: int) -> dict[str, Any]:
        """The sessions opened last, at most `limit`."""
        newest = list(self._store)[: -limit - 1 : -1]
        return {"sessions": [self._view(each) for each in newest], "total": len(self._store)}

    async def close(self, session_id: str) -> dict[str, Any]:
        """Forget a session, aborting its turn first."""
        session = self._store.remove(session_id)
        # Not to be cut short by the connection that asked for it.
        await asyncio.shield(asyncio.create_task(self._close(session)))
        return {"id": session.id, "version": session.version, "closed": True}

    async def tree(self, session_id: str | None, limit: int) -> dict[str, Any]:
        """The prefix tree, or one session's path in it."""
        if session_id is not None:
            self._store.get(session_id)
        try:
            return await self._engine.tree_summary(session_id, limit)
        except EngineError as error:
            raise not_done(error) from error

    async def append(self, session_id: str, body: AppendBody) -> RunningTurn:
        """Start a turn.

        Raises:
            SessionError: What is wrong with the request, before the engine has seen any of it.
        """
        arrived = time.perf_counter()
        turn = self._turns.get(self._store.get(session_id).id)
        if turn is not None and turn.aborting:
            await turn.wait()
        session = self._store.get(session_id)
        self._store.check_writable(session, body.expected_version)
        constraint = constraint_of(body, session.tip.conversation.head.tools)
        prepared = {}
        if constraint is not None:
            prepared[constraint.engine_kind] = await self._prepared(constraint)
            session = self._store.get(session_id)
            self._store.check_writable(session, body.expected_version)
        plan = self._plan(session, body)
        asked = body.sampling.max_tokens
        room = self._engine.context_length - plan.base_len - len(plan.delta)
        max_tokens = min(asked or DEFAULT_MAX_TOKENS, room)
        params = sampling_params(
            body,
            constraint=prepared,
            max_tokens=max_tokens,
            vocab_size=self._engine.vocab_size,
        )
        base_len, delta = self._store.begin(session, plan)

        async def commit(last: TurnProgress, first_token_at: float) -> Reply:
            return await self._commit(
                session, plan, body, last, max_tokens, arrived, first_token_at - arrived
            )

        def release() -> None:
            self._store.release(session)
            self._turns.pop(session.id, None)

        request = TurnRequest(
            session.id, secrets.token_hex(16), base_len, delta, params, body.stream
        )
        turn = RunningTurn(
            self._engine,
            request,
            commit=commit,
            release=release,
            constraint=constraint.field if constraint is not None else None,
        )
        self._turns[session.id] = turn
        return turn

    async def _prepared(self, constraint: Constraint) -> str:
        try:
            return await self._constraints.prepared(constraint.kind, constraint.text)
        except ConstraintError as error:
            tool = error.tool
            field = constraint.field if tool is None else f"tools[{tool}].function.parameters"
            raise InvalidInputError(field, str(error)) from error
        except WorkerUnavailableError as error:
            raise turn_failed(EngineError("overloaded", str(error)), None) from error

    async def _close(self, session: Session) -> None:
        turn = self._turns.get(session.id)
        if turn is not None:
            await turn.abort(SessionClosedError())
        try:
            await self._engine.close_session(session.id)
        except Exception as error:
            broken = EngineError("broken", f"closing the session failed: {error}")
            raise turn_failed(broken, None) from error

    def _plan(self, session: Session, body: AppendBody) -> PlannedTurn:
        """What the append adds, rendered and tokenised, and proven to fit."""
        tip = session.tip
        head, messages = tip.conversation.head, None
        if body.messages is not None:
            new = [message.to_message() for message in body.messages]
            if session.version:
                messages = [*tip.pending, *new]
                rendered = self._renderer.next(tip.conversation, tip.transcript, messages)
            else:
                head, messages = absorb_system(head, [*tip.pending, *new])
                rendered = self._renderer.first(head, messages)
        else:
            rendered = self._raw(session, body)
        if not rendered.delta:
            param = "messages" if body.messages is not None else "text"
            raise InvalidInputError(param, "nothing to append: it has no tokens")
        left = max(0, self._engine.context_length - rendered.base_len - 1)
        if len(rendered.delta) > left:
            raise ContextOverflowError(
                delta_tokens=len(rendered.delta),
                tokens_left=left,
                context_length=self._engine.context_length,
            )
        return PlannedTurn(
            rendered.base_len, rendered.delta, rendered.rewind_reason, head, messages
        )

    def _raw(self, session: Session, body: AppendBody) -> RenderedDelta:
        param = "text" if body.text is not None else "input_ids"
        tip = session.tip
        if not tip.version and (opened_with := _opened_with(session)):
            raise InvalidInputError(
                param,
                f"this session was opened with {' and '.join(opened_with)}, which the first append "
                "renders: begin with messages, or open a session without",
            )
        if body.text is not None:
            return self._renderer.text(body.text, tip.transcript)
        ids: Sequence[int] = body.input_ids or ()
        check_token_ids(ids, self._engine.vocab_size, param)
        return RenderedDelta(len(tip.transcript), array("q", ids))

    async def _commit(
        self,
        session: Session,
        plan: PlannedTurn,
        body: AppendBody,
        last: TurnProgress,
        max_tokens: int,
        arrived: float,
        ttft: float,
    ) -> Reply:
        history = len(session.tip.transcript)
        raw = self._renderer.answer_text(last.output_ids)
        parsed = self._parse(plan, body, last.text, raw)
        finish = "tool_calls" if parsed.calls else _reason(last)
        tokens = self._renderer.answer_tokens(last.output_ids, raw)
        answer = Message("assistant", parsed.content, parsed.calls, raw=raw, tokens=tokens)
        commit = self._store.prepare(session, plan, last.output_ids, answer, finish)
        await self._record(session, commit)
        self._store.publish(session, commit)
        generated = len(last.output_ids)
        asked = body.sampling.max_tokens
        usage = Usage(
            history_tokens=history,
            delta_tokens=len(plan.delta),
            cached_tokens=last.cached_tokens,
            computed_tokens=last.prompt_tokens - last.cached_tokens,
            generated_tokens=generated,
            accepted_per_step=_rounded((generated - 1) / last.decode_steps)
            if last.decode_steps
            else None,
            ttft_ms=_rounded(ttft * 1e3),
            total_ms=_rounded((time.perf_counter() - arrived) * 1e3),
            rewound_tokens=history - plan.base_len,
            rewind_reason=plan.rewind_reason,
            max_tokens=max_tokens,
            max_tokens_clipped=asked is not None and max_tokens < asked,
        )
        message: dict[str, Any] = {"role": "assistant", "content": parsed.content}
        if parsed.calls:
            message["tool_calls"] = tool_calls.openai_form(parsed.calls)
        reply: Reply = {
            "id": session.id,
            "version": commit.version,
            "message": message,
            "text": last.text,
            "finish_reason": finish,
            "usage": asdict(usage),
        }
        if body.return_output_ids:
            reply["output_ids"] = list(last.output_ids)
        return reply

    async def _record(self, session: Session, commit: Commit) -> None:
        try:
            await self._log.append(session.id, commit)
        except Exception as error:
            logger.exception("a commit of version %d could not be recorded", commit.version)
            raise CommitFailedError(f"{type(error).__name__}: {error}") from error

    def _parse(
        self, plan: PlannedTurn, body: AppendBody, text: str, raw: str
    ) -> tool_calls.ParsedAnswer:
        if not plan.head.tools or body.tool_choice == "none":
            return tool_calls.ParsedAnswer(text, ())
        if body.tool_choice == "required" or body.sampling.constraints():
            return tool_calls.parse_json_call(text, plan.head)
        parsed = self._engine.parse_tool_calls(raw, plan.head.tools)
        return parsed or tool_calls.parse_hermes_calls(text, plan.head)

    def _view(self, session: Session) -> dict[str, Any]:
        tip = session.tip
        tokens = len(tip.transcript)
        return {
            "id": session.id,
            "version": tip.version,
            "busy": session.busy,
            "tokens": tokens,
            "tokens_left": max(0, self._engine.context_length - tokens - 1),
            "messages": len(tip.conversation.messages),
            "tools": tip.conversation.head.tool_names(),
            "finish_reason": tip.finish_reason,
            "metadata": dict(session.metadata),
            "created_at": session.created_at,
            "updated_at": session.updated_at,
        }


def _opened_with(session: Session) -> list[str]:
    """What the opening gave that only a chat template can render."""
    head = session.tip.conversation.head
    given = {
        "system": head.system is not None,
        "tools": bool(head.tools),
        "chat_template_kwargs": bool(head.template_kwargs),
        "messages": bool(session.tip.pending),
    }
    return [name for name, there in given.items() if there]


def _reason(last: TurnProgress) -> str:
    assert last.finish is not None  # a turn commits only at its end
    return last.finish.reason


def _rounded(value: float) -> float:
    return round(value, 3)
