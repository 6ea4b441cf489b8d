"""What a service of sessions answers, before any wire form."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass

from stateful_sglang.session.messages import ToolCall


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as last committed."""

    id: str
    version: int
    busy: bool
    """Whether a turn runs now."""
    tokens: int
    tokens_left: int
    """Tokens that a delta could still have, one being kept for the answer."""
    messages: int
    """How many are committed."""
    tools: tuple[str, ...]
    """Names, in the order given."""
    finish_reason: str | None
    """How the last committed turn ended; None before the first."""
    metadata: Mapping[str, str]
    created_at: float
    """Seconds since the epoch, as is `updated_at`."""
    updated_at: float


@dataclass(frozen=True, slots=True)
class SessionList:
    """The sessions opened last, the newest first."""

    sessions: tuple[SessionView, ...]
    total: int
    """All that are open."""


@dataclass(frozen=True, slots=True)
class Closed:
    """A session that is no more."""

    id: str
    version: int
    """Its last."""


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
