"""What a service of sessions answers, before any wire form."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from stateful_sglang.session.messages import Message, ToolCall
from stateful_sglang.session.records import CommitRef, Retention, State


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as last committed."""

    id: str
    version: int
    state: State
    busy: bool
    """Whether a turn runs now."""
    tokens: int
    tokens_left: int
    """Tokens that a delta could still have, one being kept for the answer."""
    messages: int
    """How many are committed, those not rendered yet left out."""
    pending: int
    """Those: given at opening, ingested or put there by an edit; the next turn renders them."""
    tools: tuple[str, ...]
    """Names, in the order given."""
    finish_reason: str | None
    """How the last committed turn ended; None before the first."""
    metadata: Mapping[str, str]
    ttl_s: float | None
    """Seconds without a use after which it expires; None: never."""
    retention: Retention
    priority: int
    private: bool
    forked_from: CommitRef | None
    created_at: float
    """Seconds since the epoch, as is `used_at`."""
    used_at: float


@dataclass(frozen=True, slots=True)
class SessionList:
    """A page of the caller's sessions, the last used first."""

    sessions: tuple[SessionView, ...]
    total: int
    """Of all pages."""
    next: str | None
    """What to give as `after` for the next page; None: this is the last."""


@dataclass(frozen=True, slots=True)
class SessionMessages:
    """The messages of one version."""

    session_id: str
    version: int
    system: str | None
    messages: tuple[Message, ...]
    pending: tuple[Message, ...]
    """Those that are not rendered yet: given at opening or ingested, until the next turn."""
    raw: bool
    """Text or tokens were appended, so that the messages alone don't make up the transcript."""


@dataclass(frozen=True, slots=True)
class Ingested:
    """Messages that were added without generating."""

    session_id: str
    version: int
    """The version this made."""
    pending: int
    """Messages that the next turn will render, these included."""
    missing: tuple[str, ...]
    """Ids of calls of the last answer whose results are still to come."""
    ready_tokens: int
    """Tokens of the next turn's delta whose KV is computed by now."""
    computed_tokens: int
    """Of those, the ones computed now."""


@dataclass(frozen=True, slots=True)
class Closed:
    """A session that is no more."""

    id: str
    version: int
    """Its last."""
    erased: bool = False
    """Whether its content was removed from the journal's files."""


class SessionEvent(NamedTuple):
    """Something that happened to a session."""

    name: str
    """``listening``, ``turn.started``, ``turn.committed``, ``turn.failed``, ``ingested``,
    ``rolled_back``, ``edited``, ``forked``, ``touched``, ``closed``, ``expired`` or ``lagged``."""
    data: Mapping[str, Any]
    """As JSON has it; with the session's version."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a turn held, computed and took. Counts are tokens, times milliseconds."""

    history_tokens: int
    """Committed transcript before the turn."""
    delta_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV was there already."""
    computed_tokens: int
    """Prompt tokens computed in this turn."""
    generated_tokens: int
    accepted_per_step: float | None
    """Generated tokens per decode step; the first token comes from the prefill and is left out.
    None where no decode step was taken."""
    ttft_ms: float
    total_ms: float
    rewound_tokens: int = 0
    """Committed tokens that the chat template made the session drop and compute again."""
    rewind_reason: str | None = None
    max_tokens: int = 0
    """Most tokens this turn could generate."""
    max_tokens_clipped: bool = False
    """Fewer than asked for, because of the context length."""


@dataclass(frozen=True, slots=True)
class TurnResult:
    """A committed turn."""

    session_id: str
    version: int
    """The version this turn made."""
    text: str
    """All that was generated, calls included."""
    content: str
    """The answer without its calls."""
    calls: tuple[ToolCall, ...]
    finish_reason: str
    """``stop``, ``length`` or ``tool_calls``."""
    usage: Usage
    output_ids: array[int]
    """The generated tokens ('q'), not to be changed."""


def as_json(turn: TurnResult) -> dict[str, Any]:
    """A turn's result as JSON keeps it, and `from_json` reads it again."""
    return asdict(turn) | {"output_ids": turn.output_ids.tolist()}


def from_json(kept: Mapping[str, Any]) -> TurnResult:
    """A result that `as_json` wrote."""
    calls = tuple(ToolCall(**call) for call in kept["calls"])
    output_ids = array("q", kept["output_ids"])
    usage = Usage(**kept["usage"])
    return TurnResult(**{**kept, "calls": calls, "output_ids": output_ids, "usage": usage})
