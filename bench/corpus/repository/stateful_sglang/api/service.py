"""Sessions as a service: plans appends, runs them as turns, commits those that end well."""

from __future__ import annotations

import asyncio
import secrets
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stateful_sglang.api import tool_calls
from stateful_sglang.api.errors import EngineError
from stateful_sglang.api.sampling import DEFAULT_MAX_TOKENS, check_token_ids, sampling_params
from stateful_sglang.api.schemas import AppendBody, OpenBody
from stateful_sglang.api.turns import Reply, RunningTurn
from stateful_sglang.session.conversation import absorb_system
from stateful_sglang.session.engine import TurnEngine, TurnProgress, TurnRequest
from stateful_sglang.session.errors import (
    ContextOverflowError,
    InvalidInputError,
    SessionClosedError,
)
from stateful_sglang.session.messages import Message
from stateful_sglang.session.render import DeltaRenderer, RenderedDelta
from stateful_sglang.session.store import Session, SessionStore
from stateful_sglang.session.turn import PlannedTurn, Usage


@dataclass(frozen=True)
class Limits:
    """What one server takes on."""

    max_sessions: int = 10_000
    max_body_bytes: int | None = None
    """Largest request body; None: 32 bytes for each token of the context, at least 1 MiB."""


class SessionService:
    """The one owner of sessions in the API process."""

    def __init__(self, engine: TurnEngine, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        self._engine = engine
        self._store = SessionStore(limits.max_sessions)
        self._renderer = DeltaRenderer(engine.tokenizer, engine.eos_ids)
        self._turns: dict[str, RunningTurn] = {}
        self.max_body_bytes = limits.max_body_bytes or max(1 << 20, 32 * engine.context_length)

    def open(self, body: OpenBody) -> dict[str, Any]:
        """Open a session; nothing is computed."""
        head = body.to_head()
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
        return await self._engine.tree_summary(session_id, limit)

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
        plan = self._plan(session, body)
        asked = body.sampling.max_tokens
        room = self._engine.context_length - plan.base_len - len(plan.delta)
        max_tokens = min(asked or DEFAULT_MAX_TOKENS, room)
        params = sampling_params(
            body,
            tools=plan.head.tools,
            max_tokens=max_tokens,
            vocab_size=self._engine.vocab_size,
        )
        base_len, delta = self._store.begin(session, plan)

        def commit(last: TurnProgress, first_token_at: float) -> Reply:
            return self._commit(
                session, plan, body, last, max_tokens, arrived, first_token_at - arrived
            )

        def release() -> None:
            self._store.release(session)
            self._turns.pop(session.id, None)

        request = TurnRequest(
            session.id, secrets.token_hex(16), base_len, delta, params, body.stream
        )
        turn = RunningTurn(self._engine, request, commit=commit, release=release)
        self._turns[session.id] = turn
        return turn

    async def _close(self, session: Session) -> None:
        turn = self._turns.get(session.id)
        if turn is not None:
            await turn.abort(SessionClosedError())
        try:
            await self._engine.close_session(session.id)
        except Exception as error:
            raise EngineError(f"closing session {session.id} failed: {error}", 500) from error

    def _plan(self, session: Session, body: AppendBody) -> PlannedTurn:
        """What the append adds, rendered and tokenised, and proven to fit."""
        head, messages = session.conversation.head, None
        if body.messages is not None:
            new = [message.to_message() for message in body.messages]
            if session.version:
                messages = [*session.pending, *new]
                rendered = self._renderer.next(session.conversation, session.transcript, messages)
            else:
                head, messages = absorb_system(head, [*session.pending, *new])
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
        if not session.version and (session.conversation.head.system or session.pending):
            raise InvalidInputError(
                param,
                "this session was opened with a system prompt or messages, which the first append "
                "renders: begin with messages",
            )
        if body.text is not None:
            return self._renderer.text(body.text, session.transcript)
        ids: Sequence[int] = body.input_ids or ()
        check_token_ids(ids, self._engine.vocab_size, param)
        return RenderedDelta(len(session.transcript), array("q", ids))

    def _commit(
        self,
        session: Session,
        plan: PlannedTurn,
        body: AppendBody,
        last: TurnProgress,
        max_tokens: int,
        arrived: float,
        ttft: float,
    ) -> Reply:
        history = len(session.transcript)
        raw = self._renderer.answer_text(last.output_ids)
        parsed = self._parse(plan, body, last.text, raw)
        finish = "tool_calls" if parsed.calls else str((last.finish or {}).get("type"))
        answer = Message("assistant", parsed.content, parsed.calls, raw=raw)
        self._store.commit(session, plan, last.output_ids, answer, finish)
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
            "version": session.version,
            "message": message,
            "text": last.text,
            "finish_reason": finish,
            "usage": asdict(usage),
        }
        if body.return_output_ids:
            reply["output_ids"] = list(last.output_ids)
        return reply

    def _parse(
        self, plan: PlannedTurn, body: AppendBody, text: str, raw: str
    ) -> tool_calls.ParsedAnswer:
        if not plan.head.tools or body.tool_choice == "none":
            return tool_calls.ParsedAnswer(text, ())
        if body.tool_choice == "required" or body.sampling.constraints():
            return tool_calls.parse_json_call(text, plan.head)
        if self._engine.tool_call_parser is not None:
            return tool_calls.parse_with_sglang(
                raw, plan.head, self._engine.tool_call_parser, self._engine.tokenizer
            )
        return tool_calls.parse_hermes_calls(text, plan.head)

    def _view(self, session: Session) -> dict[str, Any]:
        tokens = len(session.transcript)
        return {
            "id": session.id,
            "version": session.version,
            "busy": session.busy,
            "tokens": tokens,
            "tokens_left": max(0, self._engine.context_length - tokens - 1),
            "messages": len(session.conversation.messages),
            "tools": session.conversation.head.tool_names(),
            "finish_reason": session.finish_reason,
            "metadata": dict(session.metadata),
            "created_at": session.created_at,
            "updated_at": session.updated_at,
        }


def _rounded(value: float) -> float:
    return round(value, 3)
