"""From an append to a planned turn: new tokens, what constrains the answer, what fits."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stateful_sglang.grammar.constraints import Constraints
from stateful_sglang.grammar.errors import ConstraintError
from stateful_sglang.grammar.prepare import Kind
from stateful_sglang.grammar.worker import WorkerUnavailableError
from stateful_sglang.rendering.delta import DeltaRenderer, RenderedDelta, beyond
from stateful_sglang.service.commands import Append, NewMessages, NewText, NewTokens
from stateful_sglang.service.engine import EngineError, TurnEngine
from stateful_sglang.service.failures import turn_failed
from stateful_sglang.service.sampling import DEFAULT_MAX_TOKENS, Constraint, Sampling
from stateful_sglang.session.conversation import absorb_system
from stateful_sglang.session.errors import ContextOverflowError, InvalidInputError
from stateful_sglang.session.history import Commit
from stateful_sglang.session.messages import Head, Message
from stateful_sglang.session.session import Session
from stateful_sglang.session.tool_results import common_prefix, followers, in_call_order
from stateful_sglang.session.transcript import Transcript
from stateful_sglang.session.turn import PlannedTurn

_BEGINNINGS = ("zq", "Zq", "0", " zq", "\n\nzq", "(", "#")
"""Messages that share no token at their beginning, nor with what a template puts before them."""


class Planner:
    """Proves that an append can be run, and says how, before the engine sees any of it."""

    def __init__(self, engine: TurnEngine, renderer: DeltaRenderer) -> None:
        self._engine = engine
        self._renderer = renderer
        self._constraints = Constraints(engine.check_constraint)

    async def check_head(self, head: Head) -> None:
        """Raise `InvalidInputError` where no turn could begin with this head."""
        if any(tool["function"].get("parameters") for tool in head.tools):
            await self._prepared("tools", as_text(head.tools, "tools"), "tools")
        if head != Head():
            self._renderer.check_head(head)

    async def prefix(self, content: Head | NewText | NewTokens) -> array[int]:
        """The tokens with which every conversation with this head begins, or those given.

        Raises:
            InvalidInputError: It can't be rendered, or comes to nothing.
            ContextOverflowError: It doesn't fit.
        """
        if isinstance(content, Head):
            await self.check_head(content)
            rendered = RenderedDelta(0, self._head_tokens(content))
        else:
            rendered = self._raw(Transcript(), content)
        if not rendered.delta:
            raise InvalidInputError("system", "no conversation begins with anything of its own")
        self._check_fits(rendered)
        return rendered.delta

    def _head_tokens(self, head: Head) -> array[int]:
        """What is there before the first user message, whatever that begins with."""
        first, *others = (
            self._renderer.first(head, [Message("user", text)]).delta for text in _BEGINNINGS
        )
        return first[: min(common_prefix(first, other) for other in others)]

    async def constraint(self, command: Append, head: Head) -> Constraint | None:
        """What constrains the answer, proven to be followed; None where nothing does.

        Raises:
            InvalidInputError: It can't be followed, or a call is required and there are no tools.
            EngineFailedError: It can't be checked now.
        """
        if command.tool_choice == "required":
            if not head.tools:
                raise InvalidInputError("tool_choice", "'required', but the session has no tools")
            tools = as_text(head.tools, "tool_choice")
            return Constraint(
                "json_schema", await self._prepared("tool_call", tools, "tool_choice")
            )
        asked = command.constraint
        if asked is None:
            return None
        return Constraint(asked.kind, await self._prepared(asked.kind, asked.text, asked.field))

    def plan(
        self, session: Session, content: NewMessages | NewText | NewTokens | None
    ) -> PlannedTurn:
        """What the append adds, rendered and tokenised, and proven to fit; None: what is pending.

        Raises:
            InvalidInputError: It can't be rendered, or comes to nothing.
            ContextOverflowError: It doesn't fit.
        """
        tip = session.tip
        head = tip.conversation.head
        messages: Sequence[Message] | None = None
        if content is None or isinstance(content, NewMessages):
            new = () if content is None else content.messages
            messages = in_call_order(tip.conversation, [*tip.pending, *new])
            if not messages:
                raise InvalidInputError(
                    "messages",
                    "there is nothing to answer: every message of this session is "
                    "answered; append one",
                )
            head, messages, rendered = self._behind(tip, messages)
        else:
            self._check_opening(session, _field(content))
            rendered = self._raw(tip.transcript, content)
        if not rendered.delta:
            raise InvalidInputError(_field(content), "nothing to append: it has no tokens")
        self._check_fits(rendered)
        return PlannedTurn(
            rendered.base_len, rendered.delta, rendered.rewind_reason, head, messages
        )

    def plan_first(
        self, head: Head, messages: Sequence[Message], rendered: array[int], *, exact: bool
    ) -> PlannedTurn:
        """The first turn of a conversation that the model server's own route has rendered.

        Its tokens are taken, unless they may have special tokens that content spells; `exact`
        takes those too.

        Args:
            head: Without a system message.
            messages: All of them.
            rendered: By the model server ('q').

        Raises:
            InvalidInputError: They have to be rendered again, and can't be.
        """
        head, messages = absorb_system(head, messages)
        if not exact and not self._renderer.is_plain(head, messages):
            rendered = self._renderer.first(head, messages).delta
        return PlannedTurn(0, rendered, None, head, messages)

    def plan_whole(
        self, session: Session, new: Sequence[Message], rendered: array[int]
    ) -> PlannedTurn:
        """A turn of a conversation that was rendered as a whole: what it shares with the session's
        tokens is kept.

        Args:
            session: Has said all but `new`.
            new: Messages behind what it has said.
            rendered: Everything, by the model server ('q').
        """
        turn = beyond(session.tip.transcript, rendered)
        head = session.tip.conversation.head
        return PlannedTurn(turn.base_len, turn.delta, turn.rewind_reason, head, new)

    def plan_prefill(self, session: Session, pending: Sequence[Message]) -> PlannedTurn | None:
        """What the next turn's delta begins with, whatever follows the pending messages.

        None where there is nothing to compute ahead: the template rewrites history with what
        follows, or the messages don't fit.

        Raises:
            InvalidInputError: They can't be rendered.
        """
        head, messages, now = self._behind(session.tip, pending)
        length = len(now.delta)
        for then in followers(pending):
            _, _, more = self._behind(session.tip, [*pending, then])
            if more.base_len != now.base_len:
                return None
            length = min(length, common_prefix(now.delta, more.delta))
        if not length or length > self.tokens_left(now.base_len):
            return None
        return PlannedTurn(now.base_len, now.delta[:length], now.rewind_reason, head, messages)

    def check_pending(self, parent: Commit, pending: Sequence[Message]) -> None:
        """Prove that a turn could begin with these messages behind a commit, if there are any.

        Raises:
            InvalidInputError: They can't be rendered.
            ContextOverflowError: They don't fit.
        """
        if pending:  # no template renders nothing, and no turn begins with it
            self._check_fits(self._behind(parent, pending)[2])

    def _check_fits(self, rendered: RenderedDelta) -> None:
        left = self.tokens_left(rendered.base_len)
        if len(rendered.delta) > left:
            raise ContextOverflowError(
                delta_tokens=len(rendered.delta),
                tokens_left=left,
                context_length=self._engine.context_length,
            )

    def _behind(
        self, commit: Commit, messages: Sequence[Message]
    ) -> tuple[Head, Sequence[Message], RenderedDelta]:
        """Messages behind a commit: the head from there on, the messages left, what they add."""
        head = commit.conversation.head
        if len(commit.transcript):
            rendered = self._renderer.next(commit.conversation, commit.transcript, messages)
            return head, messages, rendered
        head, messages = absorb_system(head, messages)
        return head, messages, self._renderer.first(head, messages)

    def tokens_left(self, held: int) -> int:
        """Tokens that a delta behind `held` tokens may have, one being kept for the answer."""
        return max(0, self._engine.context_length - held - 1)

    def sampling(self, asked: Sampling, plan: PlannedTurn) -> Sampling:
        """How to generate after `plan`: as asked, as far as it fits.

        Raises:
            InvalidInputError: A token id beyond the vocabulary.
        """
        if asked.stop_token_ids:
            self._check_token_ids(asked.stop_token_ids, "sampling.stop_token_ids")
        room = self._engine.context_length - plan.base_len - len(plan.delta)
        max_tokens = min(asked.max_tokens or DEFAULT_MAX_TOKENS, room)
        min_tokens = min(asked.min_tokens, max_tokens) if asked.min_tokens else None
        return replace(asked, max_tokens=max_tokens, min_tokens=min_tokens)

    def _check_opening(self, session: Session, field: str) -> None:
        if not len(session.tip.transcript) and (opened_with := _opened_with(session)):
            raise InvalidInputError(
                field,
                f"this session was opened with {' and '.join(opened_with)}, which the first append "
                "renders: begin with messages, or open a session without",
            )

    def _raw(self, transcript: Transcript, content: NewText | NewTokens) -> RenderedDelta:
        if isinstance(content, NewText):
            return self._renderer.text(content.text, transcript)
        self._check_token_ids(content.ids, "input_ids")
        return RenderedDelta(len(transcript), array("q", content.ids))

    def _check_token_ids(self, ids: Sequence[int], field: str) -> None:
        size = self._engine.vocab_size
        if not ids or (min(ids) >= 0 and max(ids) < size):
            return
        at = next(index for index, token in enumerate(ids) if not 0 <= token < size)
        raise InvalidInputError(
            f"{field}[{at}]", f"{ids[at]} is no token id: the vocabulary is 0 to {size - 1}"
        )

    async def _prepared(self, kind: Kind, text: str, field: str) -> str:
        try:
            return await self._constraints.prepared(kind, text)
        except ConstraintError as error:
            tool = error.tool
            where = field if tool is None else f"tools[{tool}].function.parameters"
            raise InvalidInputError(where, str(error)) from error
        except WorkerUnavailableError as error:
            raise turn_failed(EngineError("overloaded", str(error)), None) from error


def as_text(value: Any, field: str) -> str:
    """A parsed value as JSON again.

    Raises:
        InvalidInputError: It has numbers of thousands of digits, or no end of levels.
    """
    try:
        return json.dumps(value)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(field, f"can't be written as JSON: {error}") from error


def constrained_by(command: Append) -> str | None:
    """The field of the caller's request that constrains the answer, if one does."""
    if command.tool_choice == "required":
        return "tool_choice"
    return None if command.constraint is None else command.constraint.field


def _field(content: NewMessages | NewText | NewTokens | None) -> str:
    if content is None or isinstance(content, NewMessages):
        return "messages"
    return "text" if isinstance(content, NewText) else "input_ids"


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
