"""What the API room asks of a model server: run one turn, close a session, describe the tree.

The runtime room implements this over SGLang; nothing here imports it, so that versions,
transactions and rendering are tested in milliseconds.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True)
class TurnRequest:
    """One turn as it travels to the scheduler: only what is new."""

    session_id: str
    rid: str
    """Random and of fixed length: SGLang's abort matches request ids by prefix."""
    base_len: int
    """Committed transcript length in tokens; a rank drops whatever it holds beyond it."""
    delta: array[int]
    """New tokens, typecode 'q'."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """SGLang sampling parameters."""
    stream: bool = True
    """False: nobody reads between the first token and the last, so progress may be sparse."""


class TurnProgress(NamedTuple):
    """A turn so far. The last one carries ``finish``."""

    text: str
    """The whole text so far, stop strings trimmed."""
    output_ids: array[int]
    """All output tokens so far ('q'), cut at what is delivered, a generated end token included."""
    finish: Mapping[str, Any] | None
    """SGLang's finish reason (``type``: stop, length or abort), or None while generating."""
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV was found in the tree."""
    decode_steps: int
    """Model steps taken after the prefill, each yielding one or more tokens."""


class TurnEngine(Protocol):
    """The model server as the API room sees it."""

    @property
    def context_length(self) -> int:
        """Most tokens of a session, prompt and answer."""
        ...

    vocab_size: int
    tokenizer: Any
    eos_ids: frozenset[int]
    tool_call_parser: str | None

    def run(self, turn: TurnRequest) -> AsyncIterator[TurnProgress]:
        """Run a turn. Closing the iterator early aborts it."""
        ...

    async def close_session(self, session_id: str) -> None:
        """Drop the session's tokens, pin and index on every rank."""
        ...

    async def tree_summary(self, session_id: str | None, limit: int) -> dict[str, Any]:
        """Bounded description of the prefix tree, or of one session's path in it."""
        ...
