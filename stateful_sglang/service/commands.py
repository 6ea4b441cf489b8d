"""What a caller asks of a service of sessions, whatever wire form it came in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from stateful_sglang.service.sampling import ConstraintKind, Sampling
from stateful_sglang.session.messages import Head, Message

ToolChoice = Literal["auto", "none", "required"]


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Open a session; nothing is computed."""

    head: Head = field(default_factory=Head)
    messages: tuple[Message, ...] = ()
    """What the first append begins with."""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NewMessages:
    """Messages to append, rendered by the model's chat template."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class NewText:
    """Text that continues the transcript, outside any chat template."""

    text: str


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens that continue the transcript."""

    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class AskedConstraint:
    """What the answer must be like, as the caller said it."""

    kind: ConstraintKind
    text: str
    """A schema as JSON, a regular expression, or an EBNF grammar."""
    field: str
    """Of the caller's request, for errors."""


@dataclass(frozen=True, slots=True)
class Append:
    """Append what is new, and generate the answer."""

    content: NewMessages | NewText | NewTokens
    sampling: Sampling = field(default_factory=Sampling)
    constraint: AskedConstraint | None = None
    tool_choice: ToolChoice = "auto"
    """``required``: the answer is one call of a tool, which is a constraint of its own."""
    stream: bool = False
    """False: the caller reads only the end, so that progress may be sparse."""
    expected_version: int | None = None
    """Refuse unless the session is at this version."""
