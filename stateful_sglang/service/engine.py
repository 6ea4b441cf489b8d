"""The engine port: what a service of sessions asks of a model server.

The runtime room implements this over SGLang; nothing here imports it, so that versions,
transactions and rendering are tested in milliseconds. Nothing of SGLang's own forms passes through
it either: how a turn ended is a `Finish`, and what went wrong an `EngineError` of some kind.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from stateful_sglang.service.sampling import Constraint, Sampling
from stateful_sglang.service.tool_calls import ParsedAnswer

ErrorKind = Literal[
    "stale_base", "busy", "conflict", "invalid", "overloaded", "out_of_memory", "broken"
]
"""Why an engine ended a turn, or gave no answer:

``stale_base`` a rank holds fewer tokens than are committed; ``busy`` it runs another turn of the
session; ``conflict`` it refuses the turn for another reason of the session's state; ``invalid``
the request can't be followed; ``overloaded`` not now, but later; ``out_of_memory`` the scheduler
gave it up to have room for others, so that the same turn can run now; ``broken`` anything else."""

TurnKind = Literal["turn", "ephemeral", "prefill"]
"""What becomes of a turn on the ranks:

``turn`` its tokens are kept provisionally, until the next one says what was committed;
``ephemeral`` nothing of it is kept, its KV is dead at its end, and it may run beside another turn
of the session; ``prefill`` nothing is generated, and the KV of its delta is kept for the session,
so that the next turn, whose delta begins with the same tokens, finds it."""


class EngineError(Exception):
    """The model server did not do what it was asked for; a turn is over without a result.

    `field` names the attribute of the `TurnRequest` that is at fault, where one is known.
    """

    def __init__(self, kind: ErrorKind, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.kind: ErrorKind = kind
        self.message = message
        self.field = field


@dataclass(frozen=True, slots=True)
class Finish:
    """A good end of a turn."""

    reason: Literal["stop", "length"]
    """``length``: it has as many tokens as it might have."""
    matched: int | str | None = None
    """The end token, stop token or stop string that stopped it, where the engine says which."""


@dataclass(frozen=True)
class TurnRequest:
    """One turn as it travels to the scheduler: only what is new."""

    session_id: str = field(repr=False)
    rid: str
    """Random and of fixed length: SGLang's abort matches request ids by prefix."""
    base_len: int
    """Committed transcript length in tokens; a rank drops whatever it holds beyond it."""
    delta: array[int]
    """New tokens, typecode 'q'."""
    sampling: Sampling
    """With ``max_tokens`` set, to what fits."""
    constraint: Constraint | None = None
    stream: bool = True
    """False: nobody reads between the first token and the last, so progress may be sparse."""
    kind: TurnKind = "turn"
    wire: Any = field(default=None, repr=False)
    """The request as a route of the model server's own made it, for which everything but its prompt
    holds as it stands there; opaque to all but the engine."""
    salt: str | None = field(default=None, repr=False)
    """KV is shared among requests of one salt only; None: with all that have none."""


class TurnProgress(NamedTuple):
    """A turn so far. The last one carries ``finish``."""

    text: str
    """The whole text so far, stop strings trimmed."""
    output_ids: array[int]
    """All output tokens so far ('q'), cut at what is delivered, a generated end token included.
    One array that grows with the turn: an earlier progress shows later tokens too."""
    finish: Finish | None
    """None while generating."""
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV was found in the tree."""
    decode_steps: int
    """Model steps taken after the prefill, each yielding one or more tokens."""
    report: Any = None
    """The same in the model server's own form, where the turn's request came in that form."""


class PublishAnswer(NamedTuple):
    """What an engine made of a prefix that all are to share."""

    aligned_tokens: int
    """How many of its tokens are shared: whole pages of the KV pool."""
    problem: str | None
    """Why it is not shared; None: it is."""


class TurnEngine(Protocol):
    """The model server as a service sees it."""

    @property
    def context_length(self) -> int:
        """Most tokens of a session, prompt and answer."""
        ...

    vocab_size: int
    model_digest: str
    """Of the model and its chat template: a session of another one can't be continued."""
    tokenizer: Any
    eos_ids: frozenset[int]

    def run(self, turn: TurnRequest) -> AsyncIterator[TurnProgress]:
        """Run a turn to its `Finish`. Closing the iterator early aborts it.

        Raises:
            EngineError: The turn ended badly; no rank keeps anything of it.
        """
        ...

    def parse_tool_calls(self, raw: str, tools: Sequence[Mapping[str, Any]]) -> ParsedAnswer | None:
        """Calls in an answer, as the model's own format has them.

        Args:
            raw: The answer with its special tokens.
            tools: What may be called, in OpenAI's form.

        Returns:
            None where the model server knows no format of the model.
        """
        ...

    async def check_constraint(self, kind: str, text: str) -> None:
        """Prove that a turn may be constrained so, before it starts: by a `Constraint`'s fields.

        Raises:
            ConstraintError: The model server can't follow it; says why.
        """
        ...

    async def fork_session(self, source_id: str, session_id: str, length: int) -> None:
        """Let a new session share the first `length` tokens of another, their KV and their draft
        material, before its first turn. A rank that can't says so at that turn (``stale_base``)."""
        ...

    async def rollback_session(self, session_id: str, length: int) -> None:
        """Drop the session's tokens beyond `length`: their KV is superseded, and evicted first."""
        ...

    async def close_session(self, session_id: str) -> None:
        """Drop the session's tokens, pin and index on every rank."""
        ...

    async def publish_prefix(
        self, prefix_id: str, tokens: array[int], *, compute: bool
    ) -> PublishAnswer:
        """Let requests of all salts that begin with these tokens share their KV.

        Args:
            prefix_id: By which it is unpublished.
            tokens: Typecode 'q'.
            compute: Compute the KV before the answer; else the first request that begins so does.

        Raises:
            EngineError: It could not be computed, and is not shared.
        """
        ...

    async def unpublish_prefix(self, prefix_id: str) -> None:
        """Share the prefix no longer: what it has of KV stays until the room is needed."""
        ...

    async def tree_summary(self, session_id: str | None, limit: int) -> dict[str, Any]:
        """Bounded description of the prefix tree, or of one session's path in it, for a person.

        Raises:
            EngineError: It did not answer in time (``overloaded``).
        """
        ...
