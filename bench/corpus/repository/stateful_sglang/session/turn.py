"""What a turn is, from the accepted append to its committed result."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from stateful_sglang.session.messages import Head, Message


@dataclass(frozen=True)
class PlannedTurn:
    """An append that was accepted: what it adds, fixed before anything is computed."""

    base_len: int
    """Committed tokens the turn continues."""
    delta: array[int]
    """New tokens, typecode 'q'."""
    rewind_reason: str | None
    """Why fewer tokens are continued than were committed; None: all are."""
    head: Head
    """The session's head from this turn on."""
    messages: Sequence[Message] | None
    """New messages; None where text or tokens were appended."""


@dataclass(frozen=True)
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
