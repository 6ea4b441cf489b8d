"""Requests of stateless APIs, as far as sessions are concerned, and what is told of them."""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from stateful_sglang.service.engine import TurnProgress
from stateful_sglang.service.turns import TurnReader
from stateful_sglang.session.messages import Head, Message
from stateful_sglang.session.records import SessionOptions
from stateful_sglang.session.said import Difference, Recital

Match = Literal["append", "branch", "new"]


@dataclass(frozen=True)
class Conversation:
    """A request of a stateless API, as far as sessions are concerned."""

    head: Head
    """Tools and what the template is told; the system message is one of the messages."""
    messages: Sequence[Message]
    """All that was said; the last one is what the answer is to."""
    recital: Recital
    """The same as it is compared, from `SessionService.recital`."""
    wire: Any
    """The request as the model server's own route made it; its prompt is not looked at."""
    first: Callable[[], Awaitable[array[int]]]
    """Renders the whole conversation as the model server's own route does."""
    read: Callable[[TurnProgress], Message]
    """What the answer says, as the route will send it."""
    stream: bool
    exact: bool = False
    """Its tokens are those of `first`, whatever the session holds; else what is known is neither
    rendered nor tokenised."""
    options: SessionOptions = field(default_factory=SessionOptions)
    repeats: Hashable | None = None
    """Of a request that may repeat one which runs: what the two have in common."""


class Reuse(NamedTuple):
    """What of a request was there already."""

    match: Match
    session_id: str
    version: int
    """That it continues."""
    history_tokens: int
    """Tokens of that version."""
    delta_tokens: int
    messages: int
    """Of the request, those that were known."""
    divergence: Difference | None
    """Where the request left what its session went on with; None where it did not."""


class ImplicitTurn(NamedTuple):
    """A turn of a conversation, for one of those who asked for it."""

    reader: TurnReader
    reuse: Reuse
