"""From a turn that ended well to a commit: its calls parsed, recorded, published, accounted for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from stateful_sglang.rendering.delta import DeltaRenderer
from stateful_sglang.service import tool_calls
from stateful_sglang.service.commands import Append
from stateful_sglang.service.directory import Resident
from stateful_sglang.service.engine import TurnEngine, TurnProgress
from stateful_sglang.service.idempotency import Keeping
from stateful_sglang.service.results import TurnResult, Usage, as_json
from stateful_sglang.session.errors import CommitFailedError
from stateful_sglang.session.journal.base import Journal, JournalError
from stateful_sglang.session.messages import Message
from stateful_sglang.session.turn import PlannedTurn

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AcceptedAppend:
    """An append that became a turn."""

    resident: Resident
    command: Append
    plan: PlannedTurn
    max_tokens: int
    """Most tokens it may generate, at most what was asked for."""
    arrived: float
    """When it came, by `time.perf_counter`."""
    keeping: Keeping
    """Where its result is kept, if it is."""
    version: int
    """The version it continues."""
    history: int
    """Tokens of that version."""
    read: Callable[[TurnProgress], Message] | None = None
    """What the answer says, as whoever asked reads it; None: as the session's own routes do."""
    said: Callable[[Message], bytes] | None = None
    """The digest of all that was said when this answer was; None where nobody says it again."""
    unrecorded: bool = False
    """The session itself is recorded with this turn, its first."""


class Committer:
    """Makes a session's next version of what a turn gave."""

    def __init__(self, engine: TurnEngine, journal: Journal, renderer: DeltaRenderer) -> None:
        self._engine = engine
        self._journal = journal
        self._renderer = renderer

    async def commit(
        self, append: AcceptedAppend, last: TurnProgress, first_token_at: float
    ) -> TurnResult:
        """Commit a turn; of an ephemeral one, keep its result at most.

        Args:
            append: What was asked for.
            last: The turn's last progress, which has its finish.
            first_token_at: When its first token came, by `time.perf_counter`.

        Raises:
            CommitFailedError: It could not be recorded; nothing has changed.
        """
        assert last.finish is not None
        session = append.resident.session
        raw = self._renderer.answer_text(last.output_ids)
        parsed = self._parse(append, last, raw)
        # The lock, because the version is the session's next one until it is published.
        async with append.resident.recording:
            result = TurnResult(
                session_id=session.id,
                version=append.version if append.command.ephemeral else session.history.newest + 1,
                text=last.text,
                content=parsed.content,
                calls=parsed.calls,
                finish_reason="tool_calls" if parsed.calls else last.finish.reason,
                usage=_usage(append, last, first_token_at),
                output_ids=last.output_ids,
            )
            try:
                await self._record(append, result, raw)
            except JournalError as error:
                logger.error("a turn could not be recorded: %s", error)
                if append.said is None:
                    raise CommitFailedError(str(error)) from error
                # Whoever says everything again loses nothing but time: it is answered all the same.
        return result

    async def _record(self, append: AcceptedAppend, result: TurnResult, raw: str) -> None:
        session = append.resident.session
        keyed = None if append.keeping.key is None else append.keeping.result(as_json(result))
        if append.command.ephemeral:
            if keyed is not None:
                await self._journal.keep(keyed)
            return
        tokens = self._renderer.answer_tokens(result.output_ids, raw)
        # What is equal is one object: an answer without calls is kept once.
        content = raw if result.content == raw else result.content
        answer = Message("assistant", content, result.calls, raw=raw, tokens=tokens)
        said = None if append.said is None else append.said(answer)
        commit = session.prepare(append.plan, result.output_ids, answer, result.finish_reason, said)
        record = replace(session.record(self._engine.model_digest, commit), used_at=time.time())
        appended = self._journal.append(record, commit, keyed)
        if append.unrecorded:
            opened = session.record(self._engine.model_digest)
            # Handed in one behind the other, so that they are in one transaction.
            await asyncio.gather(self._journal.open(opened, session.history, None), appended)
        else:
            await appended
        session.publish(commit, held=True)

    def _parse(
        self, append: AcceptedAppend, last: TurnProgress, raw: str
    ) -> tool_calls.ParsedAnswer:
        head, command, text = append.plan.head, append.command, last.text
        if append.read is not None:
            answer = append.read(last)
            return tool_calls.ParsedAnswer(answer.content, answer.tool_calls)
        if not head.tools or command.tool_choice == "none":
            return tool_calls.ParsedAnswer(text, ())
        if command.tool_choice == "required" or command.constraint is not None:
            return tool_calls.parse_json_call(text, head)
        parsed = self._engine.parse_tool_calls(raw, head.tools)
        return parsed or tool_calls.parse_hermes_calls(text, head)


def _usage(append: AcceptedAppend, last: TurnProgress, first_token_at: float) -> Usage:
    history = append.history
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
