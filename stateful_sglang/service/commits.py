"""From a turn that ended well to a commit: its calls parsed, recorded, published, accounted for."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from stateful_sglang.rendering.delta import DeltaRenderer
from stateful_sglang.service import tool_calls
from stateful_sglang.service.commands import Append
from stateful_sglang.service.engine import TurnEngine, TurnProgress
from stateful_sglang.service.results import TurnResult, Usage
from stateful_sglang.session.errors import CommitFailedError
from stateful_sglang.session.history import Commit
from stateful_sglang.session.journal.base import CommitLog
from stateful_sglang.session.messages import Message
from stateful_sglang.session.store import Session, SessionStore
from stateful_sglang.session.turn import PlannedTurn

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AcceptedAppend:
    """An append that became a turn."""

    session: Session
    command: Append
    plan: PlannedTurn
    max_tokens: int
    """Most tokens it may generate, at most what was asked for."""
    arrived: float
    """When it came, by `time.perf_counter`."""


class Committer:
    """Makes a session's next version of what a turn gave."""

    def __init__(
        self, engine: TurnEngine, store: SessionStore, renderer: DeltaRenderer, log: CommitLog
    ) -> None:
        self._engine = engine
        self._store = store
        self._renderer = renderer
        self._log = log

    async def commit(
        self, append: AcceptedAppend, last: TurnProgress, first_token_at: float
    ) -> TurnResult:
        """Commit a turn.

        Args:
            append: What was asked for.
            last: The turn's last progress, which has its finish.
            first_token_at: When its first token came, by `time.perf_counter`.

        Raises:
            CommitFailedError: It could not be recorded; nothing has changed.
        """
        assert last.finish is not None
        session, plan = append.session, append.plan
        history = len(session.tip.transcript)
        raw = self._renderer.answer_text(last.output_ids)
        parsed = self._parse(append, last.text, raw)
        finish = "tool_calls" if parsed.calls else last.finish.reason
        tokens = self._renderer.answer_tokens(last.output_ids, raw)
        answer = Message("assistant", parsed.content, parsed.calls, raw=raw, tokens=tokens)
        commit = self._store.prepare(session, plan, last.output_ids, answer, finish)
        await self._record(session, commit)
        self._store.publish(session, commit)
        return TurnResult(
            session_id=session.id,
            version=commit.version,
            text=last.text,
            content=parsed.content,
            calls=parsed.calls,
            finish_reason=finish,
            usage=_usage(append, history, last, first_token_at),
            output_ids=last.output_ids,
        )

    async def _record(self, session: Session, commit: Commit) -> None:
        try:
            await self._log.append(session.id, commit)
        except Exception as error:
            logger.exception("a commit of version %d could not be recorded", commit.version)
            raise CommitFailedError(f"{type(error).__name__}: {error}") from error

    def _parse(self, append: AcceptedAppend, text: str, raw: str) -> tool_calls.ParsedAnswer:
        head, command = append.plan.head, append.command
        if not head.tools or command.tool_choice == "none":
            return tool_calls.ParsedAnswer(text, ())
        if command.tool_choice == "required" or command.constraint is not None:
            return tool_calls.parse_json_call(text, head)
        parsed = self._engine.parse_tool_calls(raw, head.tools)
        return parsed or tool_calls.parse_hermes_calls(text, head)


def _usage(
    append: AcceptedAppend, history: int, last: TurnProgress, first_token_at: float
) -> Usage:
    generated, steps = len(last.output_ids), last.decode_steps
    asked = append.command.sampling.max_tokens
    return Usage(
        history_tokens=history,
        delta_tokens=len(append.plan.delta),
        cached_tokens=last.cached_tokens,
        computed_tokens=last.prompt_tokens - last.cached_tokens,
        generated_tokens=generated,
        accepted_per_step=round((generated - 1) / steps, 3) if steps else None,
        ttft_ms=_milliseconds(first_token_at - append.arrived),
        total_ms=_milliseconds(time.perf_counter() - append.arrived),
        rewound_tokens=history - append.plan.base_len,
        rewind_reason=append.plan.rewind_reason,
        max_tokens=append.max_tokens,
        max_tokens_clipped=asked is not None and append.max_tokens < asked,
    )


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 3)
